"""Policies of a language model for any weight vector, measured by what they write.

Axes: V weight vectors, R objectives, M policies, X prompts, N texts of a policy on a prompt, P numbers of one adapter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plm.arrays import Float64Array
from plm.backbones import Completion, completion_tokens
from plm.generation import Sample, sample
from plm.messages import Problems
from plm.methods.palm.oracle import Oracle, PolicySet, unsolved
from plm.portfolio.policies import PolicyPortfolio
from plm.portfolio.writing import WritingPortfolio
from plm.types import UserState


class PolicyOracle(Oracle):
    """Makes members of a `WritingPortfolio` and measures rewards and KL of what they write on fixed prompts.

    ``error`` is what can be seen of it: the most by which another policy was better, at the weights that a policy was
    made for. It is an estimate from below, and certificates hold as far as it is right.

    Args:
        portfolio: Takes the members; its objectives are calibrated to [0, 1].
        prompts: X prompts, the same for all policies.
        beta: What a nat of KL from the unaligned policy costs.
        num_samples: N.
        max_new_tokens: Tokens after which a text is cut.
        seed: Seed of the texts; all policies write with the same.
    """

    def __init__(
        self,
        portfolio: WritingPortfolio,
        prompts: Sequence[str],
        *,
        beta: float = 0.0,
        num_samples: int = 4,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        problems = Problems(f"{type(self).__name__}.")
        problems.at_least(1, num_samples=num_samples, max_new_tokens=max_new_tokens)
        problems.numbers(beta=beta)
        problems.say(f"{problems.prefix}prompts: expected some to measure on, got none", when=not prompts)
        problems.check()
        super().__init__(portfolio.num_objectives)
        self.portfolio, self.prompts, self.beta = portfolio, list(prompts), beta
        self.num_samples, self.max_new_tokens, self.seed = num_samples, max_new_tokens, seed
        none = np.zeros((0, self.num_objectives))
        self.solved = PolicySet(none, none, np.zeros(0))
        self.divergence: Float64Array = np.zeros(0)
        """``(M,)`` KL of every policy made so far from the unaligned one, in nats per response."""

    @abstractmethod
    def _make(self, weights: Float64Array) -> Tensor:
        """Add a member for each weight vector ``(V, R)``; their numbers ``(V,)``."""

    @property
    def max_reward(self) -> float:
        """R: every calibrated objective is at most 1."""
        return float(self.num_objectives)

    @property
    def max_cost(self) -> float:
        """The largest cost among the policies made so far."""
        return float(self.solved.costs.max(initial=0.0))

    def members_for(self, weights: Float64Array) -> list[int]:
        """Numbers of the members made for weight vectors ``(V, R)``, all of them solved."""
        assert not len(unsolved(weights, self.solved.weights))
        apart = np.abs(self.solved.weights[None] - weights[:, None]).max(2)
        return [int(row) for row in apart.argmin(1)]

    def _solve(self, weights: Float64Array) -> PolicySet:
        new = unsolved(weights, self.solved.weights)
        if len(new):
            rewards, divergence = self.measured(self._make(new))
            self.divergence = np.concatenate([self.divergence, divergence])
            self.solved = PolicySet.cat([self.solved, PolicySet(new, rewards, self.beta * np.maximum(divergence, 0))])
            values = self.solved.values(self.solved.weights)  # (W, M), a policy for each weight vector
            self.error = float((values.max(1) - values.diagonal()).max())
        return self.solved.take(self.members_for(weights))

    def _texts(self, members: Tensor) -> list[list[list[Sample]]]:
        options = {"max_new_tokens": self.max_new_tokens, "num_samples": self.num_samples, "seed": self.seed}
        return written(self.portfolio, members, self.prompts, **options)

    @torch.no_grad()
    def measured(self, members: Tensor) -> tuple[Float64Array, Float64Array]:
        """Mean objectives ``(M, R)`` and KL ``(M,)`` of members ``(M,)``."""
        rewards, divergence = [], []
        for member, rows in zip(members.tolist(), self._texts(members), strict=True):
            prompts = [prompt for prompt, row in zip(self.prompts, rows, strict=True) for _ in row]
            texts = [text for row in rows for text in row]
            objectives = self.portfolio.objectives.represent(prompts, [text.text for text in texts])
            assert isinstance(objectives, Tensor)
            rewards.append(objectives.double().mean(0).numpy())
            backbone = self.portfolio.unaligned.backbone
            tokens = completion_tokens(
                [
                    Completion(backbone.prompt_tokens(prompt), list(text.token_ids))
                    for prompt, text in zip(prompts, texts, strict=True)
                ]
            ).to(self.portfolio.device)
            divergence.append(float(self.portfolio.log_ratios(tokens, member).double().mean()))
        return np.stack(rewards), np.array(divergence)


def written(
    portfolio: WritingPortfolio, members: Tensor, prompts: Sequence[str], **settings: Any
) -> list[list[list[Sample]]]:
    """Let members ``(M,)`` write on X prompts, see `plm.generation.sample`: M x X x N texts."""
    member = members.repeat_interleave(len(prompts))
    texts = sample(
        portfolio, list(prompts) * len(members), UserState({"member": member}, torch.zeros_like(member)), **settings
    )
    return [texts[start : start + len(prompts)] for start in range(0, len(texts), len(prompts))]


class MixedPolicies(PolicyOracle):
    """Mixtures of single-objective policies: no training for a weight vector, whatever their number.

    By the portfolio's ``decoding`` these are mixtures of weight changes (merged) or of distributions (logits).

    Args:
        portfolio: Takes the members.
        adapters: ``(R, P)``, one for each objective.
        prompts: See `PolicyOracle`.
        **options: See `PolicyOracle`.
    """

    def __init__(self, portfolio: PolicyPortfolio, adapters: Tensor, prompts: Sequence[str], **options: Any) -> None:
        super().__init__(portfolio, prompts, **options)
        if len(adapters) != self.num_objectives or portfolio.decoding == "own":
            raise ValueError(
                f"expected an adapter of each of {self.num_objectives} objectives and decoding merged or logits, got "
                f"{len(adapters)} adapters and decoding {portfolio.decoding!r}"
            )
        self.mixed = portfolio
        portfolio.extend(adapters, torch.zeros(0, self.num_objectives))

    def _make(self, weights: Float64Array) -> Tensor:
        return self.mixed.extend(self.mixed.adapters[:0], torch.as_tensor(weights))


class TrainedPolicies(PolicyOracle):
    """A policy trained for every weight vector, those of one call together.

    Args:
        portfolio: Takes the members.
        train: Weight vectors ``(V, R)`` -> rows that make members ``(V, P)``, such as adapters.
        prompts: See `PolicyOracle`.
        **options: See `PolicyOracle`.
    """

    def __init__(
        self,
        portfolio: WritingPortfolio,
        train: Callable[[Float64Array], Tensor],
        prompts: Sequence[str],
        **options: Any,
    ) -> None:
        super().__init__(portfolio, prompts, **options)
        self.train = train

    def _make(self, weights: Float64Array) -> Tensor:
        return self.portfolio.add(self.train(weights))
