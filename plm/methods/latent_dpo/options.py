"""Options of Latent DPO: the three presets, and what does not fit together."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, get_args

from plm.methods.latent_dpo.families import FamilyName, Variance
from plm.methods.latent_dpo.rules import POOLED, SAMPLED, RuleName

Preset = Literal["fast", "paper", "newton"]


@dataclass(frozen=True)
class Options:
    """Everything `LatentDPO` can be told, as its class documents it; the defaults are those of the preset ``fast``."""

    family: FamilyName = "mlp"
    hidden_dim: int = 128
    variance: Variance = "unit"
    rule: RuleName = "closed_form"
    beta: float = 0.1
    kl_coef: float = 0.01
    num_samples: int = 16
    evidence_ratio: float = 0.5
    posterior_draws: bool = True
    marginal: bool = False
    batch_size: int = 64
    num_steps: int = 200
    warmup: float = 0.0
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    patience: int = 0
    lr: float = 1e-3
    latent_temperature: float = 1.0
    max_latent_norm: float | None = None

    @property
    def pairs_per_step(self) -> int:
        """Most pairs of a user in a step; an exact solution reads all."""
        return sys.maxsize if self.rule == "newton" else self.batch_size

    def problems(self) -> list[str]:
        """What is out of range, or contradicts something else."""
        found = [
            f"model.{name}: expected an integer >= 1, got {getattr(self, name)!r}"
            for name in ("hidden_dim", "num_samples", "batch_size")
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        names = {"family": FamilyName, "variance": Variance, "rule": RuleName}
        found += [
            f"model.{name}: expected one of {', '.join(get_args(valid))}, got {getattr(self, name)!r}"
            for name, valid in names.items()
            if getattr(self, name) not in get_args(valid)
        ]
        found += [
            f"model.{name}: expected a finite number >= 0, got {getattr(self, name)!r}"
            for name in ("kl_coef", "num_steps", "clip_norm", "weight_decay", "patience", "lr", "latent_temperature")
            if not 0 <= getattr(self, name) < math.inf
        ]
        if self.max_latent_norm is not None and not self.max_latent_norm > 0:
            found.append(f"model.max_latent_norm: expected a number > 0 or null, got {self.max_latent_norm!r}")
        if not 0 < self.beta < math.inf:
            found.append(f"model.beta: expected a finite number > 0, got {self.beta!r}")
        if not 0 < self.evidence_ratio <= 1:
            found.append(f"model.evidence_ratio: expected a share in (0, 1], got {self.evidence_ratio!r}")
        if not 0 <= self.warmup <= 1:
            found.append(f"model.warmup: expected a share in [0, 1], got {self.warmup!r}")
        if self.rule == "newton":
            wanted = {"family": "vector", "variance": "unit"}
            found += [
                f"model.{name}: expected {value} with model.rule newton, got {getattr(self, name)!r}"
                for name, value in wanted.items()
                if getattr(self, name) != value
            ]
            if self.kl_coef == 0:
                found.append("model.kl_coef: expected a number > 0 with model.rule newton, whose ridge it is, got 0")
        return found

    def without_effect(self, given: set[str]) -> list[str]:
        """Names in ``given`` that do nothing beside the others, with what they need."""
        stepped = {"batch_size", "num_steps", "warmup", "clip_norm", "weight_decay", "patience", "lr"}
        needs = {
            "hidden_dim": ("model.family mlp", self.family == "mlp"),
            "num_samples": ("a model.rule that samples", self.rule in SAMPLED),
            "evidence_ratio": ("model.rule evidence", self.rule == "evidence"),
            "posterior_draws": ("a model.rule with a pool", self.rule in POOLED),
            "marginal": ("a model.rule that samples", self.rule in SAMPLED),
            **{name: ("another model.rule than newton", self.rule != "newton") for name in stepped},
        }
        return [
            f"model.{name} acts only with {what}, got {getattr(self, name)!r}"
            for name, (what, acts) in needs.items()
            if name in given and not acts
        ]


PRESETS = {
    "fast": Options(),
    "paper": Options(
        family="full",
        variance="free",
        rule="evidence",
        kl_coef=0.0,
        num_steps=0,
        warmup=0.1,
        patience=10,
        lr=1e-4,
        latent_temperature=0.0,
    ),
    "newton": Options(family="vector", rule="newton"),
}
"""``paper``: the released variant A for GPT-2."""
