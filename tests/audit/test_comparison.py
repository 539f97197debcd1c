"""Comparing files of what models got right: by hand, with scipy, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from plm.audit.comparison import compare_items
from plm.audit.items import read_items
from plm.cli import main
from plm.data.keys import pair_names
from plm.data.schema import make_pairs
from plm.evaluation import compare
from plm.evaluation.comparison import MAX_RESAMPLED_USERS

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def judged(correct: list[float], users: list[str]) -> Rows:
    return [
        {"item": f"i{n}", "user": user, "correct": value}
        for n, (user, value) in enumerate(zip(users, correct, strict=True))
    ]


def drawn(seed: int, num_users: int = 60, gain: float = 0.1) -> tuple[Rows, Rows]:
    """Two models on the same judgements, users with 1 to 20 each; the first is better."""
    rng = np.random.default_rng(seed)
    users = [f"u{user}" for user in range(num_users) for _ in range(rng.integers(1, 21))]
    second = (rng.random(len(users)) < 0.6).astype(float)
    first = np.where(rng.random(len(users)) < gain, 1.0, second)
    return judged(first.tolist(), users), judged(second.tolist(), users)


def test_an_example_by_hand(tmp_path: Path) -> None:
    """Ten users, whose own differences are 1/2 (one judgement of two), 0 ... : mean .1, sd .2108, t 1.5 of 9."""
    users = [f"u{n // 2}" for n in range(18)] + ["u9"] * 6
    second = [0.0] * 24
    first = [1.0, 0.0, 0.0, 1.0] + [0.0] * 20
    one = write(tmp_path / "one.csv", judged(first, users))
    # the rows of the other file in another order, in another format, by margins, with user_id
    other = [{"item": row["item"], "user_id": row["user"], "margin": -0.5} for row in judged(second, users)[::-1]]
    two = write(tmp_path / "two.jsonl", other)
    assert main(["compare", one, two, "--output", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["all"]
    assert (result["num_items"], result["num_users"], result["method"]) == (24, 10, "bootstrap")
    (entry,) = result["comparisons"]
    assert (entry["first"], entry["second"]) == (one, two)
    assert entry["difference"] == pytest.approx((0.5 + 0.5) / 10)
    sd = math.sqrt((2 * 0.4**2 + 8 * 0.1**2) / 9)
    assert entry["difference_mde"] == pytest.approx((2.26216 + 0.84162) * sd / math.sqrt(10), rel=1e-4)
    assert entry["p_holm"] == entry["p_value"]
    # means of ten draws of {1/2 twice, 0 eight times}: binomial(10, 1/5) / 20, none below zero
    assert entry["difference_low"] == 0.0 and entry["difference_high"] == pytest.approx(0.25)
    assert [file["accuracy"] for file in result["files"]] == [pytest.approx(0.1), 0.0]
    assert [file["accuracy_micro"] for file in result["files"]] == [pytest.approx(2 / 24), 0.0]


def test_it_agrees_with_the_bootstrap_of_scipy(tmp_path: Path) -> None:
    """Differences per user, resampled by another library."""
    first, second = drawn(3)
    files = [write(tmp_path / f"{name}.parquet", rows) for name, rows in (("first", first), ("second", second))]
    result = compare_items([read_items(file) for file in files])["comparisons"][0]
    gains: dict[str, list[float]] = {}
    for left, right in zip(first, second, strict=True):
        gains.setdefault(left["user"], []).append(left["correct"] - right["correct"])
    values = np.array([np.mean(gain) for gain in gains.values()])
    boot = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1))
    low, high = boot.confidence_interval
    assert result["difference"] == pytest.approx(values.mean())
    # ours is wider by sqrt(60/59) and t instead of normal: 2.9 %
    assert (result["difference_low"], result["difference_high"]) == (
        pytest.approx(values.mean() - 1.029 * (values.mean() - low), abs=0.0015),
        pytest.approx(values.mean() + 1.029 * (high - values.mean()), abs=0.0015),
    )
    assert result["p_value"] == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.003)


def test_many_users_take_the_closed_form() -> None:
    values = np.tile([0.0, 1.0, -0.5, 0.0], MAX_RESAMPLED_USERS // 4 + 1)[: MAX_RESAMPLED_USERS + 1]
    found = compare(values, np.zeros_like(values))
    expected = stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval()
    assert found[:4] == pytest.approx((values.mean(), low, high, expected.pvalue), rel=1e-9)
    resampled = compare(values[:40_000], np.zeros(40_000), num_resamples=2000)
    assert (found.high - found.low) * math.sqrt(100_001 / 40_000) == pytest.approx(
        resampled.high - resampled.low, rel=0.1
    )
    assert compare(np.full(MAX_RESAMPLED_USERS + 1, 0.5), np.zeros(MAX_RESAMPLED_USERS + 1))[:4] == (0.5, 0.5, 0.5, 0.0)


def test_several_files_are_corrected_by_holm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = drawn(0)
    third = drawn(1)[0]
    third = [{**row, "correct": other["correct"]} for row, other in zip(second, third * 2, strict=False)]
    files = [write(tmp_path / f"{n}.csv", rows) for n, rows in enumerate((first, second, third))]
    output = tmp_path / "numbers.json"
    assert main(["compare", *files, "--output", str(output)]) == 0
    entries = json.loads(output.read_text())["all"]["comparisons"]
    assert [(entry["first"], entry["second"]) for entry in entries] == [
        (files[0], files[1]), (files[0], files[2]), (files[1], files[2])
    ]  # fmt: skip
    p_values = sorted(entry["p_value"] for entry in entries)
    assert min(entry["p_holm"] for entry in entries) == pytest.approx(3 * p_values[0])
    shown = capsys.readouterr().out
    assert f"{files[0]} − {files[1]}" in shown and "found four times in five" in shown


def test_too_few_users_for_an_interval_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"item": str(item), "user": f"u{item % 7}", "margin": 1 - 2 * (item % 2)} for item in range(28)]
    files = [str(write(tmp_path / f"{name}.csv", rows)) for name in "ab"]
    assert main(["compare", *files]) == 0
    assert "no intervals: they need 8 users" in " ".join(capsys.readouterr().out.split())


def test_ties_are_left_out_and_zero_margins_are_half(tmp_path: Path) -> None:
    rows = [
        {"item": "a", "user_id": "u", "tie": 0, "margin": 0},
        {"item": "b", "user_id": "u", "tie": 1, "margin": 3},
        {"item": "c", "user_id": "v", "tie": "", "margin": -1},
        {"item": "d", "user_id": "v", "tie": "false", "margin": 1e-300},
    ]
    found = read_items(write(tmp_path / "x.csv", rows))
    assert found.items == ["a", "c", "d"] and found.correct.tolist() == [0.5, 0.0, 1.0] and found.num_ties == 1


def test_the_folder_of_a_run_stands_for_its_predictions(tmp_path: Path) -> None:
    """Of all processes."""
    with pytest.raises(ValueError, match=r"expected predictions\.csv in .*plm predict"):
        read_items(tmp_path)
    for part in range(2):
        rows = [{"item": f"{part}", "users": "seen", "user_id": "u", "tie": 0, "margin": 1, "population_margin": -1}]
        write(tmp_path / f"predictions-{part}.csv", rows)
    found = read_items(tmp_path)
    assert found.items == ["0", "1"] and found.controls["population_margin"].tolist() == [0, 0]


def test_pairs_are_named_by_content() -> None:
    base = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [base, {**base, "user_id": "v"}, {**base, "chosen": "b", "rejected": "a"}, {**base, "tie": True}]
    names = pair_names(make_pairs(rows, "test"))
    assert len(set(names)) == 4
    assert pair_names(make_pairs(rows[::-1], "test")) == names[::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-2], r"got 2 in one of them only.*\n  only in .*a\.csv: 'i22' \(.*a\.csv:24\)"),
        (lambda rows: [*rows[:-1], {**rows[-1], "item": "x"}], r"got 2 in one of them only.*\n.*'i23'.*\n.*'x'"),
        (lambda rows: [*rows, rows[3]], r"every item once in .*b\.csv, got 1 again.*\n  item 'i3': .*:5 and .*:26"),
        (lambda rows: [{**rows[0], "user": "z"}, *rows[1:]], r"same user of every item.*\n  'i0': user 'u0' .*'z'"),
        (lambda rows: [{**rows[0], "correct": 2}, *rows[1:]], r"b\.csv:2: correct: expected true, false or a number"),
        (lambda rows: [{**rows[0], "correct": ""}, *rows[1:]], r"expected correct or margin, got neither"),
        (lambda rows: [{**row, "margin": -1} for row in rows], r"correct and margin contradict each other"),
        (lambda rows: [{"item": row["item"], "user": "u"} for row in rows], r"a column correct \(0 to 1\) or margin"),
        (lambda rows: [{"itm": row["item"], **row} | {"item": 1} for row in rows], r"every item once"),
        (lambda rows: [{"itm": "1", "user": "u", "correct": 1}], r"'item' is missing; did you mean 'itm'\? Set --col"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    rows = judged([1.0, 0.0] * 12, [f"u{n // 2}" for n in range(24)])
    files = write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", change(rows))
    with pytest.raises(ValueError, match=message):
        compare_items([read_items(file) for file in files])


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "annotator": "u", "score": 0.1} for n in range(3)]
    file = write(tmp_path / "x.jsonl", rows)
    found = read_items(file, {"item": "id", "user": "annotator", "margin": "score"})
    assert found.correct.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"expected keys among item, user.*did you mean 'item'"):
        read_items(file, {"itm": "id"})
