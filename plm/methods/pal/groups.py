"""A method whose parameters are trained in named groups."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from plm.method import PersonalizationMethod
from plm.optimizer import RowAdam, with_decay


class GroupedMethod(PersonalizationMethod):
    """A method whose parameters are trained in named groups, each with a learning rate and weight decay of its own."""

    group_options: dict[str, dict[str, float]]

    @abstractmethod
    def _members(self) -> dict[str, list[torch.nn.Parameter]]:
        """Trainable parameters of every group."""

    def param_groups(self) -> list[dict[str, Any]]:
        """One group per kind of parameter that has something to train."""
        members = self._members()
        groups = [{"params": value, "name": key, **self.group_options[key]} for key, value in members.items() if value]
        assert sum(len(group) for group in members.values()) == sum(p.requires_grad for p in self.parameters())
        return groups

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """`RowAdam`, lazy on the table of users, whose learning rates fall linearly to zero over the fit."""
        groups = self.param_groups()
        if not groups:
            return None
        optimizer = RowAdam(groups, lr=self.lr)
        return with_decay(optimizer, self.trainer.estimated_stepping_batches)
