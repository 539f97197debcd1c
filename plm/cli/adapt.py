"""``plm adapt``: learn new users of a checkpoint from their pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from plm.checkpoint import load_method
from plm.cli.options import OptionParser
from plm.data.collate import FeaturedPairs, build_context
from plm.data.encoding import encode_pairs
from plm.data.schema import PairTable, read_pairs
from plm.evaluation import print_parts
from plm.method import PersonalizationMethod
from plm.method.policy import PolicyMethod
from plm.types import Context, UserState
from plm.users import store_path

_ADAPT_USERS = 1024  # users whose padded pairs are in memory at once


def run(args: list[str]) -> None:
    """Run the command.

    Raises:
        ValueError: For whatever the user can mend.
    """
    parser = OptionParser(
        prog="plm adapt",
        description="Learn users of a checkpoint from their pairs. The checkpoint stays as it is: the users go to the "
        "store beside it, <stem>.users/. A user who is already there is learned anew from the given pairs alone.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by plm fit")
    parser.add_argument("--pairs", required=True, nargs="+", metavar="FILE", help="pairs: JSONL(.gz), CSV or Parquet")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="column of the files that holds NAME, e.g. user_id=uid",
    )
    options = parser.parse(args)
    malformed = [item for item in options.columns if "=" not in item]
    if malformed:
        parser.error(f"--columns: expected NAME=COLUMN, got {malformed[0]!r}")
    method = load_method(options.ckpt_path)
    table = read_pairs(options.pairs, dict(item.split("=", 1) for item in options.columns))
    data = _encoded(method, table)
    table = data.table
    store = method.known_users.store
    num_pairs = np.bincount(table.user, minlength=table.num_users)
    by_length = np.argsort(num_pairs, kind="stable")  # little padding per group
    by_length = by_length[num_pairs[by_length] > 0]  # of whom no pair fits, nothing is learned
    already = [table.user_ids[row] in store for row in by_length]
    groups = [by_length[start : start + _ADAPT_USERS] for start in range(0, len(by_length), _ADAPT_USERS)]
    contexts = (build_context(data, np.arange(table.num_pairs), group) for group in groups)
    state = UserState.cat([method.adapt(_to(context, method.device)).to("cpu") for context in contexts])
    store.add([table.user_ids[row] for group in groups for row in group], state)
    store.save(store_path(options.ckpt_path))
    pairs = state.num_pairs.float()
    summary = Table("users", "new", "learned anew", "pairs per user (median, most)", "in the store")
    summary.add_row(
        str(len(by_length)),
        str(already.count(False)),
        str(already.count(True)),
        f"{pairs.median():.0f}, {pairs.max():.0f}",
        str(len(store)),
    )
    console = Console()
    print_parts(summary, console=console)
    console.print(f"written to {store_path(options.ckpt_path)}", soft_wrap=True, highlight=False)


def _encoded(method: PersonalizationMethod, table: PairTable) -> FeaturedPairs:
    """Pairs of new users with the features, or tokens, that the method reads."""
    if isinstance(method, PolicyMethod):
        return encode_pairs(table, method.causal_lm)
    encoder = method.text_encoder
    return encode_pairs(table, encoder.backbone, encoder, prompt_features=method.reads_prompts)


def _to(context: Context, device: torch.device) -> Context:
    """The context on another device."""
    moved: list[Any] = [None if value is None else value.to(device) for value in context]
    return Context(*moved)
