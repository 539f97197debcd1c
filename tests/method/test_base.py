"""What the base of all methods does in a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plm.methods.lore import LoRe
from plm.testing import PlantedData, quiet_trainer


@pytest.mark.parametrize(
    ("options", "refreshed_at"),
    [
        ({"check_val_every_n_epoch": 2}, [2, 4, 5]),  # a fit ends with a validation
        ({"limit_val_batches": 0}, [5]),
        ({"max_steps": 3, "check_val_every_n_epoch": 9}, [3]),
    ],
)
def test_users_are_solved_once_for_the_same_weights(
    options: dict[str, Any], refreshed_at: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PlantedData(8, pairs_per_user=12, feature_dim=4)
    method: Any = LoRe(data.num_users, data.feature_dim, num_bases=2)
    solve, steps = method.refresh_users, []
    monkeypatch.setattr(method, "refresh_users", lambda: steps.append(method.trainer.global_step) or solve())
    for _ in range(2):  # a second fit of the same method starts from nothing
        steps.clear()
        quiet_trainer(tmp_path, max_epochs=5, num_sanity_val_steps=0, **options).fit(method, datamodule=data)
        assert steps == refreshed_at
