"""``plm dashboard``: a saved workspace of Weights & Biases for a project of plm runs."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any, NamedTuple

from plm.cli.options import OptionParser

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


def run(args: list[str]) -> None:
    """Save the workspace, or print its definition.

    Raises:
        ValueError: If wandb-workspaces is not installed, or W&B cannot be reached.
    """
    parser = OptionParser(prog="plm dashboard", description="Make a saved workspace for a W&B project of plm runs.")
    parser.add_argument("--project", required=True, help="the project that the runs are in")
    parser.add_argument("--entity", help="user or team; default: that of the login")
    parser.add_argument("--name", default="plm", help="name of the workspace (default: plm)")
    parser.add_argument("--print", action="store_true", help="print the definition as JSON instead of saving it")
    options = parser.parse(args)
    entity = options.entity
    if entity is None and not options.print:
        entity = _entity()
    made = workspace(entity or "entity", options.project, options.name)
    if options.print:
        print(json.dumps(definition(made), indent=1, ensure_ascii=False))
        return
    try:
        made.save()
    except Exception as error:  # whatever the network or the server says
        raise ValueError(f"the workspace could not be saved: {error}; check `wandb login` and the network") from error
    print(made.url)


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


def workspaces() -> tuple[Any, Any]:
    """The modules of wandb-workspaces that make reports and workspaces.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return import_module("wandb_workspaces.reports.v2"), import_module("wandb_workspaces.workspaces")
    except ModuleNotFoundError as error:
        raise ValueError("W&B reports and workspaces need wandb-workspaces: pip install 'plm[dashboard]'") from error


def definition(made: Any) -> dict[str, Any]:
    """What would be sent to W&B."""
    sent: dict[str, Any] = json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return sent


def _entity() -> str:
    """The default entity of the login.

    Raises:
        ValueError: If nobody is logged in.
    """
    import wandb

    try:
        return str(wandb.Api().default_entity)
    except Exception as error:  # offline, or no key
        raise ValueError(f"W&B cannot be reached: {error}; run `wandb login`, or give --entity and --print") from error
