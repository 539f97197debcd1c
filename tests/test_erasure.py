from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from plm.atomic import write_csv
from plm.backbones import HashingBackbone
from plm.checkpoint import load_method, store_users
from plm.cli import main
from plm.erasure import erase_users
from plm.method import CHECKPOINT_KEY
from plm.methods.lore import LoRe
from plm.testing import quiet_trainer
from plm.users import UserStore, store_path

IDS = ["person-anna", "person-ben", "person-ann"]
WEIGHTS = torch.tensor([[0.125, 0.75], [0.3, 0.6], [0.2, 0.1]])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, with a checkpoint of the best and of the last weights and moments of their optimizer."""
    method = LoRe(3, 16, backbone=HashingBackbone(dim=16).spec(), num_bases=2)
    method.user_ids = IDS
    method.weights.copy_(WEIGHTS)
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(method)
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    checkpoint["optimizer_states"] = [
        {"state": {0: {"step": torch.ones(3), "mean": WEIGHTS + 1, "all": torch.ones(2)}}}
    ]
    folder = tmp_path / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("best", "last"):
        torch.save(checkpoint, folder / "checkpoints" / f"{name}.ckpt")
    store_users(method, folder / "checkpoints" / "best.ckpt")
    rows = [[name, "seen", 4] for name in IDS]
    write_csv(folder / "per_user.csv", ["user_id", "split", "num_pairs"], rows)
    write_csv(folder / "predictions-1.csv", ["users", "user_id", "margin"], [["seen", name, 0.5] for name in IDS * 2])
    (folder / "splits.json").write_text(json.dumps({"hash": "x", "users": {"seen": IDS, "unseen": []}, "pairs": "rv"}))
    (folder / "metrics.json").write_text("{}")
    return folder


def bytes_of(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_what_was_tested_and_predicted_beside_the_run_is_erased_too(run: Path) -> None:
    """But no file of another fit, whatever it is called."""
    files = []
    for name in ("version_0-test", "version_0-predict-2", "version_0-tests", "version_0-test-3"):
        files.append(run.parent / name / "per_user.csv")
        write_csv(files[-1], ["user_id"], [[user] for user in IDS])
    (files[3].parent / "recipe.yaml").touch()
    (files[1].parent / "notes.txt").write_text("person-anna")
    erasure = erase_users(run / "checkpoints" / "best.ckpt", ["person-anna"])
    assert ["person-anna" in file.read_text() for file in files] == [False, False, True, True]
    assert set(files[:2]) <= {*erasure.changed} and erasure.remaining == [files[1].parent / "notes.txt"]


def test_nothing_of_an_erased_user_is_left_in_the_run(run: Path) -> None:
    anna, moments = WEIGHTS[0].numpy().tobytes(), (WEIGHTS[0] + 1).numpy().tobytes()
    assert sum(anna in data for data in bytes_of(run).values()) == 3  # the store and both checkpoints
    best = run / "checkpoints" / "best.ckpt"
    before = load_method(best)
    rewards = before.score(["tea", "a long walk"], user_id="person-ben")
    erasure = erase_users(best, ["person-anna"])
    for name, data in bytes_of(run).items():
        assert b"person-anna" not in data and anna not in data and moments not in data, name
    assert erasure.remaining == [] and erasure.receipts[0].was_stored and erasure.receipts[0].is_wiped
    changed = {"best.ckpt", "last.ckpt", "per_user.csv", "predictions-1.csv", "splits.json"}
    assert {file.name for file in erasure.changed} == changed

    # the others are as they were
    after = load_method(best)
    assert torch.equal(after.score(["tea", "a long walk"], user_id="person-ben"), rewards)
    saved = torch.load(best, weights_only=True)
    assert saved["plm"]["user_ids"] == ["", "person-ben", "person-ann"]
    assert torch.equal(saved["state_dict"]["weights"], torch.cat([torch.zeros(1, 2), WEIGHTS[1:]]))
    moments_after = saved["optimizer_states"][0]["state"][0]
    assert moments_after["step"].tolist() == [0, 1, 1] and moments_after["all"].tolist() == [1, 1]
    with (run / "per_user.csv").open(newline="") as file:
        assert [row["user_id"] for row in csv.DictReader(file)] == IDS[1:]
    assert json.loads((run / "splits.json").read_text())["users"] == {"seen": IDS[1:], "unseen": []}


def test_a_copy_without_its_store_knows_nobody_and_a_renamed_one_no_erased_user(run: Path, tmp_path: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    shutil.copy(best, tmp_path / "copy.ckpt")
    copy = load_method(tmp_path / "copy.ckpt")
    assert copy.known_users.store.ids == [] and not copy.known_users.lookup(IDS)[1].any()
    erase_users(best, ["person-anna"])
    best.rename(tmp_path / "new.ckpt")
    store_path(best).rename(store_path(tmp_path / "new.ckpt"))
    assert load_method(tmp_path / "new.ckpt").known_users.lookup(IDS)[1].tolist() == [False, True, True]


def test_several_erased_users_leave_a_checkpoint_that_loads(run: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    rewards = load_method(best).score(["tea", "a long walk"], user_id="person-ben")
    erase_users(best, ["person-anna", "person-ann"])
    method = load_method(best)
    assert method.user_ids == ["", "person-ben", ""]
    assert torch.equal(method.score(["tea", "a long walk"], user_id="person-ben"), rewards)
    assert method.known_users.lookup([*IDS, ""])[1].tolist() == [False, True, False, False]


def test_training_goes_on_from_a_checkpoint_without_the_erased_user(run: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    erase_users(last, ["person-anna"])
    resumed = LoRe(3, 16, num_bases=2)
    resumed.user_ids = IDS
    checkpoint = torch.load(last, weights_only=True)
    with pytest.warns(UserWarning, match="1 of 3 users are not in the checkpoint: prior state"):
        resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(resumed.weights[1:], WEIGHTS[1:]) and not torch.equal(resumed.weights[0], WEIGHTS[0])


def test_what_was_killed_half_way_is_ended_by_the_same_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "checkpoints" / "best.ckpt"
    for place in ("plm.erasure._erase_rows", "plm.erasure._erase_names", "plm.erasure._holds"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

            def killed(*_: object) -> bool:
                raise KeyboardInterrupt

            patch.setattr(place, killed)
            erase_users(best, ["person-anna"])
    command = ["users", "delete", "--ckpt_path", str(best), "--user", "person-anna", "never-seen"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["was_stored"] for line in shown.out.splitlines()] == [False, False]
    assert "deleted 0 users, 2 left" in shown.err and "never-seen" not in shown.out
    nobody = [line for line in shown.err.splitlines() if line.startswith("nobody")]
    assert nobody == ["nobody was stored as 'person-anna'", "nobody was stored as 'never-seen'"]
    assert not any(b"person-anna" in data for data in bytes_of(run).values())


def test_what_cannot_be_reached_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "checkpoints" / "best.ckpt"
    (run / "notes.txt").write_text("person-anna likes tea; so does person-annabel")
    (run / "other.txt").write_text("person-annabel, not-person-anna")
    assert main(["users", "delete", "--ckpt_path", str(best), "--user", "person-anna"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("still named in") == 1 and f"still named in {run / 'notes.txt'}" in shown
    assert "not looked at: the data that the pairs came from" in shown


def test_a_checkpoint_of_before_without_names_of_tables(run: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best, weights_only=True)
    del checkpoint["plm"]["user_tables"]
    torch.save(checkpoint, best)
    erase_users(best, ["person-anna"])
    assert WEIGHTS[0].numpy().tobytes() not in best.read_bytes()


def test_without_a_store_names_are_removed_all_the_same(run: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    store_path(best).unlink()
    assert erase_users(best, ["person-ben"]).remaining == [] and not UserStore(store_path(best)).exists


def test_a_number_or_bytes_are_no_mention_of_a_short_id(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is named is named all the same: in a cell, a string, a value, a database, a checkpoint, a table of pairs."""
    silent = {
        "metrics.csv": "epoch,step,loss\n1,1,0.5\n",
        "metrics.json": '{"num_users": 1, "version": "2.1"}',
        "recipe.yaml": "trainer: {max_epochs: 1, devices: '2.1'}\n",
        "notes.txt": "version 1.1 of 11, 2.1 and u1",
    }
    named = {
        "hparams.yaml": "user: '1'\n",
        "facts.json": '{"of": "1"}',
        "foreign.csv": "rater,pairs\n1,7\n",
        "foreign.json": '{"rater": 1}',
        "old/per_user.csv": "user_id,num_pairs\n1,7\n",
        "foreign.yaml": "rater: 1\n",
        "words.txt": "user 1.",
    }
    (run / "old").mkdir()
    for name, text in (silent | named).items():
        (run / name).write_text(text)
    (run / "calibration.png").write_bytes(b"\x89PNG\r\n\0\xff 1 \0")
    for name, ids in (("old.db", ("1",)), ("other.db", ("11",))):
        with sqlite3.connect(run / name) as database:
            database.execute("CREATE TABLE users (user_id TEXT, num_pairs INTEGER)")
            database.executemany("INSERT INTO users VALUES (?, 1)", [ids])
    for name, ids in (("old.ckpt", ["1"]), ("other.ckpt", ["11"])):
        torch.save({CHECKPOINT_KEY: {"user_ids": ids}}, run / name)
    for name, ids in (("old.parquet", ["1"]), ("other.parquet", ["11"])):
        pq.write_table(pa.table({"rater": ids}), run / name)
    assert main(["users", "delete", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--user", "1"]) == 0
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("still named in")]
    expected = {run / name for name in (*named, "old.db", "old.ckpt", "old.parquet")}
    assert {Path(line.split(": ")[0].removeprefix("still named in ")) for line in lines} == expected
    assert len(lines) == len(expected) and shown.count("too short to tell from other bytes: '1'") == 1


def test_a_long_id_is_found_in_any_bytes(run: Path) -> None:
    (run / "picture.png").write_bytes(b"\x89PNG\r\n\0\xff person-anna \0")
    (run / "cut.txt").write_bytes(b"a" * 65535 + "ä person-anna".encode())
    erasure = erase_users(run / "checkpoints" / "best.ckpt", ["person-anna", "1"])
    assert erasure.remaining == [run / "cut.txt", run / "picture.png"] and erasure.short == ["1"]
