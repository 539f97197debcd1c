"""Runs to rows: seeds averaged per user, comparisons, verdicts and every format of the table."""

from __future__ import annotations

import csv
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import plm
from plm.atomic import write_csv, write_json
from plm.evaluation import html_page
from plm.leaderboard import figures
from plm.leaderboard.figures import all_figures
from plm.leaderboard.report import Leaderboard, markdown, page, records, tables, terminal, write
from plm.leaderboard.results import (
    BoardRow,
    SweepPoint,
    all_pairs,
    fill_row,
    other_user_row,
    ranked,
    read_run,
    verdicts,
    versus,
)

USERS = 24


def write_run(folder: Path, shift: float, gain: float, per_user: int, seed: int = 0, users: int = USERS) -> None:
    rng = np.random.default_rng(seed)
    base = np.linspace(0.5, 0.8, users)
    own = base + shift + gain + rng.normal(0, 0.01, users)
    rows = []
    for split in ("seen", "unseen"):
        for row in reversed(range(users)):
            accuracy, whole = own[row], base[row] + shift
            values = [accuracy, whole, accuracy - whole, whole - 0.02, 0.6 - shift]
            rows.append([f"{split}-{row:02d}", split, 10 + row, *values])
    columns = "user_id split num_pairs accuracy global_accuracy gain other_accuracy log_loss".split()
    write_csv(folder / "per_user.csv", columns, rows)
    group = {"ece": 0.02 * (seed + 1)}
    curve = {"shots": [0, 4], "num_users": users, "num_repeats": 2}
    curve |= {"accuracy": [0.6, 0.6 + gain], "accuracy_low": [0.5, None], "accuracy_high": [0.7, None]}
    write_json(folder / "metrics.json", {"split_hash": "x", "seen": group, "unseen": group, "few_shot": curve})
    facts = {"shared_parameters": 10, "parameters_per_user": per_user, "parameters": 10 + 24 * per_user}
    write_json(folder / "facts.json", {**facts, "num_users": 24, "fit_seconds": seed + 1.0, "val_value": 0.5 - gain})


def row(folder: Path, name: str, shift: float, gain: float, per_user: int, seeds: int = 2) -> BoardRow:
    for seed in range(seeds):
        write_run(folder / f"{name}-{seed}", shift, gain, per_user, seed)
    runs = {seed: read_run(folder / f"{name}-{seed}") for seed in range(seeds)}
    return fill_row(BoardRow(name, "method", "for the test", command=f"plm fit {name}"), runs)


@pytest.fixture
def rows(tmp_path: Path) -> list[BoardRow]:
    personal, plain = row(tmp_path, "Own", 0.0, 0.06, 3), row(tmp_path, "BradleyTerry", 0.0, 0.0, 0)
    rival = row(tmp_path, "Rival", -0.05, 0.0, 2)
    majority = BoardRow(**{**vars(row(tmp_path, "majority", -0.1, 0.0, 0, 1)), "kind": "baseline", "few_shot": None})
    failed = BoardRow("Broken", "method", "for the test", errors={0: "ValueError: no | luck"})
    return [majority, failed, plain, rival, personal, other_user_row(personal)]


def board(rows: list[BoardRow]) -> Leaderboard:
    data = {"split_hash": "abc" * 20, "group_by": "pair", "users_seen": 24}
    about = {"command": "plm leaderboard", "seeds": 2}
    return Leaderboard("tiny, test", rows, "BradleyTerry", data, about, {"LatentDPO": "reads latents"})


def test_seeds_are_averaged_per_user_before_intervals(tmp_path: Path):
    one = row(tmp_path, "Own", 0.0, 0.06, 3, seeds=3)
    runs = [read_run(tmp_path / f"Own-{seed}") for seed in range(3)]
    values = np.mean([run.users["unseen"].values["accuracy"] for run in runs], axis=0)
    numbers = one.numbers["unseen"]
    assert one.users["unseen"].ids == sorted(one.users["unseen"].ids)
    assert numbers["accuracy"] == pytest.approx(values.mean())
    spread = np.std([run.users["unseen"].values["accuracy"].mean() for run in runs], ddof=1)
    assert numbers["accuracy_seed_sd"] == pytest.approx(spread)
    assert numbers["ece"] == pytest.approx(0.04) and one.facts["fit_seconds"] == 2.0
    assert numbers["accuracy_micro"] == pytest.approx(np.average(values, weights=np.arange(10, 34)))
    assert numbers["accuracy_low"] < numbers["accuracy"] < numbers["accuracy_high"]
    assert one.few_shot is not None and one.few_shot["accuracy"] == pytest.approx([0.6, 0.66])
    assert math.isnan(one.few_shot["accuracy_low"][1])


def test_runs_of_other_users_are_refused(tmp_path: Path):
    write_run(tmp_path / "a", 0, 0, 0)
    write_run(tmp_path / "b", 0, 0, 0, users=USERS + 1)
    with pytest.raises(ValueError, match="different splits"):
        fill_row(BoardRow("x", "method", ""), {0: read_run(tmp_path / "a"), 1: read_run(tmp_path / "b")})


def test_users_of_one_split_alone_count_as_much_as_those_of_several(tmp_path: Path):
    write_run(tmp_path / "a", 0, 0, 0)
    write_run(tmp_path / "b", 0, 0, 0, users=USERS + 1)
    runs = {name: read_run(tmp_path / name)._replace(split_hash=name) for name in "ab"}
    filled = fill_row(BoardRow("x", "method", ""), {0: runs["a"], 1: runs["b"]})
    (one, other), both = (run.users["unseen"].values["accuracy"] for run in runs.values()), filled.users["unseen"]
    assert both.ids == runs["b"].users["unseen"].ids
    np.testing.assert_allclose(both.values["accuracy"], [*(one + other[:-1]) / 2, other[-1]], rtol=0, atol=1e-12)
    single = fill_row(BoardRow("BradleyTerry", "method", ""), {0: runs["a"]})
    with pytest.raises(ValueError, match="their splits differ"):
        versus([filled, single], "BradleyTerry")
    single = replace(single, errors={1: "a fit that failed"})
    (test,) = [test for test in versus([filled, single], "BradleyTerry") if test.group == "unseen"]
    assert test.difference == pytest.approx(((one + other[:-1]) / 2 - one).mean()), "over the users that both have"


def test_comparisons_and_their_families(rows: list[BoardRow]):
    tests = {(test.group, test.first): test for test in versus(rows, "BradleyTerry")}
    assert set(name for _, name in tests) == {"Own", "Rival", "majority"}, "neither failures nor controls"
    own, rival = tests["unseen", "Own"], tests["unseen", "Rival"]
    assert own.difference == pytest.approx(0.06, abs=0.005) and own.low > 0
    assert rival.high < 0
    assert own.p_holm == pytest.approx(2 * own.p_value) or own.p_holm == pytest.approx(rival.p_holm)
    assert math.isnan(tests["unseen", "majority"].p_holm)
    pairs = [(test.first, test.second) for test in all_pairs(rows) if test.group == "seen"]
    assert pairs == [("BradleyTerry", "Rival"), ("BradleyTerry", "Own"), ("Rival", "Own")]
    assert versus(rows, "absent") == []


def test_a_sweep_is_drawn_over_its_values_beside_what_strangers_get(tmp_path: Path) -> None:
    made = [
        replace(row(tmp_path, f"mine, K {value:g}", 0.0, gain, 3), point=SweepPoint("mine", "K", value))
        for value, gain in ((8.0, 0.06), (1.0, 0.01), (2.0, 0.03))
    ]
    figure = figures.sweep([*made, row(tmp_path, "BradleyTerry", 0.0, 0.0, 0)], "BradleyTerry")
    assert figure is not None and figures.sweep(made[:0], "BradleyTerry") is None
    for axes, group in zip(figure.axes, ("unseen", "seen"), strict=True):
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "8"]
        (line, _, _), ends, shown = axes.containers[0], axes.lines[1], made[1:] + made[:1]
        assert line.get_ydata().tolist() == [100 * one.numbers[group]["accuracy"] for one in shown]
        assert ends.get_ydata().tolist() == [100 * one.numbers[group]["global_accuracy"] for one in shown]
        assert axes.get_xlabel() == "K"


def test_order_and_verdicts(rows: list[BoardRow]):
    names = [one.name for one in ranked(rows)]
    assert names == ["Own", "BradleyTerry", "Rival", "Broken", "Own, another user", "majority"]
    assert verdicts(rows[2]) == [], "a method without users claims nothing"
    said = [sentence for one in rows for sentence in verdicts(one)]
    assert [sentence.partition(":")[0] for sentence in said] == [
        "Rival, unseen",
        "Rival, seen",
        "Own, unseen",
        "Own, seen",
    ]
    assert "no evidence" in said[0] or "harms" in said[0]
    assert "personalisation helps: +6." in said[2] or "personalisation helps: +5." in said[2]
    control = rows[-1].numbers["unseen"]
    assert control["accuracy"] == pytest.approx(rows[4].numbers["unseen"]["other_accuracy"])


def test_every_format_holds_every_row(rows: list[BoardRow], tmp_path: Path):
    made = board(rows)
    files = write(made, all_figures(made), tmp_path / "out")
    assert all(file.stat().st_size > 500 for file in files)
    names = {f"leaderboard.{kind}" for kind in ("md", "json", "html", "csv", "tex")}
    names |= {f"{name}.{k}" for name in ("accuracy", "few-shot_curves", "parameters") for k in ("png", "pdf", "svg")}
    assert {file.name for file in files} == names
    tex = (tmp_path / "out" / "leaderboard.tex").read_text()
    assert tex.count(r"\toprule") == 3 and r"Own & 60.0 & 66.0 \\" in tex
    text = markdown(made)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {line.replace("\\|", "").count("|") for line in lines}
    assert widths == {4, 17}, "rows of equal width, those of the few-shot table of another"
    assert "failed: ValueError: no \\| luck" in text and "Broken, seed 0: ValueError: no | luck" in text
    assert "| Own | 60.0 | 66.0 |" in text and "- LatentDPO: reads latents" in text
    web = (tmp_path / "out" / "leaderboard.html").read_text()
    assert '<th scope="row">Own</th><td>60.0</td><td>66.0</td>' in web and "LatentDPO: reads latents" in web
    assert web.count("data:image/png;base64,") == 3 and "http" not in web
    columns, table = records(made)
    assert len(table) == 2 * len(rows) and all(len(line) == len(columns) for line in table)
    with (tmp_path / "out" / "leaderboard.csv").open(newline="") as file:
        (best,) = [one for one in csv.DictReader(file) if (one["row"], one["group"]) == ("Own", "unseen")]
    assert float(best["vs_reference"]) == pytest.approx(0.06, abs=0.005) and best["parameters_per_user"] == "3"
    kept = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert {one["name"] for one in kept["rows"]} == {one.name for one in rows}
    assert len(kept["verdicts"]) == 4 and kept["rows"][3]["errors"] == {"0": "ValueError: no | luck"}
    assert len(terminal(made)) > 4


def test_a_board_without_results_still_shows_its_failures():
    made = board([BoardRow("Broken", "method", "", errors={0: "why"})])
    assert made.groups == [] and all_figures(made) == {}
    assert "Broken, seed 0: why" in markdown(made)


def test_what_a_page_shows_is_escaped(tmp_path: Path):
    personal = row(tmp_path, "<script>", 0.0, 0.06, 3)
    failed = BoardRow("Broken", "method", "a & b", errors={0: "<b>why</b>"}, command="plm fit '<x>'")
    web = html_page("<script>", page(board([personal, failed]), {"<i>": b"PNG"}))
    assert web.count("<script>") == 1 and "<b>" not in web and "<x>" not in web and "<i>" not in web
    assert '<th scope="row">&lt;script&gt;</th>' in web and "failed: &lt;b&gt;why&lt;/b&gt;" in web
    assert "a &amp; b" in web and 'src="data:image/png;base64,UE5H"' in web


def test_every_format_shows_the_same_cells(rows: list[BoardRow]):
    made = board(rows)
    text, web = markdown(made), html_page("", page(made, {}))
    for section in tables(made):
        for name, *cells in (line.cells for line in section.rows):
            escaped = [cell.replace("|", "\\|") for cell in cells]
            assert f"| {name} | {' | '.join(escaped)} |" in text
            body = "".join(f"<td>{cell.replace('<', '&lt;')}</td>" for cell in cells)
            assert f'<th scope="row">{name}</th>{body}' in web


def test_a_new_leaderboard_fills_the_page_of_results(rows: list[BoardRow], tmp_path: Path):
    write(board(rows), {}, tmp_path)
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    content["metadata"] |= {"date": "today", "commit": "abc"}
    counts = ("users_unseen", "pairs_train", "pairs_val", "pairs_test", "pairs_support", "pairs_query")
    content["data"] |= dict.fromkeys(counts, 7)
    lines = runpy.run_path(str(Path(plm.__file__).parents[1] / "docs/tables.py"))["tables"](content).splitlines()
    (own,) = [line for line in lines if line.startswith("| Own | 7")]
    cells, (other,) = board(rows).cells(rows[4], "unseen"), [one for one in rows if one.name == "Own, another user"]
    assert own.split(" | ")[1] == cells[1] and own.split(" | ")[3:7] == [*cells[6:8], cells[8], cells[9]]
    assert own.split(" | ")[7:9] == ["–", f"{100 * other.numbers['unseen']['accuracy']:.1f}"]
    assert not any("Broken" in line for line in lines)
