"""What the documentation points at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import plm

ROOT = Path(plm.__file__).parents[1]
TESTS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
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
            places = [path for path, text in TESTS.items() if re.search(rf"^\s*(?:def|class) {name}\b", text, re.M)]
            assert any(str(path).endswith(f"/{file}") if file else True for path in places), (
                f"{what}: no {file}::{name}"
            )
        files = re.findall(r"`((?:tests|benchmarks|recipes|parity|contract|data)/[\w/.]+)(?:::\w+)?`", shown)
        for file in files:
            assert (ROOT / file).exists() or (ROOT / "tests" / file).exists(), f"{what}: no file {file}"
        assert names or files, f"{what}: nothing shows it"
