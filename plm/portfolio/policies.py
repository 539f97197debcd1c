"""PolicyPortfolio: a portfolio whose members are policies of one language model, distinguished by low-rank adapters.

Papers: arXiv 2604.04144 (PALM); Rame et al. 2023, arXiv 2306.04488 (soups); Shi et al. 2024, arXiv 2406.18853 (mixtures
of next-token distributions). Reference code: none is used.
Deviations: soups mix weight changes ``B_k A_k``, not B and A apart, which would add products of one adapter's B and
    another's A. Mixtures of distributions are normalised token by token; the optimum of the mixed objective, the
    product of whole-response probabilities, is normalised once: equal for responses of one token, near it for longer.

Axes: B texts, T tokens, n response tokens, V vocabulary, U users, S pairs of a user, R objectives, M members,
K adapters, P numbers of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from plm.backbones import Backbone, Completion, LoRA, MixedWriting, Policy, TargetModules, TextWriter, mixed_logits
from plm.functional import response_logps
from plm.method.abilities import Exporter
from plm.method.policy import PolicyMethod
from plm.portfolio.writing import WritingPortfolio
from plm.types import Tokens, UserState

Decoding = Literal["own", "merged", "logits"]

_PLACES = 1024  # places whose scores over the vocabulary are in memory at once


class PolicyPortfolio(WritingPortfolio, PolicyMethod, Exporter):
    """Few policies of one language model that serve everybody, distinguished by low-rank adapters.

    K adapters are kept, and M members, each a row of shares over the adapters.

    Args:
        num_users: Number of users.
        feature_dim: Number of objectives R.
        backbone: The `CausalLM`, as ``{class_path, init_args}``.
        objectives: A backbone whose features are the objectives of a response, as ``{class_path, init_args}``.
        decoding: How a member writes: ``own``, with the adapter of its largest share; ``merged``, with its mixture of
            weight changes, exact as a matrix; ``logits``, by its mixture of next-token distributions, which takes K
            times as long.
        rank: Rank of an adapter.
        alpha: An adapter's term is scaled by ``alpha / rank``.
        target_modules: Linear maps that are adapted, see `LoRA`.
        sharpness: Nats by which the best value of an objective raises the log-odds that a user chooses a response over
            one of the worst; for users who are inferred from pairs.
        prior_precision: Pull of a new user's weights to the mean user, in nats per pair.
        batch_tokens: Most tokens that are scored at once.
    """

    _of_any_length: ClassVar[tuple[str, ...]] = (*WritingPortfolio._of_any_length, "adapters", "mixture")

    adapters: Tensor
    mixture: Tensor

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None,
        objectives: dict[str, Any],
        decoding: Decoding = "own",
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: TargetModules = None,
        sharpness: float = 8.0,
        prior_precision: float = 0.1,
        batch_tokens: int = 16384,
    ) -> None:
        super().__init__(
            num_users=num_users, feature_dim=feature_dim, backbone=backbone, lr=0.0, batch_tokens=batch_tokens
        )
        if decoding not in ("own", "merged", "logits"):
            raise ValueError(f"decoding: expected own, merged or logits, got {decoding!r}")
        self.check_users(sharpness, prior_precision)
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens!r}")
        self.decoding, self.sharpness, self.prior_precision = decoding, sharpness, prior_precision
        self.rank, self.alpha, self.target_modules = rank, alpha, target_modules
        self.num_objectives = feature_dim
        self.objectives = Backbone.from_spec(objectives)
        if self.objectives.feature_dim != feature_dim:
            raise ValueError(f"expected {feature_dim} objectives, got {self.objectives.feature_dim}")
        self.add_portfolio()

    def build(self, policy: Policy) -> None:
        """Make room for adapters; there is no member yet."""
        self.shape: LoRA = policy.add_lora(self.rank, self.alpha, self.target_modules)
        self.register_buffer("adapters", torch.zeros(0, self.shape.num_parameters))
        self.register_buffer("mixture", torch.zeros(0, 0))

    # ------------------------------------------------------------------ members
    @torch.no_grad()
    def extend(self, adapters: Tensor, mixture: Tensor) -> Tensor:
        """Add adapters ``(k, P)``, then members with shares ``(m, K)`` of all K; returns their numbers ``(m,)``."""
        num_members, num_adapters = self.mixture.shape
        self.adapters = torch.cat([self.adapters, adapters.to(self.adapters)])
        old = torch.nn.functional.pad(self.mixture, (0, len(self.adapters) - num_adapters))
        self.mixture = torch.cat([old, mixture.to(self.mixture)])
        return torch.arange(num_members, len(self.mixture))

    def add(self, rows: Tensor) -> Tensor:
        """Add members ``(m, P)``, each with an adapter of its own.

        Raises:
            ValueError: If members are mixtures.
        """
        if self.decoding != "own":
            raise ValueError(f"expected a portfolio of decoding own, got {self.decoding!r}")
        return self.extend(rows, torch.eye(len(self.adapters) + len(rows))[len(self.adapters) :])

    @torch.no_grad()
    def keep(self, members: Sequence[int]) -> None:
        """Forget all but these members, in this order, and the adapters that nobody uses any more."""
        mixture = self.mixture[torch.as_tensor(members, device=self.device)]
        used = (mixture != 0).any(0)
        self.adapters, self.mixture = self.adapters[used], mixture[:, used]

    def _terms(self, shares: Tensor) -> list[Tensor]:
        """Adapters ``(B, P)`` whose terms together steer B texts, from their shares ``(B, K)``."""
        if self.decoding == "own":
            return [self.adapters[shares.argmax(1)]]
        return [
            self.shape.weighed(adapter.expand(len(shares), -1), share)
            for adapter, share in zip(self.adapters, shares.unbind(1), strict=True)
        ]

    # ------------------------------------------------------------------ text
    @property
    def unaligned(self) -> Policy:
        """The language model as it is."""
        return self.policy

    def writing(self, users: UserState, prompts: Sequence[str]) -> TextWriter:
        """A batch of texts, each written by the member of its user."""
        shares = self.mixture[users.tensors["member"].to(self.device)]
        if self.decoding == "logits":
            return MixedWriting([self.policy.write(one) for one in torch.split(self.adapters, 1)], shares)
        return self.policy.write(*self._terms(shares))

    @torch.no_grad()
    def member_logps(self, tokens: Tokens, member: Tensor) -> Tensor:
        """Log-probability ``(B,)`` of B responses, each under its member ``(B,)``, at temperature 1."""

        def read(part: Tokens, rows: Tensor) -> Tensor:
            shares = self.mixture[member[rows].to(self.device)]
            if self.decoding == "logits":
                return self._mixed_logps(part, shares)
            return self.logps(part, *self._terms(shares)).total

        return self.in_chunks(tokens, read)

    def log_ratios(self, tokens: Tokens, member: int) -> Tensor:
        """Log-likelihood ratio ``(B,)`` of B responses, a member against the language model as it is, in nats."""
        device = tokens.input_ids.device
        member_logps = self.member_logps(tokens, torch.full((tokens.num_rows,), member, device=device))
        return member_logps - self.total_logps(tokens)

    def _mixed_logps(self, tokens: Tokens, shares: Tensor) -> Tensor:
        hidden = []
        for adapter in torch.split(self.adapters, 1):
            with self.policy.adapted(adapter):
                read, token, row = self.policy.completions(tokens)
                hidden.append(read)
        parts = [
            mixed_logits([self.policy.logits(states[at]) for states in hidden], shares[row[at]])
            .log_softmax(-1)
            .gather(1, token[at, None])[:, 0]
            for at in torch.split(torch.arange(len(row), device=row.device), _PLACES)
        ]
        return response_logps(torch.cat(parts), row, tokens.num_rows).total

    def export(self, folder: str | Path, user: UserState) -> None:
        """Write the member of one user as a PEFT folder.

        Raises:
            ValueError: If members are mixtures of distributions, which no single adapter is.
        """
        if self.decoding == "logits":
            raise ValueError(
                "a mixture of next-token distributions is no single adapter and cannot be exported; write with plm "
                "generate"
            )
        terms = self._terms(self.mixture[user.tensors["member"].to(self.device)])
        self.shape.save([term[0] for term in terms], folder, self.causal_lm.model)

    # ------------------------------------------------------------------ users
    def read(self, responses: Tensor | Tokens) -> Tensor:
        """Objectives ``(B, R)`` of B responses, which come as such or as tokens."""
        return self.read_tokens(responses) if isinstance(responses, Tokens) else responses

    def read_tokens(self, tokens: Tokens) -> Tensor:
        """Objectives ``(B, R)`` of B responses."""
        columns = tokens.input_ids.cpu(), tokens.attention_mask.cpu(), tokens.completion_mask.cpu()
        prompts, responses = [], []
        for ids, attended, is_response in zip(*columns, strict=True):
            prompt = ids[attended & ~is_response].tolist()
            prompts.append(self.causal_lm.response_text(Completion([], prompt)))
            responses.append(self.causal_lm.response_text(Completion(prompt, ids[is_response].tolist())))
        read = self.objectives.represent(prompts, responses)
        assert isinstance(read, Tensor)
        return read.to(self.device)
