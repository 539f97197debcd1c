"""Options of CLaP: its two presets, each with its two stages, and what does not fit together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from plm.methods.clap.adapter import Placement

Preset = Literal["fast", "paper"]
KL = Literal["marginal", "joint", "ordinary"]


@dataclass(frozen=True)
class Options:
    """Everything `CLaP` can be told, as its class documents it; the defaults are those of the preset ``fast``."""

    latent_dim: int = 32
    num_queries: int = 4
    num_virtual_tokens: int = 4
    encoder_layers: int = 2
    prompt_in_posterior: bool = True
    fix_entropy: bool = False
    deterministic: bool = False
    train_embeddings: bool = False
    hidden_dim: int | None = None
    placement: Placement = "suffix"
    gated: bool = False
    kl: KL = "marginal"
    kl_weight: float = 0.1
    kl_draws: int = 16
    contrast_weight: float = 1.0
    num_negatives: int | None = 3
    skip: bool = True
    lr: float = 1e-3

    def problems(self) -> list[str]:
        """What is out of range, or contradicts something else."""
        found = [
            f"model.{name}: expected an integer >= 1, got {value!r}"
            for name in (
                "latent_dim",
                "num_queries",
                "num_virtual_tokens",
                "encoder_layers",
                "hidden_dim",
                "kl_draws",
                "num_negatives",
            )
            if (value := getattr(self, name)) is not None and not value >= 1
        ]
        found += [
            f"model.{name}: expected a number >= 0, got {getattr(self, name)!r}"
            for name in ("kl_weight", "contrast_weight", "lr")
            if not getattr(self, name) >= 0
        ]
        if not found and self.latent_dim % self.num_queries:
            found.append(
                f"model.latent_dim: expected a multiple of model.num_queries={self.num_queries}, each of which speaks "
                f"for its share, got {self.latent_dim!r}"
            )
        for name, values in (("placement", get_args(Placement)), ("kl", get_args(KL))):
            if getattr(self, name) not in values:
                found.append(f"model.{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")
        return found


def resolved(preset: Preset, unfreeze: bool, given: dict[str, object]) -> Options:
    """Options of a preset and a stage, with those given by hand in their place.

    Raises:
        ValueError: For whatever is unknown or out of range, in one message.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"model.preset: expected one of {', '.join(get_args(Preset))}, got {preset!r}")
    base = Options()
    if preset == "paper":
        base = replace(
            base,
            train_embeddings=True,
            placement="prefix",
            kl_weight=1.0,
            num_negatives=None,
            contrast_weight=1.0 if unfreeze else 0.0,
            skip=not unfreeze,
            lr=1e-4,
        )
    options = replace(base, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if problems := options.problems():
        raise ValueError("\n".join(problems))
    return options
