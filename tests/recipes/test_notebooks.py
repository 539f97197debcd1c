"""The notebooks of the documentation run, and what they show is what they print."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
COLOURS = re.compile(r"\x1b\[[\d;]*m")


def shown(cell: dict[str, Any]) -> str:
    """What a cell has printed, and the value of its last line, without warnings and figures."""
    texts = [output["text"] for output in cell["outputs"] if output.get("name") == "stdout"]
    texts += [output["data"]["text/plain"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
    return "".join("".join(text) + "\n" for text in texts)


def run(source: str, names: dict[str, Any]) -> str:
    """Execute a cell as a notebook does; returns what it prints and the value of its last line."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue() + ("" if value is None else repr(value))


def words(text: str) -> list[str]:
    """Text without numbers, colours, lines of tables, and how it is broken."""
    return NUMBER.sub("#", COLOURS.sub("", text)).replace("─", "").split()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_prints_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are the same; numbers, which another processor rounds in another way, are close."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the cache of features is
    monkeypatch.setattr("sys.argv", ["notebook"])
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and any(shown(cell) for cell in code)
    for cell in code:
        printed, expected = run("".join(cell["source"]), vars(module)), shown(cell)
        assert words(printed) == words(expected)
        for found, wanted in zip(
            NUMBER.findall(COLOURS.sub("", printed)), NUMBER.findall(COLOURS.sub("", expected)), strict=True
        ):
            assert float(found) == pytest.approx(float(wanted), abs=3.0, rel=0.05)


def test_there_are_three_notebooks_without_places_of_a_machine() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in NOTEBOOKS.glob("*.ipynb")}
    assert {*texts} == {"first_model", "own_data", "write_a_method"}
    assert not any(re.search(r"/(tmp|home|root|work|Users)/", text) for text in texts.values())
