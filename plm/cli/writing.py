"""What the commands that write share: the policy that the options name, a progress bar, and rows as JSONL."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plm.atomic import json_line, whole_file
from plm.backbones import CausalLM, Policy, RemotePolicy, device
from plm.messages import counted


def policy_of(options: argparse.Namespace) -> Policy | RemotePolicy:
    """Load the model that writes, on the GPU where there is one, or find the server where it is.

    Raises:
        ValueError: If it cannot be read or found, or lacks a chat template that is asked for.
    """
    if options.policy_url is not None:
        concurrency = {} if options.concurrency is None else {"concurrency": options.concurrency}
        return RemotePolicy(options.policy_url, options.policy, options.template, **concurrency)
    backbone = CausalLM(
        options.policy,
        template=options.template,
        dtype=options.dtype or "float32",
        max_prompt_length=options.max_prompt_length,
    )
    backbone.prepare([])  # what is wrong with the template shows before the weights are read
    return Policy(backbone).to(device())


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; call the function that is yielded with the number of texts finished."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def with_results(record: dict[str, Any], user_id: str | None, **results: Any) -> dict[str, Any]:
    """A row as it was read, with its user and what a command found out.

    Raises:
        ValueError: If the row has a key of a result already.
    """
    taken = [name for name in results if name in record]
    if taken:
        raise ValueError(f"expected rows without {taken[0]!r}, which this command writes; rename it in the input")
    return {**record, "user_id": user_id, **results}


def write_rows(rows: Iterable[dict[str, Any]], output: str | None, noun: str = "row") -> None:
    """Write rows as JSONL to a file, which is then named on standard error; to standard output where none is given."""
    if output:
        num_rows = 0
        with whole_file(output, "w") as file:
            for num_rows, row in enumerate(rows, start=1):  # noqa: B007 - never all at once
                file.write(json_line(row))
        print(f"{counted(num_rows, noun)} written to {output}", file=sys.stderr)
    else:
        sys.stdout.write("".join(map(json_line, rows)))
