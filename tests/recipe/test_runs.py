"""Folders of runs: one process each, names that say what ran, and a list of what they hold."""

from __future__ import annotations

import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import plm
from plm.cli import main
from plm.methods.bradley_terry import BradleyTerry
from plm.recipe.fit import _renamed, run_recipe
from plm.recipe.runs import claim, numbered, read_runs, repeatable, run_name
from plm.types import PreferenceBatch

RECIPE = """
defaults: [{data: synthetic}, {backbone: hashing}, {trainer: cpu}, {logger: csv}, {eval: quick}]
model: {class_path: LoRe, init_args: {num_bases: 2}}
data: {cache_dir: cache, source: {init_args: {num_users: 20, pairs_per_user: 12}}}
trainer: {max_epochs: 1, check_val_every_n_epoch: 1, enable_progress_bar: false}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plm"])
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        folders = list(threads.map(lambda _: claim(tmp_path / "runs", numbered("lore-polis")), range(64)))
    assert len({*folders}) == 64
    assert {path.name for path in folders} == {"lore-polis", *(f"lore-polis-{number}" for number in range(2, 65))}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\\b"])
def test_a_name_is_that_of_one_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the name of a folder, got"):
        claim(tmp_path, [name])
    assert not [*tmp_path.rglob("b"), *tmp_path.parent.glob("a")]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("results/mine/checkpoints/best.ckpt", "mine-test"),
        ("checkpoints/best.ckpt", "here-test"),
        ("elsewhere/best.ckpt", None),
        (None, None),
    ],
)
def test_what_is_done_with_a_checkpoint_is_named_after_its_run(
    checkpoint: str | None, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = run_name("test", "plm.methods.lore.LoRe", None, checkpoint)
    assert found == name if name else re.fullmatch(r"test-lore-\d{8}-\d{6}", found)
    assert run_name("fit", "plm.methods.lore.LoRe", None, checkpoint).startswith("lore-2")


@pytest.mark.parametrize(
    ("verb", "path", "said"),
    [
        ("fit", "/data/polis_bowling_green/prefs.parquet", "lore-polis_bowling_green"),
        ("fit", ["mine.jsonl.gz", "more.jsonl"], "lore-mine"),
        ("test", None, "test-lore-synthetic"),
        ("fit", "odd name; rm.csv", "lore-odd_name_rm"),
    ],
)
def test_a_run_is_named_by_method_data_and_time(verb: str, path: str | list[str] | None, said: str) -> None:
    arguments = {} if path is None else {"path": path}
    name = run_name(verb, "plm.methods.lore.LoRe", {"class_path": "x.SyntheticPairs", "init_args": arguments})
    assert re.fullmatch(rf"{re.escape(said)}-\d{{8}}-\d{{6}}", name)


def test_a_run_has_the_folder_that_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config", "recipe.yaml", "--final_test", "false"]
    assert main([*fit, "--name", "mine"]) == 0
    saved = Path("runs/mine/recipe.yaml").read_bytes()
    capsys.readouterr()
    assert main([*fit, "--name", "mine"]) == 1
    assert "expected a new run, but runs/mine is there; give another name" in capsys.readouterr().err
    assert Path("runs/mine/recipe.yaml").read_bytes() == saved
    assert yaml.safe_load(saved)["name"] is None  # a run of the saved recipe gets a folder of its own
    assert main(["fit", "--config", "runs/mine/recipe.yaml"]) == 0
    (again,) = {path.name for path in Path("runs").iterdir()} - {"mine"}
    assert again.startswith("lore-synthetic-")


def test_a_name_without_a_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for logger in ("false", "WandbLogger"):
        fit = ["fit", "--config", "recipe.yaml", "--trainer.logger", logger, "--name", "mine"]
        assert main(fit) == 2 and "--name: expected a logger that keeps files" in capsys.readouterr().err


def test_the_first_of_several_loggers_has_the_folder() -> None:
    text = RECIPE.replace(
        "trainer: {",
        "trainer: {logger: [{class_path: WandbLogger, init_args: {offline: true}}, "
        "{class_path: CSVLogger, init_args: {save_dir: runs}}], fast_dev_run: false, ",
    )
    recipe = yaml.safe_load(text)
    recipe["defaults"] = [group for group in recipe["defaults"] if "logger" not in group]
    recipe["trainer"]["logger"].reverse()
    recipe["trainer"]["logger"].pop()
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", "recipe.yaml", "--name", "mine", "--final_test", "false"]) == 0
    assert Path("runs/mine/recipe.yaml").is_file() and Path("runs/mine/checkpoints/best.ckpt").is_file()


def test_other_verbs_and_fits_that_go_on_take_the_next_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that names its run is tested, and a job that is started again goes on."""
    Path("recipe.yaml").write_text(RECIPE + "name: mine\n")
    assert main(["fit", "--config", "recipe.yaml", "--final_test", "false"]) == 0
    best = "runs/mine/checkpoints/best.ckpt"
    assert main(["validate", "--config", "recipe.yaml", "--ckpt_path", best]) == 0
    last = "runs/mine/checkpoints/last.ckpt"
    assert "goes on from" not in capsys.readouterr().out
    assert main(["fit", "--config", "recipe.yaml", "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0
    assert f"goes on from {last}, where epoch 1 and step 1 were reached" in capsys.readouterr().out
    assert {path.name for path in Path("runs").iterdir()} == {"mine", "mine-2", "mine-3"}


def test_a_process_that_others_have_started_learns_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of torchrun: no variable tells it, so the first process does."""
    other = CSVLogger(tmp_path, name="", version="run")
    assert Path(_renamed(other, "lore-polis").log_dir) == tmp_path / "lore-polis"
    mine = CSVLogger(tmp_path, name="a", version="mine")
    assert _renamed(mine, "lore-polis") is mine


def test_a_run_that_cannot_start_leaves_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "recipe.yaml", "--data.source.init_args.num_users", "1"]) == 1
    assert main(["fit", "--config", "recipe.yaml", "--trainer.fast_dev_run", "true"]) == 0
    assert not Path("runs").exists()
    Path("results").mkdir()
    fit = ["fit", "--config", "recipe.yaml", "--data.source.init_args.num_users", "1"]
    assert main([*fit, "--trainer.default_root_dir", "results"]) == 1
    assert Path("results").is_dir() and not list(Path("results").iterdir())


class Torn(BradleyTerry):
    """Fails in its first step."""

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        raise RuntimeError("torn")


def test_a_fit_that_raises_finishes_its_wandb_run_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next fit of a notebook would continue it."""
    run = MagicMock()
    monkeypatch.setattr("wandb.init", MagicMock(return_value=run))
    Path("recipe.yaml").write_text(RECIPE.replace("logger: csv", "logger: wandb"))
    fit = ["fit", "--config", "recipe.yaml", "--final_test", "false", "--model"]
    with pytest.raises(ValueError, match="expected validation pairs"):  # before there is a run
        run_recipe([*fit, "BradleyTerry", "--data.val_rows", "0"])
    run.finish.assert_not_called()
    with pytest.raises(RuntimeError, match="torn"):
        run_recipe([*fit, f"{__name__}.Torn"])
    run.finish.assert_called_once_with(1)
    run_recipe([*fit, "BradleyTerry"])
    assert run.finish.call_args_list == [call(1), call(0)]


def test_a_saved_recipe_names_no_folder_of_its_run() -> None:
    """Else a run of it would write over the first one, or, of a leaderboard, into what the next one throws away."""
    recipe = yaml.safe_load(RECIPE)
    recipe["defaults"].remove({"logger": "csv"})
    pinned = {"save_dir": "elsewhere", "name": "mine", "version": "run"}
    recipe["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": pinned}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", "recipe.yaml", "--final_test", "false"]) == 0
    first = Path("elsewhere/mine/run")
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert main(["fit", "--config", str(first / "recipe.yaml"), "--final_test", "false"]) == 0
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    (again,) = Path("runs").iterdir()
    assert again.name.startswith("lore-synthetic-") and not Path("elsewhere").joinpath(again.name).exists()


def test_a_saved_recipe_names_no_run_of_wandb() -> None:
    arguments = Namespace(save_dir="runs", name="shown", version="abc", id="abc")
    logger = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=arguments)
    config = Namespace(name=None, trainer=Namespace(default_root_dir="other", logger=[logger]))
    (saved,) = repeatable(config).trainer.logger
    assert saved.init_args == Namespace(save_dir="runs", name="shown", version=None, id=None)
    assert arguments.version == "abc"


def test_runs_are_listed_the_newest_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plm.recipe.fit.time", SimpleNamespace(perf_counter=iter([10.0, 12.5]).__next__))
    assert main(["fit", "--config", "recipe.yaml", "--name", "one"]) == 0
    two = claim("runs", ["two"])
    (two / "recipe.yaml").write_bytes(Path("runs/one/recipe.yaml").read_bytes())
    (two / "metrics.json").write_text(json.dumps({"seen": {"accuracy": 0.5, "personal_minus_global": None}}))
    (Path("runs/one") / "later.txt").touch()  # what is written into a run does not make it newer
    first, second = read_runs("runs")
    numbers = json.loads(Path("runs/one/metrics.json").read_text())
    assert (second.folder, second.name, second.method, second.data) == (Path("runs/one"), "one", "LoRe", "Synthetic")
    assert second.users == "unseen" and not second.problems and second.split == numbers["split_hash"]
    assert all(second.numbers[users]["accuracy"] == numbers[users]["accuracy"] for users in ("seen", "unseen"))
    assert second.verdicts == [*numbers["verdicts"].values()] and second.few_shot == numbers["few_shot"]
    assert datetime.fromisoformat(second.facts["date"]).date() == datetime.now().date()
    assert second.facts["plm"] == plm.__version__ and second.facts["commit"] and second.facts["fit_seconds"] == 2.5
    assert (first.folder, first.users, first.numbers["seen"]["accuracy"]) == (two, "seen", 0.5)
    assert math.isnan(first.numbers["seen"]["personal_minus_global"])
    capsys.readouterr()
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("two") < shown.index("one") and "50.0" in shown
    assert "–" in shown.splitlines()[1] and str(datetime.now().date()) in shown
    assert shown.endswith("two: no checkpoint; no per_user.csv\n")
    assert main(["runs", "nowhere"]) == 1 and "expected a folder of runs, got 'nowhere'" in capsys.readouterr().err


def test_lightning_is_quiet_unless_it_is_asked(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "--config", "recipe.yaml"]
    assert main(fit) == 0
    quiet = capsys.readouterr()
    assert not caplog.records and "Total params" not in quiet.out
    assert "best epoch 1 of 1, val/seen/log_loss 0." in quiet.out and "; ran to its end" in quiet.out
    assert max(map(len, quiet.out.partition("Few-shot")[0].splitlines()[:16])) <= 80
    assert main([*fit, "--show_lightning", "true"]) == 0
    assert "Total params" in capsys.readouterr().out
    assert any("GPU available" in record.message for record in caplog.records)
