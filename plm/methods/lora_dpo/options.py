"""Options of the losses: their names and constants, and what does not fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from plm.messages import Problems

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
    """Which losses, and their constants, under the names of TRL's DPOConfig; `LoRADPO` says what each means."""

    loss_type: tuple[LossType, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    use_weighting: bool = False

    def problems(self) -> list[str]:
        """What is unknown, out of range, without effect, or contradicts something else."""
        problems = Problems("model.")
        for name in self.loss_type:
            problems.choices(loss_type=(name, get_args(LossType)))
        problems.choices(f_divergence_type=(self.f_divergence_type, get_args(Divergence)))
        none_chosen = "model.loss_type: expected at least one loss, got none; the usual one is 'sigmoid'"
        problems.say(none_chosen, when=not self.loss_type)
        if not problems.found:
            self._check_ranges(problems)
            self._check_combinations(problems)
        return problems.found

    def _check_ranges(self, problems: Problems) -> None:
        """Note numbers that no loss can work with."""
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            problems.add("loss_weights", f"one weight for each of {', '.join(self.loss_type)}", list(self.loss_weights))
        for name, value in {"beta": self.beta, "discopop_tau": self.discopop_tau}.items():
            if not 0 < value < math.inf:
                problems.add(name, "a number > 0", value)
        if not 0 <= self.label_smoothing < 0.5:
            advice = "; at one half labels say nothing"
            problems.add("label_smoothing", "a share of flipped labels in [0, 0.5)", self.label_smoothing, advice)
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            problems.add("ld_alpha", "a number in [0, 1] or null", self.ld_alpha)
        if not math.isfinite(self.f_alpha_divergence_coef):
            problems.add("f_alpha_divergence_coef", "a finite number", self.f_alpha_divergence_coef)

    def _check_combinations(self, problems: Problems) -> None:
        """Note settings without effect, and losses that cannot be had together with something else."""
        names: set[str] = set(self.loss_type)
        problems.say(
            f"model.label_smoothing acts only on {', '.join(sorted(SMOOTHED))}; got {self.label_smoothing!r} with "
            f"model.loss_type {', '.join(self.loss_type)}. The sigmoid loss with smoothed labels is 'conservative'",
            when=bool(self.label_smoothing) and not names & SMOOTHED,
        )
        if "exo_pair" in names and self.label_smoothing == 0:
            expected = "a number > 0 for exo_pair, which takes its logarithm"
            problems.add("label_smoothing", expected, self.label_smoothing, "; the paper advises 0.001")
        problems.say(
            f"model.discopop_tau acts only on discopop, got {self.discopop_tau!r}",
            when=self.discopop_tau != LossOptions.discopop_tau and "discopop" not in names,
        )
        problems.say(
            f"model.f_alpha_divergence_coef acts only with model.f_divergence_type alpha_divergence, got "
            f"{self.f_alpha_divergence_coef!r}",
            when=self.f_alpha_divergence_coef != LossOptions.f_alpha_divergence_coef
            and self.f_divergence_type != "alpha_divergence",
        )
        if self.f_divergence_type != "reverse_kl" and (single := sorted(names & REVERSE_KL_ONLY)):
            advice = (
                ": another divergence leaves a constant of the prompt in each reward, which cancels only in losses of "
                "the difference of both"
            )
            problems.add("f_divergence_type", f"reverse_kl with {', '.join(single)}", self.f_divergence_type, advice)
        if self.use_weighting and (sorts := sorted(names & SORTING)):
            expected = f"false with {', '.join(sorts)}, which sort pairs so that a weight would meet another pair"
            problems.add("use_weighting", expected, True)
