"""What the documentation points at exists."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from pathlib import Path

import pytest

import plm

ROOT = Path(plm.__file__).parents[1]
TESTS = {
    path: {*re.findall(r"^\s*(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
}
"""File -> names of its classes and functions."""
SECTIONS = {
    "## PAL": "plm/methods/pal",
    "## VPL": "plm/methods/vpl",
    "## Latent DPO": "plm/methods/latent_dpo",
    "## PALM": "plm/methods/palm",
}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table of capabilities below a heading."""
    section = (ROOT / "docs/capabilities.md").read_text(encoding="utf-8").split(f"{heading}\n")[1].split("\n## ")[0]
    table = section.split("| shown by |\n")[1].split("\n\n")[0]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[1:]]


@pytest.mark.parametrize(("heading", "folder"), SECTIONS.items())
def test_every_capability_has_its_file_and_its_test(heading: str, folder: str) -> None:
    found = rows(heading)
    assert len(found) > 20
    for _, what, where, shown in found:
        for name in re.findall(r"`([\w/.]+\.(?:py|yaml))`", where):
            assert (ROOT / folder / name).is_file() or (ROOT / name).is_file(), f"{what}: no file {name}"
        names = re.findall(r"`(?:([\w/.]+?)::)?(Test\w+|test_\w+)`", shown)
        for file, name in names:
            places = [path for path, names_there in TESTS.items() if name in names_there]
            assert any(str(path).endswith(f"/{file}") if file else True for path in places), (
                f"{what}: no {file}::{name}"
            )
        files = re.findall(r"`((?:tests|benchmarks|recipes|parity|contract|data)/[\w/.]+)(?:::\w+)?`", shown)
        for file in files:
            assert (ROOT / file).exists() or (ROOT / "tests" / file).exists(), f"{what}: no file {file}"
        assert names or files, f"{what}: nothing shows it"


# ---------------------------------------------------------------------- names in backticks
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FILES = re.compile(r"(?<![\w/.-])((?:plm|recipes|conf|tests|benchmarks|docs)/[\w./-]*\w\.(?:py|yaml|md|json))")
NAMES = re.compile(r"(?<![\w/.-])plm(?:\.\w+)+")


def in_backticks(page: Path) -> list[str]:
    """Inline code and code blocks of a page."""
    return re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), re.DOTALL)


def exists(name: str) -> bool:
    """Whether a dotted name leads to a module or to what one holds."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_name_in_backticks_exists(page: Path) -> None:
    code = in_backticks(page)
    # of the instructions
    mine = {"plm/methods/mine.py", "plm/methods/mine.md", "tests/parity/test_mine.py", "conf/data/mine.yaml"}
    files = {file for text in code for file in FILES.findall(text)} - mine
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []
    names = {name for text in code for name in NAMES.findall(text)} - {"plm.methods", "plm.yaml"}
    assert [name for name in sorted(names) if not exists(name)] == []


# ---------------------------------------------------------------------- tables of results
TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))


def test_the_tables_of_the_results_are_those_of_their_files() -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert TABLES["fill"](page) == page, "run python docs/tables.py"
    marked = re.findall(r"<!-- table: (\S+) -->", page)
    assert sorted(marked) == sorted(file.stem for file in (ROOT / "docs/results").glob("*.json"))


def test_a_cell_is_the_number_of_its_file() -> None:
    board = json.loads((ROOT / "docs/results/polis.json").read_text(encoding="utf-8"))
    (line,) = [line for line in TABLES["tables"](board).splitlines() if line.startswith("| PALM | 75")]
    expected = "75.2 [73.4, 76.9] | 73.2 [72.3, 74.2] | +3.4 [1.8, 5.1] | +6.5 [4.6, 8.4] | +0.3 [-1.2, 1.9] | 0.674"
    assert line == f"| PALM | {expected} | 73.4 | 68.7 | 0.533 | 0.036 | 59.8 | 124/64 | 5,427 | 9.9 | 0.14 |"
