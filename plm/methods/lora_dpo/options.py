"""Options of the losses: their names and constants, and what does not fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from plm.messages import nearest

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "conservative",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "discopop",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
    "sft",
]
"""TRL's names, and ``conservative``: TRL's sigmoid has no label smoothing."""

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

SMOOTHED = frozenset({"conservative", "robust", "exo_pair", "aot", "aot_unpaired"})
"""Losses that read ``label_smoothing``."""

SORTING = frozenset({"aot", "aot_unpaired"})
"""Losses that hold a pair against others."""

REVERSE_KL_ONLY = SORTING | {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"}
"""Losses that are not functions of a difference of rewards, hence without an f-divergence."""


@dataclass(frozen=True)
class LossOptions:
    """Which losses, and their constants, under the names of TRL's DPOConfig."""

    loss_type: tuple[LossType, ...] = ("sigmoid",)
    """Several are added."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each; None = 1."""
    beta: float = 0.1
    """Strength of the pull to the reference; for ipo the paper's tau."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels; read by conservative, robust, exo_pair, aot and aot_unpaired."""
    f_divergence_type: Divergence = "reverse_kl"
    """What ties the policy to the reference, f-DPO (arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """``a`` of alpha_divergence: 1 is reverse_kl, 0 is forward_kl."""
    discopop_tau: float = 0.05
    """Temperature of discopop's blend."""
    ld_alpha: float | None = None
    """LD-DPO's weight of tokens past the shorter response, see `pair_totals`."""
    use_weighting: bool = False
    """WPO: multiply each pair's loss by `PairLogps.wpo_weight`."""

    def problems(self) -> list[str]:
        """What is unknown, out of range, without effect, or contradicts something else."""
        names, divergences = get_args(LossType), get_args(Divergence)
        found = [_unknown("loss_type", name, names) for name in self.loss_type if name not in names]
        if not self.loss_type:
            found.append("model.loss_type: expected at least one loss, got none; the usual one is 'sigmoid'")
        if self.f_divergence_type not in divergences:
            found.append(_unknown("f_divergence_type", self.f_divergence_type, divergences))
        return found or self._out_of_range() + self._contradictions()

    def _out_of_range(self) -> list[str]:
        """Numbers that no loss can work with."""
        found = []
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            found.append(
                f"model.loss_weights: expected one weight for each of {', '.join(self.loss_type)}, "
                f"got {list(self.loss_weights)!r}"
            )
        for name in ("beta", "discopop_tau"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                found.append(f"model.{name}: expected a number > 0, got {value!r}")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(
                f"model.label_smoothing: expected a share of flipped labels in [0, 0.5), got {self.label_smoothing!r}; "
                "at one half labels say nothing"
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            found.append(f"model.ld_alpha: expected a number in [0, 1] or null, got {self.ld_alpha!r}")
        if not math.isfinite(self.f_alpha_divergence_coef):
            found.append(
                f"model.f_alpha_divergence_coef: expected a finite number, got {self.f_alpha_divergence_coef!r}"
            )
        return found

    def _contradictions(self) -> list[str]:
        """Settings without effect, and losses that cannot be had together with something else."""
        names: set[str] = set(self.loss_type)
        found = []
        if self.label_smoothing and not names & SMOOTHED:
            found.append(
                f"model.label_smoothing acts only on {', '.join(sorted(SMOOTHED))}; got {self.label_smoothing!r} with "
                f"model.loss_type {', '.join(self.loss_type)}. The sigmoid loss with smoothed labels is 'conservative'"
            )
        if "exo_pair" in names and self.label_smoothing == 0:
            found.append(
                f"model.label_smoothing: expected a number > 0 for exo_pair, which takes its logarithm, got "
                f"{self.label_smoothing!r}; the paper advises 0.001"
            )
        if self.discopop_tau != LossOptions.discopop_tau and "discopop" not in names:
            found.append(f"model.discopop_tau acts only on discopop, got {self.discopop_tau!r}")
        is_alpha = self.f_divergence_type == "alpha_divergence"
        if self.f_alpha_divergence_coef != LossOptions.f_alpha_divergence_coef and not is_alpha:
            found.append(
                f"model.f_alpha_divergence_coef acts only with model.f_divergence_type alpha_divergence, got "
                f"{self.f_alpha_divergence_coef!r}"
            )
        if self.f_divergence_type != "reverse_kl" and (single := sorted(names & REVERSE_KL_ONLY)):
            found.append(
                f"model.f_divergence_type: expected reverse_kl with {', '.join(single)}, got "
                f"{self.f_divergence_type!r}: another divergence leaves a constant of the prompt in each reward, which "
                "cancels only in losses of the difference of both"
            )
        if self.use_weighting and (sorts := sorted(names & SORTING)):
            found.append(
                f"model.use_weighting: expected false with {', '.join(sorts)}, which sort pairs so that a weight would "
                "meet another pair, got true"
            )
        return found


def _unknown(option: str, name: str, valid: Sequence[str]) -> str:
    """The message about a name that does not exist."""
    return f"model.{option}: expected one of {', '.join(valid)}, got {name!r}{nearest(name, valid)}"
