"""Options of VPL: the two presets, and what does not fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plm.methods.vpl.episodes import TargetRule
from plm.methods.vpl.networks import Anneal, Bounds

Preset = Literal["default", "paper"]
PairFeatures = Literal["odd_even", "concat"]
PosteriorKind = Literal["product", "attention"]
LatentMap = Literal["same", "sphere", "sphere_in_training"]
DecoderKind = Literal["bilinear", "film", "concat"]


@dataclass(frozen=True)
class Options:
    """Everything `VPL` can be told, as its class documents it; the defaults are those of the preset ``default``."""

    latent_dim: int = 16
    hidden_dim: int = 64
    pair_features: PairFeatures = "odd_even"
    posterior: PosteriorKind = "product"
    latent_map: LatentMap = "same"
    bounds: Bounds = "smooth"
    decoder: DecoderKind = "film"
    kl_weight: float = 0.3
    free_bits: float = 0.1
    anneal: Anneal = "linear"
    anneal_steps: int = 100
    cyclical: bool = False
    swap_guide: float = 0.0
    num_samples: int = 4
    target_rule: TargetRule = "response"
    min_context: int = 0
    max_context: int = 64
    num_targets: int = 32
    calibrate: bool = True
    ridge: float = 0.06
    basis_ridge: float = 1.0
    weight_decay: float = 0.0
    lr: float = 0.005

    def problems(self) -> list[str]:
        """What is out of range, or contradicts something else."""
        counts = ("latent_dim", "hidden_dim", "anneal_steps", "num_samples", "max_context", "num_targets")
        shares = ("kl_weight", "free_bits", "swap_guide", "min_context", "ridge", "basis_ridge", "weight_decay", "lr")
        found = [
            f"model.{name}: expected an integer >= 1, got {getattr(self, name)!r}"
            for name in counts
            if not getattr(self, name) >= 1
        ]
        found += [
            f"model.{name}: expected a number >= 0, got {getattr(self, name)!r}"
            for name in shares
            if not getattr(self, name) >= 0
        ]
        if self.min_context > self.max_context:
            found.append(
                f"model.min_context: expected at most model.max_context = {self.max_context}, got {self.min_context!r}"
            )
        if self.swap_guide and self.pair_features == "odd_even":
            found.append(
                "model.swap_guide acts only with model.pair_features concat: with odd_even a swapped pair says the "
                f"opposite by construction; got {self.swap_guide!r}"
            )
        if self.min_context and self.target_rule == "response":
            found.append(
                "model.min_context acts only with model.target_rule rest or any: with response the context of an "
                f"episode is whatever falls on its side; got {self.min_context!r}"
            )
        return found


PRESETS = {
    "default": Options(),
    "paper": Options(
        latent_dim=512,
        hidden_dim=512,
        pair_features="concat",
        posterior="attention",
        latent_map="sphere_in_training",
        bounds="clamp",
        decoder="concat",
        kl_weight=3e-6,
        free_bits=0.0,
        anneal="cosine",
        anneal_steps=10_000,
        cyclical=True,
        num_samples=1,
        target_rule="any",
        min_context=2,
        max_context=8,
        num_targets=1,
        calibrate=False,
        ridge=0.0,
        basis_ridge=0.0,
        weight_decay=1e-3,
        lr=1e-4,
    ),
}
"""``paper``: UF-P-4 of the published scripts, on cached features instead of a language model trained by LoRA."""
