"""Write the margin of every test pair, for ``plm predict``."""

from __future__ import annotations

from typing import Any

import lightning as L

from plm.atomic import write_csv
from plm.callbacks import is_fast_dev_run, run_dir
from plm.types import PreferenceBatch

COLUMNS = ("users", "user_id", "margin", "population_margin", "other_margin")


class SavePredictions(L.Callback):
    """Writes ``predictions.csv`` into the folder of the run, one file per process where there are several.

    One row per test pair, users in turn, each one's pairs in the order of the source: seen or unseen, user id, and the
    margins of the personal model and of its two controls. A ``fast_dev_run`` writes none.
    """

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the margins of a batch."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert batch.user_row is not None
        users = data.eval_names("predict")[dataloader_idx]
        missing = [""] * batch.num_pairs
        facts = [outputs[key].tolist() if key in outputs else missing for key in COLUMNS[2:]]
        for user_row, *margins in zip(batch.user_row.tolist(), *facts, strict=True):
            self._rows.append([users, data.all_user_ids[user_row], *margins])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        if is_fast_dev_run(trainer):
            return
        part = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        write_csv(run_dir(trainer) / f"predictions{part}.csv", COLUMNS, self._rows)
        self._rows = []
