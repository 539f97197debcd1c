"""The W&B workspace, offline: what it shows is what runs log."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from plm.cli import main
from plm.leaderboard.dashboard import SECTIONS

ROOT = Path(__file__).parents[2]


def test_every_metric_is_one_that_a_run_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the CSV of a small run; pictures against its files."""
    monkeypatch.chdir(tmp_path)
    small = ["--data.source.init_args.num_users", "30", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    cache = ["--data.cache_dir", "cache", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(ROOT / "recipes/quickstart.yaml"), *small, *cache]) == 0
    (log,) = tmp_path.glob("runs/*/metrics.csv")
    with log.open() as stream:
        logged = set(next(csv.reader(stream)))
    pictures = {f"test/{file.stem}" for file in log.parent.glob("*.png")}
    for panels in SECTIONS.values():
        for panel in panels:
            assert set(panel.metrics) <= (pictures if panel.kind == "media" else logged), panel


def test_the_definition_holds_every_panel(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces", reason="needs the test extra")
    assert main(["dashboard", "--project", "p", "--entity", "e", "--name", "mine", "--print"]) == 0
    sent = json.loads(capsys.readouterr().out)
    assert (sent["entity"], sent["project"], sent["displayName"]) == ("e", "p", "mine")
    sections = sent["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    for section, panels in zip(sections, SECTIONS.values(), strict=True):
        shown = [set(panel["config"].get("metrics") or panel["config"]["mediaKeys"]) for panel in section["panels"]]
        assert shown == [set(panel.metrics) for panel in panels]
    (runs,) = sent["spec"]["section"]["runSets"]  # W&B puts "value" after the first key of a nested config
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("config", "dataset.value"),
        ("config", "method.value"),
    ]


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    assert main(["dashboard", "--project", "p", "--print"]) == 1
    assert "pip install 'plm[dashboard]'" in capsys.readouterr().err
