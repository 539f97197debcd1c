"""What git may track: few names at the root, no binaries that a build or a run leaves behind; README and CI agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml

import plm
from plm.cli import VERBS

ROOT = Path(__file__).parents[1]
AT_ROOT = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
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


def test_the_readme_is_short_and_its_commands_run_in_ci() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 110
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    run = [step.get("run") for job in jobs for step in job["steps"]]
    commands = re.findall(r"^```\n(.+)\n```$", readme, re.MULTILINE)
    assert len(commands) == 2 and set(commands) <= set(run)


def test_what_is_cited_is_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == plm.__version__ and {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_readme_names_every_command_and_every_method() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"`(?:plm )?(\w+)[^`]*`", readme.split("## Commands")[1].split("## Methods")[0]))
    assert set(VERBS) <= commands
    methods = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert set(methods["plm.methods"]) <= set(re.findall(r"`(\w+)`", readme.split("## Methods")[1]))
