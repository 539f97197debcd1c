"""People of a few types: those of one type agree about everything, and types are in conflict about some pairs.

Papers: VPL, arXiv 2408.10075 (Pets and UltraFeedback-P).
Deviations: VPL's users *are* the types, all of them seen in training, and every target pair comes with a context of
survey pairs. Here many people share a type, each with survey pairs of their own, so that seen and unseen people exist;
survey pairs are never targets, as they can be in the released code.

Axes: N pairs, T types.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from plm.arrays import BoolArray, IntArray
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource
from plm.messages import Problems

SURVEY, TARGET, TEST = 0, 1, 2


@dataclass(frozen=True)
class TypedPool:
    """Pairs and what every type thinks of them."""

    types: list[str]
    """T names."""
    prompts: list[str]
    """Distinct prompts."""
    responses: list[str]
    """Distinct responses."""
    pairs: IntArray
    """``(N, 3)`` rows of prompt, left response and right response."""
    opinion: IntArray
    """``(N, T)`` 1 = left is better, -1 = right, 0 = equally good, never asked."""
    part: IntArray
    """``(N,)`` SURVEY (only ever support), TARGET or TEST."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Why rows of the corpus are not here -> how many."""

    @classmethod
    def of(
        cls,
        types: Sequence[str],
        opinions: Mapping[tuple[str, str, str], tuple[list[int], int]],
        dropped: Mapping[str, int] | None = None,
    ) -> TypedPool:
        """A pool of (prompt, left, right) texts -> what every type thinks of the pair, and its part."""
        opinion, part = (np.array(column, dtype=np.int64) for column in zip(*opinions.values(), strict=True))
        return cls(list(types), *number_texts(list(opinions)), opinion, part, dict(dropped or {}))


def conflict(opinion: IntArray) -> BoolArray:
    """``(N,)`` True where two types with an opinion disagree.

    Example:
        >>> conflict(np.array([[1, -1], [1, 0], [1, 1]])).tolist()
        [True, False, False]
    """
    return np.logical_and((opinion > 0).any(axis=1), (opinion < 0).any(axis=1))


class TypedPairs(PairSource):
    """People of a few types over a pool of pairs; a subclass reads the pool.

    Args:
        num_seen: People to train on, of each type.
        num_unseen: People held out, of each type.
        support_pairs: Pairs an unseen person gives; everyone's are drawn from the survey, where there is one.
        target_pairs: Further training pairs of a seen person.
        test_pairs: Test pairs of everyone.
        seed: Another seed draws, and where they are made up, writes other pairs.
    """

    def __init__(
        self,
        num_seen: int = 100,
        num_unseen: int = 100,
        support_pairs: int = 8,
        target_pairs: int = 32,
        test_pairs: int = 32,
        seed: int = 0,
    ) -> None:
        self.num_seen, self.num_unseen, self.seed = num_seen, num_unseen, seed
        self.support_pairs, self.target_pairs, self.test_pairs = support_pairs, target_pairs, test_pairs
        problems = Problems(f"{type(self).__name__}.")
        problems.at_least(1, num_seen=num_seen, test_pairs=test_pairs)
        problems.at_least(0, num_unseen=num_unseen, support_pairs=support_pairs, target_pairs=target_pairs)
        problems.check()

    @abstractmethod
    def read_pool(self) -> TypedPool:
        """Read pairs and opinions."""

    def load(self) -> PairTable:
        """Draw every person's pairs; a type with fewer pairs in a part gives all of them."""
        pool = self.read_pool()
        rng = np.random.default_rng(self.seed)
        survey = SURVEY if (pool.part == SURVEY).any() else TARGET
        rows_of_types = [
            {part: np.flatnonzero((pool.part == part) & (column != 0)) for part in (SURVEY, TARGET, TEST)}
            for column in pool.opinion.T
        ]
        user_ids: list[str] = []
        rows: list[IntArray] = []
        num_people = self.num_seen + self.num_unseen
        for kind, type_rows in enumerate(rows_of_types):
            if not len(type_rows[survey]) or not len(type_rows[TEST]):
                raise ValueError(f"expected pairs to train on and to test for {pool.types[kind]!r} of {self.name}")
            for person in range(num_people):
                seen = person < self.num_seen
                support = rng.permutation(type_rows[survey])[: self.support_pairs]
                free = np.setdiff1d(
                    type_rows[TARGET], support
                )  # where there is no survey, support comes from the targets
                drawn = {
                    0: np.concatenate([support, rng.permutation(free)[: self.target_pairs if seen else 0]]),
                    2: rng.permutation(type_rows[TEST])[: self.test_pairs],
                }
                for split, pick in drawn.items():
                    number = np.full(len(pick), len(user_ids))
                    rows.append(
                        np.stack([number, pick, pool.opinion[pick, kind], number * 0 + split, number * 0 + (not seen)])
                    )
                user_ids.append(f"{pool.types[kind]}-{person:0{len(str(num_people))}d}")
        user, pair, opinion, row_split, user_split = np.concatenate(rows, axis=1)
        prompt, left, right = pool.pairs[pair].T
        return pair_table(
            user_ids,
            pool.prompts,
            pool.responses,
            user=user,
            prompt=prompt,
            chosen=np.where(opinion > 0, left, right),
            rejected=np.where(opinion > 0, right, left),
            row_split=row_split,
            user_split=user_split,
            dropped=pool.dropped,
        )


def number_texts(pairs: list[tuple[str, str, str]]) -> tuple[list[str], list[str], IntArray]:
    """(prompt, left, right) texts -> distinct prompts, distinct responses, ``(N, 3)`` rows of them."""
    prompts: dict[str, int] = {}
    responses: dict[str, int] = {}
    rows = [
        (
            prompts.setdefault(prompt, len(prompts)),
            responses.setdefault(left, len(responses)),
            responses.setdefault(right, len(responses)),
        )
        for prompt, left, right in pairs
    ]
    return list(prompts), list(responses), np.array(rows, dtype=np.int64).reshape(-1, 3)
