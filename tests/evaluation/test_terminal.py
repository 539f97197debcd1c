"""What a terminal shows: no number of a report is cut, however narrow; and what is no terminal: no progress bars."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from plm.evaluation import plain_table, print_parts


def wide_table() -> Table:
    table = plain_table("Regret")
    for number in range(12):
        table.add_column(f"worst-case {number}")
    table.add_row(*(f"0.{number:03d} [0.{number:03d}, 1.{number:03d}]" for number in range(12)))
    return table


@pytest.mark.parametrize("width", [20, 80, 300])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_number_is_cut(width: int, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    print_parts(wide_table(), "a [0.1, 0.2] " + 40 * "long ", console=console)
    text = out.getvalue()
    assert "…" not in text and "a [0.1, 0.2] " in text
    for number in range(12):
        assert f"0.{number:03d}" in text and f"1.{number:03d}]" in text
    if not terminal:
        assert "0.011 [0.011, 1.011]" in text
    assert console.width == width


def test_a_table_too_wide_for_a_terminal_is_several_with_the_first_column_in_each() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, color_system=None)
    print_parts(wide_table(), console=console)
    lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0] == "Regret" and "Regret" not in lines[1:] and max(map(len, lines)) <= 60
    heads = [line.split("worst-case ")[1:] for line in lines if "worst-case" in line]
    assert [int(head[0]) for head in heads] == [0] * len(heads)
    assert [int(number) for head in heads for number in head[1:]] == list(range(1, 12))
    rows = [line for line in lines if line.startswith("0.000 [0.000, 1.000]")]
    assert len(rows) == len(heads) == 11  # two columns of 20 characters and what is between them fit, three do not


def test_nothing_of_a_table_gets_lost_or_comes_twice() -> None:
    """One column cannot be split, and a caption stands once."""
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, color_system=None)
    narrow = plain_table("")
    narrow.add_column("one")
    narrow.add_row("x" * 70)
    wide = wide_table()
    wide.caption = "captioned"
    print_parts(narrow, wide, console=console)
    assert "x" * 70 in out.getvalue() and out.getvalue().count("captioned") == 1


def test_a_table_that_fits_is_not_widened() -> None:
    table = plain_table("")
    table.add_column("one")
    table.add_row("1")
    out = io.StringIO()
    print_parts(table, console=Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 5


def test_no_progress_bars_in_pipes() -> None:
    """What is no terminal gets messages alone, unless the user says otherwise."""
    code = (
        "from plm.cli import main; main(['--version']); "
        "from transformers.utils import logging; print(logging.is_progress_bar_enabled())"
    )
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    for asked, shown in (({}, "False"), ({"HF_HUB_DISABLE_PROGRESS_BARS": "0"}, "True")):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | asked)
        assert run.stdout.split()[-1] == shown, run.stderr
