"""The command, driven in process; what needs a process of its own is at the end."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor

import plm
from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.cli import VERBS, main
from plm.cli.fit import NAMES as OWN_NAMES
from plm.cli.options import SHARED, OptionParser, add_reading, reading_of
from plm.cli.recipe_options import COMMON
from plm.cli.writing import with_results, write_rows
from plm.data.cache import cached_features
from plm.data.sources.pairs import PairFiles
from plm.method import PersonalizationMethod
from plm.recipe.quiet import quiet
from plm.types import Context, PreferenceBatch, Tokens, UserState
from plm.users import UserStore, store_path

ROOT = Path(plm.__file__).parents[1]
RECIPE = f"""
defaults: [{{backbone: hashing}}, {{trainer: cpu}}, {{logger: csv}}, {{eval: quick}}]
model:
  class_path: {__name__}.MeanMethod
  init_args: {{num_bases: 2}}
data:
  source:
    class_path: plm.data.sources.synthetic.SyntheticPairs
    init_args: {{num_users: 20, pairs_per_user: 12}}
  backbone: {{init_args: {{dim: 32}}}}
  shots: [0, 4]
  repeats: 1
trainer: {{max_epochs: 2, enable_progress_bar: false, enable_model_summary: false}}
"""


class MeanMethod(PersonalizationMethod):
    """A shared direction plus the mean support difference of an unseen user."""

    view = "features"

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None = None,
        lr: float = 0.1,
        num_bases: int = 1,
        ridge: float = 0.0,
    ) -> None:
        super().__init__(num_users, feature_dim, backbone, lr)
        if num_bases < 1:
            raise ValueError(f"expected num_bases >= 1, got {num_bases!r}; set model.init_args.num_bases")
        self.num_bases, self.ridge = num_bases, ridge
        self.direction = torch.nn.Parameter(torch.randn(feature_dim) / 100)

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        nll = -torch.nn.functional.logsigmoid(self.num_bases * self.margin(batch)).mean()
        return {"loss": nll + self.ridge * self.direction.square().sum()}

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        assert isinstance(responses, Tensor)
        return (responses * (self.direction + users.tensors["shift"])).sum(-1)

    def _adapt(self, context: Context) -> UserState:
        total = ((context.chosen - context.rejected) * context.mask[..., None]).sum(1)
        count = context.mask.sum(1)
        return UserState({"shift": total / (count[:, None] + 1)}, count)

    def user_states(self, user_index: Tensor) -> UserState:
        return self.population_state(len(user_index))

    def population_state(self, num_users: int) -> UserState:
        return UserState(
            {"shift": self.direction.new_zeros(num_users, self.feature_dim)}, torch.zeros(num_users).long()
        )


class OtherMethod(MeanMethod):
    """Another class of the same shapes."""


class BrokenMethod(MeanMethod):
    """A method with a mistake in its code."""

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        return {"loss": {}["nll"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and caches of each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLM_FIT__DATA__CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["plm"])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail, and return the one message it shows."""

    def run(*args: str) -> str:
        capsys.readouterr()
        assert main(args) in (1, 2)
        shown = capsys.readouterr().err
        assert "Traceback" not in shown and "usage:" not in shown
        lines = [
            line for line in shown.splitlines() if line and not line.startswith("INFO: ")
        ]  # pytest's own log handler
        assert len(lines) == 1 and lines[0].startswith("error: "), shown
        return lines[0]

    return run


def fit(*args: str) -> Path:
    """Fit the recipe; returns the folder of the run."""
    before = set(Path("runs").glob("*"))
    assert main(["fit", "--config", "recipe.yaml", *args]) == 0
    (made,) = set(Path("runs").glob("*")) - before
    return made


# ---------------------------------------------------------------------- the path from fit to score
def test_a_fit_on_everybody_says_that_nothing_was_tested(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--data.unseen_users", "0", "--data.test_rows", "0", "--trainer.max_epochs", "1")
    shown = capsys.readouterr()
    assert "no pair was held out: nothing was tested" in shown.out and "held out and are unknown" not in shown.out
    assert "across ranks is zero" not in shown.out + shown.err


def test_options_win_over_the_recipe_wherever_they_stand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = ["--trainer.max_epochs", "1", "--model.init_args.num_bases=3", "--config", "recipe.yaml"]
    assert main(["fit", *before, "--data.repeats", "2", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["trainer"]["max_epochs"], shown["data"]["repeats"]) == (1, 2)
    assert shown["model"]["init_args"]["num_bases"] == 3


def test_a_checkpoint_of_a_run_is_evaluated_by_the_recipe_of_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit("--model.init_args.num_bases", "3")
    expected = json.loads((run / "metrics.json").read_text())["unseen"]["accuracy"]
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    named = ["--ckpt_path", checkpoint, "--model.init_args.num_bases", "3", "--config", "recipe.yaml"]
    for args in (named, [f"--ckpt_path={checkpoint}"]):
        before = set(Path("runs").glob("*"))
        assert main(["test", *args]) == 0
        (made,) = set(Path("runs").glob("*")) - before
        assert json.loads((made / "metrics.json").read_text())["unseen"]["accuracy"] == expected
        assert "no --ckpt_path" not in capsys.readouterr().err


def test_adapt_reads_pairs_as_the_training_did_unless_it_is_told_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels of a winner column stay as they are; read by our own column names they would be missing or reversed."""
    rows = [
        {"uid": f"u{user}", "q": f"p{row}", "a": f"alpha {row}", "b": f"beta {row}", "best": "b" if user % 2 else "a"}
        for user in range(12)
        for row in range(10)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = {
        "columns": {"user_id": "uid", "prompt": "q", "chosen": "a", "rejected": "b"},
        "winner": {"column": "best", "left": ["a"], "right": ["b"]},
    }
    assert PairFiles("x", attributes={"a": np.float64(1)}, winner={"left": [date(2020, 1, 2)]}).reading == {
        "attributes": {"a": 1.0},
        "winner": {"left": ["2020-01-02"]},
    }  # what checkpoints can hold
    source = {"class_path": "PairFiles", "init_args": {"path": "rows.jsonl", **reading}}
    Path("recipe.yaml").write_text(RECIPE + "seed_everything: 0\nfinal_test: false\n")
    checkpoint = fit("--data.source", json.dumps(source)) / "checkpoints" / "best.ckpt"
    new = [{**row, "uid": "new"} for row in rows if row["uid"] == "u1"]
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    adapt = ["adapt", "--ckpt_path", str(checkpoint), "--pairs", "new.jsonl"]
    assert main(adapt) == 0
    assert "read as those of the training were (columns: {'user_id': 'uid'" in capsys.readouterr().out
    loaded = load_method(checkpoint)
    assert loaded.encode is not None and loaded.find_users is not None
    betas, alphas = (loaded.encode([""] * 10, [f"{word} {row}" for row in range(10)]) for word in ("beta", "alpha"))
    assert torch.allclose(loaded.find_users(["new"]).tensors["shift"][0], (betas - alphas).sum(0) / 11)
    assert main([*adapt, "--columns", "user_id=uid"]) == 1  # what is said replaces all of it
    assert "expected" in capsys.readouterr().err
    Path("new.jsonl").write_text(json.dumps({**new[0], "uid": ""}))
    assert main(adapt) == 1 and capsys.readouterr().err.startswith("error: 1 malformed row")
    ours = [{"user_id": "me", "prompt": row["q"], "chosen": row["b"], "rejected": row["a"]} for row in new]
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    assert main(adapt) == 1
    cure = "error: pairs with the columns user_id, prompt, chosen and rejected are read with --layout pairs; "
    assert capsys.readouterr().err.startswith(cure)
    assert main([*adapt, "--layout", "pairs"]) == 0
    assert "me" in load_method(checkpoint).users.ids


def test_a_fit_encodes_nothing_after_plm_features(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded: list[str] = []
    encode = HashingBackbone.encode

    def counting(backbone: HashingBackbone, texts: Sequence[str]) -> Tensor:
        encoded.extend(texts)
        return encode(backbone, texts)

    monkeypatch.setattr(HashingBackbone, "encode", counting)
    command = ["features", "--config", "recipe.yaml", "--data.source.init_args.pairs_per_user", "10"]
    assert main([*command, "--shard", "2/2"]) == 0
    part = len(encoded)
    assert main(command) == 0
    total = len(encoded)
    assert 20 < part < total - 20 and total == len(set(encoded))
    shown = capsys.readouterr().out.splitlines()
    (cached,) = cached_features(folder / "cache")
    assert cached.num_texts == total
    assert shown == [
        "200 pairs of 20 users from synthetic/low_rank-20x10",
        f"responses: {total} distinct texts, {part} in shard 2/2: 0 were cached, {part} encoded",
        f"  {cached.folder}",
        "200 pairs of 20 users from synthetic/low_rank-20x10",
        f"responses: {total} distinct texts: {part} were cached, {total - part} encoded",
        f"  {cached.folder}",
    ]
    assert not Path("runs").exists()
    fit(*command[3:], "--final_test", "false")
    assert len(encoded) == total
    assert main([*command, "--trainer.accelerator", "gpu", "--trainer.devices", "8"]) == 0  # nothing is trained
    assert main(["features", "--config", "recipe.yaml", "--dta.cache_dir", "x"]) == 2


def test_fit_tests_the_best_checkpoint_and_its_users_can_be_adapted_and_scored(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit()
    shown = capsys.readouterr().out
    assert "4 of 20 users were held out and are unknown to the checkpoint: " in shown
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "splits.json", "metrics.json", "checkpoints", "metrics.csv"} <= names
    checkpoint = run / "checkpoints" / "best.ckpt"
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["seen"]["num_users"] == 16 and numbers["unseen"]["num_users"] == 4
    splits = json.loads((run / "splits.json").read_text())
    assert UserStore(store_path(checkpoint)).ids == splits["users"]["seen"]
    assert ", ".join(map(repr, splits["users"]["unseen"][:2])) in shown

    # adapt: pairs whose mean difference is known
    pairs = [
        {"uid": "new", "prompt": "p", "chosen": "alpha beta", "rejected": "gamma"},
        {"uid": "new", "prompt": "p", "chosen": "alpha", "rejected": "delta gamma"},
        {"uid": splits["users"]["seen"][0], "prompt": "p", "chosen": "beta", "rejected": "alpha"},
    ]
    Path("new.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    before = checkpoint.read_bytes()
    adapt = ["adapt", "--ckpt_path", str(checkpoint), "--pairs", "new.jsonl"]
    assert main(adapt) == 1 and "columns: {user_id: uid}" in capsys.readouterr().err  # how to mend it
    assert main([*adapt, "--columns", "user_id=uid"]) == 0
    assert "learned anew" in capsys.readouterr().out and checkpoint.read_bytes() == before
    loaded = load_method(checkpoint)
    assert loaded.encode is not None and loaded.find_users is not None
    features = loaded.encode([""] * 4, ["alpha beta", "gamma", "alpha", "delta gamma"])
    expected = (features[0] - features[1] + features[2] - features[3]) / 3
    state = loaded.find_users(["new"])
    assert torch.allclose(state.tensors["shift"][0], expected) and state.num_pairs.tolist() == [2]

    # score: the command and the function give the same bits, unknown users are marked
    rows = [{"response": "alpha beta", "id": 7}, {"response": "gamma", "user_id": "nobody"}, {"response": "gamma"}]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    score = ["score", "--ckpt_path", str(checkpoint), "--responses", "rows.jsonl", "--user", "new"]
    assert main([*score, "--output", "out.jsonl"]) == 0
    assert "1 of 3 rows have no known user" in capsys.readouterr().err
    scored = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["user_known"] for row in scored] == [True, False, True]
    assert [row["user_id"] for row in scored] == ["new", "nobody", "new"] and scored[0]["id"] == 7
    own = loaded.score(["alpha beta", "gamma"], user_id="new")
    assert [scored[0]["reward"], scored[2]["reward"]] == own.tolist()
    assert scored[1]["reward"] == loaded.score(loaded.encode([""], ["gamma"])).item()
    assert main(score) == 0 and capsys.readouterr().out == Path("out.jsonl").read_text()

    # users
    users = ["--ckpt_path", str(checkpoint)]
    assert main(["users", "list", *users]) == 0
    listed = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert len(listed) == 17 and listed["new"] == "2"
    assert main(["users", "export", *users, "--user", "new", "--output", "new-user.jsonl"]) == 0
    (exported,) = [json.loads(line) for line in Path("new-user.jsonl").read_text().splitlines()]
    assert exported["user_id"] == "new" and torch.allclose(torch.tensor(exported["state"]["shift"]), expected)
    assert main(["users", "delete", *users, "--user", "new", splits["users"]["seen"][1]]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["was_stored"] for line in shown.out.splitlines()] == [True, True]
    assert "removed from" in shown.err and "still named" not in shown.err
    assert main(score) == 0
    assert not json.loads(capsys.readouterr().out.splitlines()[0])["user_known"]


def test_a_saved_recipe_reruns_to_the_same_run(folder: Path) -> None:
    first = fit("--model.lr", "0.25", "--data.shots", "[0, 2]")
    assert main(["fit", "--config", str(first / "recipe.yaml"), "--name", "second"]) == 0
    second = first.with_name("second")
    assert (first / "recipe.yaml").read_text() == (second / "recipe.yaml").read_text()
    weights = [torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"] for run in (first, second)]
    assert torch.equal(weights[0]["direction"], weights[1]["direction"])
    saved = yaml.safe_load((first / "recipe.yaml").read_text())
    assert saved["model"]["init_args"] == {"lr": 0.25, "num_bases": 2, "ridge": 0.0}  # no link target, no default lost
    assert saved["defaults"] is None and saved["data"]["shots"] == [0, 2] and saved["trainer"]["max_epochs"] == 2


def test_the_recipe_wins_over_the_checkpoint_and_another_method_is_refused(
    folder: Path, error: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(fit("--model.lr", "0.25", "--final_test", "false") / "checkpoints" / "best.ckpt")
    assert "Test, 95" not in capsys.readouterr().out
    test = ["test", "--config", "recipe.yaml", "--data.cache_dir", "cache", "--ckpt_path"]
    assert main([*test, checkpoint, "--model.lr", "0.75", "--name", "again"]) == 0
    saved = yaml.safe_load(Path("runs/again/test.yaml").read_text())
    assert saved["model"]["init_args"]["lr"] == 0.75 and "seen" in json.loads(
        Path("runs/again/metrics.json").read_text()
    )
    assert "holds tests.cli.test_cli.MeanMethod, the recipe asks for tests.cli.test_cli.OtherMethod" in error(
        *test, checkpoint, "--model", f"{__name__}.OtherMethod"
    )
    assert "does not fit the recipe: " in error(*test, checkpoint, "--data.backbone.dim", "16")
    assert "'nope.ckpt', which does not exist" in error(*test, "nope.ckpt")


def test_predict_writes_the_margins_that_test_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(fit("--name", "fitted") / "checkpoints" / "best.ckpt")
    capsys.readouterr()
    assert main(["predict", "--config", "recipe.yaml", "--ckpt_path", checkpoint]) == 0
    with (Path("runs/fitted-predict") / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert f"predictions.csv of {len(rows)} pairs in runs/fitted-predict\n" in capsys.readouterr().out
    assert len({row["item"] for row in rows}) == len(rows) and all(len(row["item"]) == 16 for row in rows)
    numbers = json.loads(Path("runs/fitted/metrics.json").read_text())
    for users in ("seen", "unseen"):
        right: dict[str, list[float]] = {}
        for row in rows:
            if row["users"] == users:
                margin = float(row["margin"])
                right.setdefault(row["user_id"], []).append(0.5 if margin == 0 else float(margin > 0))
        assert sum(map(len, right.values())) == numbers[users]["num_pairs"]
        accuracy = sum(sum(user) / len(user) for user in right.values()) / len(right)
        assert accuracy == pytest.approx(numbers[users]["accuracy"])
    Path("copy.csv").write_bytes(Path("runs/fitted-predict/predictions.csv").read_bytes())
    assert main(["compare", "runs/fitted-predict", "copy.csv", "--output", "comparison.json"]) == 0
    compared = json.loads(Path("comparison.json").read_text())["all"]
    assert compared["num_users"] == 20 and compared["comparisons"][0]["difference"] == 0


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(folder: Path) -> None:
    run = fit()
    test = ["test", "--config", "recipe.yaml", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--name", "two"]
    ddp = [
        sys.executable,
        "-m",
        "plm",
        *test,
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--show_lightning=true",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PLM_TEST__DATA__CACHE_DIR": "cache"}
    done = subprocess.run(ddp, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (run, Path("runs/two")))
    for users in ("seen", "unseen"):
        assert two[users] == pytest.approx(one[users], nan_ok=True)
    assert two["few_shot"]["accuracy"] == pytest.approx(one["few_shot"]["accuracy"])


def test_a_file_of_rows_is_named_where_no_row_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error: the file may be /dev/stdout."""
    write_rows(({"reward": number} for number in range(2)), str(tmp_path / "rows.jsonl"))
    shown = capsys.readouterr()
    assert not shown.out and shown.err == f"2 rows written to {tmp_path}/rows.jsonl\n"
    write_rows([{"reward": 1}], None)
    assert capsys.readouterr() == ('{"reward": 1}\n', "")


# ---------------------------------------------------------------------- selection
def test_select_keeps_the_best_candidate_by_validation_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = "{model.init_args.ridge: [50.0, 0.0], model.num_bases: [1, 2]}"
    run = fit("--select", grid)
    out = capsys.readouterr().out
    table = json.loads((run / "select.json").read_text())
    values = [candidate["val/seen/log_loss"] for candidate in table["candidates"]]
    assert [(c["ridge"], c["num_bases"]) for c in table["candidates"]] == [(50.0, 1), (50.0, 2), (0.0, 1), (0.0, 2)]
    assert table["selected"] == values.index(min(values)) and len(set(values)) > 1
    assert "Selection on validation rows" in out and out.count("Test, 95") == 1
    chosen = table["candidates"][table["selected"]]
    loaded = load_method(run / "checkpoints" / "best.ckpt")
    assert isinstance(loaded, MeanMethod) and (loaded.ridge, loaded.num_bases) == (chosen["ridge"], chosen["num_bases"])
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    (state,) = [state for key, state in best["callbacks"].items() if key.startswith("BestCheckpoint")]
    assert state["best_model_score"].item() == min(values)  # fitted again from the same seed: the same value
    assert yaml.safe_load((run / "recipe.yaml").read_text())["select"] == yaml.safe_load(grid)
    # the recipe of the chosen candidate fits the checkpoint and reruns to it
    assert main(["fit", "--config", str(run / "selected.yaml"), "--name", "again"]) == 0
    again = torch.load("runs/again/checkpoints/best.ckpt", weights_only=True)
    assert torch.equal(again["state_dict"]["direction"], best["state_dict"]["direction"])


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("{model.init_args.num_base: [1]}", "no key 'num_base'; did you mean 'num_bases'?"),
        ("{model.init_args.num_bases: [1, two]}", "num_bases: expected int, got 'two'"),
        ("{model.init_args.num_bases: [1, 0]}", "expected num_bases >= 1, got 0"),
        ("{data.val_rows: [0.1]}", "expected keys like model.init_args.NAME, got 'data.val_rows'"),
        ("{model.init_args.num_users: [1]}", "filled from data.num_users"),
        ("{model.init_args.num_bases: []}", "expected a list of values for model.init_args.num_bases"),
        ("{model.init_args.num_bases: 3}", "select"),
    ],
)
def test_select_refuses_a_wrong_grid_before_fitting(error: Callable[..., str], grid: str, message: str) -> None:
    assert message in error("fit", "--config", "recipe.yaml", "--select", grid)
    assert not Path("runs").exists()


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_epoch", "3"], "no option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'?"),
        (["--trainer.max_epo", "3"], "no option '--trainer.max_epo'"),  # no abbreviations
        (["--model.num_base", "3"], "no key 'num_base'; did you mean 'num_bases'?"),
        (["--model.num_bases", "x"], "num_bases: expected int, got 'x'"),
        (["--model", "MeanMethd"], "model: no class 'MeanMethd'; did you mean 'MeanMethod'?"),
        (["--data.source", "SyntheticPair"], "no class 'SyntheticPair'; did you mean 'SyntheticPairs'?"),
        (["--data.source.num_user", "3"], "no key 'num_user'; did you mean 'num_users'?"),
        (["--data.source.num_users", "1"], "num_users: expected at least 2"),
        (["--data.unseen_users", "2"], "data.unseen_users: expected a share in [0, 1), got 2"),
        (["--model.num_bases", "0"], "expected num_bases >= 1, got 0; set model.init_args.num_bases"),
        (["--model.num_users", "3"], "model.init_args.num_users is filled from data.num_users"),
        (["--model.init_args.backbone", "{}"], "model.init_args.backbone is filled from data.backbone_spec"),
        (["--early_stopping.monitor", "val/nope"], "val/nope"),
        (["--trainer.accelerator", "gpux"], "invalid accelerator name"),
        (["--defaults", "[{data: synthetic}]"], "defaults work in a recipe given by --config only"),
        (["--config", "recipe.yml"], "no config file 'recipe.yml'"),
    ],
)
def test_a_wrong_option_gives_one_message(error: Callable[..., str], args: list[str], message: str) -> None:
    assert message in error("fit", "--config", "recipe.yaml", *args)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_bases", "num_base", "no key 'num_base'; did you mean 'num_bases'?"),
        ("max_epochs", "max_epoch", "no key 'trainer.max_epoch'; did you mean 'max_epochs'?"),
        ("trainer: {max", "traner: {max", "no key 'traner'; did you mean 'trainer'?"),
        ("MeanMethod", "MeanMethd", "has no attribute 'MeanMethd'; did you mean 'MeanMethod'?"),
        ("num_bases: 2", "num_users: 2", "model.init_args.num_users is filled from data.num_users"),
        ("num_bases: 2", "num_bases: ${data.nope}", "data.nope"),
        ("{trainer: cpu}", "{trainer: cpus}", "no trainer named 'cpus'; did you mean 'cpu'? (trainer: cpu, ddp, "),
        ("{trainer: cpu}", "{trainr: cpu}", "no group 'trainr' in defaults; did you mean 'trainer'?"),
        ("SyntheticPairs", "SyntheticPair", "did you mean 'SyntheticPairs'?"),
        ("SyntheticPairs", "plm.data.sources.SyntheticPairs", "mean 'plm.data.sources.synthetic.SyntheticPairs'?"),
    ],
)
def test_a_typo_in_a_recipe_gives_one_message(error: Callable[..., str], old: str, new: str, message: str) -> None:
    assert old in RECIPE
    Path("typo.yaml").write_text(RECIPE.replace(old, new))
    assert message in error("fit", "--config", "typo.yaml")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], "no command 'fitt'; did you mean 'fit'?"),
        (["--versio"], "no option '--versio'; did you mean '--version'?"),
        (["methods", "x"], "plm methods takes no arguments"),
        (["fit"], "the following arguments are required: data.source, data.backbone, model; give a recipe"),
        (["score", "--ckpt", "x"], "--ckpt_path"),
        (["users", "lst", "--ckpt_path", "x"], "no action 'lst'; did you mean 'list'?"),
        (["users", "list", "--ckpt_path", "x.ckpt"], "no users are stored beside 'x.ckpt'"),
        (["adapt", "--ckpt_path", "x.ckpt", "--pairs", "y"], "'x.ckpt', which does not exist"),
        (["adapt", "--ckpt_path", "x", "--pairs", "y", "--columns", "user_id"], "expected NAME=COLUMN"),
        (["adapt", "--ckpt_path", "x", "--pairs", "y", "--colums", "a=b"], "did you mean '--columns'?"),
        (["adapt", "--pair", "new.csv"], "no option '--pair'; did you mean '--pairs'?"),
        (
            ["score", "--ckpt_path", "x", "--responses", "y", "--user", "a", "b"],
            "--user takes one value, got 'a' and 'b'",
        ),
        (["score", "--ckpt_path", "x", "--responses", "y.csv"], "expected a file, got 'y.csv', which does not exist"),
        (["query", "--ckpt_path", "x", "--user", "a", "--pool", "y.parquet"], "'y.parquet', which does not exist"),
        (["leaderboard", "--data", "polis", "--backbone", "hashin"], "did you mean 'conf/backbone/hashing.yaml'?"),
        (
            ["label", "--samples", "y.jsonl", "--rewards", "{rewards: {a: {class_path: Length}}}", "--output", "o"],
            "'y.jsonl', got no such file",
        ),
    ],
)
def test_a_wrong_command_gives_one_message(error: Callable[..., str], args: list[str], message: str) -> None:
    assert message in error(*args)


def test_a_repeated_option_of_many_values_adds_up() -> None:
    """Whoever gives none, or gives them once, gets what argparse gives; the default is left alone."""
    parser = OptionParser(prog="plm")
    add_reading(parser)
    parser.add_argument_group("group").add_argument("--methods", nargs="+", default=["all"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse("--columns a=b c=d --methods X --columns e=f --methods Y Z --seed 1 --seed 2".split())
    assert (
        given.columns == [("a", "b"), ("c", "d"), ("e", "f")] and given.methods == ["X", "Y", "Z"] and given.seed == 2
    )
    given = parser.parse("--winner tie=same --winner tie=neither column=best".split())
    assert reading_of(given)["winner"] == {"tie": ["same", "neither"], "column": "best"}
    assert given.columns == SHARED["--columns"]["default"] == [] and given.methods == ["all"]


def test_a_command_of_two_actions_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["data"], ["data", "--help"]):
        assert main(args) == 0
        shown = capsys.readouterr().out
        assert all(f"\n{action}: " in shown and f"plm data {action} --help" in shown for action in ("check", "convert"))


def test_malformed_rows_to_score_are_named_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        '{"response": "fine"}',
        "{",
        '{"respnse": "x"}',
        '{"response": " "}',
        "[1]",
        '{"response": "x", "user_id": [1]}',
    ]
    Path("rows.jsonl").write_text("\n".join(rows))
    assert main(["score", "--ckpt_path", "x.ckpt", "--responses", "rows.jsonl"]) == 1
    shown = capsys.readouterr().err
    for line, text in {
        2: "malformed JSON",
        3: "rename 'respnse'",
        4: "empty text",
        5: "a JSON object",
        6: "user_id",
    }.items():
        assert any(row.startswith(f"rows.jsonl:{line}: ") and text in row for row in shown.splitlines()), shown
    assert "5 malformed rows" in shown and "rows.jsonl:1:" not in shown


def test_results_overwrite_neither_the_input_nor_a_column_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"response": "fine", "reward": 0.9}')
    assert main(["score", "--ckpt_path", "x.ckpt", "--responses", "rows.jsonl", "--output", "./rows.jsonl"]) == 2
    assert "--output: './rows.jsonl' is what --responses reads; write to another file" in capsys.readouterr().err
    assert Path("rows.jsonl").read_text() == '{"response": "fine", "reward": 0.9}'
    with pytest.raises(ValueError, match="expected rows without 'reward', which this command writes"):
        with_results({"response": "fine", "reward": 0.9}, None, reward=1.0)
    assert with_results({"response": "fine"}, "u", reward=1.0) == {"response": "fine", "user_id": "u", "reward": 1.0}


def test_modules_of_the_working_folder_are_not_imported() -> None:
    Path("taken.py").write_text("open('ran', 'w').close()")
    torch.save({"plm": {"class_path": "taken.M", "user_ids": []}, "state_dict": {}}, "x.ckpt")
    Path("rows.jsonl").write_text('{"response": "fine"}')
    command = [sys.executable, "-m", "plm", "score", "--ckpt_path", "x.ckpt", "--responses", "rows.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "cannot import the method 'taken.M'" in done.stderr
    assert not Path("ran").exists()


def test_score_reads_what_the_data_read_and_refuses_rewards_that_are_nan(
    folder: Path, error: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fit("--final_test", "false") / "checkpoints" / "best.ckpt"
    day = datetime.date(2026, 11, 21)
    rows = [{"response": "alpha", "user_id": "seen-1", "day": day}, {"response": "beta", "user_id": None, "day": day}]
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    with gzip.open("rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
    Path("rows.csv").write_text("response,user_id,day\nalpha,seen-1,2026-11-21\nbeta,,2026-11-21\n")
    score = ["score", "--ckpt_path", str(checkpoint), "--responses"]
    capsys.readouterr()
    shown = []
    for name in ("rows.parquet", "rows.jsonl.gz", "rows.csv"):
        assert main([*score, name]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    scored = [json.loads(line) for line in shown[0].splitlines()]
    assert [(row["response"], row["user_id"], row["day"]) for row in scored] == [
        ("alpha", "seen-1", "2026-11-21"),
        ("beta", None, "2026-11-21"),
    ]
    pq.write_table(pa.Table.from_pylist([{"response": "x"}, {"response": ""}]), "bad.parquet")
    assert main([*score, "bad.parquet"]) == 1
    assert "bad.parquet:row 1: response: empty text" in capsys.readouterr().err
    assert "expected a file ending in .jsonl, .jsonl.gz, .json, .json.gz, .csv" in error(*score, "recipe.yaml")

    store = UserStore(store_path(checkpoint))
    state, _ = store.get(store.ids[:1])
    store.add(["damaged"], UserState({"shift": torch.full_like(state.tensors["shift"], torch.nan)}, state.num_pairs))
    message = error(*score, "rows.csv", "--user", "damaged")
    assert "got nan for 1 of 2 rows, the first 'beta' for user 'damaged'" in message


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PLM_DEBUG", "1")
    assert main(["fit", "--config", "nope.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback_and_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "recipe.yaml", "--model", f"{__name__}.BrokenMethod"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "KeyError: 'nll'" in shown
    assert "this is a bug in plm or in the method's code; report it" in shown.splitlines()[-1]


# ---------------------------------------------------------------------- what a run leaves behind
def test_loggers_write_below_the_folder_that_is_set(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    args = ["fit", "--config", "recipe.yaml", "--trainer.default_root_dir", str(elsewhere)]
    assert main(args) == 0
    assert {"recipe.yaml", "metrics.csv", "metrics.json"} <= {path.name for path in elsewhere.glob("*/*")}
    Path("recipe.yaml").write_text(RECIPE.replace("logger: csv", "logger: tensorboard"))
    assert main(args) == 0
    assert list(elsewhere.glob("*/events.*")) and not Path("runs").exists()


def test_a_fast_dev_run_leaves_nothing_behind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ["fit", "--config", "recipe.yaml", "--trainer.fast_dev_run", "true"]
    assert main(fast) == 0 and main([*fast, "--select", "{model.num_bases: [1, 2]}"]) == 0
    assert "nan" not in capsys.readouterr().out and not Path("runs").exists()
    checkpoint = str(fit() / "checkpoints" / "best.ckpt")
    before = set(folder.rglob("*"))
    predict = ["predict", "--config", "recipe.yaml", "--data.cache_dir", "cache", "--ckpt_path", checkpoint]
    assert main([*predict, "--trainer.fast_dev_run", "true"]) == 0
    assert set(folder.rglob("*")) == before


def test_a_fit_that_few_steps_end_is_validated_and_saved(folder: Path) -> None:
    for options in (["--trainer.max_steps", "3"], ["--data.batch_size", "20", "--trainer.max_steps", "2"]):
        every = ["--trainer.check_val_every_n_epoch", "25"]  # there are one and many steps in an epoch
        run = fit("--trainer.max_epochs", "300", *every, *options)
        for name in ("best.ckpt", "last.ckpt"):
            saved = torch.load(run / "checkpoints" / name, weights_only=True)
            assert saved["global_step"] == int(options[-1])
        assert len(UserStore(store_path(run / "checkpoints" / "best.ckpt"))) == 16
        assert (run / "metrics.json").is_file()
        test = ["test", "--config", "recipe.yaml", "--data.cache_dir", "cache", "--ckpt_path"]
        assert main([*test, str(run / "checkpoints" / "last.ckpt")]) == 0


# ---------------------------------------------------------------------- configuration
def test_print_config_shows_the_expanded_and_interpolated_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ref.yaml").write_text("data: {test_rows: '${data.unseen_users}'}\n")
    args = ["fit", "--config", "recipe.yaml", "--config", "ref.yaml", "--data.unseen_users", "0.25", "--print_config"]
    assert main(args) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["accelerator"] == "cpu" and shown["trainer"]["max_epochs"] == 2  # group, then recipe
    assert shown["data"]["backbone"]["init_args"]["dim"] == 32 and shown["metrics"]["num_resamples"] == 500
    assert shown["data"]["test_rows"] == 0.25  # a reference follows the command line
    assert "num_users" not in shown["model"]["init_args"]


def test_environment_variables_set_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PLM_FIT__SEED_EVERYTHING", "7")
    assert main(["fit", "--config", "recipe.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] == 7


def test_two_offline_wandb_runs_have_recipes_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    text = RECIPE.replace("logger: csv", "logger: wandb").replace("max_epochs: 2", "max_epochs: 1")
    Path("recipe.yaml").write_text(text)
    for lr in ("0.1", "0.2"):
        assert main(["fit", "--config", "recipe.yaml", "--model.lr", lr, "--trainer.logger.init_args.group", "g"]) == 0
    saved = sorted(Path("runs/plm").glob("*/recipe.yaml"))
    assert {yaml.safe_load(path.read_text())["model"]["init_args"]["lr"] for path in saved} == {0.1, 0.2}
    assert all((path.parent / "metrics.json").is_file() for path in saved)
    assert len(list(Path("runs/wandb").glob("offline-run-*"))) == 2


# ---------------------------------------------------------------------- plug-ins and start-up
def test_methods_are_listed_from_their_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Path("third/party")
    package.mkdir(parents=True)
    Path("third/__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "__init__.py").write_text(
        '"""A module.\n\nPaper: Someone (2031), On Taste.\n"""\nclass Mine:\n    """Guesses well."""\n'
    )
    Path("third/parts").mkdir()
    Path("third/parts/__init__.py").write_text("from .made import Told\n")
    Path("third/parts/made.py").write_text(
        '"""Made.\n\nPaper: Somebody,\n    On Words (2032).\nDeviations: none.\n"""\nclass Told:\n    """Tells."""\n'
    )
    monkeypatch.syspath_prepend(Path.cwd())
    places = {"Mine": "third.party:Mine", "Gone": "gone.x:Gone", "Told": "third.parts:Told"}
    entries = [EntryPoint(name, place, "plm.methods") for name, place in places.items()]
    monkeypatch.setattr("plm.recipe.plugins.entry_points", lambda group: entries)
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "Mine  (third.party.Mine)\n    Guesses well.\n    Paper: Someone (2031), On Taste." in shown
    assert "Gone  (gone.x.Gone)\n    cannot be imported" in shown
    assert "Told  (third.parts.Told)\n    Tells.\n    Paper: Somebody, On Words (2032)." in shown


def test_every_method_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    """By what it is, and by a paper with its year or number, in lines of at most 120 characters."""
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for method in re.split(r"\n(?=\w)", shown.strip()):
        _, summary, *paper = method.splitlines()
        assert not summary.strip().startswith("Paper") and summary.endswith("."), method
        assert re.search(r"Paper: .*\d{4}", " ".join(paper)) and paper[-1].endswith("."), method
    assert max(map(len, shown.splitlines())) <= 120


def test_plugins_get_short_names_and_broken_ones_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from plm.recipe.plugins import load_plugins

    entries = [
        EntryPoint("MeanMethod", f"{__name__}:MeanMethod", "plm.methods"),
        EntryPoint("Gone", "gone.x:Gone", "plm.methods"),
        EntryPoint("Twin", f"{__name__}:MeanMethod ", "plm.methods"),
    ]
    monkeypatch.setattr("plm.recipe.plugins.entry_points", lambda group: entries)
    with pytest.warns(UserWarning) as warned:
        load_plugins()
    assert ["gone.x" in str(w.message) for w in warned] == [True, False]
    assert "two methods are named 'MeanMethod'" in str(warned[1].message)
    with pytest.warns(UserWarning):
        assert main(["fit", "--config", "recipe.yaml", "--model", "MeanMethod", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == f"{__name__}.MeanMethod"


WRONG = {
    "fit": [],
    "validate": ["--traner.max_epochs", "3"],
    "test": ["--config", "no_such_recipe.yaml"],
    "predict": ["--modl", "LoRe"],
    "adapt": ["--ckpt_path", "x", "--pairs", "y", "--columns", "user_id"],
    "score": ["--ckpt_path", "x"],
    "serve": ["--ckpt_path", "x", "--port", "0"],
    "export": ["--ckpt_path", "x", "--outptu", "y"],
    "query": ["--ckpt_path", "x", "--user", "a", "--pool", "y", "--num_draws", "1"],
    "generate": ["--ckpt_path", "x", "--prompts", "y", "--best_of", "3"],
    "sample": ["--policy", "x", "--prompts", "y", "--num_samples", "0", "--output", "z"],
    "label": ["--samples", "x", "--output", "y"],
    "judge": ["--ckpt_path", "x", "--prompts", "y", "--rewards", "z", "--num_prompts", "0"],
    "data": ["check", "--strict"],
    "audit": ["a.csv", "--reported", "0.7", "--output", "b"],
    "verify": ["recipes/papers/lore_polis_k2.yaml", "--results", "x", "--dry"],
    "compare": ["a.csv"],
    "rewardbench": ["--input", "x"],
    "explain": ["--ckpt_path", "x", "--pairs", "y", "--data.split_seed", "1"],
    "users": ["lst", "--ckpt_path", "x"],
    "portfolio": ["--siz", "3"],
    "leaderboard": ["--seeds", "0"],
    "dashboard": ["--name", "x"],
    "runs": ["--folder", "x"],
    "features": ["--config", "x", "--shard", "0/2"],
    "cache": ["clera"],
    "methods": ["x"],
}
"""A wrong command line for each verb."""


def test_help_and_wrong_command_lines_are_answered_without_what_does_the_work() -> None:
    assert WRONG.keys() == VERBS.keys()
    code = f"""
import contextlib, io, sys
from plm.cli import main
import plm
dir(plm)
HEAVY = {{"torch", "lightning", "transformers", "numpy", "pyarrow", "scipy"}}
HEAVY |= {{"jsonargparse", "omegaconf", "rich", "wandb"}}
def check(*args, expected):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(args)
    assert status in expected, (args, status, out.getvalue())
    assert not HEAVY & set(sys.modules), (args, HEAVY & set(sys.modules))
    if expected != [0]:
        assert out.getvalue().startswith("error: ") and out.getvalue().count("\\n") == 1, (args, out.getvalue())
    return out.getvalue()
shown = check("--help", expected=[0])
assert check("--version", expected=[0]) == f"plm {{plm.__version__}}\\n"
check("methods", expected=[0])
for verb, wrong in {WRONG!r}.items():
    assert f"\\n  {{verb}} " in shown
    for option in ("--help", "-h"):
        assert f"plm {{verb}}" in check(verb, option, expected=[0])
    check(verb, *wrong, expected=[1, 2])
check("fit", "--select", "{{model.lr: 3}}", expected=[2])
check("fit", "--config", "typo.yaml", expected=[1])
"""
    Path("typo.yaml").write_text("defaults: [{trainr: cpu}]")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PLM_")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr


def test_the_short_help_of_a_recipe_names_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """And the first parts that are checked before Lightning is imported are those of the real parser."""
    for verb in ("fit", "validate", "test", "predict"):
        assert main([verb, "--help", "all"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: plm [options] {verb} ")  # whatever started the program
        real = set(re.findall(r"--([\w.]+)", text))
        firsts = {name.partition(".")[0] for name in real}
        refused = set() if verb == "fit" else set(OWN_NAMES["fit"])  # Lightning shows and ignores them
        assert firsts - refused <= {*COMMON, *OWN_NAMES.get(verb, ())} <= firsts | {"c", "h"}, verb
        assert main([verb, "--help"]) == 0
        short = capsys.readouterr().out
        assert len(short.splitlines()) < 50
        for name in re.findall(r"^  --([\w.]+)", short, flags=re.M):
            assert name in real or name.removesuffix(".init_args.NAME") in real, name
    assert main(["portfolio", "--help", "all"]) == 0
    real = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    assert main(["portfolio", "--help"]) == 0
    assert set(re.findall(r"^  --([\w.]+)", capsys.readouterr().out, flags=re.M)) <= real


def test_options_for_the_same_thing_have_the_same_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option of every verb: it is in the table of shared ones, or only one verb has it."""
    verbs_of: dict[str, set[str]] = {}
    of_recipes = {"fit", "validate", "test", "predict", "portfolio"}
    for verb, *action in [*([verb] for verb in VERBS.keys() - of_recipes), ["data", "check"], ["data", "convert"]]:
        assert main([verb, *action, "--help"]) == 0
        for name in re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, flags=re.M):
            verbs_of.setdefault(name, set()).add(verb)
    several = {name for name, verbs in verbs_of.items() if len(verbs) > 1}
    settings = {"--max_new_tokens", "--min_new_tokens", "--temperature", "--top_k", "--top_p", "--batch_tokens"}
    policy = {"--policy", "--template", "--dtype", "--max_prompt_length", "--policy_url", "--concurrency"}
    assert several == set(SHARED) | settings | policy
    assert settings | policy <= verbs_of.keys() and verbs_of["--policy"] == {"generate", "judge", "sample"}


def test_two_runs_in_one_process_leave_warnings_and_logging_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = (warnings.formatwarning, list(warnings.filters), list(logger.filters))
    for _ in range(2):
        assert main(["fit", "--config", "recipe.yaml", "--print_config"]) == 0
        assert (warnings.formatwarning, list(warnings.filters), list(logger.filters)) == before
    with quiet():
        with quiet():
            assert len(logger.filters) == len(before[2]) + 1
        assert len(logger.filters) == len(before[2]) + 1


def test_public_names_are_lazy_and_complete() -> None:
    assert plm.UserStore is UserStore and plm.load_method is load_method
    assert set(plm.__all__) <= set(dir(plm))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        plm.nope  # noqa: B018


def test_only_a_fit_selects(capsys: pytest.CaptureFixture[str]) -> None:
    """What another verb would ignore is refused."""
    for option in ("--select", "--final_test"):
        assert main(["test", option, "{}", "--config", "recipes/quickstart.yaml"]) == 2
        assert f"no option '{option}'" in capsys.readouterr().err
