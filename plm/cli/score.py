"""``plm score``: rewards of responses for given users."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.atomic import write_text
from plm.checkpoint import load_method
from plm.cli.options import OptionParser
from plm.data.files import read_rows
from plm.data.values import short, to_id, to_prompt, to_response
from plm.functional import win_probability
from plm.messages import missing_key
from plm.method import PersonalizationMethod
from plm.types import UserState


class Row(NamedTuple):
    """A response to score."""

    prompt: str
    text: str
    user_id: str | None
    record: dict[str, Any]  # the row as it was read


def run(args: list[str]) -> None:
    """Run the command.

    Raises:
        ValueError: For whatever the user can mend.
    """
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
    row_of = {user_id: number for number, user_id in enumerate(dict.fromkeys(row.user_id for row in rows))}
    users, is_known = method.known_users.lookup(list(row_of))
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
        write_text(options.output, text)
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
    prompts = [row.prompt for row in reference]
    features, asked = (
        method.text_encoder(prompts, [row.text for row in reference]),
        method.text_encoder.prompts(prompts),
    )
    wins, whose = torch.zeros_like(rewards), whose.to(rewards.device)
    for user in range(users.num_users):
        others = method.score(features, users, rows=torch.full((len(reference),), user), prompt_features=asked)
        wins[whose == user] = win_probability(rewards[whose == user], others)
    return [float(value) for value in wins]


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
