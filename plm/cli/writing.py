"""What the commands that write texts share: options, policies and a progress bar."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plm.backbones import CausalLM, Policy, device
from plm.cli.options import OptionParser
from plm.generation import BATCH_TOKENS

PROMPTS = "JSONL, CSV or Parquet with a key prompt, lines of text, or a recipe (.yaml) whose prompts are taken"


def add_settings(parser: OptionParser) -> None:
    """Options of how texts are drawn."""
    group = parser.add_argument_group("how texts are drawn")
    group.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="cut a text here (default 64)")
    group.add_argument("--min_new_tokens", type=int, default=0, metavar="N", help="no text ends earlier (default 0)")
    group.add_argument("--temperature", type=float, default=1.0, help="0 = the likeliest token (default 1)")
    group.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    group.add_argument("--top_p", type=float, metavar="P", help="draw from the likeliest tokens of joint probability P")
    group.add_argument("--seed", type=int, default=0, help="a prompt gets the same texts again (default 0)")
    group.add_argument(
        "--batch_tokens",
        type=int,
        default=BATCH_TOKENS,
        metavar="N",
        help=f"most tokens written at once; changes memory and speed alone (default {BATCH_TOKENS})",
    )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of `plm.generation.sample`."""
    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_tokens")
    return {name: getattr(options, name) for name in names}


def add_policy(parser: OptionParser, required: bool) -> None:
    """Options of which model writes."""
    group = parser.add_argument_group("who writes")
    group.add_argument("--policy", required=required, metavar="MODEL", help="folder or hub id of a causal LM")
    group.add_argument(
        "--template", choices=("plain", "chat"), default="plain", help="chat: its chat template (default plain)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    group.add_argument(
        "--max_prompt_length", type=int, metavar="N", help="keep the last N tokens of a prompt (default: all)"
    )


def policy_of(options: argparse.Namespace) -> Policy:
    """The model that writes, on the GPU where there is one.

    Raises:
        ValueError: If it cannot be read, or lacks a chat template that is asked for.
    """
    backbone = CausalLM(
        options.policy,
        template=options.template,
        dtype=options.dtype,
        max_prompt_length=options.max_prompt_length,
    )
    backbone.tokenizer  # noqa: B018 - what is wrong with the template shows before the weights are read
    return Policy(backbone).to(device())


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; call what is yielded with the number of texts finished."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
