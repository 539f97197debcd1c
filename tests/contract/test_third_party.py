"""The method of docs/write_a_method.md, in a package of its own: found, trained by its name, held to the contract."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import plm
from plm.checkpoint import load_method
from plm.cli import main
from plm.leaderboard.entries import check_search_space
from plm.method import PersonalizationMethod
from plm.testing import MethodContract

PAGE = Path(__file__).parents[2] / "docs/write_a_method.md"
SOURCE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
RECIPE = """
defaults: [{backbone: hashing}, {trainer: cpu}, {logger: csv}, {eval: quick}]
model: {class_path: Centroid, init_args: {pull: 2.0}}
data:
  source:
    class_path: SyntheticPairs
    init_args: {num_users: 20, pairs_per_user: 12}
  backbone: {init_args: {dim: 32}}
  shots: [0, 4]
  repeats: 1
trainer: {max_epochs: 2, check_val_every_n_epoch: 1, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution ``acme-prefs`` in a folder of its own; nothing of plm is edited."""
    site = tmp_path / "site-packages"
    (site / "acme_prefs").mkdir(parents=True)
    (site / "acme_prefs" / "__init__.py").write_text("")
    (site / "acme_prefs" / "centroid.py").write_text(SOURCE)
    info = site / "acme_prefs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-prefs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[plm.methods]\nCentroid = acme_prefs.centroid:Centroid\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plm"])
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme_prefs"]:
        del sys.modules[name]


def test_it_is_listed_without_being_imported(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "Centroid  (acme_prefs.centroid.Centroid)\n    The mean of what a user chose." in shown
    assert "LoRe  (plm.methods.lore.LoRe)" in shown and "acme_prefs.centroid" not in sys.modules


def test_it_trains_by_its_short_name(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLM_FIT__DATA__CACHE_DIR", str(Path("cache").resolve()))
    Path("recipe.yaml").write_text(RECIPE)
    assert main(["fit", "--config", "recipe.yaml"]) == 0
    (run,) = Path("runs").iterdir()
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["unseen"]["num_users"] == 4 and 0 <= numbers["unseen"]["accuracy"] <= 1
    loaded = load_method(run / "checkpoints" / "best.ckpt")
    assert type(loaded).__module__ == "acme_prefs.centroid" and loaded.hparams["pull"] == 2.0
    user_id = loaded.user_ids[0]
    assert loaded.score(["Hello there.", "No."], user_id=user_id).isfinite().all()


BOARD_RECIPE = RECIPE.replace("  shots: [0, 4]\n  repeats: 1\n", "  shots: [0]\n  repeats: 1\n  val_rows: 0.2\n")


@pytest.mark.slow
def test_it_brings_its_search_grid_to_the_leaderboard(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLM_FIT__DATA__CACHE_DIR", str(Path("cache").resolve()))
    Path("mine.yaml").write_text(BOARD_RECIPE)
    args = ["--seeds", "1", "--budget", "3", "--output", "board", "--set", "metrics.num_resamples=50"]
    assert main(["leaderboard", "mine.yaml", *args]) == 0
    (row,) = [row for row in json.loads(Path("board/leaderboard.json").read_text())["rows"] if row["name"] == "mine"]
    assert row["num_candidates"] == 3 and row["arguments"].keys() <= {"pull", "gain"}
    assert "its search_space is empty or small" not in capsys.readouterr().out


def test_a_search_grid_over_no_argument_is_refused(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = package / "acme_prefs" / "centroid.py"
    module.write_text(SOURCE.replace('search_space = {"pull"', 'search_space = {"pul"'))
    centroid: Any = importlib.import_module("acme_prefs.centroid").Centroid
    with pytest.raises(ValueError, match=r"Centroid.search_space: .*got 'pul'; did you mean 'pull'\?"):
        check_search_space(centroid)


def test_it_passes_the_contract(package: Path) -> None:
    """As its own test suite would run it; every test of the contract is a plain method."""
    centroid: Any = importlib.import_module("acme_prefs.centroid").Centroid

    class TestCentroid(MethodContract):
        def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
            made: PersonalizationMethod = centroid(num_users, feature_dim)
            return made

    names = [name for name in dir(TestCentroid) if name.startswith("test_")]
    for name in names:
        getattr(TestCentroid(), name)()
    assert len(names) >= 12


@pytest.mark.parametrize(
    ("line", "by", "test", "message"),
    [
        ("context.mask.sum(1))", "context.mask.sum(1) + 1)",
         "test_adapt_returns_detached_finite_rows", "num_pairs must count"),
        ("return self._state(difference.sum(1)", "self.sums[0] += 1\n        return self._state(difference.sum(1)",
         "test_adapt_leaves_no_mark", "adapt changed 'sums'"),
        ("difference.sum(1)", "difference.sum(1) - difference.mean((0, 1))",
         "test_a_user_alone_equals_the_same_user_in_the_crowd", "'shift' differs"),
        ("(self.direction + users", "(1 + self.direction + users", "test_zero_shots_is_the_population", None),
        ('user_tables = ("sums", "counts")', "user_tables = ()",
         "test_rows_of_users_are_copied_by_id", "size mismatch"),
    ],
)  # fmt: skip
def test_the_contract_catches_a_broken_method(
    package: Path, line: str, by: str, test: str, message: str | None
) -> None:
    """One mutation each; the fourth is legal and passes."""
    assert SOURCE.count(line) == 1
    (package / "acme_prefs" / "centroid.py").write_text(SOURCE.replace(line, by))
    broken: Any = importlib.import_module("acme_prefs.centroid").Centroid

    class TestBroken(MethodContract):
        fit_epochs = 2

        def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
            made: PersonalizationMethod = broken(num_users, feature_dim)
            return made

    run = getattr(TestBroken(), test)
    if message is None:
        run()
        return
    with pytest.raises((AssertionError, RuntimeError), match=message):
        run()


def test_nothing_of_plm_names_it() -> None:
    sources = Path(plm.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "acme" in path.read_text(encoding="utf-8").lower()]
