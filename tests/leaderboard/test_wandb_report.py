"""The W&B report of a leaderboard, offline: its definition holds the tables, and the run that logged them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from matplotlib.figure import Figure

from plm.leaderboard import wandb as wandb_report
from plm.leaderboard.dashboard import definition
from plm.leaderboard.report import Leaderboard, markdown
from plm.leaderboard.results import BoardRow

pytest.importorskip("wandb_workspaces", reason="needs the test extra")

BOARD = Leaderboard(
    "tiny, test",
    [BoardRow("Broken", "method", "for the test", errors={0: "ValueError: no | luck"})],
    "BradleyTerry",
    {"split_hash": "abc", "group_by": "pair"},
    {"command": "plm leaderboard", "seeds": 2},
)


def test_the_definition_holds_tables_pictures_and_the_run() -> None:
    sent = definition(wandb_report.report(BOARD, "e", "p", "run7", ["accuracy", "few-shot_curves"]))
    assert (sent["project"], sent["displayName"]) == ({"name": "p", "entityName": "e"}, "tiny, test")
    blocks = {block["type"]: block for block in sent["spec"]["blocks"]}
    assert blocks["markdown-block"]["content"] == markdown(BOARD)
    assert "Broken, seed 0: ValueError: no | luck" in blocks["markdown-block"]["content"]
    grid = blocks["panel-grid"]["metadata"]
    (runs,) = grid["runSets"]
    (only,) = runs["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "name"}, "=", "run7")
    panels = grid["panelBankSectionConfig"]["panels"]
    assert [panel["config"].get("mediaKeys") for panel in panels] == [["accuracy"], ["few-shot_curves"], None]
    picked = panels[-1]["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]
    assert picked == wandb_report.TABLE


@pytest.mark.parametrize(("fails", "said"), [(False, "W&B report: https://report"), (True, "not saved: no network")])
def test_a_report_that_cannot_be_saved_does_not_spoil_the_leaderboard(
    fails: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    run = MagicMock()
    run.__enter__.return_value = SimpleNamespace(entity="e", id="run7", offline=False, log=lambda values: None)
    monkeypatch.setattr(wandb, "init", MagicMock(return_value=run))
    saved: list[tuple[Any, ...]] = []

    def save() -> None:
        if fails:
            raise RuntimeError("no network")

    def made(*given: Any) -> SimpleNamespace:
        saved.append(given)
        return SimpleNamespace(save=save, url="https://report")

    monkeypatch.setattr(wandb_report, "report", made)
    Figure(figsize=(1, 1)).savefig(tmp_path / "accuracy.png")
    line = wandb_report.publish(BOARD, [tmp_path / "accuracy.png", tmp_path / "leaderboard.md"], tmp_path, "p")
    assert said in line.replace("could not be saved", "not saved")
    assert saved == [(BOARD, "e", "p", "run7", ["accuracy"])]
    assert wandb.init.call_args.kwargs["config"]["split_hash"] == "abc"
