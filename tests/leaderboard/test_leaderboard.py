"""The command, on planted users and hashed words: one run that is resumed, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from torch import Tensor

from plm.backbones import HashingBackbone
from plm.cli import main
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.synthetic import SyntheticPairs
from plm.data.splits import TEST, UNSEEN
from plm.leaderboard import board as command
from plm.leaderboard import cells, entries
from plm.leaderboard.cells import Cell, run_cells
from plm.leaderboard.entries import Entry, as_options, candidates, check_search_space, source_hash
from plm.leaderboard.report import Leaderboard, markdown
from plm.leaderboard.results import BoardRow, SweepPoint
from plm.method import PersonalizationMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lore import LoRe
from plm.methods.pal import PAL
from plm.methods.palm import PALM
from plm.methods.vpl import VPL
from plm.recipe.defaults import shipped
from tests.marks import slow_but


class Headed(HashingBackbone):
    """Hashed words with the head of a reward model that likes whatever falls on the first axis."""

    @property
    def reference_head(self) -> Tensor:
        return torch.eye(self.feature_dim)[0]


DATA = {
    "data": {
        "source": {
            "class_path": "plm.data.sources.synthetic.SyntheticPairs",
            "init_args": {"num_users": 40, "pairs_per_user": 20},
        },
        "backbone": {"class_path": f"{__name__}.Headed", "init_args": {"dim": 32}},
        "shots": [0, 4],
        "repeats": 1,
    }
}
SMALL = ["trainer.max_epochs=40", "metrics.num_resamples=100", "few_shot.num_resamples=100"]


class Broken(BradleyTerry):
    """A method that fails while it is trained."""

    def loss(self, batch: Any) -> Any:
        raise RuntimeError("it does not work")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("board")
    data = {"data": {**DATA["data"], "cache_dir": str(folder / "cache")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    (folder / "empty.yaml").write_text("{}\n")
    yield folder


def leaderboard(place: Path, *more: str, out: str = "out") -> int:
    base = ["--data", str(place / "tiny.yaml"), "--backbone", str(place / "empty.yaml")]
    return main(["leaderboard", *base, "--output", str(place / out), *more, "--set", *SMALL])


@pytest.fixture(scope="module")
def board(place: Path) -> dict[str, Any]:
    """Run once; a failing method is in the field."""
    names = ["BradleyTerry", "LoRe", f"{__name__}.Broken"]
    assert leaderboard(place, "--methods", *names, "--seeds", "1") == 0
    found: dict[str, Any] = json.loads((place / "out" / "leaderboard.json").read_text())
    return found


def test_all_rows_and_controls_are_there(board: dict[str, Any], place: Path) -> None:
    rows = {row["name"]: row for row in board["rows"]}
    assert set(rows) == {
        "BradleyTerry",
        "LoRe (ours)",
        "Broken",
        "per-user BradleyTerry",
        "LoRe (ours), shuffled users",
        "LoRe (ours), another user",
        "reference head",
        "majority",
        "length",
        "surface",
        "oracle",
    }
    assert rows["Broken"]["errors"] == {"0": "RuntimeError: it does not work"} and not rows["Broken"]["numbers"]
    assert rows["LoRe (ours)"]["facts"]["parameters_per_user"] == 8
    assert rows["BradleyTerry"]["facts"]["parameters"] == 5 * 32
    assert rows["LoRe (ours)"]["few_shot"]["shots"] == [0, 4]
    best = max(row["numbers"]["seen"]["accuracy"] for row in rows.values() if row["numbers"])
    assert rows["oracle"]["numbers"]["seen"]["accuracy"] == best
    assert board["left_out"] == {}
    assert {len(row["numbers"]["unseen"]) > 10 for name, row in rows.items() if name != "Broken"} == {True}
    hashes = {json.loads(file.read_text())["split_hash"] for file in place.glob("out/cells/*/metrics.json")}
    assert hashes == {board["data"]["split_hash"]}
    for kind in ("md", "csv", "html"):
        assert (place / "out" / f"leaderboard.{kind}").stat().st_size > 1000


def test_the_reference_head_is_judged_as_it_is(board: dict[str, Any], place: Path) -> None:
    """Its accuracy is that of the first feature alone, counted here from the features themselves."""
    made = DATA["data"]["source"]["init_args"]
    data = PreferenceDataModule(SyntheticPairs(**made), Headed(dim=32), cache_dir=str(place / "cache"))
    table, splits = data.table, data.splits
    first = Headed(dim=32).encode([data.backbone.render(*text) for text in table.texts()])[:, 0].numpy()
    margin = first[table.chosen] - first[table.rejected]
    rows = (splits.user_split[table.user] == UNSEEN) & (splits.stage == TEST)
    right = np.where(margin == 0, 0.5, margin > 0)
    expected = [right[rows & (table.user == user)].mean() for user in np.unique(table.user[rows])]
    (row,) = [row for row in board["rows"] if row["name"] == "reference head"]
    assert row["kind"] == "baseline" and row["facts"]["parameters_per_user"] == 0
    assert row["numbers"]["unseen"]["accuracy"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_command_of_the_table_gives_the_number_of_the_table(board: dict[str, Any], place: Path) -> None:
    (row,) = [row for row in board["rows"] if row["name"] == "BradleyTerry"]
    args = row["command"].split()[1:]
    assert main([*args, "--trainer.default_root_dir", str(place / "again"), "--trainer.logger", "false"]) == 0
    again = json.loads((place / "again" / "run" / "metrics.json").read_text())
    assert again["unseen"]["accuracy"] == pytest.approx(row["numbers"]["unseen"]["accuracy"], abs=1e-9)


def test_finished_cells_are_kept_and_lost_ones_are_redone(
    board: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "out", place / "resumed")
    root = place / "resumed" / "cells"
    (lost,) = root.glob("LoRe__ours_-seed0-*")
    lost.rename(lost.with_name(f"{lost.name}.part"))  # as a killed run leaves it
    done = []
    monkeypatch.setattr(cells, "run_here", lambda one, run=cells.run_here: (done.append(one.row), run(one)))
    args = ["--methods", "BradleyTerry", "LoRe", "--seeds", "1"]
    assert leaderboard(place, *args, out="resumed") == 0
    assert done == ["LoRe (ours)"], "the shuffled control and the baselines are kept too"
    again = json.loads((place / "resumed" / "leaderboard.json").read_text())
    for row in again["rows"]:
        (before,) = [one for one in board["rows"] if one["name"] == row["name"]]
        assert row["numbers"]["seen"]["accuracy"] == pytest.approx(before["numbers"]["seen"]["accuracy"])
    assert not list(root.glob("*.part"))


def test_search_spends_the_same_budget_on_validation_pairs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, ...]] = []

    def pretend(todo: list[Cell], jobs: int, tell: Any) -> None:
        for one in todo:
            tried.append(one.args)
            one.folder.mkdir(parents=True)
            value = 0.1 if "--model.init_args.num_bases" in one.args and "32" in one.args else 0.5
            (one.folder / "facts.json").write_text(json.dumps({"val_value": value}))

    monkeypatch.setattr(entries, "run_cells", pretend)
    field = [Entry(method.__name__, "method", "", (), method_class=method) for method in (LoRe, BradleyTerry)]
    found = entries.search(field, 12, place / "search", 1, lambda one: None)
    assert [entry.num_candidates for entry in found] == [12, 12]
    assert all(args[-2:] == ("--final_test", "false") for args in tried) and len(tried) == 24
    assert found[0].arguments["num_bases"] == 32 and "--model.init_args.num_bases" in found[0].args
    assert found[1].arguments == {}, "equal values: the defaults come first"


def test_a_sweep_has_a_row_for_each_value(place: Path) -> None:
    recipe = ("--config", str(place / "tiny.yaml"), "--model", "plm.methods.lore.LoRe")
    rows = entries.swept([Entry("mine", "method", "", recipe)], "num_bases", "10, 1,2")
    assert [row.name for row in rows] == ["mine, num_bases 1", "mine, num_bases 2", "mine, num_bases 10"]
    assert [row.point for row in rows] == [SweepPoint("mine", "num_bases", value) for value in (1, 2, 10)]
    read, _ = entries.read_entries(rows)
    assert [f"num_bases: {value}\n" in row.identity for row, value in zip(read, (1, 2, 10), strict=True)] == [True] * 3
    assert command._row(rows[2], []).point == rows[2].point and command._shuffled(rows[2]).point is None


@pytest.mark.parametrize(
    ("argument", "select", "message"),
    [
        ("num_base", {}, "mine, num_base 2: model: plm.LoRe: no key 'num_base'; did you mean 'num_bases'?"),
        ("feature_dim", {}, "model.init_args.feature_dim is filled from data.feature_dim"),
        ("num_bases", {"model.init_args.num_bases": [2, 4]}, "selects num_bases on validation pairs; take it out"),
    ],
)
def test_a_sweep_that_would_not_be_one_is_refused_at_once(
    place: Path, tmp_path: Path, argument: str, select: dict[str, Any], message: str
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"class_path": "LoRe"}, **({"select": select} if select else {})}))
    args = ("--config", str(place / "tiny.yaml"), "--config", str(recipe))
    rows = entries.swept([Entry("mine", "method", "", args)], argument, "2,4")
    with pytest.raises(ValueError) as caught:
        entries.read_entries(rows)
    assert message in str(caught.value)


def test_what_is_swept_is_not_searched() -> None:
    entry = Entry("LoRe", "method", "", (), method_class=LoRe, point=SweepPoint("LoRe", "num_bases", 2.0))
    assert "num_bases" in LoRe.search_space
    drawn = candidates(entry, 100)
    assert len(drawn) > 1 and not any("num_bases" in one for one in drawn)


def test_candidates_are_distinct_and_start_with_the_defaults() -> None:
    for method in (BradleyTerry, LoRe, PAL, VPL):
        check_search_space(method)
        drawn = candidates(Entry("x", "method", "", (), method_class=method), 12)
        assert drawn[0] == {} and len(drawn) == 12
        assert len({json.dumps(one, sort_keys=True) for one in drawn}) == 12
        assert drawn[:5] == candidates(Entry("other", "method", "", (), method_class=method), 5)
    assert candidates(Entry("x", "method", "", (), method_class=PALM), 12) == [{}]
    assert candidates(Entry("unread", "method", "", ()), 12) == [{}]
    assert as_options({"lr": 0.1, "decoder": "film", "ridges": [1.0, 2.0]}) == [
        *("--model.init_args.lr", "0.1"),
        *("--model.init_args.decoder", "film"),
        *("--model.init_args.ridges", "[1.0, 2.0]"),
    ]


def test_all_methods_are_ours_and_the_published_ones(place: Path) -> None:
    """Each with the settings of its paper, whatever the budget of the search; every row can be read."""
    found, left_out = entries.of_methods(["all"], ["--config", str(place / "tiny.yaml")])
    both = {f"{name} ({whose})" for name in entries.PUBLISHED for whose in ("ours", "published")}
    installed = {point.name for point in entry_points(group="plm.methods")} - {"PublishedLoRe", *entries.PUBLISHED}
    assert both | installed - set(left_out) == {entry.name for entry in found} and "SFT" in left_out
    read, _ = entries.read_entries([entry for entry in found if "published" in entry.name])
    assert [entry.error for entry in read] == [""] * len(entries.PUBLISHED)
    for entry in read:
        assert candidates(entry, 12) == [{}]
        settings = yaml.safe_load(Path(entry.args[-1]).read_text())["model"]
        assert entry.method_class is not None
        assert settings["class_path"].rpartition(".")[2] == entry.method_class.__name__
    with pytest.raises(ValueError, match=r"no method 'lore_papr'; did you mean 'lore_paper'\?"):
        entries.of_methods(["lore_papr"], [])


@pytest.mark.parametrize("method", slow_but(["BradleyTerry", "LoRe"], "BradleyTerry"))
def test_on_several_splits_a_user_counts_once_by_the_mean_over_those_that_test_the_user(
    place: Path, method: str
) -> None:
    out = f"splits_{method}"
    assert leaderboard(place, "--methods", method, "--splits", "2", out=out) == 0
    found = json.loads((place / out / "leaderboard.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert {"length", "majority", "oracle", "per-user BradleyTerry"} <= set(rows)
    assert ("LoRe (ours), shuffled users" in rows) == (method == "LoRe")
    assert not any(row["errors"] for row in rows.values())
    row = ("LoRe (ours)", "LoRe__ours_-seed*") if method == "LoRe" else (method, f"{method}-seed*")
    for name, pattern in (row, ("majority", "majority-*")):
        values: dict[str, list[float]] = {}
        tested, hashes = [], set()
        for folder in (place / out / "cells").glob(pattern):
            hashes.add(json.loads((folder / "metrics.json").read_text())["split_hash"])
            with (folder / "per_user.csv").open() as file:
                lines = [line for line in csv.DictReader(file) if line["split"] == "unseen"]
            tested.append({line["user_id"] for line in lines})
            for line in lines:
                values.setdefault(line["user_id"], []).append(float(line["accuracy"]))
        assert len(hashes) == len(tested) == 2 and tested[0] != tested[1]
        numbers = rows[name]["numbers"]["unseen"]
        assert numbers["num_users"] == len(values) == len(tested[0] | tested[1])
        mean = sum(sum(each) / len(each) for each in values.values()) / len(values)
        assert numbers["accuracy"] == pytest.approx(mean, abs=1e-9)
    assert found["metadata"]["splits"] == found["metadata"]["seeds"] == 2


def test_a_run_on_another_split_is_no_result(place: Path, tmp_path: Path) -> None:
    args = (
        "--config",
        str(place / "tiny.yaml"),
        "--config",
        str(shipped("conf") / "trainer" / "cpu.yaml"),
        "--model",
        "BradleyTerry",
    )
    one = Cell("BradleyTerry", 0, (*args, "--trainer.max_epochs", "1"), tmp_path / "cell", "0" * 64)
    run_cells([one], 1, lambda cell: None)
    assert not one.is_done and re.fullmatch(r"the run saw the split \w{12}, expected 0{12}", one.error)


def test_splits_that_would_test_what_was_chosen_by_or_the_same_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--seeds", "2"], ["--budget", "2"]):
        assert leaderboard(place, "--methods", "LoRe", "--splits", "2", *more) == 2
        assert "takes the place of --seeds and --budget" in " ".join(capsys.readouterr().err.split())
    rows = [
        {"user_id": f"u{row % 6}", "prompt": f"p{row}", "chosen": f"a{row}", "rejected": f"b{row}"} for row in range(90)
    ]
    for number, row in enumerate(rows):
        row |= {
            "row_split": ("train", "val", "test")[number // 6 % 3],
            "user_split": "unseen" if number % 6 == 0 else "seen",
        }
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"class_path": "plm.data.sources.pairs.PairFiles", "init_args": {"path": [str(tmp_path / "own.jsonl")]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"data": {**DATA["data"], "source": source}}))
    args = ["leaderboard", "--data", str(tmp_path / "own.yaml"), "--backbone", str(place / "empty.yaml")]
    assert main([*args, "--output", str(tmp_path / "out"), "--methods", "LoRe", "--splits", "2"]) == 1
    assert "says itself who and what is held out; for fits by several seeds there is --seeds" in capsys.readouterr().err


def test_recipes_on_different_splits_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        recipe = {**DATA, "model": {"class_path": "plm.methods.bradley_terry.BradleyTerry"}}
        recipe["data"] = {**DATA["data"], "split_seed": seed}
        (place / f"seed{seed}.yaml").write_text(yaml.safe_dump(recipe))
    paths = [str(place / f"seed{seed}.yaml") for seed in (0, 1)]
    assert main(["leaderboard", *paths, "--output", str(place / "refused")]) == 1
    message = capsys.readouterr().err
    assert "expected all rows on the same split" in message and "seed0: " in message and "seed1: " in message
    assert not (place / "refused" / "cells").exists()


def test_a_recipe_without_a_test_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {**DATA, "model": {"class_path": "plm.methods.bradley_terry.BradleyTerry"}, "final_test": False}
    (place / "untested.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["leaderboard", str(place / "untested.yaml"), "--output", str(place / "untested")]) == 1
    assert "untested: expected final_test: true, got false" in capsys.readouterr().err
    assert not (place / "untested" / "cells").exists()


def test_a_finished_cell_that_cannot_be_read_is_a_failed_one(tmp_path: Path) -> None:
    one = Cell("LoRe", 3, (), tmp_path / "LoRe-seed3", "")
    one.folder.mkdir()
    row = command._row(Entry("LoRe", "method", "", ()), [one])
    assert not row.numbers and "metrics.json" in row.errors[3] and "remove LoRe-seed3" in row.errors[3]


def test_another_backbone_or_another_plm_is_another_cell(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity() -> str:
        given, _ = entries.of_methods(["BradleyTerry"], ["--config", str(place / "tiny.yaml")])
        (found,), _ = entries.read_entries(given)
        return found.identity

    first = identity()
    assert identity() == first
    with monkeypatch.context() as patch:
        patch.setattr(Headed, "key", lambda self: {"content": "other"})
        assert identity() != first
    monkeypatch.setattr(entries, "library_hash", lambda: "other")
    assert identity() != first


def test_two_leaderboards_do_not_share_a_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = place / "locked" / "cells" / "LoRe-seed0-1.part"
    running.mkdir(parents=True)
    with FileLock(running.parent / ".lock"):
        assert leaderboard(place, "--methods", "BradleyTerry", "--seeds", "1", out="locked") == 1
    assert "another plm leaderboard is writing" in capsys.readouterr().err
    assert running.is_dir()


@pytest.mark.slow
def test_a_leaderboard_that_failed_gives_its_folder_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError("no space left")  # held here, its traceback keeps the frames of the command alive
    monkeypatch.setattr(command, "write", MagicMock(side_effect=full))
    assert leaderboard(place, "--methods", "BradleyTerry", "--seeds", "1", out="failed") == 1
    with FileLock(place / "failed" / "cells" / ".lock", timeout=0):
        assert full.__traceback__ is not None


def test_the_table_says_how_many_candidates_each_method_had() -> None:
    rows = [
        BoardRow("LoRe", "method", "", num_candidates=12),
        BoardRow("Mine", "method", ""),
        BoardRow("length", "baseline", ""),
    ]
    text = markdown(Leaderboard("t", rows, "LoRe", {"split_hash": "0", "group_by": "pair"}, {}))
    assert "- LoRe: as given, of 12 candidates" in text and "- Mine: as given, not searched (1 candidate)" in text
    assert "length: as given" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected either recipes or --data FILE"),
        (["a.yaml", "--data", "b.yaml"], "expected either recipes or --data FILE"),
        (["--data", "conf/data/poliss.yaml"], "did you mean 'conf/data/polis.yaml'?"),
        (["--data", "poliss"], "did you mean 'conf/data/polis.yaml'?"),
        (["--data", "conf/data/synthetic.yaml", "--seeds", "0"], "--seeds: expected an integer >= 1, got 0"),
        (["--data", "conf/data/synthetic.yaml", "--set", "lr"], "--set: expected KEY=VALUE, got 'lr'"),
        (["--data", "conf/data/synthetic.yaml", "--method", "LoRe"], "did you mean '--methods'?"),
        (["--data", "synthetic", "--sweep", "num_bases=1,x"], "two or more numbers, each once, got num_bases=1,x"),
        (["--data", "synthetic", "--sweep", "num_bases=2,2.0"], "two or more numbers, each once, got num_bases=2,2.0"),
        (["--data", "synthetic", "--sweep", "num_bases=2"], "two or more numbers, each once, got num_bases=2"),
        (["--data", "conf/data/synthetic.yaml", "--methods", "Lore"], "did you mean 'LoRe'?"),
    ],
)
def test_mistakes_get_one_message(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", *args]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_process_that_dies_leaves_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = SimpleNamespace(stderr="Traceback\nMemoryError", returncode=-9)
    monkeypatch.setattr(cells.subprocess, "run", lambda *args, **kwargs: dead)
    one = Cell("LoRe", 3, (), tmp_path / "LoRe-seed3", "")
    told: list[Cell] = []
    run_cells([one], 2, told.append)
    assert told == [one] and not one.is_done
    assert one.error == "the process ended with status -9: MemoryError"


@pytest.mark.slow
def test_a_run_ends_with_the_process_that_started_it() -> None:
    """The parent is killed without a chance to say so; its run must not go on beside those of the next command."""
    run = "import time; from plm.leaderboard.cells import end_with_parent; end_with_parent(0.05)"
    run += "; print('up', flush=True); time.sleep(60); print('went on')"
    parent = f"import subprocess, sys; one = subprocess.Popen([sys.executable, '-c', {run!r}])"
    started = subprocess.Popen(
        [sys.executable, "-c", f"{parent}; print(one.pid, flush=True); one.wait()"], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert {started.stdout.readline(), started.stdout.readline()} >= {"up\n"}
    started.kill()
    started.wait()
    assert started.stdout.read() == "", "the run ended before it had more to print"


def test_the_hash_follows_the_source_of_a_method(tmp_path: Path) -> None:
    assert source_hash(BradleyTerry) != source_hash(Broken)
    assert source_hash(Broken) == source_hash(type("Other", (PersonalizationMethod,), {"__module__": __name__}))


def test_the_table_goes_to_wandb(
    board: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    logged: dict[str, Any] = {}
    run = MagicMock()
    run.__enter__.return_value.log = logged.update
    run.__enter__.return_value.offline = True
    monkeypatch.setattr(wandb, "init", MagicMock(return_value=run))
    args = ["--methods", "BradleyTerry", "LoRe", f"{__name__}.Broken", "--seeds", "1", "--project", "team"]
    assert leaderboard(place, *args) == 0
    assert wandb.init.call_args.kwargs["project"] == "team" and wandb.init.call_args.kwargs["config"]["seeds"] == 1
    assert set(logged) == {"leaderboard", "accuracy", "few-shot_curves", "parameters"}
    rows = {tuple(line[:3]) for line in logged["leaderboard"].data}
    assert ("LoRe (ours)", "method", "unseen") in rows and ("oracle", "baseline", "seen") in rows
    assert "the run is offline, so no report was saved" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_give_the_same_numbers(board: dict[str, Any], place: Path) -> None:
    args = ["--methods", "BradleyTerry", "LoRe", "--seeds", "1", "--jobs", "2"]
    assert leaderboard(place, *args, out="apart") == 0
    apart = json.loads((place / "apart" / "leaderboard.json").read_text())
    for row in apart["rows"]:
        (here,) = [one for one in board["rows"] if one["name"] == row["name"]]
        assert row["numbers"]["unseen"]["accuracy"] == pytest.approx(here["numbers"]["unseen"]["accuracy"], abs=1e-6)


def test_what_rows_share_is_never_rewritten_with_something_else(tmp_path: Path) -> None:
    """A second leaderboard in the same folder is refused, but only after it has written what its rows would share."""
    texts = ["data: {batch_size: 4}\n", "data: {batch_size: 8}\n"]
    paths = []
    for text in texts:
        (tmp_path / "board.yaml").write_text(text + "model: {class_path: LoRe}\n")
        paths.append(Path(entries.shared_part(str(tmp_path / "board.yaml"), tmp_path / "shared")[1]))
    assert [path.read_text() for path in paths] == ["data:\n  batch_size: 4\n", "data:\n  batch_size: 8\n"]
