"""A saved workspace of Weights & Biases for a project of plm runs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from plm.leaderboard.wandb import workspaces

GROUPS = ("dataset", "method")
"""What runs are grouped by, as every run logs it."""


class Panel(NamedTuple):
    """A chart: bars of the last values of metrics, lines of their course, or pictures."""

    kind: str
    """``bar``, ``line`` or ``media``."""
    title: str
    metrics: tuple[str, ...]


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Is personalisation real?": (
        Panel("bar", "Accuracy of unseen users", ("test/unseen/accuracy",)),
        Panel("bar", "Unseen: personal − global", ("test/unseen/personal_minus_global",)),
        Panel("bar", "Unseen: personal − other", ("test/unseen/personal_minus_other",)),
        Panel("bar", "Accuracy of seen users", ("test/seen/accuracy",)),
        Panel("bar", "Seen: personal − global", ("test/seen/personal_minus_global",)),
        Panel("bar", "Worst decile of unseen users", ("test/unseen/accuracy_p10",)),
    ),
    "Few shots and calibration": (
        Panel("media", "How many pairs does a new user need?", ("test/few_shot",)),
        Panel("media", "Confidence against accuracy", ("test/calibration",)),
        Panel("media", "Who is helped, who is harmed", ("test/histogram",)),
        Panel("bar", "Log-loss", ("test/seen/log_loss", "test/unseen/log_loss")),
        Panel("bar", "Calibration error", ("test/seen/ece", "test/unseen/ece")),
    ),
    "Training": (
        Panel("line", "Loss", ("train/loss",)),
        Panel("line", "Validation accuracy", ("val/seen/accuracy", "val/seen/global_accuracy")),
        Panel("line", "Validation log-loss", ("val/seen/log_loss",)),
    ),
}
"""Names of sections and what they show; every metric is one that every run logs."""


def workspace(entity: str, project: str, name: str) -> Any:
    """The workspace as wandb-workspaces builds it, not yet saved.

    Raises:
        ValueError: If wandb-workspaces is not installed.
    """
    wr, ws = workspaces()

    def chart(panel: Panel) -> Any:
        metrics = list(panel.metrics)
        if panel.kind == "media":
            return wr.MediaBrowser(title=panel.title, media_keys=metrics)
        if panel.kind == "line":
            return wr.LinePlot(title=panel.title, y=metrics)
        return wr.BarPlot(title=panel.title, metrics=metrics)  # grouped as the runs are

    sections = [
        ws.Section(name=title, panels=[chart(panel) for panel in panels], is_open=True)
        for title, panels in SECTIONS.items()
    ]
    grouped = ws.RunsetSettings(groupby=[ws.Config(name) for name in GROUPS])
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=grouped)


def definition(view: Any) -> dict[str, Any]:
    """Return what would be sent to W&B."""
    content: dict[str, Any] = json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return content


def save(board: Any) -> str:
    """Save a workspace at W&B; returns its address.

    Raises:
        ValueError: If W&B cannot be reached.
    """
    try:
        board.save()
    except Exception as error:  # whatever the network or the server says
        raise ValueError(f"the workspace could not be saved: {error}; check `wandb login` and the network") from error
    return str(board.url)


def default_entity() -> str:
    """Ask W&B for the default entity of the login.

    Raises:
        ValueError: If nobody is logged in.
    """
    import wandb

    try:
        return str(wandb.Api().default_entity)
    except Exception as error:  # offline, or no key
        raise ValueError(f"W&B cannot be reached: {error}; run `wandb login`, or give --entity and --print") from error
