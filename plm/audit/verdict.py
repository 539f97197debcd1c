"""One verdict on a file of pairs and, where given, on what somebody says of a model on them.

Axes: N pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from plm.arrays import IntArray
from plm.audit.check import DataReport, check_pairs, split_stages
from plm.audit.items import item_files, read_items
from plm.audit.results import Fault, ModelScores, claim_fault, read_candidates, score_model, selection_fault, tie_fault
from plm.audit.signal import Control, UserSignal, read_signal
from plm.data.agreement import Repeats, agreement, repeated_comparisons
from plm.data.keys import pair_names
from plm.data.schema import PairTable, read_pairs
from plm.data.sources.corpus import local_files
from plm.data.splits import LEFT_OUT, TEST, TRAIN, split_pairs


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    name: str
    inputs: dict[str, str]
    """File -> sha256 of its bytes."""
    faults: list[Fault]
    signal: UserSignal | None
    controls: list[Control]
    """Of a probe of words and surface."""
    repeats: Repeats
    """Comparisons that users made again."""
    num_shared: int
    """Pairs that several users compare."""
    shared_ceiling: float
    """Best accuracy on them of a model that does not know the user."""
    model: ModelScores | None
    reported: str | None
    """The accuracy that is claimed, as it is printed."""
    data: DataReport

    @property
    def hash(self) -> str:
        """Sha256 of the hashes of all inputs, in order."""
        return hashlib.sha256("".join(self.inputs.values()).encode()).hexdigest()

    @property
    def ceiling(self) -> float:
        """Best accuracy of whoever knows each user; nan where nobody contradicts themselves: repeats may be copies."""
        return self.repeats.noise_ceiling if self.repeats.contradicting else math.nan

    @property
    def verdict(self) -> str:
        """One sentence."""
        found = [fault.name for fault in self.faults if fault.state == "found"]
        unknown = [fault.name for fault in self.faults if fault.state == "unknown"]
        parts = [f"not to be trusted: {'; '.join(found)}" if found else "none of the faults that were looked for"]
        if unknown:
            parts.append(f"not known: {'; '.join(unknown)}")
        problems = sum(finding.level == "problem" for finding in self.data.findings)
        if problems:
            parts.append(f"the data have {problems} problems, see the findings")
        return ". ".join(f"{part[0].upper()}{part[1:]}" for part in parts) + "."

    def as_dict(self) -> dict[str, Any]:
        """The audit as plain types, for JSON."""
        return {
            "verdict": self.verdict,
            "hash": self.hash,
            "inputs": self.inputs,
            "faults": [fault._asdict() for fault in self.faults],
            "signal": None if self.signal is None else {**asdict(self.signal), "is_found": self.signal.is_found},
            "controls": [asdict(control) for control in self.controls],
            "noise": {
                **self.repeats._asdict(),
                "ceiling": self.ceiling,
                "shared": self.num_shared,
                "shared_ceiling": self.shared_ceiling,
            },
            "model": None if self.model is None else asdict(self.model),
            "reported": self.reported,
            "data": self.data.as_dict(),
        }


def audit_files(
    pairs: Sequence[str],
    *,
    reading: Mapping[str, Any] | None = None,
    test_pairs: Sequence[str] = (),
    scores: str | None = None,
    reported: str | None = None,
    candidates: str | None = None,
) -> Audit:
    """Audit files of pairs.

    Args:
        pairs: Files of preference pairs.
        reading: How the files are read: other arguments of `read_pairs`.
        test_pairs: Files of the test's pairs, where ``pairs`` are those of training.
        scores: Per-item file of a model, or the folder of its run.
        reported: The accuracy that is claimed of it, as it is printed.
        candidates: File of the models that it was chosen from.

    Raises:
        ValueError: If a file cannot be read, or they contradict each other.
    """
    files, test_files = local_files(pairs), local_files(test_pairs)
    table = read_pairs([*files, *test_files], **(reading or {}))
    num_copied = 0
    if test_files:
        if (table.row_split >= 0).any():
            raise ValueError(
                "expected pairs without a column row_split beside --test_pairs, got one; leave out one of them"
            )
        stage = np.where(table.where[:, 0] < len(files), TRAIN, TEST)
        table = replace(table, row_split=stage)
        names = (set(pair_names(read_pairs(some, **(reading or {})))) for some in (files, test_files))
        num_copied = len(set.intersection(*names))
    given = bool((table.row_split >= 0).any())
    split = {} if given or scores is None else run_split(table, Path(scores))
    is_split = given or bool(split)
    name = ", ".join(Path(file).name for file in [*files, *test_files])
    data = check_pairs(table, name, **split)
    stage = split_stages(table, split)[0]
    sides = table.row_split if given else stage if split else np.full(table.num_pairs, LEFT_OUT)
    signal, controls = read_signal(table, stage)
    model = None
    if scores is not None:
        expected = sides == TEST if is_split else np.ones(table.num_pairs, dtype=np.bool_)
        model = score_model(table, expected, read_items(scores))
    faults = [
        _format_fault(data),
        _split_fault(data, sides, num_copied),
        _user_fault(signal),
        tie_fault(model, reported, is_split=is_split),
        selection_fault(read_candidates(candidates) if candidates else ()),
        *([] if reported is None else [claim_fault(model, reported)]),
    ]
    more = [] if scores is None else list(map(str, item_files(Path(scores))))
    inputs = [*files, *test_files, *more, *([candidates] if candidates else [])]
    hashes = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in inputs}
    repeats = repeated_comparisons(table)
    return Audit(name, hashes, faults, signal, controls, repeats, *agreement(table), model, reported, data)


def _format_fault(data: DataReport) -> Fault:
    """Whether the surface of a response gives its label away."""
    name = "labels in the format"
    if data.probe is None:
        return Fault(name, "unknown", "there are too few pairs to probe the format")
    texts = [finding.text for finding in data.findings if finding.topic == "format"]
    return Fault(name, "found" if data.probe.is_leak else "clear", "; ".join(texts))


def run_split(table: PairTable, folder: Path) -> dict[str, Any]:
    """How the run in a folder has split these pairs, as arguments of `split_pairs`; empty if it did not or never said.

    That it was these pairs is told by the hash of the split, which is drawn again.

    Raises:
        ValueError: If the file of the split is damaged.
    """
    if not (folder / "splits.json").is_file():
        return {}
    try:
        metadata = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
        split = {name: metadata[name] for name in ("group_by", "unseen_users", "val_rows", "test_rows")}
        split["seed"] = metadata["split_seed"]
        split_hash = metadata["hash"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'splits.json'} is damaged: {type(error).__name__}: {error}") from error
    return split if split_pairs(table, **split).hash == split_hash else {}


def _split_fault(data: DataReport, sides: IntArray, num_copied: int) -> Fault:
    """Whether what belongs together is on both sides of the split that came with the pairs or their run."""
    name = "a dialogue on both sides of the split"
    if not (sides >= 0).any():
        return Fault(name, "unknown", "nothing says which pairs are the test's (column row_split, or --test_pairs)")
    num_test = int((sides == TEST).sum())
    counts = {leak.unit: leak.same_user for leak in data.leaks if leak.same_user}
    grave = {unit: counts[unit] for unit in ("dialogue", "conversation", "turn", "pair") if unit in counts}
    texts = [
        f"{count} of {num_test} test pairs share their {unit} with a training pair" for unit, count in grave.items()
    ]
    if num_copied:
        texts.append(f"{num_copied} pairs are in the training and in the test files")
    if texts:
        return Fault(name, "found", "; ".join(texts))
    if num_test in (0, int((sides >= 0).sum())):
        return Fault(name, "unknown", f"{num_test} pairs are of the test, and nothing is on its other side")
    known = [leak.unit for leak in data.leaks if leak.unit in ("dialogue", "conversation")]
    what = known[0] if known else "whole pair (the pairs name no dialogues)"
    return Fault(name, "clear", f"no {what} of a user is on both sides")


def _user_fault(signal: UserSignal | None) -> Fault:
    """Whether the user column is as good as a permuted one."""
    name = "a shuffled user column"
    if signal is None:
        return Fault(name, "unknown", "there are too few users with several pairs")
    text = (
        f"how much the pairs of one user agree is {signal.score:+.1f} standard deviations from what permuted user "
        f"columns give ({signal.num_users:,} users, {signal.num_pairs:,} pairs)"
    )
    if signal.is_found:
        return Fault(name, "clear", text)
    if signal.is_missing:
        more = f"what is personal in the log-odds is below {signal.spread_high:.2f}: shuffled, or nobody differs"
        return Fault(name, "found", f"{text}; {more}")
    return Fault(name, "unknown", f"{text}; users who differ by less than {signal.found_from:.2f} would be missed")
