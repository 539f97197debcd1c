"""A fit from Python: the same run as the command's, from tables of every kind."""

from __future__ import annotations

import html
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from lightning import Trainer

import plm
from plm.backbones import HashingBackbone
from plm.callbacks import FewShotCurve, PreferenceMetrics
from plm.cli import main
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.pairs import PairFiles
from plm.data.sources.synthetic import SyntheticPairs
from plm.erasure import erase_users
from plm.methods.lore import LoRe

FAST = {
    "trainer.max_epochs": 30,
    "trainer.check_val_every_n_epoch": 10,
    "trainer.enable_progress_bar": False,
    "data.shots": [],
}


def planted(num_users: int = 30, pairs_per_user: int = 14) -> list[dict[str, Any]]:
    """Users with odd numbers like what mentions the sea, the others what mentions the snow."""
    draw = random.Random(0)
    rows = []
    for user in range(num_users):
        for number in range(pairs_per_user):
            sea, snow = f"the sea at {draw.randrange(999)}", f"the snow at {draw.randrange(999)}"
            chosen, rejected = (sea, snow) if user % 2 else (snow, sea)
            rows.append({"user_id": user, "prompt": f"where to {number}", "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["notebook"])
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> plm.Run:
    """Fitted from a DataFrame whose ids are integers."""
    root = tmp_path_factory.mktemp("fitted")
    options = {**FAST, "data.cache_dir": str(root / "cache")}
    return plm.fit(
        pd.DataFrame(planted()), "LoRe", backbone="hashing", folder=root / "runs", options=options, num_bases=2
    )


def test_a_table_is_fitted_tested_and_served(run: plm.Run) -> None:
    assert run.metrics["unseen"]["accuracy"] > 0.9 > 0.6 > run.metrics["unseen"]["global_accuracy"]
    assert set(run.figures) >= {"histogram", "calibration"} and all(path.is_file() for path in run.figures.values())
    assert isinstance(run.method, LoRe) and run.method.num_bases == 2
    odd, even = (next(user for user in run.users if int(user) % 2 == parity) for parity in (1, 0))
    for user, likes_sea in ((odd, True), (even, False)):
        sea, snow = run.method.score(["the sea at 5", "the snow at 5"], user_id=user).tolist()
        assert (sea > snow) == likes_sea


def test_ids_may_be_integers_and_a_method_tells_what_it_is(run: plm.Run) -> None:
    known, method = int(run.users[0]), run.method
    texts = ["the sea at 5", "the snow at 5"]
    assert torch.equal(method.score(texts, user_id=known), method.score(texts, user_id=str(known)))
    each = np.array([known, int(run.users[1])])
    assert torch.equal(method.score(texts, user_id=each), method.score(texts, user_id=[*map(str, each)]))  # type: ignore[arg-type]
    assert method.learn(777, [("where to", *texts)]) == 1 and 777 in method.users and "777" in method.users
    assert repr(method).startswith("LoRe(num_users=24, feature_dim=512, num_bases=2), reads texts by HashingBackbone")
    assert repr(method).endswith(f"knows {len(run.users)} users of {method.users.place}")
    method.forget(777)
    assert 777 not in method.users and repr(LoRe(3, 4)) == "LoRe(num_users=3, feature_dim=4)"
    for wrong in (True, 1.5, None):
        with pytest.raises(ValueError, match="expected the id of a user as a text or an integer"):
            method.learn(wrong, [("where to", *texts)])  # type: ignore[arg-type]


def test_a_run_tells_its_verdicts_and_shows_its_figures(run: plm.Run) -> None:
    text = repr(run)
    assert text.splitlines() == [
        f"Run({str(run.folder)!r})",
        *(f"  {line}" for line in run.metrics["verdicts"].values()),
    ]
    page = run._repr_html_()
    assert html.escape(run.metrics["verdicts"]["seen"]) in page
    assert page.count("data:image/png;base64,") == len(run.figures)
    with pytest.raises(ValueError, match=r"which has no checkpoints/best\.ckpt"):
        plm.Run(run.folder.parent)


def test_the_saved_recipe_repeats_the_run(run: plm.Run) -> None:
    """The table was kept, so that the command prints the numbers of the fit from Python."""
    assert main(["fit", "--config", str(run.folder / "recipe.yaml"), "--name", "again"]) == 0
    again = plm.Run(run.folder.parent / "again")
    assert again.metrics["unseen"] == pytest.approx(run.metrics["unseen"], nan_ok=True)
    assert torch.equal(
        again.method.score(["the sea"], user_id=run.users[0]), run.method.score(["the sea"], user_id=run.users[0])
    )


class Frame:
    """What other libraries of tables offer."""

    def to_arrow(self) -> pa.Table:
        return pa.Table.from_pylist(planted(6, 6))


@pytest.mark.parametrize("kind", ["list", "arrow", "frame", "path", "paths", "pairs"])
def test_pairs_come_in_tables_of_every_kind(kind: str, folder: Path) -> None:
    rows = planted(6, 6)
    for name, part in (("all", rows), ("a", rows[:18]), ("b", rows[18:])):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    given = {
        "list": rows,
        "arrow": pa.Table.from_pylist(rows),
        "frame": Frame(),
        "path": Path("all.jsonl"),
        "paths": ["a.jsonl", "b.jsonl"],
        "pairs": plm.read_pairs("all.jsonl"),
    }[kind]
    options = {**FAST, "trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "final_test": False}
    run = plm.fit(given, plm.BradleyTerry, backbone=HashingBackbone(dim=16), name="mine", options=options, lr=0.1)
    saved = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert run.folder == Path("runs/mine") and saved["model"]["init_args"]["lr"] == 0.1
    assert saved["data"]["backbone"]["init_args"]["dim"] == 16
    users = json.loads((run.folder / "splits.json").read_text())["users"]
    assert {*users["seen"], *users["unseen"]} == {str(user) for user in range(6)}
    assert "not tested" in repr(run)
    with pytest.raises(ValueError, match="expected a run that was tested"):
        _ = run.metrics


@pytest.mark.filterwarnings("ignore:1 malformed row left out")
def test_files_are_read_as_they_are_said_to_be(folder: Path) -> None:
    """Layout, winner and malformed rows, as of `plm.read_pairs`."""
    rows = [
        {"annotator": row["user_id"], "prompt": row["prompt"], "answer1": row["rejected"], "answer2": row["chosen"]}
        for row in planted(10, 12)
    ]
    lines = [json.dumps({**row, "comparison": "right"}) for row in rows]
    Path("export.jsonl").write_text("\n".join([*lines, "{"]))
    options = {**FAST, "data.cache_dir": "kept", "final_test": False}
    for reading in (
        {"layout": "label_studio"},
        {
            "columns": {"user_id": "annotator", "chosen": "answer1", "rejected": "answer2"},
            "winner": {"column": "comparison"},
        },
    ):
        run = plm.fit("export.jsonl", backbone="hashing", on_error="skip", options=options, num_bases=2, **reading)  # type: ignore[arg-type]
        assert run.method.score(["the sea at 1", "the snow at 1"], user_id=run.users[0]).diff().sign() == (
            -1 if int(run.users[0]) % 2 else 1
        )
        assert (run.folder / "skipped.ndjson").is_file()
    table = plm.read_pairs("export.jsonl", layout="label_studio", on_error="skip")
    expected = f"PairTable(120 pairs of 10 users, {len(table.items)} distinct texts; left out: 1 malformed)"
    assert repr(table) == expected


def test_a_column_of_some_rows_is_read(folder: Path) -> None:
    """Arrow takes its columns from the first row."""
    rows = planted(6, 6)
    rows[7] |= {"tie": True, "weight": 3.0}
    options = {**FAST, "trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "final_test": False}
    run = plm.fit(rows, plm.BradleyTerry, backbone="hashing", options=options)
    (table,) = Path("runs/pairs").glob("table_*.parquet")
    assert plm.read_pairs([table]).tie.sum() == 1 and plm.read_pairs([table]).weight.max() == 3
    left = {path.resolve() for path in erase_users(run.checkpoint, ["3"]).remaining}
    assert table.resolve() in left  # the pairs of others are not thrown away, and it is said


def test_options_are_laid_over_the_recipe_and_may_be_of_numpy(folder: Path) -> None:
    trainer = {"max_epochs": np.int64(1), "check_val_every_n_epoch": 1, "enable_progress_bar": False}
    options = {
        "trainer": trainer,
        "trainer.log_every_n_steps": 1,
        "final_test": False,
        "data.cache_dir": Path("kept"),
        "model.init_args": {"ridge": 0.5},
    }
    run = plm.fit(planted(6, 6), "LoRe", backbone="hashing", folder="here", options=options, num_bases=np.int32(2))
    assert run.folder.parent == Path("here") and Path("kept").is_dir() and "log_every_n_steps" not in trainer
    saved = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert (saved["model"]["init_args"]["num_bases"], saved["model"]["init_args"]["ridge"]) == (2, 0.5)


def test_a_checkpoint_of_another_name_is_found(folder: Path) -> None:
    options = {**FAST, "trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "checkpoint.filename": "top"}
    run = plm.fit(planted(6, 6), "BradleyTerry", backbone="hashing", options={**options, "final_test": False})
    assert run.checkpoint.name == "top.ckpt" and run.users


@pytest.mark.parametrize(
    ("pairs", "arguments", "message"),
    [
        (3, {}, "expected files, a DataFrame, an Arrow table or a list of mappings of one kind, got int"),
        ([{"user_id": "a"}, 5], {}, "got list"),
        ([{**planted()[0], "chosen": 5}, planted()[1]], {}, "got list"),
        ("nowhere.jsonl", {}, "expected data at 'nowhere.jsonl'"),
        (
            [{"user_id": "a", "prompt": "p", "chosen": "x", "reject": "y"}],
            {},
            r"^the list: .* column 'rejected' is missing; .* Set columns={'rejected': 'reject'}\. For usual",
        ),
        (
            pd.DataFrame([{**row, "winner": "C"} for row in planted(6, 6)]).rename(columns={"user_id": "who"}),
            {"columns": {"user_id": "who"}, "winner": {"column": "winner"}},
            r"the labels 'C' mean by winner={'column': 'winner', 'left': .*\n  row 0 of the DataFrame: winner: "
            "expected one of left, right, tie, a, .* b, ",
        ),
        (
            pd.DataFrame([{**planted()[0], "rejected": ""}, *planted(6, 6)]),
            {},
            r"^1 malformed row .* leave out by on_error='skip':\n  row 0 of the DataFrame: rejected: empty text",
        ),
        (pd.DataFrame([{**planted()[0], "user_id": np.nan}]), {}, "row 0 of the DataFrame: user_id: missing or null"),
        (planted(6, 6), {"method": "LoRo"}, "no class 'LoRo'; did you mean 'LoRe'"),
        (planted(6, 6), {"num_basis": 2}, "no key 'num_basis'; did you mean 'num_bases'"),
        (planted(6, 6), {"backbone": "hashin"}, "no backbone named 'hashin'; did you mean 'hashing'"),
        (planted(6, 6), {"options": {"trainer.max_epoch": 2}}, "did you mean 'max_epochs'"),
        (
            planted(6, 6),
            {"options": {"model": "LoRe", "model.init_args.lr": 0.1}},
            "'model.init_args.lr', but model is",
        ),
        (planted(6, 6), {"lr": object()}, "model.init_args.lr: expected what a recipe can hold, got object"),
        (planted(6, 6), {"options": {"trainer.fast_dev_run": True}}, "trainer.fast_dev_run: expected a fit"),
        ([{**planted()[0], "user_id": 2**70}], {}, "got list"),
        (planted(6, 6), {"name": "a/b"}, "expected the name of a folder, got 'a/b'"),
    ],
)
def test_what_cannot_be_fitted_is_an_error_and_leaves_no_run(
    pairs: Any, arguments: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        plm.fit(pairs, **{"backbone": "hashing", **arguments})
    assert not Path("runs").exists()
    for hidden in ("recipe.yaml", "table_", "--"):  # nobody has written these files, or a command
        assert hidden not in str(raised.value)


def test_a_table_stays_beside_the_run_that_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that fails on its way has claimed a folder, whose recipe reads the table."""

    def fail(args: object) -> None:
        Path("runs/half").mkdir()
        raise ValueError("no memory")

    monkeypatch.setattr("plm.fitting.fit_recipe", fail)
    with pytest.raises(ValueError, match="no memory"):
        plm.fit(planted(6, 6))
    assert len(list(Path("runs/pairs").glob("table_*.parquet"))) == 1


def test_a_trainer_of_ones_own_measures_and_keeps_users(folder: Path) -> None:
    """Nobody passes callbacks: the numbers, files and users are those of a run."""
    Path("all.jsonl").write_text("\n".join(map(json.dumps, planted(12, 14))))
    data = PreferenceDataModule(PairFiles("all.jsonl"), HashingBackbone(dim=32), "kept", shots=[0, 2])
    method = LoRe(data.num_users, data.feature_dim, num_bases=2)
    trainer = Trainer(max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(method, datamodule=data)
    (numbers, *_) = trainer.test(method, datamodule=data, verbose=False)
    assert json.loads(Path("run/metrics.json").read_text())["unseen"]["accuracy"] == pytest.approx(
        numbers["test/unseen/accuracy"]
    )
    assert Path("run/few_shot.png").is_file()
    (best,) = Path("checkpoints").glob("*.ckpt")
    assert plm.load_method(best).known_users.store.ids == sorted(data.user_ids)
    trainer.test(method, datamodule=data, verbose=False)
    assert sum(isinstance(callback, PreferenceMetrics) for callback in trainer.callbacks) == 1  # type: ignore[attr-defined]


def test_a_trainer_that_was_told_to_measure_is_left_alone() -> None:
    method = LoRe(2, 8, num_bases=2)
    method.trainer = Trainer(logger=False, callbacks=[PreferenceMetrics()])
    assert method.configure_callbacks() == []
    method.trainer = Trainer(logger=False)
    assert method.configure_callbacks() == []
    method.trainer = Trainer(logger=False, callbacks=[mine := FewShotCurve(num_resamples=7)])
    method.trainer.datamodule = PreferenceDataModule(SyntheticPairs(), HashingBackbone())  # type: ignore[attr-defined]
    assert mine.num_resamples == 7 and [type(one).__name__ for one in method.configure_callbacks()] == [
        "PreferenceMetrics",
        "SaveUserStates",
    ]


@pytest.mark.parametrize("cls", [plm.LoRe, plm.PAL, plm.VPL, plm.BradleyTerry])
def test_a_loop_of_ones_own_is_told_that_nothing_was_measured(cls: type[plm.PersonalizationMethod]) -> None:
    chosen, rejected = torch.randn(2, 4, 8)
    batch = plm.PreferenceBatch(chosen, rejected, torch.zeros(4).long(), torch.ones(4), torch.zeros(4).bool())
    with pytest.raises(RuntimeError, match=r"expected a loss inside of a fit.*plm.fit|not attached to a `Trainer`"):
        cls(2, 8).loss(batch)


def test_a_method_of_a_notebook_is_fitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of ``__main__`` have import paths there."""
    import __main__

    monkeypatch.setattr(__main__, "Mine", type("Mine", (plm.BradleyTerry,), {"__module__": "__main__"}), raising=False)
    options = {**FAST, "trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "final_test": False}
    run = plm.fit(planted(6, 6), __main__.Mine, backbone="hashing", options=options)
    assert type(run.method).__name__ == "Mine" and run.folder.name.startswith("mine-")


def test_a_trainer_of_ones_own_keeps_what_made_the_features(folder: Path) -> None:
    """Two lines of Lightning: the checkpoint scores texts as that of ``plm fit`` does."""
    data = plm.PreferenceDataModule(
        source=SyntheticPairs(num_users=6, pairs_per_user=8), backbone=HashingBackbone(dim=16), cache_dir="cache"
    )
    data.prepare_data()
    data.setup("fit")
    method = plm.LoRe(num_users=data.num_users, feature_dim=data.feature_dim, num_bases=2)
    quiet = {f"enable_{what}": False for what in ("progress_bar", "model_summary", "checkpointing")}
    trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, default_root_dir=folder, **quiet)
    trainer.fit(method, datamodule=data)
    trainer.save_checkpoint(folder / "own.ckpt", weights_only=True)
    features = HashingBackbone(dim=16).encode(["a bus"])
    assert torch.equal(
        plm.load_method(folder / "own.ckpt").score(["a bus"]), method.score(features, method.population_state(1))
    )
