"""Planted users whom every rival method is asked to tell apart."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TypeVar

import torch

from plm.method import PersonalizationMethod
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch

Method = TypeVar("Method", bound=PersonalizationMethod)


def opposite_users(num_users: int = 60, pairs: int = 20, num_shots: int = 10) -> PlantedData:
    """Users of one taste, but every other user prefers the other response: the population wants nothing."""
    data = PlantedData(num_users, 40, pairs_per_user=pairs, num_shots=num_shots, rank=1, spread=0.0, signal=6.0)
    chosen, rejected = data.context.features
    odd = (torch.arange(40) % 2 == 1)[:, None, None]
    data.context = data.context._replace(
        chosen=torch.where(odd, rejected, chosen), rejected=torch.where(odd, chosen, rejected)
    )

    def swapped(batch: PreferenceBatch) -> PreferenceBatch:
        (chosen, rejected), row = batch.features, batch.user_index if batch.user_row is None else batch.user_row
        odd = (row % 2 == 1)[:, None]
        return batch._replace(chosen=torch.where(odd, rejected, chosen), rejected=torch.where(odd, chosen, rejected))

    data.train_batch, data.val_batch = swapped(data.train_batch), swapped(data.val_batch)
    data.test_batch = swapped(data.test_batch)
    data.unseen_batch = swapped(data.unseen_batch)._replace(context=data.context)
    return data


def fitted(method: Method, data: PlantedData, folder: Path, epochs: int) -> Method:
    """The method after some steps, validated once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(folder, max_epochs=epochs, check_val_every_n_epoch=epochs)
        trainer.fit(method, datamodule=data)
    method.trainer = None  # type: ignore[assignment]
    return method.eval()


def accuracies(method: PersonalizationMethod, batch: PreferenceBatch) -> dict[str, float]:
    """Share of pairs that each margin of ``evaluate`` ranks as the user did."""
    with torch.no_grad():
        facts = method.evaluate(batch)
    return {name: (margin > 0).double().mean().item() for name, margin in facts.items()}
