"""Runs of one split, compared by what they keep of each user: the numbers of their predictions, pair by pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plm
from plm.atomic import write_csv, write_json
from plm.audit.models import compare
from plm.cli import main
from plm.evaluation import USER_COLUMNS, summarize, user_rows
from plm.metrics import PreferenceMetric

NUM_USERS, PAIRS = 24, 12
IDS = [f"user {number}" for number in range(NUM_USERS)]


def write_run(folder: Path, seed: int, split_hash: str = "a" * 64, shift: float = 0.0) -> Path:
    """What a test and ``plm predict`` write of the same margins: ties, margins of zero, users of both groups."""
    draw = np.random.default_rng(seed)
    user = np.repeat(np.arange(NUM_USERS), PAIRS)
    margin = np.round(draw.normal(shift, 1, len(user)), 1)
    margin[draw.random(len(user)) < 0.1] = 0
    tie = np.arange(len(user)) % 17 == 0
    groups = {"seen": user < 14, "unseen": user >= 14}
    tables = {}
    for name, rows in groups.items():
        metric = PreferenceMetric(NUM_USERS)
        metric.update(*(torch.from_numpy(values[rows]) for values in (margin, user, tie)))
        tables[name] = metric.table()
    numbers = {name: summarize(table, 10) for name, table in tables.items()}
    write_json(folder / "metrics.json", {"split_hash": split_hash, **numbers})
    write_csv(folder / "per_user.csv", USER_COLUMNS, user_rows(tables, IDS))
    for name, rows in {"predict": user >= 0, **groups}.items():
        lines = [[f"item {row}", IDS[user[row]], int(tie[row]), margin[row]] for row in np.flatnonzero(rows).tolist()]
        write_csv(
            folder.with_name(f"{folder.name}-{name}") / "predictions.csv", "item user_id tie margin".split(), lines
        )
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two runs of one split, the second better."""
    monkeypatch.chdir(tmp_path)
    return [write_run(Path("runs") / name, seed, shift=seed / 2) for seed, name in enumerate(("one", "two"))]


def without_names(numbers: Any) -> Any:
    """Numbers without the names of the models."""
    if isinstance(numbers, dict):
        return {key: without_names(value) for key, value in numbers.items() if key not in ("name", "first", "second")}
    return [without_names(value) for value in numbers] if isinstance(numbers, list) else numbers


@pytest.mark.parametrize("users", ["seen", "unseen"])
def test_runs_compare_as_their_predictions_do(users: str, runs: list[Path]) -> None:
    """Exactly, also where there are ties and margins of zero; both sort users by id."""
    by_user = compare(*runs).groups[users]
    by_item = compare(*(f"{run}-{users}" for run in runs)).groups["all"]
    assert by_user["num_users"] == (14 if users == "seen" else 10) and by_user["comparisons"][0]["difference"] < 0
    assert by_user["files"][0]["labelled_ties"] == (10 if users == "seen" else 7)
    found, expected = (json.dumps(without_names(numbers)) for numbers in (by_user, by_item))
    numbers, others = json.loads(found), json.loads(expected)
    assert numbers.keys() == others.keys() and numbers["num_items"] == others["num_items"]
    for kind in ("files", "comparisons"):
        for one, other in zip(numbers[kind], others[kind], strict=True):
            assert one == pytest.approx(other, rel=1e-12)


def test_the_command_takes_names_and_python_gives_the_same(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "one", "runs/two", "--output", "numbers.json"]) == 0
    shown = capsys.readouterr().out
    result = plm.compare("one", runs[1])
    assert json.loads(Path("numbers.json").read_text()) == result.groups and list(result.groups) == ["unseen", "seen"]
    assert [line.rstrip() for line in shown.splitlines()[:-1]] == [line.rstrip() for line in repr(result).splitlines()]
    page = result._repr_html_()
    assert page.count("<table") == 4 and "<style" not in page and "<html" not in page and "runs/one − runs/two" in page


def test_a_run_and_a_file_are_compared_by_item(runs: list[Path]) -> None:
    """The run stands for the predictions beside it."""
    result = compare(runs[0], "runs/two-predict/predictions.csv")
    assert list(result.groups) == ["all"] and result.groups["all"]["num_users"] == NUM_USERS
    Path("runs/one-predict/predictions.csv").unlink()
    with pytest.raises(ValueError, match=r"expected predictions\.csv in runs/one or in one-predict beside it"):
        compare(runs[0], "runs/two-predict/predictions.csv")


def test_other_splits_are_refused_with_both_hashes(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/other"), 0, split_hash="b" * 64)
    assert main(["compare", "one", "two", "other"]) == 1
    error = capsys.readouterr().err
    assert f"got runs/one of {'a' * 12} and runs/other of {'b' * 12}" in error and error.count("\n") == 1


def test_users_deleted_from_one_run_are_left_out_of_both(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """As if both runs had been without them; without the file of the split nobody knows, and it is refused."""
    assert "deleted" not in repr(compare(*runs))
    for run in runs:
        write_json(run / "splits.json", {"hash": "a" * 64, "users": {"seen": IDS[:14], "unseen": IDS[14:]}})
    path = runs[0] / "per_user.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("user 3,")))
    with pytest.raises(ValueError, match="got 1 users who differ"):
        compare(*runs)  # the split still names the user
    others = [user for user in IDS[:14] if user != "user 3"]
    write_json(runs[0] / "splits.json", {"hash": "a" * 64, "users": {"seen": others, "unseen": IDS[14:]}})
    found = compare(*runs).groups
    assert found["seen"].pop("num_deleted") == 1 and "num_deleted" not in found["unseen"]
    assert main(["compare", "one", "two"]) == 0
    assert "without 1 user deleted from a run" in " ".join(capsys.readouterr().out.split())
    second = runs[1] / "per_user.csv"
    second.write_text("".join(line for line in second.read_text().splitlines(True) if not line.startswith("user 3,")))
    for run in runs:
        (run / "splits.json").unlink()
    assert compare(*runs).groups == found and found["seen"]["num_users"] == 13
    write_json(runs[0] / "splits.json", {"hash": "b" * 64, "users": {"seen": others[1:], "unseen": IDS[14:]}})
    assert compare(*runs).groups == found  # the file of another split says nothing


def replaced(old: str, new: str) -> Callable[[str], str]:
    """A change of a file's text."""
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("per_user.csv", replaced("user 3,", "user 3b,"), "expected the same test pairs of seen users"),
        ("per_user.csv", replaced("user 0,seen,11,", "user 0,seen,10,"), "got 1 users who differ"),
        ("per_user.csv", replaced("num_pairs", "pairs"), "KeyError: 'num_pairs'"),
        ("per_user.csv", replaced("user 3,", "user 4,"), "user 'user 4' is there twice"),
        ("per_user.csv", replaced(",11,0.", ",11,7."), "expected accuracies from 0 to 1"),
        ("metrics.json", lambda text: "{", r"metrics\.json is damaged: JSONDecodeError"),
        ("metrics.json", lambda text: "{}", r"metrics\.json is damaged: KeyError"),
    ],
)
def test_damaged_runs_are_named(file: str, change: Callable[[str], str], message: str, runs: list[Path]) -> None:
    path = runs[0] / file
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(ValueError, match=message):
        compare(*runs)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["one"], "expected two models or more, got 1"),
        (["one", "runs/one"], "expected every model once, got runs/one again"),
        (["one", "tow"], "the name of one in runs, got 'tow', which does not exist; did you mean 'two'"),
    ],
)
def test_what_is_no_pair_of_models_is_refused(models: list[str], message: str, runs: list[Path]) -> None:
    with pytest.raises(ValueError, match=message):
        compare(*models)
