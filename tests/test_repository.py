"""What git may track: few names at the root, and no binaries that a build or a run leaves behind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
AT_ROOT = {
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "benchmarks",
    "conf",
    "docs",
    "examples",
    "mkdocs.yml",
    "plm",
    "pyproject.toml",
    "recipes",
    "tests",
}


@pytest.fixture(scope="module")
def tracked() -> list[PurePosixPath]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [PurePosixPath(path) for path in listing.split("\0") if path]


def test_the_root_holds_known_names(tracked: list[PurePosixPath]) -> None:
    """A new name at the root is added to the list above, by somebody who meant it to be there."""
    assert {path.parts[0] for path in tracked} <= AT_ROOT


def test_no_wheels_or_weights_are_tracked(tracked: list[PurePosixPath]) -> None:
    assert not [
        path for path in tracked if path.suffix in {".whl", ".ckpt", ".safetensors"} and path.parts[0] != "tests"
    ]
