"""Bradley-Terry: one reward for everybody, the baseline every personal method must beat.

Paper: Bradley & Terry, "Rank analysis of incomplete block designs" (Biometrika 39, 1952).
Reference code: none.
Deviations: the ridge is tuned, because an untuned baseline is easily beaten: all candidates train side by side as
    columns of one matrix, and validation picks the column.

Axes: B pairs, D feature width, R candidate ridges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from plm.functional import bt_losses, project, targets
from plm.method.linear import LinearMethod
from plm.method.population import RIDGES
from plm.method.shared import SharedMethod
from plm.types import PreferenceBatch, Tokens, UserState


def ridge_losses(margins: Tensor, directions: Tensor, batch: PreferenceBatch, ridges: Tensor, num_pairs: int) -> Tensor:
    """Penalised loss of every candidate: ``(B, R)``, ``(D, R)``, ``(R,)`` -> ``(R,)``.

    ``mean_n weight_n * bt(margin_n) + ridge * |direction|^2 / (2 * num_pairs)``: the negative log posterior under a
    normal prior of precision ``ridge``, divided by the number of training pairs.
    """
    losses = bt_losses(margins.T, targets(batch.tie).to(margins))  # (R, B)
    return (batch.weight * losses).mean(-1) + 0.5 * ridges * directions.square().sum(0) / num_pairs


class BradleyTerry(SharedMethod, LinearMethod):
    """One linear reward for all users, ridge-tuned on validation pairs.

    Args:
        ridges: Precisions of the normal prior on the direction, tried side by side; features count in units of the
            root mean square difference of a training pair.
        anchor: Whether the prior is centred at the backbone's own reward head (times a learned scale) instead of zero.
        lr: Learning rate of Adam.
        **options: See `PersonalizationMethod`.
    """

    search_space: ClassVar[dict[str, list[Any]]] = {
        "lr": [0.03, 0.1, 0.3],
        "ridges": [
            [0.001, 0.01, 0.1, 1.0, 10.0],
            [0.03, 0.3, 3.0, 30.0],
            [0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
            [1.0, 10.0, 100.0, 1000.0],
        ],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        ridges: Sequence[float] = RIDGES,
        anchor: bool = False,
        lr: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_users, feature_dim, lr=lr, **options)
        if not ridges or min(ridges) < 0:
            raise ValueError(f"model.ridges: expected numbers >= 0, at least one, got {list(ridges)!r}")
        self.ridges: Tensor
        self.chosen_ridge: Tensor
        self.directions = torch.nn.Parameter(torch.zeros(feature_dim, len(ridges)))
        self.reference_scale = torch.nn.Parameter(torch.zeros(len(ridges)), requires_grad=anchor)
        self.register_buffer("ridges", torch.tensor(list(ridges), dtype=torch.get_default_dtype()), persistent=False)
        self.register_buffer("chosen_ridge", torch.tensor(len(ridges) // 2))

    def _directions(self) -> Tensor:
        """``(D, R)``, in units of the features."""
        return (self.directions + self.reference_direction[:, None] * self.reference_scale) / self.feature_scale

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Sum of the candidates' losses, which do not share parameters, and the loss of the one chosen so far."""
        margins = project(batch.difference, self._directions())
        losses = ridge_losses(margins, self.directions, batch, self.ridges, self.num_train_pairs)
        return {"loss": losses.sum(), "nll": losses[self.chosen_ridge]}

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Pick the ridge with the lowest validation loss."""
        total = self.reference.new_zeros(len(self.ridges))
        for batch in self.val_pass():
            margins = project(batch.difference, self._directions())
            total += (batch.weight * bt_losses(margins.T, targets(batch.tie).to(margins))).sum(-1)
        total = self.sum_over_processes(total)
        if total.any():
            self.chosen_ridge.copy_(total.argmin())

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """The same reward for everybody: ``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        return responses @ self._directions()[:, self.chosen_ridge]
