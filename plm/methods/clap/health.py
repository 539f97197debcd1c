"""Measures whether a CLaP model works: sums over evaluated responses, and the numbers they give.

Axes: R responses, G prompts, Z latent width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ACTIVE = 0.01
"""A dimension is used if its posterior means vary more than this over texts (Burda et al. 2016, arXiv 1509.00519)."""

SCALARS = (
    "prompts",
    "responses",
    "tokens",
    "contrasted",
    "loss",
    "reconstruction",
    "kl",
    "contrast",
    "mutual_information",
    "log_num_responses",
    "correct",
    "chance",
    "gap",
    "tax",
)


class Health:
    """Sums in float64 over what was evaluated.

    Args:
        latent_dim: Latent width Z.
    """

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim
        self.clear()

    def clear(self) -> None:
        """Start from nothing."""
        self._scalars = dict.fromkeys(SCALARS, 0.0)
        self._moments = torch.zeros(2, self.latent_dim, dtype=torch.float64)

    def add(self, mean: Tensor, **sums: Tensor) -> None:
        """Add posterior means ``(R, Z)`` and sums under names of `SCALARS`."""
        mean = mean.double().cpu()
        self._moments = self._moments + torch.stack([mean.sum(0), mean.square().sum(0)])  # may be of inference mode
        for name, value in sums.items():
            self._scalars[name] += float(value)

    def numbers(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The report; nan where nothing was evaluated.

        Args:
            reduce: Sums a tensor over processes.
        """
        flat = torch.cat([torch.tensor(list(self._scalars.values()), dtype=torch.float64), self._moments.flatten()])
        flat = reduce(flat).cpu()
        total = dict(zip(SCALARS, flat[: len(SCALARS)].tolist(), strict=True))
        first, second = flat[len(SCALARS) :].view(2, -1) / max(total["responses"], 1.0)

        def ratio(name: str, over: str) -> float:
            return total[name] / total[over] if total[over] else float("nan")

        by_prompt = ("loss", "reconstruction", "kl", "contrast", "mutual_information", "log_num_responses")
        return {
            **{name: ratio(name, "prompts") for name in by_prompt},
            "active_units": float((second - first.square() > ACTIVE).sum()) if total["responses"] else float("nan"),
            "contrastive_accuracy": ratio("correct", "contrasted"),
            "contrastive_chance": ratio("chance", "contrasted"),
            "likelihood_gap": ratio("gap", "contrasted"),
            "fluency_tax": ratio("tax", "tokens"),
        }
