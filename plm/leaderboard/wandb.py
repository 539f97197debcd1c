"""``plm leaderboard --project``: tables and pictures as a Weights & Biases run, and a saved report that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from plm.leaderboard.report import Leaderboard, markdown, records

TABLE = "leaderboard"
"""What the run calls the table of all numbers."""


def publish(board: Leaderboard, files: Sequence[Path], folder: Path, project: str) -> str:
    """Log a leaderboard as one run and save the report; returns a line that says where it is, or why there is none."""
    wandb: Any = import_module("wandb")
    columns, rows = records(board)
    pictures = [file for file in files if file.suffix == ".png"]
    config = {**board.metadata, "split_hash": board.data["split_hash"]}
    with wandb.init(project=project, job_type="leaderboard", name=board.title, dir=str(folder), config=config) as run:
        images = {file.stem: wandb.Image(str(file)) for file in pictures}
        run.log({TABLE: wandb.Table(columns=[*columns], data=rows), **images})
        entity, run_id, offline = run.entity, run.id, run.offline
    if offline:
        return "W&B: the run is offline, so no report was saved; the same command online makes it from the kept runs"
    try:
        saved = report(board, entity, project, run_id, [file.stem for file in pictures])
        saved.save()
    except Exception as error:  # whatever the network or the server says: the leaderboard itself is done
        return f"W&B: the run is logged, the report could not be saved: {error}"
    return f"W&B report: {saved.url}"


def report(board: Leaderboard, entity: str, project: str, run_id: str, pictures: Sequence[str]) -> Any:
    """The report as wandb-workspaces builds it, not yet saved.

    Args:
        board: All rows.
        entity: User or team.
        project: Where the run is.
        run_id: The run that logged the table and the pictures.
        pictures: Their keys.

    Raises:
        ValueError: If wandb-workspaces is not installed.
    """
    wr, _ = workspaces()
    runset = wr.Runset(name="this leaderboard", filters=f"ID = {run_id!r}")  # of the report's own project
    panels = [wr.MediaBrowser(title=key.replace("_", " "), media_keys=[key]) for key in pictures]
    blocks = [
        wr.TableOfContents(),
        wr.MarkdownBlock(markdown(board)),
        wr.H2("Pictures and all numbers"),
        wr.PanelGrid(runsets=[runset], panels=[*panels, wr.WeavePanelSummaryTable(table_name=TABLE)]),
    ]
    description = "; ".join(board.provenance()[:3])
    texts = {"title": board.title, "description": description}
    return wr.Report(project=project, entity=entity, **texts, blocks=blocks, width="fluid")


def workspaces() -> tuple[Any, Any]:
    """The modules of wandb-workspaces that make reports and workspaces.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return import_module("wandb_workspaces.reports.v2"), import_module("wandb_workspaces.workspaces")
    except ModuleNotFoundError as error:
        raise ValueError("W&B reports and workspaces need wandb-workspaces: pip install 'plm[dashboard]'") from error
