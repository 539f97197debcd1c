"""Simulated people: each weighs attributes of responses in their own way and names the best and worst candidate.

Paper: PersonalLLM, arXiv 2409.20296 (Dirichlet populations over reward models); its use in LoRe, arXiv 2504.14439,
section 5: best against worst candidate of every prompt, without label noise.

Axes: P prompts, C candidates of a prompt (padded), A attributes, U users, S prompts shown to a user.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.data.schema import PairTable, pair_table
from plm.data.sources import SURE, PairSource
from plm.messages import Problems

_CHUNK = 2_000_000  # scores held in memory at once
_ROUNDING = 1e-6
"""Differences of a person's rewards below this share of the largest possible one are ties. A sum of A attributes that
are exact to u is exact to ``(A + 1) u`` of the sum of their sizes, a difference of two to twice that: for single
precision, ``u = 6e-8``, and A = 7 that is 1e-6. Nobody has a preference as small as this."""


@dataclass(frozen=True)
class CandidatePool:
    """What people choose from."""

    prompts: list[str]
    """P distinct prompts."""
    responses: list[str]
    """Distinct responses."""
    candidates: IntArray
    """``(P, C)`` rows of ``responses``, -1 = padding."""
    scores: Float64Array
    """``(P, C, A)`` attributes; nan under the padding."""
    test: BoolArray
    """``(P,)`` True = asked in the test only."""

    @classmethod
    def of(cls, replies: Mapping[str, Mapping[str, Sequence[float]]], test: BoolArray) -> CandidatePool:
        """Lay out what each prompt may be answered by: prompt -> response -> its A attributes."""
        num_attributes = next(len(values) for texts in replies.values() for values in texts.values())
        responses: dict[str, int] = {}
        candidates = np.full((len(replies), max(map(len, replies.values()))), -1, dtype=np.int64)
        scores = np.full((*candidates.shape, num_attributes), np.nan)
        for row, texts in enumerate(replies.values()):
            candidates[row, : len(texts)] = [responses.setdefault(text, len(responses)) for text in texts]
            if texts:
                scores[row, : len(texts)] = list(texts.values())
        return cls(list(replies), list(responses), candidates, scores, test)


def dirichlet_weights(num_users: int, num_attributes: int, concentration: float, seed: int) -> Float64Array:
    """Weights of U people, ``(U, A)`` rows that sum to 1; a small concentration gives people with one interest each.

    Drawn by numpy's ``Generator``: the older ``np.random.dirichlet`` underflows to nan at 0.001.

    Example:
        >>> round(float(dirichlet_weights(2000, 10, 0.01, 0).max(axis=1).mean()), 2)
        0.94
    """
    return np.random.default_rng(seed).dirichlet(np.full(num_attributes, concentration), size=num_users)


def standardise(scores: Float64Array) -> Float64Array:
    """Every attribute to mean 0 and standard deviation 1 over all candidates; a constant one becomes 0."""
    flat = scores.reshape(-1, scores.shape[-1])
    scale = np.nanstd(flat, axis=0)
    scaled: Float64Array = (scores - np.nanmean(flat, axis=0)) / np.where(scale > 0, scale, 1.0)
    return scaled


def smallest_preference(scores: Float64Array, weights: Float64Array) -> Float64Array:
    """Differences of rewards up to which people ``(U, A)`` see a tie, ``(U,)``: what rounding alone may make.

    It is 1e-6 of the largest reward that attributes ``(P, C, A)`` of these sizes could add up to.

    Example:
        >>> bounds = smallest_preference(np.array([[[0.5, 2.0], [1.0, -4.0]]]), np.array([[1.0, 0.0], [0.5, 0.5]]))
        >>> (1e6 * bounds).round(3).tolist()
        [1.0, 2.5]
    """
    sizes = np.nanmax(np.abs(scores).reshape(-1, scores.shape[-1]), axis=0, initial=0.0)
    smallest: Float64Array = _ROUNDING * (np.abs(weights) @ sizes)
    return smallest


def best_and_worst(scores: Float64Array, weights: Float64Array, shown: IntArray) -> IntArray:
    """Which candidate each person likes best and least on each prompt shown.

    Args:
        scores: ``(P, C, A)`` attributes, nan = no such candidate.
        weights: ``(U, A)``.
        shown: ``(U, S)`` prompts.

    Returns:
        ``(U, S, 2)`` columns of the best and the worst; both -1 where all candidates are worth the same, up to
        `smallest_preference`.
    """
    num_users, num_shown = shown.shape
    out = np.empty((num_users, num_shown, 2), dtype=np.int64)
    smallest = smallest_preference(scores, weights)
    step = max(1, _CHUNK // max(num_shown * scores.shape[1] * scores.shape[2], 1))
    for start in range(0, num_users, step):
        rows = slice(start, start + step)
        value = np.einsum("usca,ua->usc", scores[shown[rows]], weights[rows])
        missing = np.isnan(value)
        high, low = np.where(missing, -np.inf, value), np.where(missing, np.inf, value)
        tied = ~(high.max(axis=2) - low.min(axis=2) > smallest[rows, None])
        out[rows] = np.where(tied[..., None], -1, np.stack([high.argmax(axis=2), low.argmin(axis=2)], axis=2))
    return out


class PopulationPairs(PairSource):
    """Simulated people over a pool of scored responses; a subclass reads the pool.

    Training prompts and test prompts are disjoint for everybody. A prompt whose candidates are all worth the same to a
    person gives no pair; how many is counted in ``dropped["ties"]``.

    Args:
        concentration: Of the Dirichlet weights: 0.001 very diverse, 0.01 moderate, 0.1 closer to each other.
        num_seen: People to train on.
        num_unseen: People held out.
        seen_pairs: Training prompts shown to a seen person.
        unseen_pairs: Support prompts shown to an unseen person.
        test_pairs: Test prompts shown to everyone, drawn for each person; null = all of them.
        z_score: Whether attributes are brought to one scale before they are weighed.
        seed: Another seed gives another population, and other candidates and test prompts where these are drawn.
    """

    def __init__(
        self,
        concentration: float = 0.01,
        num_seen: int = 1000,
        num_unseen: int = 1000,
        seen_pairs: int = 45,
        unseen_pairs: int = 9,
        test_pairs: int | None = None,
        z_score: bool = True,
        seed: int = 0,
    ) -> None:
        self.concentration, self.num_seen, self.num_unseen = concentration, num_seen, num_unseen
        self.seen_pairs, self.unseen_pairs, self.test_pairs = seen_pairs, unseen_pairs, test_pairs
        self.z_score, self.seed = z_score, seed
        problems = Problems(f"{type(self).__name__}.")
        problems.at_least(1, num_seen=num_seen, seen_pairs=seen_pairs, test_pairs=test_pairs)
        problems.at_least(0, num_unseen=num_unseen, unseen_pairs=unseen_pairs)
        problems.positive(concentration=concentration)
        problems.check()

    @abstractmethod
    def read_pool(self) -> CandidatePool:
        """Read prompts, candidates and raw attributes."""

    @cached_property
    def pool(self) -> CandidatePool:
        """The pool, read once."""
        return self.read_pool()

    @cached_property
    def weights(self) -> Float64Array:
        """``(U, A)`` weights of the people: the seen ones first, then the unseen ones."""
        num_users = self.num_seen + self.num_unseen
        return dirichlet_weights(num_users, self.pool.scores.shape[2], self.concentration, self.seed)

    def load(self) -> PairTable:
        """Let everyone name the best and the worst candidate of the prompts shown to them."""
        return self._planted[0]

    def planted_log_odds(self) -> Float64Array:
        """Those of people who never err, in units of the spread of all differences."""
        difference = self._planted[1]
        log_odds: Float64Array = difference / max(float(difference.std()), SURE) / SURE
        return log_odds

    @cached_property
    def _planted(self) -> tuple[PairTable, Float64Array]:
        """The pairs, and what each person sees in the chosen response over the rejected one, ``(N,)``."""
        pool = self.pool
        scores = standardise(pool.scores) if self.z_score else pool.scores
        rng = np.random.default_rng([self.seed, 1])
        train, test = np.flatnonzero(~pool.test), np.flatnonzero(pool.test)
        people = np.arange(self.num_seen + self.num_unseen)
        parts = [  # users, number of prompts, prompts to draw from, row split
            (people[: self.num_seen], self.seen_pairs, train, 0),
            (people[self.num_seen :], self.unseen_pairs, train, 0),
            (people, len(test) if self.test_pairs is None else self.test_pairs, test, 2),
        ]
        columns: list[IntArray] = []
        for users, count, prompts, split in parts:
            if not len(users):
                continue
            if count > len(prompts):
                kind = "test" if split else "training"
                raise ValueError(f"expected at most the {len(prompts)} {kind} prompts of {self.name}, got {count}")
            shown = prompts[_draw(rng, len(users), len(prompts), count)]
            picked = best_and_worst(scores, self.weights[users], shown).reshape(-1, 2)
            user, prompt = np.repeat(users, count), shown.ravel()
            columns.append(np.stack([user, prompt, *picked.T, np.full(len(user), split)], axis=1))
        user, prompt, best, worst, split = np.concatenate(columns).T
        kept = best >= 0
        user, prompt, best, worst, split = (column[kept] for column in (user, prompt, best, worst, split))
        difference = ((scores[prompt, best] - scores[prompt, worst]) * self.weights[user]).sum(1)
        digits = len(str(len(people)))
        table = pair_table(
            [f"{'seen' if row < self.num_seen else 'unseen'}-{row:0{digits}d}" for row in people.tolist()],
            pool.prompts,
            pool.responses,
            user=user,
            prompt=prompt,
            chosen=pool.candidates[prompt, best],
            rejected=pool.candidates[prompt, worst],
            row_split=split,
            user_split=(user >= self.num_seen).astype(np.int64),
            dropped={"ties": int((~kept).sum())},
        )
        return table, difference


def shown_prompts(test: BoolArray, most: int | None, rng: np.random.Generator) -> IntArray:
    """Prompts shown to a person: training ones, at most so many of them where there is a limit, then all of the test.

    Args:
        test: ``(P,)`` True = a prompt of the test.
        most: Most training prompts, drawn at random; None = all.
        rng: What draws them.
    """
    train = np.flatnonzero(~test)
    if most is not None:
        train = np.sort(rng.permutation(train)[:most])
    return np.concatenate([train, np.flatnonzero(test)])


def _draw(rng: np.random.Generator, num_users: int, num_prompts: int, count: int) -> IntArray:
    """``(U, S)`` prompts of every person, without repetition."""
    if count in (0, num_prompts):
        return np.tile(np.arange(count), (num_users, 1))
    drawn: IntArray = rng.random((num_users, num_prompts)).argpartition(count, axis=1)[:, :count]
    return drawn
