"""Intervals, verdicts, tables, files and pictures."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.special import stdtrit

from plm.atomic import write_csv, write_json
from plm.evaluation import (
    MIN_USERS,
    USER_COLUMNS,
    calibration_figure,
    cluster_bootstrap,
    control_notes,
    few_shot_figure,
    few_shot_table,
    gain_figure,
    minimum_detectable_effect,
    shot_units,
    statistics,
    summarize,
    summarize_few_shot,
    summary_table,
    user_rows,
    verdict,
)
from plm.metrics import FewShotTable, UserTable


def user_table(num_users: int = 40, gain: float = 0.05, other_gain: float = 0.05, seed: int = 0) -> UserTable:
    rng = np.random.default_rng(seed)
    num_pairs = rng.integers(20, 60, num_users).astype(float)
    base = rng.uniform(0.55, 0.75, num_users)
    return UserTable(
        user_row=np.arange(num_users) * 2,
        num_pairs=num_pairs,
        accuracy=base + gain + rng.normal(0, 0.02, num_users),
        log_loss=rng.uniform(0.4, 0.6, num_users),
        global_accuracy=base,
        global_log_loss=np.full(num_users, 0.6),
        other_accuracy=base + gain - other_gain,
        bradley_terry_accuracy=base - 0.01,
        bradley_terry_log_loss=np.full(num_users, 0.61),
        majority_accuracy=base + 0.01,
        personal_pairs=np.where(np.arange(num_users) < 3, 0.0, num_pairs),
        flipped_pairs=200,
        reversed_pairs=193,
        ties=3,
        labelled_ties=2,
        bins=np.array([[num_pairs.sum(), 0.6 * num_pairs.sum(), 0.7 * num_pairs.sum()]]),
    )


def numbers(gain: tuple[float, float, float], other: tuple[float, float, float] | None = None) -> dict[str, float]:
    out = {"num_users": 50.0}
    for name, estimate in (("personal_minus_global", gain), ("personal_minus_other", other)):
        if estimate is not None:
            out |= {name: estimate[0], f"{name}_low": estimate[1], f"{name}_high": estimate[2]}
    return out


# ---------------------------------------------------------------------- bootstrap
def test_bootstrap_of_many_users_is_the_normal_interval():
    values = np.random.default_rng(0).exponential(size=4000)
    low, high = cluster_bootstrap(values, num_resamples=4000)
    half = 1.96 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_bootstrap_of_few_users_has_the_width_of_a_t_interval():
    values = np.random.default_rng(1).normal(size=10)
    low, high = cluster_bootstrap(values, num_resamples=20_000)
    assert high - low == pytest.approx(2 * 2.262 * values.std(ddof=1) / math.sqrt(10), rel=0.06)


def test_bootstrap_covers_the_truth():
    rng, covered = np.random.default_rng(7), 0
    for seed in range(200):
        pairs = rng.integers(5, 40, 60)
        ability = rng.beta(8, 3, 60)
        low, high = cluster_bootstrap(rng.binomial(pairs, ability) / pairs, num_resamples=1000, seed=seed)
        covered += bool(low <= 8 / 11 <= high)
    assert 0.90 <= covered / 200 <= 0.985


def test_bootstrap_never_resamples_pairs():
    # 200 users of 50 equal pairs each: the micro interval is as wide as that of 200, not of 10,000, observations
    values = (np.arange(200) % 2).astype(float)
    low, high = cluster_bootstrap(values, np.full(200, 50.0))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.08)


def test_bootstrap_weights_make_a_ratio():
    values, weights = np.repeat([0.0, 1.0], 50), np.repeat([1.0, 3.0], 50)
    low, high = cluster_bootstrap(values, weights)
    assert low < 0.75 < high
    assert cluster_bootstrap(values)[1] < 0.75


def test_bootstrap_is_seeded_and_shares_resamples(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).normal(size=(30, 2))
    low, high = cluster_bootstrap(values, seed=3)
    alone = cluster_bootstrap(values[:, 1], seed=3)
    np.testing.assert_allclose((low[1], high[1]), alone, rtol=1e-12)
    assert cluster_bootstrap(values[:, 1], seed=4)[0] != alone[0]
    monkeypatch.setattr(statistics, "_CHUNK", 30 * 7)
    np.testing.assert_allclose(cluster_bootstrap(values, seed=3), (low, high), rtol=1e-12)


def test_bootstrap_of_a_constant_and_of_too_few_users():
    assert [float(end) for end in cluster_bootstrap(np.full(20, 0.7))] == pytest.approx([0.7, 0.7])
    values = np.ones((MIN_USERS + 1, 3))
    values[:2, 1] = np.nan
    values[0, 2] = np.inf
    low, high = cluster_bootstrap(values)
    np.testing.assert_array_equal(low, [1, np.nan, np.nan])
    np.testing.assert_array_equal(high, [1, np.nan, np.nan])


# ---------------------------------------------------------------------- summaries and verdicts
def test_summary_has_intervals_around_its_estimates():
    table = user_table()
    out = summarize(table, num_resamples=500)
    for name in (
        "accuracy",
        "accuracy_micro",
        "log_loss",
        "global_accuracy",
        "personal_minus_global",
        "other_accuracy",
    ):
        assert out[f"{name}_low"] < out[name] < out[f"{name}_high"], name
    assert out["accuracy_micro"] == pytest.approx((table.accuracy * table.num_pairs).sum() / table.num_pairs.sum())
    # the difference is paired: users differ by 20 points, their gains by 2
    assert out["personal_minus_global_high"] - out["personal_minus_global_low"] < 0.02
    assert out["accuracy_high"] - out["accuracy_low"] > 0.03


def test_summary_leaves_out_controls_that_were_not_measured():
    table = user_table()
    out = summarize(UserTable(**{**vars(table), "other_accuracy": np.full(40, np.nan)}), num_resamples=100)
    assert not any("other" in name for name in out)
    assert "personal_minus_global_low" in out


@pytest.mark.parametrize(
    ("gain", "other", "sentence"),
    [
        ((0.043, 0.031, 0.054), None, "helps: +4.3 points [3.1, 5.4] over its global control"),
        (
            (0.043, 0.031, 0.054),
            (0.06, 0.05, 0.07),
            "helps: +4.3 points [3.1, 5.4] over its global control, +6.0 [5.0, 7.0] over another user's state",
        ),
        ((0.001, -0.003, 0.005), (0.06, 0.05, 0.07), "+0.1 points [-0.3, 0.5] over its global control"),
        ((-0.012, -0.02, -0.004), None, "harms: -1.2 points [-2.0, -0.4] against its global control"),
        (
            (0.02, 0.01, 0.03),
            (-0.0002, -0.01, 0.01),
            "+2.0 points [1.0, 3.0] over its global control, but only +0.0 [-1.0, 1.0] over another user's state",
        ),
        ((0.0, 0.0, 0.0), None, "its users do not differ, each has the accuracy of its global control"),
        ((0.0, -1e-17, -1e-17), None, "its users do not differ, each has the accuracy of its global control"),
        ((0.02, 1e-17, 0.053), None, "+2.0 points [0.0, 5.3] over its global control"),
        ((-0.02, -0.053, -1e-17), None, "-2.0 points [-5.3, 0.0] over its global control"),
        (
            (0.02, 0.01, 0.03),
            (0.02, 1e-17, 0.03),
            "+2.0 points [1.0, 3.0] over its global control, but only +2.0 [0.0, 3.0] over another user's state",
        ),
    ],
)
def test_verdict(gain: tuple[float, float, float], other: tuple[float, float, float] | None, sentence: str):
    start = "" if sentence.startswith("h") else "no evidence of "
    expected = f"unseen: {start}personalisation{':' if start else ''} {sentence}"
    assert verdict("unseen", numbers(gain, other)) == expected


def test_verdict_without_an_interval_or_a_control():
    assert verdict("unseen", {"num_users": 5.0}) == "unseen: no verdict: the method serves every user alike"
    few = summarize(user_table(num_users=MIN_USERS - 1), num_resamples=100)
    assert verdict("seen", few) == f"seen: no verdict: an interval needs {MIN_USERS} users, got {MIN_USERS - 1}"
    assert verdict("unseen", few).endswith(f"got {MIN_USERS - 1}; hold out more of them (data.unseen_users)")


def test_verdict_is_right_on_planted_users():
    right = wrong = 0
    rng = np.random.default_rng(0)
    for seed in range(40):
        base = user_table(num_users=60)
        pairs = rng.integers(10, 40, 60)
        for gain in (0.08, 0.0):
            own, glob = rng.binomial(pairs, 0.65 + gain) / pairs, rng.binomial(pairs, 0.65) / pairs
            table = UserTable(**{**vars(base), "accuracy": own, "global_accuracy": glob, "other_accuracy": glob})
            says = "personalisation helps" in verdict("unseen", summarize(table, 500, seed))
            right, wrong = right + (says and gain > 0), wrong + (says and gain == 0)
    assert right >= 38
    assert wrong <= 3


@pytest.mark.parametrize("num_users", [12, 200])
def test_the_minimum_detectable_effect_is_found_four_times_in_five(num_users: int):
    """Simulated users whose mean differs by it; a share off by 0.03 is an effect off by less than 10 %."""
    rng = np.random.default_rng(1)
    values = np.tile([-0.1, 0.1], num_users // 2)
    effect = minimum_detectable_effect(values * np.sqrt((num_users - 1) / num_users))  # a standard deviation of 0.1
    gains = rng.normal(effect, 0.1, (4000, num_users))
    error = gains.std(1, ddof=1) / np.sqrt(num_users)
    found = (gains.mean(1) - stdtrit(num_users - 1, 0.975) * error > 0).mean()
    assert found == pytest.approx(0.8, abs=0.03)
    assert np.isnan(minimum_detectable_effect(np.ones(MIN_USERS - 1)))
    own = summarize(user_table(), 100)
    assert own["personal_minus_global_mde"] == minimum_detectable_effect(user_table().personal_minus_global)


# ---------------------------------------------------------------------- few shots
def few_shot(num_users: int = 50, repeats: int = 3) -> FewShotTable:
    rng = np.random.default_rng(0)
    gain = np.array([0, 0.01, 0.03, 0.05, 0.06, 0.065, 0.07])[:, None, None]
    noise = rng.normal(0, 0.01, (7, repeats, num_users))
    noise[0] = 0
    shots = np.array([0, 1, 2, 4, 8, 16, 32])
    accuracy = rng.uniform(0.6, 0.8, num_users) + gain + noise
    return FewShotTable(shots, np.arange(num_users), accuracy, 1 - accuracy, np.tile([[[10.0, 6.0, 7.0]]], (7, 1, 1)))


def test_few_shot_curve_by_hand():
    accuracy = np.full((2, 2, 10), 0.5)
    accuracy[1] = [[1.0] * 10, [0.5] * 10]  # one draw of four shots gives every user 1.0, the other 0.5
    bins = np.array([[[20.0, 12.0, 10.0]], [[20.0, 14.0, 15.0]]])
    table = FewShotTable(np.array([0, 4]), np.arange(10), accuracy, 2 * accuracy, bins)
    curve = summarize_few_shot(table, num_resamples=100)
    assert curve["accuracy"] == [0.5, 0.75]
    assert curve["accuracy_low"] == curve["accuracy_high"] == [0.5, 0.75]
    assert curve["accuracy_sd"] == pytest.approx([0, math.sqrt(0.125)])
    assert curve["gain"] == [0, 0.25]
    assert curve["log_loss"] == [1.0, 1.5] and curve["ece"] == pytest.approx([0.1, 0.05])
    table.accuracy[1, 0, :4] = 0.25  # 4 of 10 users harmed in one of two draws
    assert summarize_few_shot(table, num_resamples=100)["harmed"] == [0.0, 0.2]
    assert (curve["num_users"], curve["num_repeats"], curve["shots"]) == (10, 2, [0, 4])


def test_few_shot_band_and_gain_are_clustered_by_user():
    curve = summarize_few_shot(few_shot())
    low, mid, high = (np.array(curve[key]) for key in ("accuracy_low", "accuracy", "accuracy_high"))
    assert (low < mid).all() and (mid < high).all()
    assert high[-1] - low[-1] > 4 * (curve["gain_high"][-1] - curve["gain_low"][-1])
    without_zero = summarize_few_shot(
        FewShotTable(few_shot()[0][1:], few_shot()[1], *(part[1:] for part in few_shot()[2:]))
    )
    assert "gain" not in without_zero
    assert without_zero["accuracy"] == curve["accuracy"][1:]


def test_few_shot_with_one_repeat_has_no_spread(tmp_path: Path):
    curve = summarize_few_shot(few_shot(repeats=1), num_resamples=100)
    assert all(math.isnan(sd) for sd in curve["accuracy_sd"])
    few_shot_figure(curve).savefig(tmp_path / "few_shot.png")
    assert "–" in rendered(few_shot_table(curve))


# ---------------------------------------------------------------------- terminal and files
def rendered(table: Any) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_summary_table_shows_every_number():
    out = summarize(user_table(), num_resamples=200)
    text = rendered(summary_table({"seen": out, "unseen": numbers((0, 0, 0)) | {"num_pairs": 0.0}}))
    assert f"{100 * out['accuracy']:.1f} [{100 * out['accuracy_low']:.1f}, {100 * out['accuracy_high']:.1f}]" in text
    assert f"+{100 * out['personal_minus_global']:.1f} [" in text
    assert f"{out['log_loss']:.3f}" in text
    assert "0.100" in text  # ECE: 0.7 right at confidence 0.6
    assert "unseen" in text
    assert "96.5" in text and re.search(r"served population +3 +–", text)
    assert f"{100 * out['personal_minus_majority']:+.1f} [" in text
    assert max(map(len, text.splitlines())) <= 80
    notes = control_notes({"seen": out})
    assert [note.split(":")[0] for note in notes] == ["term reversed", "served population"]
    assert control_notes({"seen": numbers((0, 0, 0))})[0].startswith("accuracy − majority: not measured")


def test_few_shot_table_shows_the_curve():
    text = rendered(few_shot_table(summarize_few_shot(few_shot(), num_resamples=200)))
    assert "50 unseen users, 3 repeats" in text and max(map(len, text.splitlines())) <= 80
    assert "+6.8 [6.7, 7.0]" in text


def test_a_curve_over_dialogues_says_so():
    curve = summarize_few_shot(few_shot(), num_resamples=200)
    assert "dialogues" not in rendered(few_shot_table(curve)) and shot_units(curve) == "pairs"
    curve["shot_unit"] = "dialogue"
    assert "shots are dialogues" in rendered(few_shot_table(curve))
    (axes,) = few_shot_figure(curve).axes
    assert axes.get_xlabel() == "dialogues per unseen user (shots)"
    assert axes.get_title(loc="left").strip() == "How many dialogues does a new user need?"


def test_json_is_atomic_finite_and_merges(tmp_path: Path):
    path = tmp_path / "run" / "metrics.json"
    write_json(path, {"seen": {"accuracy": 0.5, "accuracy_low": math.nan}, "seed": 0, "list": [1.0, math.inf]})
    write_json(path, {"few_shot": {"shots": [0, 1]}, "seed": 1}, merge=True)
    expected = {"seen": {"accuracy": 0.5, "accuracy_low": None}, "seed": 1, "list": [1.0, None]}
    assert json.loads(path.read_text()) == expected | {"few_shot": {"shots": [0, 1]}}
    write_json(path, {"seed": 2})
    assert json.loads(path.read_text()) == {"seed": 2}
    with pytest.raises(TypeError):
        write_json(path, {"seed": object()})
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]
    assert json.loads(path.read_text()) == {"seed": 2}


def test_csv_of_users(tmp_path: Path):
    table = user_table(num_users=3)
    table.global_accuracy[1] = np.nan
    ids = ["ann", "-", "böb", "-", "c,d"]
    write_csv(tmp_path / "users.csv", USER_COLUMNS, user_rows({"seen": table}, ids))
    with (tmp_path / "users.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["user_id"] for row in rows] == ["ann", "böb", "c,d"]
    assert float(rows[0]["gain"]) == table.accuracy[0] - table.global_accuracy[0]
    assert rows[1]["global_accuracy"] == rows[1]["gain"] == ""
    assert rows[2]["split"] == "seen" and int(rows[2]["num_pairs"]) == table.num_pairs[2]


# ---------------------------------------------------------------------- pictures
def test_few_shot_figure_draws_the_curve(tmp_path: Path):
    curve = summarize_few_shot(few_shot(), num_resamples=200)
    figure = few_shot_figure(curve)
    (axes,) = figure.axes
    line = max(axes.lines, key=lambda line: len(line.get_xdata()))
    np.testing.assert_allclose(line.get_ydata(), 100 * np.array(curve["accuracy"]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "4", "8", "16", "32"]
    assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title(loc="left")
    figure.savefig(tmp_path / "few_shot.png")
    assert (tmp_path / "few_shot.png").stat().st_size > 5000


def test_gain_figure_counts_every_user(tmp_path: Path):
    tables = {"seen": user_table(60), "unseen": user_table(25, gain=0.0, seed=1)}
    figure = gain_figure(tables)
    for axes, table in zip(figure.axes, tables.values(), strict=True):
        harmed, unchanged, helped = (sum(bar.get_height() for bar in bars) for bars in axes.containers)
        gain = table.personal_minus_global
        assert (harmed, unchanged, helped) == ((gain < 0).sum(), (gain == 0).sum(), (gain > 0).sum())
    assert figure.axes[-1].get_xlabel()
    figure.savefig(tmp_path / "histogram.png")
    assert (tmp_path / "histogram.png").stat().st_size > 5000


def test_calibration_figure_draws_every_bin_that_has_pairs(tmp_path: Path):
    """Two bins: half right at confidence 0.6, three of four right at 0.9."""
    table = user_table(60)
    bins = np.zeros((15, 3))
    bins[3], bins[12] = (4, 2.4, 2), (8, 7.2, 6)
    table = UserTable(**{**vars(table), "bins": bins})
    figure = calibration_figure({"seen": table, "unseen": table})
    for axes in figure.axes:
        confidence, accuracy = axes.lines[1].get_data()
        assert np.allclose(confidence, [60, 90]) and np.allclose(accuracy, [50, 75])
        assert "calibration error 0.133" in axes.texts[0].get_text()  # (4 * 0.1 + 8 * 0.15) / 12
    figure.savefig(tmp_path / "calibration.png")


def test_gain_figure_of_a_method_without_a_personal_part():
    table = user_table(30)
    (axes,) = gain_figure({"seen": UserTable(**{**vars(table), "accuracy": table.global_accuracy})}).axes
    assert max(bar.get_height() for bar in axes.patches) == 30
