"""``plm adapt``, ``plm score`` and ``plm users``: what is done with a checkpoint without training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.backbones import TooLong
from plm.checkpoint import KnownUsers, TextEncoder, load_method, read_checkpoint
from plm.cli.options import OptionParser
from plm.config import missing_key, nearest
from plm.data.collate import FeaturedPairs, build_context
from plm.data.encoding import fitting_pairs, with_features
from plm.data.files import position, read_records
from plm.data.rows import token_rows
from plm.data.schema import PairTable, read_pairs
from plm.data.values import short, to_id, to_prompt, to_response
from plm.evaluation import print_parts
from plm.functional import win_probability
from plm.method import CHECKPOINT_KEY, PersonalizationMethod
from plm.policy_method import PolicyMethod
from plm.types import Context, UserState
from plm.users import UserStore, store_path

_SHOWN = 20
_ADAPT_USERS = 1024  # users whose padded pairs are in memory at once
_Parsed = TypeVar("_Parsed")


class Row(NamedTuple):
    """A response to score."""

    prompt: str
    text: str
    user_id: str | None
    record: dict[str, Any]  # the row as it was read


def run(verb: str, args: list[str]) -> None:
    """Run a command.

    Raises:
        ValueError: For whatever the user can mend.
    """
    {"adapt": _adapt, "score": _score, "users": _users}[verb](args)


# ---------------------------------------------------------------------- adapt
def _adapt(args: list[str]) -> None:
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
    assert isinstance(method.find_users, KnownUsers)
    data = _encoded(method, table)
    table = data.table
    store = method.find_users.store
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
    """Pairs of unseen users with the features, or tokens, that the method reads."""
    user_index = np.full(table.num_users, -1, dtype=np.int64)
    if isinstance(method, PolicyMethod):
        table, tokens = token_rows(table, method.causal_lm, TooLong)
        return FeaturedPairs(table, tokens, None, user_index)
    encoder = method.encode
    assert isinstance(encoder, TextEncoder)

    def read(texts: list[tuple[str, str]]) -> Any:
        features = encoder(*map(list, zip(*texts, strict=True)))
        assert isinstance(features, Tensor)
        return features.cpu()

    def read_prompts(prompts: list[str]) -> Any:
        features = encoder.prompts(prompts)
        assert features is not None  # as the method reads them
        return features.cpu()

    table, _ = fitting_pairs(table, encoder.backbone)
    return with_features(table, user_index, read, read_prompts if method.reads_prompts else None)


def _to(context: Context, device: torch.device) -> Context:
    """The context on another device."""
    moved: list[Any] = [None if value is None else value.to(device) for value in context]
    return Context(*moved)


# ---------------------------------------------------------------------- score
def _score(args: list[str]) -> None:
    parser = OptionParser(
        prog="plm score",
        description='Rewards of responses. Input rows: {"response": ..., "prompt": ..., "user_id": ...}, '
        "the last two optional.\n"
        "Output rows: the input with reward and user_known; an unknown user gets the population reward.\n"
        "Rewards compare responses for one user; they do not compare users. Those of a portfolio are by the mix of\n"
        "the member that serves the user, as plm generate --best_of chooses, not by the user's own weights.\n"
        "--reference adds win_probability: how likely the user prefers the response to one of the reference\n"
        "responses, on one scale for all users.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by plm fit")
    parser.add_argument("--input", required=True, metavar="FILE", help="responses: JSONL(.gz), CSV or Parquet")
    parser.add_argument("--user", metavar="ID", help="user of the rows without a user_id")
    parser.add_argument(
        "--reference", metavar="FILE", help="responses to be compared with, a few hundred, in the same formats"
    )
    parser.add_argument("--output", metavar="FILE", help="JSONL file of rewards; default: standard output")
    options = parser.parse(args)
    rows = read_rows(Path(options.input), lambda record: _row(record, options.user), '{"response": ...}')
    method = load_method(options.ckpt_path)
    assert isinstance(method.find_users, KnownUsers)
    row_of = {user_id: number for number, user_id in enumerate(dict.fromkeys(row.user_id for row in rows))}
    users, is_known = method.find_users.lookup(list(row_of))
    whose = torch.tensor([row_of[row.user_id] for row in rows], dtype=torch.long)
    rewards = method.score([row.text for row in rows], users, rows=whose, prompts=[row.prompt for row in rows])
    _refuse_nan(rewards, rows, options.ckpt_path)
    known = is_known[whose.to(is_known.device)].tolist()
    scaled: list[dict[str, float]] = [{}] * len(rows)
    if options.reference:
        reference = read_rows(Path(options.reference), lambda record: _row(record, None), '{"response": ...}')
        scaled = [{"win_probability": value} for value in _win_probabilities(method, users, whose, rewards, reference)]
    lines = [
        json.dumps(
            {**row.record, "user_id": row.user_id, "reward": reward, "user_known": sure, **extra},
            ensure_ascii=False,
            default=str,  # dates and the like of a Parquet file
        )
        for row, reward, sure, extra in zip(rows, rewards.tolist(), known, scaled, strict=True)
    ]
    text = "".join(f"{line}\n" for line in lines)
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    strangers = len(known) - sum(known)
    if strangers:
        print(
            f"{strangers} of {len(rows)} rows have no known user: population rewards, user_known false", file=sys.stderr
        )


def _refuse_nan(rewards: Tensor, rows: list[Row], ckpt_path: str) -> None:
    """Rewards that are not finite say nothing, and JSON has no word for them."""
    bad = (~rewards.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        row = rows[bad[0]]
        raise ValueError(
            f"expected finite rewards from {ckpt_path!r}, got {float(rewards[bad[0]])} for {len(bad)} of {len(rows)} "
            f"rows, the first {short(row.text)} for user {row.user_id!r}; its training diverged (fit again with a "
            "lower model.lr), or the state of that user is damaged (plm adapt learns it anew)"
        )


def _win_probabilities(
    method: PersonalizationMethod, users: UserState, whose: Tensor, rewards: Tensor, reference: list[Row]
) -> list[float]:
    """`win_probability` of every reward ``(B,)`` of the users at rows ``whose`` against the reference responses."""
    assert method.encode is not None and method.encode_prompts is not None
    prompts = [row.prompt for row in reference]
    features, asked = method.encode(prompts, [row.text for row in reference]), method.encode_prompts(prompts)
    wins, whose = torch.zeros_like(rewards), whose.to(rewards.device)
    for user in range(users.num_users):
        others = method.score(features, users, rows=torch.full((len(reference),), user), prompt_features=asked)
        wins[whose == user] = win_probability(rewards[whose == user], others)
    return [float(value) for value in wins]


def read_rows(path: Path, parse: Callable[[dict[str, Any]], _Parsed], example: str) -> list[_Parsed]:
    """Rows of a JSONL(.gz), CSV(.gz) or Parquet file; all malformed ones are reported together as ``file:line``."""
    records = read_records(path)
    rows, problems = [], records.problems
    for line, record in zip(records.lines, records.rows, strict=True):
        try:
            rows.append(parse(record))
        except ValueError as error:
            problems.append((line, str(error)))
    if problems:
        shown = [f"{position(path, line)}: {text}" for line, text in sorted(problems)[:_SHOWN]]
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n".join([f"{len(problems)} malformed rows", *shown, *more]))
    if not rows:
        raise ValueError(f"expected rows like {example} in {path}, got an empty file")
    return rows


def _row(record: dict[str, Any], default_user: str | None) -> Row:
    """Check one row; an empty prompt or user, as CSV has them, is not given."""
    if "response" not in record:
        raise ValueError(missing_key("response", record))
    try:
        response = to_response(record["response"])
    except ValueError as error:
        raise ValueError(f"response: {error}, got {short(record['response'])}") from error
    prompt, user = (None if record.get(name) == "" else record.get(name) for name in ("prompt", "user_id"))
    try:
        user_id = default_user if user is None else to_id(user)
    except ValueError as error:
        raise ValueError(f"user_id: {error}, got {short(user)}") from error
    try:
        return Row((response.history or "") if prompt is None else to_prompt(prompt), response.text, user_id, record)
    except ValueError as error:
        raise ValueError(f"prompt: {error}, got {short(prompt)}") from error


# ---------------------------------------------------------------------- users
def _users(args: list[str]) -> None:
    parser = OptionParser(
        prog="plm users",
        description="list: id and number of pairs of every user, tab separated\n"
        "export: rows of some or all users as JSONL\n"
        "delete: remove users; from then on they are scored like unknown ones",
    )
    actions = ("list", "export", "delete")
    parser.add_argument("action", metavar="list|export|delete")
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint the users belong to")
    parser.add_argument("--user", nargs="+", metavar="ID", help="ids; default for export: all users")
    parser.add_argument("--output", metavar="FILE", help="JSONL file to export to")
    options = parser.parse(args)
    if options.action not in actions:
        parser.error(f"no action {options.action!r}{nearest(options.action, actions)}")
    path = store_path(options.ckpt_path)
    if not path.exists():
        raise ValueError(f"no users are stored beside {options.ckpt_path!r}: expected the folder {str(path)!r}")
    store = UserStore.load(path)
    if options.action == "list":
        num_pairs = store.get(store.ids)[0].num_pairs.tolist()
        sys.stdout.writelines(f"{user_id}\t{count}\n" for user_id, count in zip(store.ids, num_pairs, strict=True))
    elif options.action == "export":
        if not options.output:
            parser.error("export needs --output FILE")
        store.export(options.user or store.ids, options.output)
    else:
        if not options.user:
            parser.error("delete needs --user ID")
        store.delete(options.user)
        store.save(path)
        print(f"deleted {len(set(options.user))} users, {len(store)} are left in {path}", file=sys.stderr)
        trained = set(options.user) & set(read_checkpoint(options.ckpt_path)[CHECKPOINT_KEY]["user_ids"])
        if trained:
            print(
                f"{len(trained)} of them were trained on: the checkpoint still holds what training learned of "
                "them, until the method is fitted again without their pairs",
                file=sys.stderr,
            )
