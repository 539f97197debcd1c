"""Planted users with known answers, who judge texts written by our own templates.

Axes: N pairs, I items, A attributes, R objectives, U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from scipy.special import expit

from plm.arrays import Float64Array, IntArray
from plm.data.schema import PairTable, pair_table
from plm.data.sources import SURE, PairSource, numbered
from plm.data.sources.phrases import MAX_LEVEL, NAMES, NUM_PROMPTS, prompt_texts, reply_text
from plm.messages import Problems

World = Literal["low_rank", "ideal_point", "conflicting_groups"]
REPLIES = 4
"""Replies per prompt; they give two sibling pairs without a common reply."""


@dataclass(frozen=True)
class Truth:
    """What is planted, for recovery tests; rows match the table of the same source."""

    attributes: Float64Array
    """``(I, A)`` attributes of the items of the table."""
    basis: Float64Array
    """``(A, R)`` orthonormal columns: objectives are ``attributes @ basis``."""
    weights: Float64Array
    """``(U, R)`` user weights, or ideal points in the space of objectives."""
    scores: Float64Array
    """``(I, R)`` objectives of the items, centred and scaled to unit variance overall."""
    margin: Float64Array
    """``(N,)`` noise-free utility of chosen minus that of rejected, of unit variance over all pairs."""
    group: IntArray
    """``(U,)`` 0 or 1 in conflicting groups, else 0."""
    best_accuracy: float
    """Expected accuracy of the planted utilities themselves under the label noise."""


class SyntheticPairs(PairSource):
    """Planted users who compare assistant replies written from templates with measurable attributes.

    Worlds: ``low_rank``: utility = weights of the user on a few planted objectives, with a common mean, so that there
    is something to gain from the population and more from the person. ``ideal_point``: utility = minus the squared
    distance of the objectives to the user's own point. ``conflicting_groups``: users come in twos who see the same
    pairs and want the opposite; whatever does not know the user is right on exactly half of the pairs.

    Args:
        world: Which one.
        num_users: Number of users; even in conflicting groups.
        pairs_per_user: Pairs of every user.
        num_objectives: Rank R of the planted preferences, at most the number of attributes (12).
        noise: Temperature of the logistic choice, in standard deviations of the utility difference; 0 = no noise.
        seed: Another seed plants another world.
    """

    def __init__(
        self,
        world: World = "low_rank",
        num_users: int = 200,
        pairs_per_user: int = 60,
        num_objectives: int = 3,
        noise: float = 0.3,
        seed: int = 0,
    ) -> None:
        self.world, self.num_users, self.pairs_per_user = world, num_users, pairs_per_user
        self.num_objectives, self.noise, self.seed = num_objectives, noise, seed
        problems = Problems("SyntheticPairs.")
        problems.choices(world=(world, get_args(World)))
        if num_users < 2 or (world == "conflicting_groups" and num_users % 2):
            problems.add("num_users", "at least 2, even in conflicting_groups", num_users)
        problems.within(1, 2 * NUM_PROMPTS, pairs_per_user=pairs_per_user)
        problems.within(1, len(NAMES), num_objectives=num_objectives)
        problems.at_least(0, noise=noise)
        problems.check()

    @property
    def name(self) -> str:
        """World and size."""
        return f"synthetic/{self.world}-{self.num_users}x{self.pairs_per_user}"

    def load(self) -> PairTable:
        """Write the texts and let the users choose."""
        return self._planted[0]

    def planted_log_odds(self) -> Float64Array:
        """Those of the planted utilities; large ones where nobody errs."""
        log_odds: Float64Array = self.truth.margin / max(self.noise, SURE)
        return log_odds

    @property
    def truth(self) -> Truth:
        """What is planted."""
        return self._planted[1]

    @cached_property
    def _planted(self) -> tuple[PairTable, Truth]:
        rng = np.random.default_rng(self.seed)
        num_prompts = min(NUM_PROMPTS, max(1000, self.pairs_per_user))
        prompts, replies, levels = _write(rng, num_prompts)
        basis = np.linalg.qr(rng.standard_normal((len(NAMES), self.num_objectives)))[0]
        scores = (levels - levels.mean(0)) @ basis
        scores /= scores.std()
        weights, group = self._users(rng)
        user, prompt, left, right = self._pairs(rng, num_prompts)
        margin = self._utility(scores[left], weights[user]) - self._utility(scores[right], weights[user])
        margin /= margin.std()
        draw = rng.random(len(margin))
        if self.world == "conflicting_groups":  # the second of two users mirrors the first, noise included
            draw = np.where(group[user] == 1, 1 - _mirror(draw, self.pairs_per_user), draw)
        swap = draw > (expit(margin / self.noise) if self.noise > 0 else np.heaviside(margin, 0.5))
        table = pair_table(
            numbered("user", self.num_users),
            prompts,
            replies,
            user=user,
            prompt=prompt,
            chosen=np.where(swap, right, left),
            rejected=np.where(swap, left, right),
        )
        reply = table.items[:, 1]
        best = expit(np.abs(margin) / self.noise).mean() if self.noise > 0 else 1.0
        signed = np.where(swap, -margin, margin)
        truth = Truth(levels[reply].astype(np.float64), basis, weights, scores[reply], signed, group, float(best))
        return table, truth

    def _users(self, rng: np.random.Generator) -> tuple[Float64Array, IntArray]:
        """User weights ``(U, R)`` and groups ``(U,)``."""
        group = np.zeros(self.num_users, dtype=np.int64)
        if self.world == "conflicting_groups":
            group[1::2] = 1
            axis = np.arange(self.num_users) // 2 % self.num_objectives
            return np.eye(self.num_objectives)[axis] * (1 - 2 * group)[:, None], group
        mean = rng.standard_normal(self.num_objectives)
        mean /= np.linalg.norm(mean)
        return mean + rng.standard_normal((self.num_users, self.num_objectives)), group

    def _pairs(self, rng: np.random.Generator, num_prompts: int) -> tuple[IntArray, ...]:
        """User, prompt, left and right reply of every pair: two sibling pairs per prompt of a user."""
        num_groups = -(-self.pairs_per_user // 2)
        drawn = rng.random((self.num_users, num_prompts)).argpartition(num_groups - 1, axis=1)[:, :num_groups]
        if self.world == "conflicting_groups":
            drawn[1::2] = drawn[::2]
        prompt = np.repeat(drawn, 2, axis=1)[:, : self.pairs_per_user]
        left = prompt * REPLIES + np.arange(self.pairs_per_user) % 2 * 2
        user = np.repeat(np.arange(self.num_users), self.pairs_per_user)
        return user, prompt.ravel(), left.ravel(), left.ravel() + 1

    def _utility(self, scores: Float64Array, weights: Float64Array) -> Float64Array:
        """Utility ``(N,)`` of objectives ``(N, R)`` for users ``(N, R)``."""
        if self.world == "ideal_point":
            utility: Float64Array = -((scores - weights) ** 2).sum(1)
        else:
            utility = (scores * weights).sum(1)
        return utility


def _write(rng: np.random.Generator, num_prompts: int) -> tuple[list[str], list[str], IntArray]:
    """Prompts, ``REPLIES`` distinct replies to each, and the attributes ``(I, A)`` of the replies."""
    prompts = prompt_texts(rng.permutation(NUM_PROMPTS)[:num_prompts].tolist())
    num_replies = num_prompts * REPLIES
    levels = rng.choice(MAX_LEVEL + 1, size=(num_replies, len(NAMES)), p=(0.6, 0.25, 0.15))
    draws = rng.integers(2**40, size=(num_replies, len(NAMES) + 2))
    replies: dict[str, None] = {}
    for row, (level, draw) in enumerate(zip(levels.tolist(), draws.tolist(), strict=True)):
        parts = prompts[row // REPLIES][1]
        text = reply_text(level, parts, draw)
        while text in replies:  # replies are distinct, so that a pair never compares a text with itself
            draw[-2] += 1
            text = reply_text(level, parts, draw)
        replies[text] = None
    return [prompt for prompt, _ in prompts], list(replies), levels


def _mirror(draw: Float64Array, block: int) -> Float64Array:
    """For every second block the values of the block before it."""
    return np.repeat(draw.reshape(-1, 2, block)[:, :1], 2, axis=1).ravel()
