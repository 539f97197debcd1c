"""Log-probabilities of responses under the untrained model, as features of width one, so that they are cached as such.

Axes: N texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from plm.backbones.backbone import Backbone, Key, device
from plm.backbones.causal_lm import CausalLM, Completion, TooLong, completion_tokens
from plm.backbones.policy import Policy

BATCH_TOKENS = 4096


class ReferenceLogps(Backbone):
    """Summed log-probability of a response given its prompt under a `CausalLM` as it is loaded.

    Args:
        causal_lm: The model, as ``{class_path, init_args}``.
    """

    def __init__(self, causal_lm: dict[str, Any]) -> None:
        self.causal_lm = causal_lm
        self._backbone = cast(CausalLM, Backbone.from_spec(causal_lm))
        self._policy: Policy | None = None

    @staticmethod
    def check_precision(precision: str) -> None:
        """Refuse a policy that will be read in another precision than its cached reference was.

        Under mixed precision the policy's matrices are multiplied in bfloat16. Even a cache of such products would come
        from batches of other shapes, which round otherwise.

        Args:
            precision: ``trainer.precision``.

        Raises:
            ValueError: If it is a mixed one.
        """
        if precision != "32-true":
            raise ValueError(
                f"data.reference_logps: expected false with trainer.precision {precision!r}, got true: they are cached "
                "in the precision of the weights, so that policy and reference would differ before the first step; "
                "leave it out, then both are read alike, or set trainer.precision to 32-true and "
                "data.backbone.init_args.dtype to bfloat16"
            )

    @property
    def feature_dim(self) -> int:
        """One number per response."""
        return 1

    def key(self) -> Key:
        """The model and all that decides its tokens."""
        return {**self._backbone.key(), "pooling": "logps"}

    def render(self, prompt: str, response: str) -> str:
        """Both texts as a JSON list."""
        return json.dumps([prompt, response], ensure_ascii=False)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities ``(N, 1)``; zero for a prompt that leaves no room for a response."""
        rows: list[Completion | None] = []
        for text in texts:
            try:
                rows.append(self._backbone.completion(*json.loads(text)))
            except TooLong:
                rows.append(None)
        fitting = [index for index, row in enumerate(rows) if row is not None]
        fitting.sort(key=lambda index: sum(map(len, cast(Completion, rows[index]))), reverse=True)
        out = torch.zeros(len(texts), 1)
        if not fitting:
            return out
        if self._policy is None:
            self._policy = Policy(self._backbone).to(device())
        start = 0
        while start < len(fitting):
            longest = sum(map(len, cast(Completion, rows[fitting[start]])))
            part = fitting[start : start + max(1, BATCH_TOKENS // longest)]
            out[part, 0] = self._logps(self._policy, [cast(Completion, rows[index]) for index in part])
            start += len(part)
        return out

    @staticmethod
    @torch.no_grad()
    def _logps(policy: Policy, rows: Sequence[Completion]) -> Tensor:
        tokens = completion_tokens(rows).to(next(policy.parameters()).device)
        hidden, token, row = policy.completions(tokens)
        logps, _ = policy.token_logps(hidden, token)
        return logps.new_zeros(len(rows)).index_add(0, row, logps).cpu()

    def release(self) -> None:
        """Free the weights."""
        self._policy = None
