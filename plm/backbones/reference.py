"""Log-probabilities of responses under the untrained model, as features of width one, so that they are cached as such.

Axes: N texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from plm.backbones.backbone import Backbone, Key, device
from plm.backbones.causal_lm import CausalLM
from plm.backbones.policy import Policy
from plm.backbones.tokens import Completion, TooLong, batches_by_length, completion_tokens

BATCH_TOKENS = 4096


class ReferenceLogps(Backbone):
    """Summed log-probability of a response given its prompt under a `CausalLM` as it is loaded.

    Args:
        causal_lm: The model, as ``{class_path, init_args}``.
    """

    def __init__(self, causal_lm: dict[str, Any]) -> None:
        self.causal_lm = causal_lm
        self._backbone = cast(CausalLM, Backbone.from_spec(causal_lm))

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

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities ``(N, 1)``; zero for a prompt that leaves no room for a response."""
        fitting: list[tuple[int, Completion]] = []
        for index, text in enumerate(texts):
            with suppress(TooLong):
                fitting.append((index, self._backbone.completion(*json.loads(text))))
        out = torch.zeros(len(texts), 1)
        for batch in batches_by_length([sum(map(len, row)) for _, row in fitting], BATCH_TOKENS):
            places, rows = zip(*(fitting[place] for place in batch), strict=True)
            hidden, token, row = self._policy.completions(completion_tokens(rows).to(self._policy.device))
            logps, _ = self._policy.token_logps(hidden, token)
            out[list(places), 0] = logps.new_zeros(len(rows)).index_add(0, row, logps).cpu()
        return out

    @cached_property
    def _policy(self) -> Policy:
        """The model with its weights."""
        return Policy(self._backbone).to(device())

    def release(self) -> None:
        """Free the weights."""
        vars(self).pop("_policy", None)
