"""Every break that is listed is caught: it is made in a copy of the package, in which the test it names must fail."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import plm

ROOT = Path(plm.__file__).parents[1]


class Mutant(NamedTuple):
    """A one-line break and the test that catches it."""

    file: str
    old: str
    new: str
    test: str


MUTANTS = [Mutant(**entry) for entry in yaml.safe_load(Path(__file__).with_name("mutants.yaml").read_text())]


def name_of(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.old[:40]}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_a_listed_break_can_be_made(mutant: Mutant) -> None:
    """Its line is in the file, once; the broken file is one of Python; the test is there."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, (
        f"expected {mutant.old!r} once in {mutant.file}, got {text.count(mutant.old)} times"
    )
    assert mutant.old != mutant.new and "\n" not in mutant.old
    broken = text.replace(mutant.old, mutant.new)
    ast.parse(broken) if mutant.file.endswith(".py") else yaml.safe_load(broken)
    file, _, function = mutant.test.partition("::")
    tests = (ROOT / file).read_text(encoding="utf-8")
    assert f"def {function.partition('[')[0]}(" in tests, f"{mutant.test} is no test"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with its groups, recipes and tests."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("plm", "conf", "recipes", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests of the copy on the copy."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_tests_pass_on_an_unbroken_copy(copy: Path) -> None:
    done = run(copy, *sorted({mutant.test for mutant in MUTANTS}))
    assert done.returncode == 0, done.stdout[-3000:]
    code = "import plm; print(plm.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(copy))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_a_listed_break_is_caught(copy: Path, mutant: Mutant) -> None:
    """The test fails, as a test does, and for no error before it."""
    file = copy / mutant.file
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        done = run(copy, mutant.test)
    finally:
        file.write_text(whole, encoding="utf-8")
    assert done.returncode == 1 and "\nFAILED " in done.stdout, f"survived, or could not run:\n{done.stdout[-3000:]}"
