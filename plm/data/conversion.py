"""Pairs of any layout, written as a Parquet file with our columns.

Axes: N pairs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plm.atomic import whole_file
from plm.data.columns import REQUIRED
from plm.data.files import TABLES, Records, read_records, read_table, table_records
from plm.data.reading import NUM_LOOKED_AT
from plm.data.schema import PairTable
from plm.data.values import ROW_SPLITS, USER_SPLITS


def first_records(path: Path) -> Records:
    """The first rows of a file.

    Raises:
        ValueError: If it cannot be read.
    """
    if path.name.endswith(TABLES):
        return table_records(path, read_table(path, num_rows=NUM_LOOKED_AT))
    records = read_records(path)
    return records._replace(rows=records.rows[:NUM_LOOKED_AT], lines=records.lines[:NUM_LOOKED_AT])


def has_our_columns(path: str | Path) -> bool:
    """Whether a file can be read and has the columns of the layout ``pairs``."""
    try:
        return {*REQUIRED} <= {*first_records(Path(path)).names}
    except (ValueError, OSError):
        return False


def write_pairs(table: PairTable, output: str | Path, inputs: list[str]) -> None:
    """Write pairs as Parquet, in one step.

    Args:
        table: The pairs.
        output: The file, ending in .parquet.
        inputs: Files that it must not take the place of.

    Raises:
        ValueError: If it has another ending or is one of the inputs.
    """
    check_output(output, inputs)
    with whole_file(output) as file:
        pq.write_table(arrow_table(table), file)


def arrow_table(table: PairTable) -> pa.Table:
    """Pairs as a table with our columns; what no pair gives is no column."""
    texts = table.texts()
    dialogues: list[str | None] = [*table.dialogues, None]
    columns: dict[str, Any] = {
        "user_id": [table.user_ids[user] for user in table.user.tolist()],
        "prompt": [table.prompts[prompt] for prompt in table.prompt.tolist()],
        "chosen": [texts[item][1] for item in table.chosen.tolist()],
        "rejected": [texts[item][1] for item in table.rejected.tolist()],
    }
    optional = {
        "weight": (table.weight.tolist(), table.weight != 1),
        "tie": (table.tie.tolist(), table.tie),
        "dialogue_id": ([dialogues[row] for row in table.dialogue.tolist()], table.dialogue >= 0),
        "turn": ([turn if turn >= 0 else None for turn in table.turn.tolist()], table.turn >= 0),
        "row_split": ([(*ROW_SPLITS, None)[row] for row in table.row_split.tolist()], table.row_split >= 0),
        "user_split": ([(*USER_SPLITS, None)[row] for row in table.user_split.tolist()], table.user_split >= 0),
    }
    for name in ("chosen_score", "rejected_score", "timestamp"):
        values = getattr(table, name)
        optional[name] = ([None if value != value else value for value in values.tolist()], ~np.isnan(values))
    columns |= {name: values for name, (values, given) in optional.items() if given.any()}
    return pa.table(columns)


def check_output(output: str | Path, inputs: list[str]) -> None:
    """Refuse an output that is no Parquet file, or one of the inputs under this or another name.

    Raises:
        ValueError: If it is.
    """
    if not str(output).endswith(".parquet"):
        raise ValueError(f"expected an output ending in .parquet, got {str(output)!r}")
    for path in inputs:
        if os.path.exists(output) and os.path.samefile(path, output):
            raise ValueError(f"expected an output beside the input, got {str(output)!r} for both; write another file")
