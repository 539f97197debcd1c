"""The page over all runs: every folder of a run is on it, whatever its files hold and whatever it is called."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from plm.cli import main
from plm.evaluation.page import latex_text
from plm.leaderboard.runs import cells, write_runs
from plm.recipe.runs import RunSummary, read_runs

PNG = bytes.fromhex("89504e470d0a1a0a")
NUMBERS = {
    "num_users": 20,
    "num_pairs": 100,
    **{f"accuracy{end}": value for end, value in (("", 0.6), ("_low", 0.55), ("_high", 0.65))},
    **{f"personal_minus_global{end}": value for end, value in (("", 0.043), ("_low", 0.021), ("_high", 0.065))},
    **{f"personal_minus_other{end}": value for end, value in (("", 0.05), ("_low", 0.02), ("_high", 0.08))},
}
CURVE = {"shots": [0, 4], "accuracy": [0.5, 0.6], "accuracy_low": [0.4, 0.5], "accuracy_high": [0.6, None]}
METRICS = {
    "split_hash": "abcdef0123456789",
    "unseen": {**NUMBERS, "accuracy": 0.7},
    "seen": NUMBERS,
    "verdicts": {"unseen": "unseen: personalisation helps: +4.3 points [2.1, 6.5] over its global control"},
    "few_shot": CURVE,
}
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "=HYPERLINK(1)",
    "@SUM(1)",
    "javascript:alert(1)",
    "a\x1b[31mred\x07",
    "$\\frac{",
]


def write_run(folder: Path, metrics: Any = METRICS, method: str = "plm.methods.lore.LoRe") -> Path:
    """A whole run."""
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {"w": torch.zeros(500)}}, folder / "checkpoints" / "best.ckpt")
    source = {"class_path": "plm.data.sources.pairs.PairFiles", "init_args": {"path": "mine.jsonl"}}
    recipe = {"model": {"class_path": method}, "data": {"source": source}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "per_user.csv").touch()
    facts = {"date": "2026-11-30 04:41:08+00:00", "commit": "1a2b3c", "plm": "0.1.0", "fit_seconds": 12.34}
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "histogram.png").write_bytes(PNG)
    return folder


def test_a_row_has_all_that_a_run_says(tmp_path: Path) -> None:
    write_run(tmp_path / "deep" / "mine")
    (run,) = read_runs(tmp_path)
    assert cells(run) == {
        "run": "deep/mine",
        "method": "LoRe",
        "data": "mine",
        "date": "2026-11-30 04:41",
        "commit": "1a2b3c",
        "users": "unseen",
        "unseen %": "70.0 [55.0, 65.0]",
        "seen %": "60.0 [55.0, 65.0]",
        "personal − global": "+4.3 [2.1, 6.5]",
        "personal − other": "+5.0 [2.0, 8.0]",
        "verdict": "personalisation helps",
        "test pairs": "200",
        "fit s": "12.3",
        "split": "abcdef01",
        "missing or damaged": "–",
    }


def damaged(kind: str, folder: Path) -> None:
    """A run of which a file is gone, torn or nonsense."""
    file, _, content = kind.partition(": ")
    if content == "gone":
        shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()
    elif content == "cut":
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) // 2])
    elif content == "folder":
        (folder / file).unlink()
        (folder / file).mkdir()
    else:
        (folder / file).write_bytes(content.encode("latin-1"))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("recipe.yaml: gone", "no recipe.yaml"),
        ("recipe.yaml: a: [", "recipe.yaml is damaged: "),
        ("recipe.yaml: 3", "recipe.yaml is damaged: it holds no mapping"),
        ("recipe.yaml: model: {class_path: {a: b}}", "recipe.yaml names no method"),
        ("recipe.yaml: \xff", "recipe.yaml is damaged: "),
        ("metrics.json: gone", "no metrics.json: it runs still, was stopped, or was not tested"),
        ("metrics.json: folder", "metrics.json is damaged: "),
        ("metrics.json: {", "metrics.json is damaged: "),
        ("metrics.json: " + "[" * 100_000, "metrics.json is damaged: "),
        ("metrics.json: {}", None),
        ('metrics.json: {"a": 1}', "metrics.json has numbers of no users"),
        ('metrics.json: {"seen": [1]}', "metrics.json has no accuracy of seen users from 0 to 1"),
        ('metrics.json: {"seen": {"accuracy": 1e300}}', "metrics.json has no accuracy of seen users from 0 to 1"),
        ('metrics.json: {"seen": {"accuracy": 1' + "0" * 400 + "}}", "metrics.json has no accuracy of seen users"),
        ('metrics.json: {"seen": {"accuracy": 0.5}, "verdicts": [7], "split_hash": 7}', None),
        (
            'metrics.json: {"seen": {"accuracy": 0.5}, "few_shot": {"shots": [1]}}',
            "few_shot of metrics.json is no curve",
        ),
        ('facts.json: {"fit_seconds": 1' + "0" * 400 + ', "date": [1]}', None),
        ("facts.json: folder", None),
        ("checkpoints: gone", "no checkpoint"),
        ("checkpoints/best.ckpt: cut", "best.ckpt is damaged: "),
        ("checkpoints/best.ckpt: folder", None),
        ("per_user.csv: gone", "no per_user.csv"),
        ("histogram.png: folder", None),
    ],
)
def test_a_damaged_run_is_shown_with_what_is_missing(kind: str, problem: str | None, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_run(root / "whole")
    damaged(kind, write_run(root / "torn"))
    runs = {run.name: run for run in read_runs(root)}
    assert not runs["whole"].problems
    if problem:
        assert any(text.startswith(problem) for text in runs["torn"].problems), runs["torn"].problems
    write_runs([runs["torn"]] if problem else [*runs.values()], root, tmp_path / "page")
    assert set(cells(runs["torn"])) == set(cells(runs["whole"]))


def test_what_is_no_run_is_left_out_and_what_has_just_begun_is_not(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "table.parquet").touch()
    (tmp_path / "mine-predict").mkdir()
    (tmp_path / "mine-predict" / "predict.yaml").touch()
    tested = write_run(tmp_path / "mine-test")
    (tested / "recipe.yaml").rename(tested / "test.yaml")
    shutil.rmtree(tested / "checkpoints")
    found = {run.name: list(run.problems) for run in read_runs(tmp_path)}
    assert found == {"begun": ["nothing was written: it has just begun, or was killed"], "mine-test": []}


class Page(HTMLParser):
    """Tags, links and event handlers of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values["href"] or ""] if "href" in values else []
        self.sources += [values["src"] or ""] if "src" in values else []
        self.handlers += [name for name in values if name.startswith("on")]


def test_links_are_followed_once(tmp_path: Path) -> None:
    """A run that lies elsewhere is listed, and a link that leads back ends nothing but itself."""
    write_run(tmp_path / "elsewhere" / "one")
    root = tmp_path / "runs"
    write_run(root / "two")
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "one")
    (root / "back").symlink_to(root)
    assert {run.name for run in read_runs(root)} == {"linked", "two"}


def test_hostile_names_are_inert_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    metrics = {**METRICS, "verdicts": {"unseen": f"unseen: {HOSTILE[0]}\x1b[2J: x"}}
    for name in HOSTILE:
        write_run(root / name, metrics, method=f"x.{HOSTILE[4]}")
    assert main(["runs", str(root), "--output", str(root / "page")]) == 0
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(shown) and r"a\x1b[31mred\x07" in shown
    page = Page((root / "page" / "runs.html").read_text())
    assert not page.handlers and page.tags.count("script") == 1 and page.tags.count("link") == 0
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.links) == 3 * len(HOSTILE)  # the row, its recipe, its details
    for link in page.links:
        assert link.startswith("./../") and re.fullmatch(r"[\w./%()~-]+", link)
    with (root / "page" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} >= {"'=HYPERLINK(1)", "'@SUM(1)", "javascript:alert(1)"}
    assert not any(cell.startswith(("=", "+", "@", "\t")) for row in rows for cell in row.values())
    tex = (root / "page" / "runs.tex").read_text()
    assert r"\$\textbackslash{}frac\{" in tex and not re.search(r"(?<!\\)[#%&](?! )|\x1b", tex.replace("% \\use", ""))
    assert {file.suffix for file in (root / "page").glob("mine_abcdef01_accuracy.*")} == {".png", ".pdf", ".svg"}


def test_text_in_latex_is_no_command() -> None:
    assert latex_text("a_b & 50 % of #1 {x} ~^") == (r"a\_b \& 50 \% of \#1 \{x\} \textasciitilde{}\textasciicircum{}")
    assert latex_text("[1, -2] 2026-11-30 −3 \n\x1b") == r"{[}1, $-$2] 2026-11-30 $-$3 \textbackslash{}x1b"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
def test_the_table_is_sorted_by_a_click_and_fits_a_telephone(tmp_path: Path) -> None:
    """Numbers as numbers, dashes last in either direction; nothing comes from the network."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the test extra")
    accuracies = {"a": 0.095, "b": 0.7, "c": None, "d": 0.61}
    runs = []
    for name, value in accuracies.items():
        numbers = {} if value is None else {"seen": {"accuracy": value, "accuracy_low": 0.0, "accuracy_high": 1.0}}
        runs.append(RunSummary(tmp_path / name, name, method="M" * 40, numbers=numbers))
    write_runs(runs, tmp_path, tmp_path)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 375, "height": 800})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if "://" in request.url[5:] else None)
        page.goto((tmp_path / "runs.html").as_uri())
        problems.clear()  # the page itself
        order = []
        for _ in range(2):
            page.get_by_role("button", name="seen %", exact=True).click()
            order.append(page.locator("tbody th").all_text_contents())
        assert order == [["a", "d", "b", "c"], ["b", "d", "a", "c"]]
        assert page.evaluate("document.documentElement.scrollWidth") == 375 and not problems
        browser.close()
