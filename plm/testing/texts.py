"""Planted users who compare texts, for methods that read tokens, and the contract for them.

Axes: U users, S pairs of one user, B pairs in a batch, D planted features, T tokens.
"""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from plm.backbones import FreshCausalLM
from plm.testing.contract import MethodContract
from plm.testing.planted import PlantedData
from plm.types import Context, PreferenceBatch, Tokens

PROMPT = 2
"""Token id of every prompt."""


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that lives as long as the process."""
    return tempfile.TemporaryDirectory()


@cache
def tiny_causal_lm(architecture: Literal["gpt2", "llama"] = "gpt2") -> FreshCausalLM:
    """A random language model of some ten thousand weights, made once per process."""
    lm = FreshCausalLM(
        f"{_folder().name}/{architecture}",
        architecture,
        vocab_size=300,
        width=16,
        num_layers=2,
        num_heads=2,
        max_positions=64,
    )
    lm.prepare(["a text of a few words, so that there is something to count"])
    return lm


class PlantedTexts(PlantedData):
    """`PlantedData` as texts: D tokens after the same prompt, of which token d is the sign of feature d.

    Args:
        num_users: Number of seen users.
        **options: See `PlantedData`.
    """

    view = "tokens"
    prompts_per_batch = 1  # there is one prompt, and all its pairs are in every batch

    def __init__(self, num_users: int = 6, **options: Any) -> None:
        super().__init__(num_users, **options)
        self.backbone_spec = tiny_causal_lm().spec()
        self.context = _context(self.context)
        for name in ("train_batch", "val_batch", "test_batch", "unseen_batch"):
            setattr(self, name, _batch(getattr(self, name)))
        self.unseen_batch = self.unseen_batch._replace(context=self.context)


def _tokens(features: Tensor | Tokens) -> Tokens:
    """``(..., D)`` -> tokens ``(..., 1 + D)``."""
    assert isinstance(features, Tensor)
    place = torch.arange(features.shape[-1])
    response = 3 + 2 * place + (features > 0)
    ids = torch.cat([torch.full_like(response[..., :1], PROMPT), response], -1)
    attended = torch.ones_like(ids, dtype=torch.bool)
    completion = attended.clone()
    completion[..., 0] = False
    return Tokens(ids, attended, completion)


def _context(context: Context) -> Context:
    return context._replace(chosen=_tokens(context.chosen), rejected=_tokens(context.rejected))


def _batch(batch: PreferenceBatch) -> PreferenceBatch:
    return batch._replace(chosen=_tokens(batch.chosen), rejected=_tokens(batch.rejected))


class TokenContract(MethodContract):
    """`MethodContract` of a method that reads tokens: ``make`` gives it ``tiny_causal_lm().spec()`` as backbone."""

    num_users = 5
    fit_epochs = 6

    def data(self) -> PlantedData:
        """Few users with few pairs: every step runs a language model."""
        return PlantedTexts(
            self.num_users, num_unseen=3, pairs_per_user=8, num_shots=4, num_test=4, feature_dim=self.feature_dim
        )
