"""Write the margin of every test pair, for ``plm predict``."""

from __future__ import annotations

from typing import Any

import lightning as L

from plm.atomic import write_csv
from plm.callbacks import is_fast_dev_run, run_dir
from plm.data.keys import pair_names
from plm.evaluation import print_parts
from plm.messages import counted
from plm.metrics import CONTROL_MARGINS
from plm.types import PreferenceBatch

_MARGINS = ("margin", *CONTROL_MARGINS)
COLUMNS = ("item", "users", "user_id", "tie", *_MARGINS)


class SavePredictions(L.Callback):
    """Writes ``predictions.csv`` into the folder of the run, one file per process where there are several.

    One row per test pair, users in turn, each one's pairs in the order of the source: the pair's name by its content
    (`plm.data.keys.pair_names`), seen or unseen, user id, whether the user called it a tie, and the margins of the
    personal model and of its controls. ``plm compare`` reads such files. A ``fast_dev_run`` writes none.
    """

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []
        self._names: list[str] = []
        self._report: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name the pairs."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._names = pair_names(data.table)

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
        assert batch.user_row is not None and batch.pair_row is not None
        users = data.eval_names("predict")[dataloader_idx]
        missing = [""] * batch.num_pairs
        facts = [outputs[key].tolist() if key in outputs else missing for key in _MARGINS]
        rows = (values.tolist() for values in (batch.pair_row, batch.user_row, batch.tie))
        for pair_row, user_row, tie, *margins in zip(*rows, *facts, strict=True):
            self._rows.append([self._names[pair_row], users, data.all_user_ids[user_row], int(tie), *margins])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        if is_fast_dev_run(trainer):
            return
        part = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = f"predictions{part}.csv"
        write_csv(run_dir(trainer) / file, COLUMNS, self._rows)
        self._report = [f"{file} of {counted(len(self._rows), 'pair')} in {run_dir(trainer)}"]
        self._rows = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Name the file below the progress bar; each of several processes names its own."""
        print_parts(*self._report)
        self._report = []
