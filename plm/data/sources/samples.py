"""Responses sampled from a policy, as `plm sample` writes them, and as pairs of one user to learn from them all.

Axes: P prompts, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plm.arrays import BoolArray
from plm.data.files import position, read_records
from plm.data.keys import digest, mix, seed_key
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource
from plm.data.sources.corpus import local_files
from plm.data.values import EVERYONE, short
from plm.messages import Problems, counted, listed


class Samples(NamedTuple):
    """Responses to prompts as read from files."""

    responses: dict[str, list[str]]
    """Two or more distinct responses of every prompt."""
    test: BoolArray
    """``(P,)`` True = a prompt of the test."""
    dropped: dict[str, int]
    """Reason -> number of prompts left out."""


def read_samples(path: str | list[str], test_share: float, seed: int) -> Samples:
    """Read JSONL files with one prompt a line: ``prompt``, ``responses`` (a list), and ``split`` in all lines or none.

    Args:
        path: The files; relative paths are also looked up under PLM_DATA.
        test_share: Share of the prompts kept for the test where the files name no split.
        seed: Another seed draws other test prompts.

    Raises:
        ValueError: With all malformed lines, or if too little is left.
    """
    sampled: dict[str, list[str]] = {}
    split: dict[str, str | None] = {}
    problems: list[str] = []
    for file in local_files(path):
        records = read_records(Path(file))
        problems += [f"{position(file, line)}: {text}" for line, text in records.problems]
        for line, record in zip(records.lines, records.rows, strict=True):
            problem = _problem(record, split)
            if problem:
                problems.append(f"{position(file, line)}: {problem}")
                continue
            texts = sampled.setdefault(record["prompt"], [])
            texts += [text for text in dict.fromkeys(record["responses"]) if text.strip() and text not in texts]
            split[record["prompt"]] = record.get("split")
    if problems:
        raise ValueError(listed(f"{counted(len(problems), 'malformed row')}:", problems, indent=""))
    kept = {prompt: texts for prompt, texts in sampled.items() if len(texts) > 1}
    if len(kept) < 2:
        raise ValueError(f"expected two or more prompts with two different responses in {path!r}")
    named = [split[prompt] for prompt in kept]
    test = np.array([name == "test" for name in named], dtype=np.bool_)
    if None in named:
        if any(name is not None for name in named):
            raise ValueError(f"expected a split of all prompts or of none in {path!r}, got both")
        order = np.argsort(mix(digest(list(kept)), seed_key(seed)), kind="stable")
        test[order[: min(len(kept) - 1, max(1, round(test_share * len(kept))))]] = True
    if test.all():
        raise ValueError(f"expected prompts to train on in {path!r}, got only such of the test")
    return Samples(kept, test, {"one_response": len(sampled) - len(kept)})


def everyone_pairs(responses: Sequence[tuple[str, Sequence[str]]], test: BoolArray, **optional: Any) -> PairTable:
    """Pairs of one user that together hold every response to every prompt: the first with the second, and so on.

    Nothing is meant by who is chosen.

    Args:
        responses: Each of P prompts with two or more distinct responses; of an odd number the last goes with the first.
        test: ``(P,)`` True = a prompt of the test.
        **optional: Other fields of ``PairTable``.
    """
    code: dict[str, int] = {}
    rows = []
    for number, (_, texts) in enumerate(responses):
        codes = [code.setdefault(text, len(code)) for text in texts]
        codes += codes[:1] if len(codes) % 2 else []
        rows += [(number, *pair) for pair in zip(codes[::2], codes[1::2], strict=True)]
    prompt, chosen, rejected = np.array(rows, dtype=np.int64).T
    return pair_table(
        [EVERYONE],
        [prompt for prompt, _ in responses],
        list(code),
        user=np.zeros(len(prompt), dtype=np.int64),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        row_split=np.where(test[prompt], 2, 0),
        user_split=np.zeros(len(prompt), dtype=np.int64),
        **optional,
    )


class SampledResponses(PairSource):
    """All responses sampled from a policy, for methods that learn what responses to a prompt there are.

    They come as pairs of one user, everyone: each response to a prompt in one pair. Nothing is meant by who is chosen.

    Args:
        path: JSONL files as ``plm sample`` writes them: ``prompt``, ``responses`` (a list), and ``split`` (train or
            test) in all lines or in none. Relative paths are also looked up under PLM_DATA.
        num_responses: Most responses to a prompt, the first ones; null = all.
        test_share: Share of the prompts kept for the test where the files name no split.
        seed: Another seed draws other test prompts.
    """

    def __init__(
        self, path: str | list[str], num_responses: int | None = None, test_share: float = 0.2, seed: int = 0
    ) -> None:
        self.path, self.num_responses, self.test_share, self.seed = path, num_responses, test_share, seed
        problems = Problems("SampledResponses.")
        if num_responses is not None and num_responses < 2:
            problems.add("num_responses", "at least 2 or null", num_responses)
        problems.inner_shares(test_share=test_share)
        problems.check()

    @property
    def name(self) -> str:
        """Name of the first file."""
        return f"responses/{Path(self.path if isinstance(self.path, str) else self.path[0]).stem}"

    def load(self) -> PairTable:
        """Read the files."""
        samples = read_samples(self.path, self.test_share, self.seed)
        responses = [(prompt, texts[: self.num_responses]) for prompt, texts in samples.responses.items()]
        return everyone_pairs(responses, samples.test, dropped=samples.dropped)


def _problem(record: dict[str, Any], split: dict[str, str | None]) -> str | None:
    """What is wrong with a line, given the splits of the prompts before it."""
    prompt, responses, half = (record.get(name) for name in ("prompt", "responses", "split"))
    if not isinstance(prompt, str):
        return f"prompt: expected a text, got {short(prompt)}"
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        return f"responses: expected a list of texts, got {short(responses)}"
    if half not in (None, "train", "test"):
        return f"split: expected train or test, got {short(half)}"
    if split.get(prompt, half) != half:
        return f"split: expected {split[prompt]!r}, as before for this prompt, got {half!r}"
    return None
