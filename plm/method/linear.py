"""Rewards that are linear in features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from plm.backbones.export import reward_backbone, save_linear_reward
from plm.method.abilities import Exporter
from plm.method.base import PersonalizationMethod
from plm.types import UserState


class LinearMethod(PersonalizationMethod, Exporter):
    """A method on features whose reward is linear in them for each user, once they are conditioned."""

    @torch.no_grad()
    def direction(self, user: UserState) -> Tensor:
        """What the features of a response are multiplied by for the one row of ``user``: ``(D,)``.

        The reward is its product with the features as the backbone gives them, up to a number that is the same for
        all responses.
        """
        units = torch.eye(self.feature_dim, device=self.device)
        read = self._score(units, user.take(torch.zeros(len(units), dtype=torch.long, device=self.device)))
        return self.conditioning.raw_direction(read)

    def export(self, folder: str | Path, user: UserState) -> None:
        """Write the reward of one user over its backbone as a Hugging Face sequence-classification model.

        Raises:
            ValueError: If the features are not those of a Hugging Face model.
        """
        save_linear_reward(self.direction(user), reward_backbone(self.hparams.get("backbone")), Path(folder))
