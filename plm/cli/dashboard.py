"""``plm dashboard``: a saved workspace of Weights & Biases for a project of plm runs."""

from __future__ import annotations

import json

from plm.cli.options import OptionParser
from plm.leaderboard.dashboard import definition, workspace


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
