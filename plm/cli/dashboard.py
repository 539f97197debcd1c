"""``plm dashboard``: a saved workspace of Weights & Biases for a project of plm runs."""

from __future__ import annotations

import json

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Save the workspace, or print its definition.

    Raises:
        ValueError: If wandb-workspaces is not installed, or W&B cannot be reached.
    """
    parser = OptionParser(prog="plm dashboard", description="Make a saved workspace for a W&B project of plm runs.")
    parser.add_shared("--project", required=True, help="the project that the runs are in")
    parser.add_argument("--entity", help="user or team; default: that of the login")
    parser.add_argument("--name", default="plm", help="name of the workspace (default: plm)")
    parser.add_argument("--print", action="store_true", help="print the definition as JSON instead of saving it")
    options = parser.parse(args)

    from plm.leaderboard.dashboard import default_entity, definition, save, workspace

    entity = options.entity or ("entity" if options.print else default_entity())
    board = workspace(entity, options.project, options.name)
    if options.print:
        print(json.dumps(definition(board), indent=1, ensure_ascii=False))
    else:
        print(save(board))
