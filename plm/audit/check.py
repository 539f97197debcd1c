"""Whether a table of pairs is fit to measure personalisation on: what can be checked before any training.

Axes: N pairs, U users.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from plm.arrays import IntArray
from plm.data.agreement import agreement, conflicts
from plm.data.files import position
from plm.data.keys import number_pairs
from plm.data.schema import PairTable
from plm.data.splits import SEEN, TEST, TRAIN, UNSEEN, VAL, split_pairs
from plm.data.surface import MARGIN, MIN_PAIRS, Probe, Share, probe_surface
from plm.data.values import spelt_alike

Level = Literal["problem", "warning", "info"]

NO_TEXT = ("none", "null", "nan", "nat", "<na>", "[]")
_NUM_EXAMPLES = 5
"""Malformed rows that are findings of their own."""
NOTABLE = 0.05
"""A gain of the surface probe, interval included, that is worth a look but may be taste."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about the data."""

    level: Level
    """problem = results on these data are wrong or cannot be trusted; warning = look at it; info = a fact."""
    topic: str
    text: str


@dataclass(frozen=True)
class Leak:
    """Test pairs that share something with training pairs."""

    unit: str
    """What is shared."""
    same_user: int
    """Test pairs that share it with a training or validation pair of the same user."""
    anyone: int
    """Test pairs that share it with a training or validation pair of anyone."""


@dataclass(frozen=True)
class DataReport:
    """The findings of a check, and the numbers behind them."""

    name: str
    counts: dict[str, int]
    pairs_per_user: IntArray
    """``(U,)``."""
    training_pairs: IntArray
    """``(U,)`` training or support pairs, as the split gives them; -1 where there is no split."""
    num_weights: int | None
    """Weights K that a method would fit per user."""
    leaks: list[Leak]
    probe: Probe | None
    findings: list[Finding]

    @property
    def worst(self) -> Level:
        """The gravest level that was found."""
        levels = {finding.level for finding in self.findings}
        return "problem" if "problem" in levels else "warning" if "warning" in levels else "info"

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types, for JSON."""
        lists = {"pairs_per_user": self.pairs_per_user.tolist(), "training_pairs": self.training_pairs.tolist()}
        probe = None if self.probe is None else {**asdict(self.probe), "is_leak": self.probe.is_leak}
        return {**asdict(self), **lists, "probe": probe, "worst": self.worst}


def check_pairs(
    table: PairTable,
    name: str,
    *,
    num_weights: int | None = None,
    checked_on: Literal["corpus", "schema"] = "corpus",
    stops: bool = True,
    **split: Any,
) -> DataReport:
    """Check a table and the split that the data module would draw.

    Args:
        table: Validated pairs.
        name: Where they come from.
        num_weights: Weights K that a method would fit per user, such as LoRe's ``num_bases``.
        checked_on: As `plm.data.sources.PairSource.checked_on`.
        stops: Whether a fit stops at malformed rows; else it leaves them out.
        **split: How the data module would split, see `split_pairs`.
    """
    findings = [*_rows(table, "problem" if stops else "warning"), *_labels(table)]
    if checked_on == "schema":
        text = "this source was tested on small files with the columns of the corpus, not yet on the corpus: compare"
        findings.insert(0, Finding("warning", "source", f"{text} the counts with those of the paper"))
    stage, user_split, found = split_stages(table, split)
    leaks = leakage(table, table.row_split if (table.row_split >= 0).any() else stage)
    findings += [*found, *_leak_findings(leaks, int((stage == TEST).sum()))]
    training = np.bincount(table.user[stage == TRAIN], minlength=table.num_users)
    training = training if len(user_split) else np.full(table.num_users, -1, dtype=np.int64)
    findings += _sizes(table, training, user_split, num_weights)
    probe = probe_surface(table, split.get("seed", 0))
    findings += _surface(table, probe)
    order = ("problem", "warning", "info")
    counts = {
        "users": table.num_users,
        "pairs": table.num_pairs,
        "prompts": len(np.unique(table.prompt)),
        "responses": len(np.unique(table.items[np.concatenate([table.chosen, table.rejected]), 1])),
        "dialogues": len(np.unique(table.dialogue[table.dialogue >= 0])),
        "ties": int(table.tie.sum()),
        "users seen": int((user_split == SEEN).sum()),
        "users unseen": int((user_split == UNSEEN).sum()),
        "pairs train or support": int((stage == TRAIN).sum()),
        "pairs validation": int((stage == VAL).sum()),
        "pairs test or query": int((stage == TEST).sum()),
        **{f"left out: {why.replace('_', ' ')}": count for why, count in table.dropped.items()},
    }
    return DataReport(
        name,
        counts,
        np.bincount(table.user, minlength=table.num_users),
        training,
        num_weights,
        leaks,
        probe,
        sorted(findings, key=lambda finding: order.index(finding.level)),
    )


def leakage(table: PairTable, stage: IntArray) -> list[Leak]:
    """What test pairs share with the pairs of the other stages, from the whole pair down to a response."""
    test, rest = np.flatnonzero(stage == TEST), np.flatnonzero((stage >= 0) & (stage != TEST))
    items = np.stack([table.chosen, table.rejected])
    units: dict[str, IntArray] = {"pair": table.comparison[None]}
    if (table.dialogue >= 0).any():
        units["dialogue"] = np.where(table.dialogue >= 0, table.dialogue, -1)[None]
        if (table.turn >= 0).any():
            turn = table.dialogue * (int(table.turn.max()) + 2) + table.turn
            units["turn"] = np.where((table.dialogue >= 0) & (table.turn >= 0), turn, -1)[None]
    elif (turns := conversations(table)).max(initial=-1) >= 0:
        units["conversation"] = turns[None]
    if len(np.unique(table.prompt)) > 1:
        units |= {"prompt": table.prompt[None], "prompt with one of the responses": items}
    units["response"] = table.items[items, 1]
    return [
        Leak(unit, *(int(_shared(values, who, test, rest).sum()) for who in (table.user, table.user * 0)))
        for unit, values in units.items()
    ]


def conversations(table: PairTable) -> IntArray:
    """``(N,)`` number of the conversation of a pair whose prompt continues another or is continued; -1 = alone.

    A prompt of chat messages continues another where that one's messages are its first ones: two turns of one dialogue.
    """
    begins = {text[:-1]: row for row, text in enumerate(table.prompts) if text.startswith('[{"role":')}
    start = np.arange(len(table.prompts))
    for head, row in begins.items():
        ends = [place for place in range(len(head)) if head.startswith(',{"role":', place)]
        start[row] = next((begins[head[:end]] for end in ends if head[:end] in begins), row)
    count = np.bincount(start, minlength=len(start))
    alone = count[start[table.prompt]] < 2
    return np.where(alone, -1, start[table.prompt])


def _shared(unit: IntArray, owner: IntArray, test: IntArray, rest: IntArray) -> IntArray:
    """``(n_test,)`` 1 where one of the units ``(S, N)`` of a test pair occurs in the rest of the same owner."""
    _, number = number_pairs(np.tile(owner, len(unit)), unit.ravel() + 1)
    number = np.where(unit >= 0, number.reshape(unit.shape), -1)
    inside = np.zeros(int(number.max(initial=-1)) + 2, dtype=np.int64)
    inside[number[:, rest]] = 1
    inside[-1] = 0  # the null unit
    shared: IntArray = inside[number[:, test]].max(axis=0, initial=0)
    return shared


# ---------------------------------------------------------------------- findings
def _rows(table: PairTable, malformed: Level) -> Iterator[Finding]:
    graver: dict[str, Level] = {"duplicates": "warning", "malformed": malformed}
    for why, count in table.dropped.items():
        yield Finding(graver.get(why, "info"), "left out", f"{count} rows were left out: {why.replace('_', ' ')}")
    for file, line, problem in table.skipped[:_NUM_EXAMPLES]:
        yield Finding(malformed, "malformed", f"{position(table.files[file], line)}: {problem}")
    if len(table.skipped) > _NUM_EXAMPLES:
        text = f"and {len(table.skipped) - _NUM_EXAMPLES} more, which stand in skipped.ndjson"
        yield Finding(malformed, "malformed", text)
    for what, names, rows in (
        ("user id", table.user_ids, table.user[:, None]),
        ("prompt", table.prompts, table.prompt[:, None]),
        ("response", table.responses, table.items[np.stack([table.chosen, table.rejected], 1), 1]),
        ("dialogue id", table.dialogues, table.dialogue[:, None]),
    ):
        spoilt = [row for row, name in enumerate(names) if name.strip().lower() in NO_TEXT]
        number = int(np.isin(rows, spoilt).any(1).sum())
        if number:
            text = f"{number} pairs have the {what} {names[spoilt[0]]!r}: a missing value became a word"
            yield Finding("problem", "texts" if what in ("prompt", "response") else "ids", text)
    for what, names in (("users", table.user_ids), ("dialogues", table.dialogues)):
        alike = spelt_alike(names)
        if alike:
            first, second = alike[0][:2]
            text = f"{len(alike)} {what} have two spellings, such as {first!r} and {second!r}: write them the same way"
            yield Finding("problem", "ids", text)
    plain = {text: index for index, text in enumerate(dict.fromkeys(map(_plain, table.responses)))}
    code = np.array([plain[_plain(text)] for text in table.responses], dtype=np.int64)[table.items[:, 1]]
    same = np.flatnonzero(code[table.chosen] == code[table.rejected])
    if len(same):
        yield Finding(
            "warning",
            "texts",
            f"{len(same)} pairs differ in capitals or white space only, first {table.position(int(same[0]))}",
        )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _labels(table: PairTable) -> Iterator[Finding]:
    if table.tie.any():
        yield Finding("info", "ties", f"{table.tie.sum()} of {table.num_pairs} pairs are ties ({table.tie.mean():.1%})")
    silent = np.bincount(table.user, weights=table.weight, minlength=table.num_users) == 0
    if silent.any():
        first = table.user_ids[int(silent.argmax())]
        text = f"{silent.sum()} users, such as {first!r}, have no pair that weighs more than 0: they teach nothing"
        yield Finding("warning", "weights", text)
    equal = ~table.tie & (table.chosen_score == table.rejected_score)
    if equal.any():
        yield Finding(
            "warning",
            "ties",
            f"{equal.sum()} pairs have equal scores and are not marked as ties: their labels may be coin flips",
        )
    upside_down = ~table.tie & (table.chosen_score < table.rejected_score)
    if upside_down.any():
        yield Finding("warning", "labels", f"{upside_down.sum()} pairs have the higher score on the rejected response")
    contradictory = conflicts(table)
    if len(contradictory):
        yield Finding(
            "warning",
            "labels",
            f"{len(contradictory)} comparisons were answered both ways by the same user, "
            f"first {table.position(int(contradictory[0]))} (user {table.user_ids[table.user[contradictory[0]]]!r})",
        )
    shared, best = agreement(table)
    if shared:
        yield Finding(
            "info",
            "labels",
            f"{shared} pairs compare what others compare too; a model that does not know the user is right on at most "
            f"{best:.1%} of them",
        )


def split_stages(table: PairTable, options: dict[str, Any]) -> tuple[IntArray, IntArray, list[Finding]]:
    """Stage of the pairs and split of the users; the corpus's own where the data module would refuse."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            splits = split_pairs(table, **options)
        except ValueError as error:
            return table.row_split, np.zeros(0, dtype=np.int64), [Finding("problem", "split", str(error))]
    found = [Finding("warning", "split", str(warning.message)) for warning in caught]
    found.append(Finding("info", "split", f"what stays on one side of a user's split: {splits.group_by}"))
    if splits.num_crossing:
        text = f"{splits.num_crossing} pairs are lost, since their two responses fall on different sides of the split"
        found.append(Finding("info", "split", text))
    return splits.stage, splits.user_split, found


def _leak_findings(leaks: list[Leak], num_test: int) -> Iterator[Finding]:
    grave = {"pair": "problem", "turn": "problem", "dialogue": "problem"}
    if any(leak.unit == "prompt" for leak in leaks):
        grave["response"] = "info"  # the same words in answer to something else
    for leak in leaks:
        if leak.same_user:
            level: Any = grave.get(leak.unit, "warning")
            share = f"{leak.same_user} test pairs ({leak.same_user / max(num_test, 1):.0%})"
            text = f"{share} share their {leak.unit} with a training pair of the same user"
            yield Finding(level, "leak", text)
        elif leak.anyone and leak.unit in ("pair", "prompt"):
            text = f"{leak.anyone} test pairs share their {leak.unit} with a training pair of another user"
            yield Finding("info", "leak", text)


def _sizes(table: PairTable, training: IntArray, user_split: IntArray, num_weights: int | None) -> Iterator[Finding]:
    for code, kind in ((SEEN, "seen"), (UNSEEN, "unseen")):
        counts = training[user_split == code] if len(user_split) else training[:0]
        if not len(counts):
            continue
        text = f"{kind} users have {np.median(counts):.0f} training pairs (median; {counts.min()} to {counts.max()})"
        if num_weights:
            text += f"; {(counts < num_weights).sum()} have fewer than the {num_weights} weights to fit"
        short = num_weights is not None and (counts < num_weights).mean() > 0.5
        yield Finding("warning" if short else "info", "pairs per user", text)
    if table.num_users < 2:
        yield Finding("problem", "pairs per user", "there is one user: nothing personal can be measured")


def percent(share: Share) -> str:
    """A share with its interval."""
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _surface(table: PairTable, probe: Probe | None) -> Iterator[Finding]:
    if probe is None:
        yield Finding("info", "format", f"fewer than {MIN_PAIRS} pairs: the format was not probed")
        return
    for trace in probe.traces:
        side = "rejected" if trace.rejected.value > 0.5 else "chosen"
        where = max(trace.rejected.value, 1 - trace.rejected.value)
        text = f"{trace.num_pairs} pairs have one response that {trace.name}: in {where:.1%} of them the {side} one"
        if trace.suspicious:
            shown = f"{text}; first {table.position(trace.example)}. Render both sides the same way"
            yield Finding("problem", "format", shown)
    if probe.length is None or probe.surface is None or probe.gain is None:
        text = "too few users, prompts and responses to hold any out: only single traces were looked for"
        yield Finding("info", "format", text)
    else:
        reached = f"its surface (no content) tells the chosen response in {percent(probe.surface)} of held-out pairs"
        against = f"length alone in {percent(probe.length)}"
        if probe.gain.low > MARGIN:
            strong = ", ".join(name for name, _ in probe.features[:3])
            yield Finding("problem", "format", f"probable leak: {reached}, {against}; look at: {strong}")
        else:
            level: Level = "warning" if probe.gain.low > NOTABLE else "info"
            yield Finding(level, "format", f"{reached}, {against}")
    if probe.longer.low > 0.5 or probe.longer.high < 0.5:
        kind = "longer" if probe.longer.value > 0.5 else "shorter"
        share = probe.longer if kind == "longer" else Share(
            1 - probe.longer.value, 1 - probe.longer.high, 1 - probe.longer.low
        )  # fmt: skip
        yield Finding("info", "length", f"people choose the {kind} response in {percent(share)} of the pairs")
