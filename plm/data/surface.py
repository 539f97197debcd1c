"""A probe that guesses the chosen response from the surface of both and never reads their content.

A probe that knows the answer from brackets, quotes or the last character has found a trace of how the data were made,
and a reward model will find it too. Length is a taste that people do have, so it is the baseline, not a finding.

Axes: N pairs, R distinct responses, F surface features.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.data.keys import digest, mix, seed_key
from plm.data.schema import PairTable

Feature = Callable[[str], float]

NUM_FOLDS = 4
"""Folds of users and of prompts."""
NUM_RESPONSE_FOLDS = 8
"""Folds of responses, of which a pair takes up two."""
MAX_PAIRS = 20_000
"""Pairs the probe is fitted on, drawn at random."""
MIN_PAIRS = 40
"""Fewer pairs than this tell nothing."""
MARGIN = 0.15
"""How far above its baseline, interval included, a probe must be to be called a probable leak."""
ONE_SIDED = 0.9
"""A trace is suspicious where its interval says that it sits on one side in more than this share of its pairs."""
_NORMAL = NormalDist().inv_cdf(0.975)

LENGTH: dict[str, Feature] = {
    "characters (log)": lambda text: float(np.log1p(len(text))),
    "characters": lambda text: float(len(text)),
    "words (log)": lambda text: float(np.log1p(len(text.split()))),
}
_COUNTED = {
    "round brackets": "()", "square brackets": "[]", "curly brackets": "{}", "angle brackets": "<>",
    "single quotes": "'’‘", "double quotes": '"“”', "backticks": "`", "backslashes": "\\", "commas": ",",
    "full stops": ".",
    "colons": ":;", "question marks": "?", "exclamation marks": "!", "newlines": "\n", "tabs": "\t", "asterisks": "*",
    "hashes": "#", "bars and underscores": "|_", "hyphens": "-–—",
}  # fmt: skip
_PATTERNS = {
    "digits": r"\d", "capitals": r"[A-Z]", "list items": r"(?m)^\s*(?:[-*•]|\d+[.)])\s", "headings": r"(?m)^#+\s",
    "bold": r"\*\*", "double spaces": r"  ", "other scripts": r"[^\x00-\x7f]",
}  # fmt: skip
_KINDS = {
    "a capital": str.isupper, "a small letter": str.islower, "a digit": str.isdigit, "white space": str.isspace,
    "a bracket": "()[]{}<>".__contains__, "a quote": "'\"`“”‘’".__contains__, "a full stop": ".".__contains__,
    "! or ?": "!?".__contains__, "a mark": "#*-•|".__contains__,
}  # fmt: skip


def _count(marks: str) -> Feature:
    return lambda text: float(np.log1p(sum(map(text.count, marks))))


def _match(pattern: str) -> Feature:
    found = re.compile(pattern)
    return lambda text: float(np.log1p(sum(1 for _ in found.finditer(text))))


def _at(position: int, kind: Callable[[str], bool]) -> Feature:
    return lambda text: float(kind(text[position]))


FORMAT: dict[str, Feature] = {
    **{name: _count(marks) for name, marks in _COUNTED.items()},
    **{name: _match(pattern) for name, pattern in _PATTERNS.items()},
    **{f"begins with {name}": _at(0, kind) for name, kind in _KINDS.items()},
    **{f"ends with {name}": _at(-1, kind) for name, kind in _KINDS.items()},
}
TRACES: dict[str, Callable[[str], bool]] = {
    "is in square brackets, like a list": lambda text: text.strip()[0] == "[" and text.strip()[-1] == "]",
    "is in quotes": lambda text: text.strip()[0] in "'\"" and text.strip()[-1] == text.strip()[0],
    "begins with white space": lambda text: text[0].isspace(),
    "ends with white space": lambda text: text[-1].isspace(),
    "holds a written-out \\n": lambda text: "\\n" in text,
    "ends with a special token": lambda text: re.search(r"(<\|[\w ]+\|>|</s>|\[/?INST\])\s*$", text) is not None,
    "begins with the name of a speaker": lambda text: re.match(r"\s*(Human|Assistant|User|AI)\s*:", text) is not None,
    "is the word None, null or nan": lambda text: text.strip().lower() in ("none", "null", "nan"),
}
"""Marks that generation and storage leave and people do not care about."""


@dataclass(frozen=True)
class Share:
    """A share of pairs with its 95% interval over clusters."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Trace:
    """A mark that one of the two responses of a pair has."""

    name: str
    num_pairs: int
    """Pairs with the mark on exactly one side."""
    rejected: Share
    """Share of them with the mark on the rejected response."""
    suspicious: bool
    example: int
    """Row of a pair."""


@dataclass(frozen=True)
class Probe:
    """How well the surface predicts the labels."""

    num_pairs: int
    longer: Share
    """How often the longer response is the chosen one; equal lengths count one half."""
    length: Share | None
    """Held-out accuracy of a logistic regression on length; None where too few pairs can be held out."""
    surface: Share | None
    """The same on length and format."""
    gain: Share | None
    """Surface above the better of length and chance, on the same pairs."""
    features: list[tuple[str, float]]
    """Standardised weights of the format features, the largest first; positive = the chosen response has more."""
    traces: list[Trace]

    @property
    def is_leak(self) -> bool:
        """Whether the labels can be told from the format: far above the baseline, or by a one-sided trace."""
        predicted = self.gain is not None and self.gain.low > MARGIN
        return predicted or any(trace.suspicious for trace in self.traces)


def clustered(values: Float64Array, cluster: IntArray) -> Share:
    """Mean and 95% interval (normal, cluster-robust) of values that hang together inside a cluster."""
    mean = float(values.mean())
    _, number = np.unique(cluster, return_inverse=True)
    sums = np.bincount(number, weights=values - mean)
    correction = len(sums) / max(len(sums) - 1, 1)
    half = _NORMAL * float(np.sqrt(correction * (sums**2).sum())) / len(values)
    return Share(mean, mean - half, mean + half)


def wilson(count: int, total: int) -> Share:
    """A share and its 95% score interval, which stays inside [0, 1]."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(count, total).proportion_ci(0.95, "wilson")
    return Share(count / total, float(interval.low), float(interval.high))


def measure(texts: list[str], features: dict[str, Feature]) -> Float64Array:
    """Surface features of texts, ``(R, F)``."""
    return np.array([[feature(text) for feature in features.values()] for text in texts]).reshape(-1, len(features))


def held_out(
    difference: Float64Array, user: IntArray, prompt: IntArray, chosen: IntArray, rejected: IntArray
) -> Float64Array:
    """Margins of a logistic regression for pairs whose user and prompt it has not seen, ``(N,)``.

    Users and prompts are divided into folds, each by itself; where there are too few of one, the other alone. Where
    there are too few of both, the regression has seen neither response of the pair. nan = too few pairs to learn from.
    """
    margin = np.full(len(difference), np.nan)
    for train, test in _parts(user, prompt, chosen, rejected):
        if train.sum() >= MIN_PAIRS // 2:
            margin[test] = difference[test] @ separating_weights(difference[train])
    return margin


def _parts(
    user: IntArray, prompt: IntArray, chosen: IntArray, rejected: IntArray
) -> Iterator[tuple[BoolArray, BoolArray]]:
    """Training and test pairs, ``(N,)`` each, until every pair was tested once; nothing where that cannot be."""
    folds = [values for group in (user, prompt) if (values := _folds(group, NUM_FOLDS)).any()]
    if folds:
        for held_out_folds in sorted(set(zip(*(values.tolist() for values in folds), strict=True))):
            is_held_out = np.stack(folds) == np.array(held_out_folds)[:, None]
            yield np.logical_not(is_held_out.any(axis=0)), np.asarray(is_held_out.all(axis=0))
        return
    sides = np.sort(_folds(np.stack([chosen, rejected]), NUM_RESPONSE_FOLDS), axis=0)
    if sides.any():
        for row in sorted(set(zip(*sides.tolist(), strict=True))):
            same = sides == np.array(row)[:, None]
            yield np.logical_not(np.isin(sides, row).any(axis=0)), np.asarray(same.all(axis=0))


def _folds(group: IntArray, num_folds: int) -> IntArray:
    """Fold of every value by its group; all zero where there are too few groups."""
    names, number = np.unique(group, return_inverse=True)
    if len(names) < 2 * num_folds:
        return np.zeros(group.shape, dtype=np.int64)
    order = np.argsort(mix(digest([str(name) for name in names.tolist()]), seed_key(0)), kind="stable")
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % num_folds
    return fold[number.reshape(group.shape)]


def separating_weights(difference: Float64Array, penalty: float = 1.0) -> Float64Array:
    """Weights ``(D,)`` of a logistic regression that separates chosen minus rejected from rejected minus chosen.

    Args:
        difference: ``(B, D)`` chosen minus rejected.
        penalty: Half the squared length of the weights counts so many times in the summed loss.
    """
    from sklearn.linear_model import LogisticRegression

    signs = np.where(np.arange(len(difference)) % 2, 1.0, -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(fit_intercept=False, C=1 / penalty).fit(difference * signs[:, None], signs)
    weights: Float64Array = model.coef_[0]
    return weights


def probe_surface(table: PairTable, seed: int = 0) -> Probe | None:
    """Try to tell chosen from rejected by their surface alone; labelled ties are left out.

    Returns:
        What was found; None with fewer than `MIN_PAIRS` pairs.
    """
    rows = np.flatnonzero(~table.tie)
    if len(rows) < MIN_PAIRS:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_PAIRS])
    sides = table.items[np.stack([table.chosen[rows], table.rejected[rows]]), 1]
    used, number = np.unique(sides, return_inverse=True)
    texts = [table.responses[row] for row in used.tolist()]
    chosen, rejected = number.reshape(2, -1)

    def difference(features: dict[str, Feature]) -> Float64Array:
        values = measure(texts, features)
        raw = values[chosen] - values[rejected]
        scale = np.sqrt((raw**2).mean(axis=0))
        scaled: Float64Array = raw / np.where(scale > 0, scale, 1.0)
        return np.clip(scaled, -5, 5)

    user, prompt = table.user[rows], table.prompt[rows]
    num_users, num_prompts = len(np.unique(user)), len(np.unique(prompt))
    if max(num_users, num_prompts) < 2 * NUM_FOLDS:
        cluster = np.arange(len(rows))
    else:
        cluster = user if num_users >= num_prompts or num_prompts < MIN_PAIRS else prompt
    by_length, by_format = difference(LENGTH), difference(FORMAT)
    both = np.concatenate([by_length, by_format], axis=1)
    margins = np.stack([held_out(values, user, prompt, chosen, rejected) for values in (by_length, both)])
    is_tested = ~np.isnan(margins[0])
    length, surface, gain = None, None, None
    if is_tested.sum() >= MIN_PAIRS:
        right, tested_cluster = (np.sign(margins[:, is_tested]) + 1) / 2, cluster[is_tested]
        length, surface = (clustered(values, tested_cluster) for values in right)
        gain = clustered(right[1] - (right[0] if length.value > 0.5 else 0.5), tested_cluster)
    weights = separating_weights(both)[len(LENGTH) :]
    order = np.argsort(-np.abs(weights))
    names = list(FORMAT)
    return Probe(
        num_pairs=len(rows),
        longer=clustered((np.sign(by_length[:, 1]) + 1) / 2, cluster),
        length=length,
        surface=surface,
        gain=gain,
        features=[(names[column], float(weights[column])) for column in order[:10].tolist()],
        traces=_traces(texts, chosen, rejected, rows),
    )


def _traces(texts: list[str], chosen: IntArray, rejected: IntArray, rows: IntArray) -> list[Trace]:
    """Marks that sit on one of the two responses of some pairs, the most frequent first."""
    traces = []
    for name, has in TRACES.items():
        marked = np.array([has(text) for text in texts])
        one_sided = np.flatnonzero(marked[chosen] != marked[rejected])
        if not len(one_sided):
            continue
        share = wilson(int(marked[rejected[one_sided]].sum()), len(one_sided))
        suspicious = len(one_sided) >= 0.01 * len(rows) and (share.low > ONE_SIDED or share.high < 1 - ONE_SIDED)
        traces.append(Trace(name, len(one_sided), share, suspicious, int(rows[one_sided[0]])))
    return sorted(traces, key=lambda trace: -trace.num_pairs)
