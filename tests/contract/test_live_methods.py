"""PAL and VPL on a live backbone pass the contract, whatever of the backbone is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plm.method import PersonalizationMethod
from plm.methods.pal import LivePAL
from plm.methods.vpl.live import LiveVPL
from plm.testing import PlantedData, TokenContract, tiny_causal_lm
from plm.types import Tokens

WIDTH = tiny_causal_lm().feature_dim


class TestLivePAL(TokenContract):
    options: dict[str, Any] = {}  # noqa: RUF012

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        common: dict[str, Any] = {"num_prototypes": 3, "rank": 2, "backbone_lr": 1e-3, "lr": 0.05}
        spec = tiny_causal_lm().spec()
        return LivePAL(num_users=num_users, feature_dim=WIDTH, backbone=spec, **{**common, **self.options})


class TestLivePALFrozen(TestLivePAL):
    options = {"train_backbone": "none", "head": "dist", "loss": "hinge", "weighting": "mean"}  # noqa: RUF012


class TestLivePALFull(TestLivePAL):
    options = {"train_backbone": "full", "residual": "bradley_terry", "weighting": "last"}  # noqa: RUF012


class TestLivePALPrompts(TestLivePAL):
    options = {"variant": "B", "head": "angle", "alignment": "token", "gradient_checkpointing": True}  # noqa: RUF012

    def data(self) -> PlantedData:
        return with_prompts(super().data())


class TestLiveVPL(TokenContract):
    options: dict[str, Any] = {}  # noqa: RUF012

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        common: dict[str, Any] = {"latent_dim": 4, "hidden_dim": 8, "rank": 2, "backbone_lr": 1e-3, "lr": 0.02}
        spec = tiny_causal_lm().spec()
        return LiveVPL(num_users=num_users, feature_dim=WIDTH, backbone=spec, **{**common, **self.options})


class TestLiveVPLFrozen(TestLiveVPL):
    options = {"train_backbone": "none", "decoder": "bilinear"}  # noqa: RUF012


class TestLiveVPLFull(TestLiveVPL):
    options = {"train_backbone": "full", "target_rule": "rest", "gradient_checkpointing": True}  # noqa: RUF012


def with_prompts(data: PlantedData) -> PlantedData:
    """The same texts, whose prompts are known alone, too; every other pair has another one."""
    data.context = data.context._replace(prompt=_prompts(data.context.mask))
    for name in ("train_batch", "val_batch", "test_batch", "unseen_batch"):
        batch = getattr(data, name)
        context = None if batch.context is None else data.context
        setattr(data, name, batch._replace(prompt=_prompts(batch.tie | True), context=context))
    return data


def _prompts(real: Tensor) -> Tokens:
    """Prompts ``(..., 2)`` of as many pairs."""
    second = torch.arange(real.numel()).view(real.shape) % 2
    ids = torch.stack([torch.full_like(second, 2), 3 + second], -1) * real[..., None]
    attended = (ids > 0) | torch.zeros_like(ids, dtype=torch.bool)
    return Tokens(ids, attended, torch.zeros_like(attended))
