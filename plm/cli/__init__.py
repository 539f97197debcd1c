"""The command ``plm``: the table of its verbs, and ``--help``.

Every verb is a function of this package that parses first and only then imports what does the work, so that help and a
wrong command line are answered without torch.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import plm
from plm.cli.options import stop
from plm.messages import WrongUsage, debug, in_command, nearest

VERBS: dict[str, tuple[str, str]] = {
    "fit": ("fit", "train a method on preference pairs, then test its best checkpoint"),
    "validate": ("fit", "evaluate a checkpoint on the validation rows"),
    "test": ("fit", "evaluate a checkpoint on seen and unseen users"),
    "predict": ("fit", "write the margins of a checkpoint on the test rows"),
    "adapt": ("adapt", "learn new users of a checkpoint from their pairs"),
    "score": ("score", "score responses for users"),
    "serve": ("serve", "serve rewards over HTTP that know their user"),
    "export": ("export", "write the model of a user for other software"),
    "query": ("query", "choose the pairs to ask a user about"),
    "generate": ("generate", "write texts for users"),
    "sample": ("generate.sample", "write many responses of a policy to each prompt"),
    "label": ("query.label", "let people, rules or models compare sampled responses"),
    "judge": ("judge", "check whether users' policies write what the users like"),
    "data": ("data", "check preference pairs before training on them, or convert files to pairs"),
    "audit": ("checks.audit", "write a verdict on pairs and on results that somebody has on them"),
    "verify": ("checks.verify", "rerun a paper's recipe and put the result beside the paper's number"),
    "compare": ("checks.compare", "compare runs, or files of what models got right, paired by user and item"),
    "rewardbench": ("score.rewardbench", "score a checkpoint on RewardBench 2"),
    "explain": ("score.explain", "show what users differ in, with the texts that tell, as a page"),
    "users": ("users", "list, export or delete the users of a checkpoint"),
    "portfolio": ("portfolio", "choose few policies that serve everybody, with a certificate"),
    "leaderboard": ("leaderboard", "compare methods and baselines on one split, with intervals and verdicts"),
    "dashboard": ("runs.dashboard", "make a saved Weights & Biases workspace for a project of runs"),
    "runs": ("runs", "list the finished runs of a folder"),
    "features": ("features", "encode the texts of a recipe into the cache, without a fit"),
    "cache": ("features.cache", "list or clear the features of texts that are kept"),
    "methods": ("fit", "list the installed methods"),
}
"""Verb -> its door, a module of this package (its ``run``) or a function of one, and its line in ``plm --help``."""
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
        with _short_warnings(), in_command():
            return _dispatch(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # whoever reads the output has enough of it, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is written at the end
        return 1
    except (ValueError, OSError) as error:
        if debug():
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, WrongUsage) else 1
    except Exception:
        traceback.print_exc()
        print(_BUG, file=sys.stderr)
        return 1


def _dispatch(args: list[str]) -> int:
    """Import the door of the verb and call it; a door of several verbs is given the verb too."""
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"plm {plm.__version__}")
        return 0
    if verb in ("-c", "--config") or verb.startswith("--config="):
        door = "fit"
    elif verb in VERBS:
        door = VERBS[verb][0]
    else:
        kind = "option" if verb.startswith("-") else "command"
        valid = ["--help", "--version", "--config"] if kind == "option" else list(VERBS)
        stop(f"no {kind} {verb!r}{nearest(verb, valid)} (plm --help lists all)")
    is_shared = sum(door == other for other, _ in VERBS.values()) > 1
    module, _, function = door.partition(".")
    carry_out = getattr(import_module(f"plm.cli.{module}"), function or "run")
    status: int | None = carry_out(args if is_shared else args[1:])
    return status or 0


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings without the source line that raised them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where, **details: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _help() -> str:
    """The text of ``plm --help``."""
    verbs = "\n".join(f"  {verb:<11} {text}" for verb, (_, text) in VERBS.items())
    return f"""usage: plm COMMAND [options]

{plm.__doc__.splitlines()[0] if plm.__doc__ else ""}

commands:
{verbs}

options:
  --help     show this text; `plm COMMAND --help` for one command
  --version  show the version

example:
  plm fit --config recipes/quickstart.yaml"""
