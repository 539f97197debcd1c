"""Oracles: the best policy for a weight vector, from whatever is affordable; and a measured portfolio of policies.

Axes: V weight vectors, R objectives, M policies, X prompts, C candidates of a prompt.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from plm.arrays import BoolArray, Float64Array, IntArray

_CHUNK = 20_000_000  # numbers held in memory at once
_SAME = 1e-9  # weights that differ by less are one


class PolicySet(NamedTuple):
    """M measured policies: all that choosing, certifying and routing need."""

    weights: Float64Array
    """``(M, R)`` the weights each policy was made for."""
    rewards: Float64Array
    """``(M, R)`` its expected rewards R(p)."""
    costs: Float64Array
    """``(M,)`` its regulariser f(p), beta included."""

    @property
    def net(self) -> Float64Array:
        """``(M, R)`` rewards minus cost: as weights sum to one, ``J_v(p) = v . net_p``."""
        net: Float64Array = self.rewards - self.costs[:, None]
        return net

    def values(self, weights: Float64Array) -> Float64Array:
        """``J_v(p)`` of each policy for each user: ``(V, R)`` -> ``(V, M)``."""
        values: Float64Array = weights @ self.net.T
        return values

    def take(self, rows: Sequence[int] | IntArray) -> PolicySet:
        """Some of the policies."""
        index = np.asarray(rows, dtype=np.int64)
        return PolicySet(self.weights[index], self.rewards[index], self.costs[index])

    @staticmethod
    def cat(sets: Sequence[PolicySet]) -> PolicySet:
        """The policies of several sets, one after the other."""
        return PolicySet(*(np.concatenate(parts) for parts in zip(*sets, strict=True)))


class Oracle(ABC):
    """Makes a policy for any weight vector and measures it.

    An oracle that trains or mixes language models is a subclass that returns measured rewards and costs, and states in
    ``error`` how far its answer may be from the best policy; `plm.methods.palm.search` adds that to its certificates.
    """

    error: float = 0.0
    """Additive bound on ``J*_w - J_w(p)`` of its answer p."""

    def __init__(self, num_objectives: int) -> None:
        self.num_objectives = num_objectives
        self._solved_weights = np.zeros((0, num_objectives))

    @property
    def num_calls(self) -> int:
        """Weight vectors solved so far, each counted once: a solved one need not be made again."""
        return len(self._solved_weights)

    @property
    @abstractmethod
    def max_reward(self) -> float:
        """Bound on the sum of all rewards of any policy: ``R_max`` of `plm.methods.palm.bounds`."""

    @property
    @abstractmethod
    def max_cost(self) -> float:
        """Bound on the regulariser: ``f_max``."""

    @abstractmethod
    def _solve(self, weights: Float64Array) -> PolicySet:
        """One policy per weight vector ``(V, R)``."""

    def solve(self, weights: Float64Array) -> PolicySet:
        """The best policy for each weight vector ``(V, R)``, measured; a new one counts as a call.

        Raises:
            ValueError: If a row is not on the simplex.
        """
        check_simplex(weights, self.num_objectives)
        self._solved_weights = np.concatenate([self._solved_weights, unsolved(weights, self._solved_weights)])
        return self._solve(weights)


class BestOfN(Oracle):
    """Picks one of the candidates of each prompt, the free oracle: its policies need no training.

    With ``beta`` 0 it takes the candidate with the highest weighted reward, the exact optimum among all ways to pick
    one candidate per prompt. With ``beta`` above 0 it draws candidates with probabilities proportional to
    ``exp(w . r / beta)``, the exact optimum under a KL penalty to picking uniformly.

    Args:
        rewards: ``(X, C, R)`` rewards of the candidates, normalised and non-negative; nan = no such candidate.
        beta: Weight of the KL penalty.
    """

    def __init__(self, rewards: Float64Array, beta: float = 0.0) -> None:
        if rewards.ndim != 3 or not len(rewards):
            raise ValueError(f"expected rewards of prompts, candidates and objectives (X, C, R), got {rewards.shape}")
        if not 0 <= beta < math.inf:
            raise ValueError(f"BestOfN.beta: expected a finite number >= 0, got {beta!r}")
        super().__init__(rewards.shape[2])
        self.beta = beta
        self.present: BoolArray = np.logical_not(np.isnan(rewards).any(axis=2))
        if not self.present.any(axis=1).all():
            raise ValueError("expected at least one candidate with all rewards for every prompt")
        self.rewards = np.where(self.present[..., None], rewards, 0.0)

    @property
    def max_reward(self) -> float:
        """Mean over prompts of the largest sum of rewards."""
        return float(np.where(self.present, self.rewards.sum(2), -np.inf).max(1).mean())

    @property
    def max_cost(self) -> float:
        """``beta ln C``."""
        return float(self.beta * np.log(self.rewards.shape[1]))

    def policies(self, weights: Float64Array) -> Float64Array:
        """Probability of each candidate under each policy, ``(V, R)`` -> ``(V, X, C)``."""
        scores = self._scores(weights)
        if self.beta == 0:
            picked: Float64Array = (np.arange(scores.shape[2]) == scores.argmax(2)[..., None]).astype(np.float64)
            return picked
        scores = np.exp((scores - scores.max(2, keepdims=True)) / self.beta)
        soft: Float64Array = scores / scores.sum(2, keepdims=True)
        return soft

    def _scores(self, weights: Float64Array) -> Float64Array:
        """Weighted reward of each candidate, minus infinity where there is none: ``(V, R)`` -> ``(V, X, C)``."""
        flat = self.rewards.reshape(-1, self.num_objectives)
        scores: Float64Array = (weights @ flat.T).reshape(len(weights), *self.present.shape)
        scores[:, ~self.present] = -np.inf
        return scores

    def _solve(self, weights: Float64Array) -> PolicySet:
        return self.measured(weights)

    def measured(self, weights: Float64Array) -> PolicySet:
        """The policies that ``solve`` makes for ``(V, R)``, on these prompts; not counted as calls."""
        return PolicySet.cat([self._solve_few(part) for part in self._parts(weights)])

    def _solve_few(self, weights: Float64Array) -> PolicySet:
        if self.beta == 0:
            picks = self._scores(weights).argmax(2)  # (V, X)
            rewards = self.rewards[np.arange(len(self.rewards)), picks].mean(1)
            return PolicySet(weights, rewards, np.zeros(len(weights)))
        chance = self.policies(weights)
        rewards = np.einsum("vxc,xcr->vr", chance, self.rewards) / len(self.rewards)
        entropy = -np.sum(chance * np.log(np.maximum(chance, 1e-300)), 2)
        costs = self.beta * (np.log(self.present.sum(1)) - entropy).mean(1)
        return PolicySet(weights, rewards, costs)

    def best_value(self, weights: Float64Array) -> Float64Array:
        """``J*_v`` of each weight vector, ``(V, R)`` -> ``(V,)``; not counted as calls."""
        best: Float64Array = np.einsum("vr,vr->v", weights, self.measured(weights).net)
        return best

    def _parts(self, weights: Float64Array) -> list[Float64Array]:
        """Weight vectors in groups that fit into memory."""
        step = max(1, _CHUNK // (self.rewards.shape[0] * self.rewards.shape[1]))
        return [weights[start : start + step] for start in range(0, len(weights), step)]


def unsolved(weights: Float64Array, solved: Float64Array) -> Float64Array:
    """The weight vectors ``(V, R)`` that are not among those solved ``(S, R)``, each once, in their order.

    >>> unsolved(np.array([[1.0, 0.0], [0.3, 0.7], [0.1 + 0.2, 0.7]]), np.array([[1.0, 0.0]])).tolist()
    [[0.3, 0.7]]
    """
    distinct = np.concatenate([solved, weights])
    count = len(solved)
    for row in weights:
        if not (np.abs(distinct[:count] - row).max(1) < _SAME).any():
            distinct[count] = row
            count += 1
    new: Float64Array = distinct[len(solved) : count]
    return new


def check_simplex(weights: Float64Array, num_objectives: int) -> None:
    """Check that weights are points of the simplex.

    Raises:
        ValueError: Naming the first bad row.
    """
    if weights.ndim != 2 or weights.shape[1] != num_objectives:
        raise ValueError(f"expected weights (V, {num_objectives}), got the shape {weights.shape}")
    is_valid = np.isfinite(weights).all(1) & (weights.min(1) >= -1e-9) & (np.abs(weights.sum(1) - 1) <= 1e-6)
    if not is_valid.all():
        row = int(np.argmin(is_valid))
        raise ValueError(
            f"expected non-negative weights that sum to 1, got {weights[row].tolist()!r} in row {row}; "
            "divide each row by its sum"
        )
