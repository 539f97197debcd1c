"""The command ``plm``: dispatch, ``--help`` and the list of methods.

Nothing here imports torch: the light commands must answer at once, and the others import what they need.
"""

from __future__ import annotations

import ast
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import plm
from plm.config import debug, nearest

_VERBS = {
    "fit": "train a method on preference pairs, then test its best checkpoint",
    "validate": "evaluate a checkpoint on the validation rows",
    "test": "evaluate a checkpoint on seen and unseen users",
    "predict": "margins of a checkpoint on the test rows",
    "adapt": "learn new users of a checkpoint from their pairs",
    "score": "rewards of responses for given users",
    "export": "write the model of a user for software other than plm",
    "query": "choose the pairs whose answers would tell most about a user",
    "generate": "texts written for given users",
    "sample": "many responses of a policy to each prompt",
    "label": "let people, rules or models compare sampled responses",
    "judge": "whether users' policies write what they like",
    "data": "check preference pairs before training on them",
    "rewardbench": "RewardBench 2 scores of a checkpoint",
    "users": "list, export or delete the users of a checkpoint",
    "portfolio": "choose few policies that serve everybody, with a certificate",
    "leaderboard": "compare methods and baselines on one split, with intervals and verdicts",
    "dashboard": "make a saved Weights & Biases workspace for a project of runs",
    "methods": "list the installed methods",
}
_BUG = (
    "error: unless the message above says otherwise, as out of memory does, this is a bug in plm or in the method's "
    "code; report it with all that stands above, the recipe and `plm --version`"
)
_TRAINING = ("fit", "validate", "test", "predict")


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
    """Import what the command needs and run it."""
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(f"plm {plm.__version__}")
    elif verb == "methods" and args[1:] in (["-h"], ["--help"]):
        print(f"usage: plm methods\n\n{_VERBS['methods']}")
    elif verb == "methods" and len(args) > 1:
        raise SystemExit(_usage_error(f"plm methods takes no arguments, got {args[1:]!r}"))
    elif verb == "methods":
        print(_methods())
    elif verb in ("adapt", "score", "users"):
        from plm.cli import commands

        commands.run(verb, args[1:])
    elif verb == "export":
        from plm.cli import export

        export.run(args[1:])
    elif verb == "query":
        from plm.cli import query

        query.run(args[1:])
    elif verb == "generate":
        from plm.cli import generate

        generate.run(args[1:])
    elif verb == "sample":
        from plm.cli import sample

        sample.run(args[1:])
    elif verb == "label":
        from plm.cli import label

        label.run(args[1:])
    elif verb == "judge":
        from plm.cli import judge

        judge.run(args[1:])
    elif verb == "portfolio":
        from plm.cli import portfolio

        portfolio.run(args[1:])
    elif verb == "leaderboard":
        from plm.cli import leaderboard

        leaderboard.run(args[1:])
    elif verb == "dashboard":
        from plm.cli import dashboard

        dashboard.run(args[1:])
    elif verb == "rewardbench":
        from plm.cli import rewardbench

        rewardbench.run(args[1:])
    elif verb == "data":
        from plm.cli import data_check

        return data_check.run(args[1:])
    elif verb in _TRAINING or verb in ("-c", "--config") or verb.startswith("--config="):
        from plm.cli import training

        training.run(args)
    else:
        kind = "option" if verb.startswith("-") else "command"
        valid = ["--help", "--version", "--config"] if kind == "option" else list(_VERBS)
        raise SystemExit(_usage_error(f"no {kind} {verb!r}{nearest(verb, valid)} (plm --help lists all)"))
    return 0


def _one_line(message: Warning | str, *where: object, **also: object) -> str:
    """A warning without the source line that raised it."""
    return f"warning: {message}\n"


def _usage_error(message: str) -> int:
    """Show a wrong command line; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def _help() -> str:
    """The text of ``plm --help``."""
    verbs = "\n".join(f"  {verb:<11} {text}" for verb, text in _VERBS.items())
    return f"""usage: plm COMMAND [options]

{plm.__doc__.splitlines()[0] if plm.__doc__ else ""}

commands:
{verbs}

options:
  --help     show this text; `plm COMMAND --help` for one command
  --version  show the version

example:
  plm fit --config recipes/quickstart.yaml"""


def _methods() -> str:
    """The text of ``plm methods``: every entry point of the group plm.methods, read without being imported."""
    lines = []
    for entry in sorted(entry_points(group="plm.methods"), key=lambda entry: entry.name):
        about, paper = _describe(entry)
        lines.append(f"{entry.name}  ({entry.value.replace(':', '.')})")
        lines += [f"    {text}" for text in (about, paper) if text]
    return "\n".join(lines) or "no methods are installed; install plm itself with `pip install .`"


def _describe(entry: EntryPoint) -> tuple[str, str]:
    """First docstring line of the class and the ``Paper:`` line of its module, read from the source text."""
    package, *rest = entry.module.split(".")
    spec = find_spec(package)  # a top-level name is found without importing anything
    if spec is None:
        return "cannot be imported: its package is missing", ""
    if rest:
        bases = [Path(folder, *rest) for folder in spec.submodule_search_locations or []]
        files = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py")]
    else:
        files = [Path(spec.origin or "")]
    source = next((file for file in files if file.is_file()), None)
    if source is None:
        return "", ""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    about = ast.get_docstring(classes[entry.attr]) if entry.attr in classes else ""
    header = (ast.get_docstring(tree) or "").splitlines()
    paper = next((line.strip() for line in header if line.strip().startswith("Paper:")), "")
    return (about or "").partition("\n")[0], paper
