"""The command ``plm``: dispatch, ``--help`` and the list of methods.

Nothing here imports torch: the light commands must answer at once, and the others import what they need.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

import plm
from plm.messages import debug, nearest

_VERBS: dict[str, tuple[str, str]] = {
    "fit": ("fit", "train a method on preference pairs, then test its best checkpoint"),
    "validate": ("fit", "evaluate a checkpoint on the validation rows"),
    "test": ("fit", "evaluate a checkpoint on seen and unseen users"),
    "predict": ("fit", "margins of a checkpoint on the test rows"),
    "adapt": ("adapt", "learn new users of a checkpoint from their pairs"),
    "score": ("score", "rewards of responses for given users"),
    "export": ("export", "write the model of a user for software other than plm"),
    "query": ("query", "choose the pairs whose answers would tell most about a user"),
    "generate": ("generate", "texts written for given users"),
    "sample": ("sample", "many responses of a policy to each prompt"),
    "label": ("label", "let people, rules or models compare sampled responses"),
    "judge": ("judge", "whether users' policies write what they like"),
    "data": ("data_check", "check preference pairs before training on them"),
    "rewardbench": ("rewardbench", "RewardBench 2 scores of a checkpoint"),
    "users": ("users", "list, export or delete the users of a checkpoint"),
    "portfolio": ("portfolio", "choose few policies that serve everybody, with a certificate"),
    "leaderboard": ("leaderboard", "compare methods and baselines on one split, with intervals and verdicts"),
    "dashboard": ("dashboard", "make a saved Weights & Biases workspace for a project of runs"),
    "methods": ("methods", "list the installed methods"),
}
"""Verb -> module of this package whose ``run(args)`` carries it out, and what ``plm --help`` says of it."""
_BUG = (
    "error: unless the message above says otherwise, as out of memory does, this is a bug in plm or in the method's "
    "code; report it with all that stands above, the recipe and `plm --version`"
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: Command line without the program name; default ``sys.argv[1:]``.

    Returns:
        The exit status: 0, 1 for an error while running, 2 for a wrong command line or recipe. A user's mistake is
        shown as one message; ``PLM_DEBUG=1`` shows the traceback too. Anything else shows its traceback: a bug.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not sys.stderr.isatty():  # transformers draws a bar for every model that it reads, also into files and pipes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        warnings.formatwarning = _one_line
        return _dispatch(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (ValueError, OSError) as error:
        if debug():
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        print(_BUG, file=sys.stderr)
        return 1


def _dispatch(args: list[str]) -> int:
    """Import the door of the verb and run it; doors of several verbs are given the verb too."""
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"plm {plm.__version__}")
        return 0
    if verb in ("-c", "--config") or verb.startswith("--config="):
        door = "fit"
    elif verb in _VERBS:
        door = _VERBS[verb][0]
    else:
        kind = "option" if verb.startswith("-") else "command"
        valid = ["--help", "--version", "--config"] if kind == "option" else list(_VERBS)
        raise SystemExit(_usage_error(f"no {kind} {verb!r}{nearest(verb, valid)} (plm --help lists all)"))
    status: int | None = import_module(f"plm.cli.{door}").run(args if door == "fit" else args[1:])
    return status or 0


def _one_line(message: Warning | str, *where: object, **also: object) -> str:
    """A warning without the source line that raised it."""
    return f"warning: {message}\n"


def _usage_error(message: str) -> int:
    """Show a wrong command line; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def _help() -> str:
    """The text of ``plm --help``."""
    verbs = "\n".join(f"  {verb:<11} {text}" for verb, (_, text) in _VERBS.items())
    return f"""usage: plm COMMAND [options]

{plm.__doc__.splitlines()[0] if plm.__doc__ else ""}

commands:
{verbs}

options:
  --help     show this text; `plm COMMAND --help` for one command
  --version  show the version

example:
  plm fit --config recipes/quickstart.yaml"""
