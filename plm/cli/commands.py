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

from plm.checkpoint import KnownUsers, load_method, read_checkpoint
from plm.cli.options import OptionParser
from plm.config import nearest
from plm.data.collate import FeaturedPairs, build_context
from plm.data.schema import read_pairs
from plm.data.values import short, to_id, to_prompt, to_response
from plm.functional import win_probability
from plm.method import CHECKPOINT_KEY, PersonalizationMethod
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
    assert method.encode is not None and isinstance(method.find_users, KnownUsers)
    features = method.encode(*(list(column) for column in zip(*table.texts(), strict=True)))
    store = method.find_users.store
    already = [user_id in store for user_id in table.user_ids]
    user_index = np.full(table.num_users, -1, dtype=np.int64)
    data = FeaturedPairs(table, features.cpu().numpy(), None, user_index)
    by_length = np.argsort(
        np.bincount(table.user, minlength=table.num_users), kind="stable"
    )  # little padding per group
    groups = [by_length[start : start + _ADAPT_USERS] for start in range(0, table.num_users, _ADAPT_USERS)]
    contexts = (build_context(data, np.arange(table.num_pairs), group) for group in groups)
    state = UserState.cat([method.adapt(_to(context, method.device)).to("cpu") for context in contexts])
    store.add([table.user_ids[row] for group in groups for row in group], state)
    store.save(store_path(options.ckpt_path))
    pairs = state.num_pairs.float()
    summary = Table("users", "new", "learned anew", "pairs per user (median, most)", "in the store")
    summary.add_row(
        str(table.num_users),
        str(already.count(False)),
        str(already.count(True)),
        f"{pairs.median():.0f}, {pairs.max():.0f}",
        str(len(store)),
    )
    console = Console()
    console.print(summary)
    console.print(f"written to {store_path(options.ckpt_path)}", soft_wrap=True, highlight=False)


def _to(context: Context, device: torch.device) -> Context:
    """The context on another device."""
    moved = {name: value.to(device) for name, value in context._asdict().items() if value is not None}
    return context._replace(**moved)


# ---------------------------------------------------------------------- score
def _score(args: list[str]) -> None:
    parser = OptionParser(
        prog="plm score",
        description='Rewards of responses. Input rows: {"response": ..., "prompt": ..., "user_id": ...}, '
        "the last two optional.\n"
        "Output rows: the input with reward and user_known; an unknown user gets the population reward.\n"
        "Rewards compare responses for one user; they do not compare users. --reference adds win_probability: how\n"
        "likely the user prefers the response to one of the reference responses, on one scale for all users.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by plm fit")
    parser.add_argument("--input", required=True, metavar="FILE", help="JSONL file of responses")
    parser.add_argument("--user", metavar="ID", help="user of the rows without a user_id")
    parser.add_argument(
        "--reference", metavar="FILE", help="JSONL file of responses to be compared with, a few hundred"
    )
    parser.add_argument("--output", metavar="FILE", help="JSONL file of rewards; default: standard output")
    options = parser.parse(args)
    rows = read_rows(Path(options.input), lambda record: _row(record, options.user), '{"response": ...}')
    method = load_method(options.ckpt_path)
    assert method.encode is not None and isinstance(method.find_users, KnownUsers)
    users, is_known = method.find_users.lookup([row.user_id for row in rows])
    features = method.encode([row.prompt for row in rows], [row.text for row in rows])
    rewards, known = method.score(features, users), is_known.tolist()
    scaled: list[dict[str, float]] = [{}] * len(rows)
    if options.reference:
        reference = read_rows(Path(options.reference), lambda record: _row(record, None), '{"response": ...}')
        scaled = [{"win_probability": value} for value in _win_probabilities(method, rows, users, rewards, reference)]
    lines = [
        json.dumps(
            {**row.record, "user_id": row.user_id, "reward": reward, "user_known": sure, **extra}, ensure_ascii=False
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


def _win_probabilities(
    method: PersonalizationMethod, rows: list[Row], users: UserState, rewards: Tensor, reference: list[Row]
) -> list[float]:
    """`win_probability` of every row against the reference responses, as its own user rewards them."""
    assert method.encode is not None
    features = method.encode([row.prompt for row in reference], [row.text for row in reference])
    groups: dict[str | None, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.user_id, []).append(index)
    wins = torch.zeros_like(rewards)
    for indices in groups.values():
        states = users.take(torch.full((len(reference),), indices[0], device=features.device))
        wins[indices] = win_probability(rewards[indices], method.score(features, states))
    return [float(value) for value in wins]


def read_rows(path: Path, parse: Callable[[Any], _Parsed], example: str) -> list[_Parsed]:
    """Rows of a JSONL file; all malformed ones are reported together as ``file:line``."""
    rows, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse(json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: malformed JSON: {error.msg}")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n".join([f"{len(problems)} malformed rows", *problems[:_SHOWN], *more]))
    if not rows:
        raise ValueError(f"expected rows like {example} in {path}, got an empty file")
    return rows


def _row(record: Any, default_user: str | None) -> Row:
    """Check one row."""
    if not isinstance(record, dict):
        raise ValueError(f'expected an object like {{"response": ...}}, got {short(record)}')
    if "response" not in record:
        raise ValueError(f"missing 'response'{nearest('response', record)}, got the keys {sorted(record)}")
    try:
        response = to_response(record["response"])
    except ValueError as error:
        raise ValueError(f"response: {error}, got {short(record['response'])}") from error
    prompt, user = record.get("prompt"), record.get("user_id")
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
