"""Training steps whose gradients are those of one batch, however many batches they are accumulated over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plm.method.reading import FeatureReader
from plm.types import PreferenceBatch


class AccumulatedSteps(FeatureReader):
    """Steps of an optimizer over one or several batches.

    Lightning takes the mean of the losses of a step's batches. Where these are means of unlike numbers of terms, or
    where the last step of an epoch has fewer batches, that is not the loss of one batch that holds them all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_last_batch = False
        self._counts: list[Tensor] = []
        """Of the batches read so far of an accumulated step, how many terms their losses are the mean of."""

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return ``"loss"`` and scalars to log, see `PersonalizationMethod.loss`."""
        raise NotImplementedError

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes of a distributed run."""
        total: Tensor = self.trainer.strategy.reduce(values, reduce_op="sum")
        return total

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Log every scalar of ``loss`` under ``train/`` and return the loss.

        Of an accumulated step, the loss is multiplied by the terms it is the mean of, in units of the first batch's.
        """
        out = self.loss(self.training_batch(batch))
        count = out.pop("count", None)
        self.log_dict({f"train/{key}": value for key, value in self.logged(out).items()}, batch_size=batch.num_pairs)
        if self.trainer.accumulate_grad_batches == 1:
            return out["loss"]
        if count is None:
            count = self.sum_over_processes(batch.weight.new_tensor(float(batch.num_pairs)))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # also after a fit that stopped within a step
            self._counts.clear()
        self._counts.append(count)
        return out["loss"] * (count / _unit(self._counts))

    def logged(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is logged of the scalars of ``loss``."""
        return {key: value.detach() for key, value in scalars.items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Run the last batch of a step, whose gradients `on_after_backward` weighs, and take the step."""
        self._is_last_batch = True
        try:
            super().optimizer_step(*args, **kwargs)
        finally:
            self._is_last_batch = False

    def on_after_backward(self) -> None:
        """Divide the gradients of an accumulated step by all its terms; Lightning divides by the batches of a full one.

        The last step of an epoch may have fewer batches.
        """
        if not (self._counts and self._is_last_batch):
            return
        total = torch.stack(self._counts).sum()
        factor = self.trainer.accumulate_grad_batches * torch.where(total > 0, _unit(self._counts) / total, 0.0)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))


def _unit(counts: list[Tensor]) -> Tensor:
    """The unit that counts of an accumulated step are divided by: the first count, or 1 where that is 0."""
    return torch.where(counts[0] > 0, counts[0], 1.0)
