"""``plm query``: which pairs of a pool to ask a user about."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from plm.atomic import write_text
from plm.checkpoint import load_method
from plm.cli.options import OptionParser
from plm.data.files import read_rows
from plm.data.values import short, to_prompt, to_response
from plm.messages import missing_key
from plm.querying import choose_pairs, posterior_samples, sampled_chances

_NOTHING = 1e-6  # nats
_EXAMPLE = '{"prompt": ..., "responses": [..., ...]}'


class Candidate(NamedTuple):
    """A pair nobody has judged yet."""

    prompt: str
    left: str
    right: str
    record: dict[str, Any]  # the row as it was read


def run(args: list[str]) -> None:
    """Choose pairs and write them as JSONL, the first to ask first.

    Raises:
        ValueError: For whatever the user can mend.
    """
    parser = OptionParser(
        prog="plm query",
        description=f"Which pairs to ask a user about. Pool rows: {_EXAMPLE}, or a file of pairs, whose\n"
        "chosen and rejected stand for the two responses. Output rows: the pool's with user_id, information (nats the\n"
        "answer tells about the user beyond the answers before it) and chance (that the user prefers the first).\n"
        "Add the answers to the user's pairs and run plm adapt. An unknown user is asked as one nothing is known of.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by plm fit")
    parser.add_argument("--user", required=True, metavar="ID", help="whom to ask")
    parser.add_argument("--pool", required=True, metavar="FILE", help="pairs to choose from: JSONL, CSV or Parquet")
    parser.add_argument("--num", type=int, default=5, metavar="N", help="how many pairs (default 5)")
    parser.add_argument("--samples", type=int, default=256, metavar="M", help="posterior samples (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--output", metavar="FILE", help="JSONL file; default: standard output")
    options = parser.parse(args)
    for name, least in (("num", 1), ("samples", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected an integer >= {least}, got {getattr(options, name)}")
    rows = read_rows(Path(options.pool), _candidate, _EXAMPLE)
    distinct: dict[tuple[str, frozenset[str]], Candidate] = {}
    for row in rows:
        distinct.setdefault((row.prompt, frozenset((row.left, row.right))), row)
    pool = list(distinct.values())
    method = load_method(options.ckpt_path)
    state, known = method.known_users.lookup([options.user])
    samples = posterior_samples(state, options.samples, options.seed)
    prompts = [pair.prompt for pair in pool]
    features = method.text_encoder(prompts * 2, [pair.left for pair in pool] + [pair.right for pair in pool])
    if not isinstance(features, Tensor):
        raise ValueError(f"plm query needs a method that reads features, got {type(method).__name__}")
    left, right = features[: len(pool)], features[len(pool) :]
    chances = sampled_chances(method, left, right, samples, method.text_encoder.prompts(prompts))
    queries = choose_pairs(chances, options.num, options.seed)
    lines = [
        json.dumps(
            {
                **pool[query.row].record,
                "user_id": options.user,
                "information": query.information,
                "chance": query.chance,
            },
            ensure_ascii=False,
            default=str,  # dates and the like of a Parquet file
        )
        for query in queries
    ]
    text = "".join(f"{line}\n" for line in lines)
    if options.output:
        write_text(options.output, text)
    else:
        sys.stdout.write(text)
    if len(pool) < len(rows):
        print(f"{len(rows) - len(pool)} of {len(rows)} rows repeat a pair of the pool: asked once", file=sys.stderr)
    if queries[0].information < _NOTHING:
        print(
            f"no answer would tell anything about {options.user!r}: {type(method).__name__} is sure of the user, or "
            "treats all users alike",
            file=sys.stderr,
        )
    if not known.all():
        print(f"unknown user {options.user!r}: the pairs that tell most about a new user", file=sys.stderr)


def _candidate(record: dict[str, Any]) -> Candidate:
    """Check one row."""
    sides = record.get("responses", [record[name] for name in ("chosen", "rejected") if name in record] or None)
    if sides is None:
        raise ValueError(missing_key("responses", record))
    if not isinstance(sides, list) or len(sides) != 2:
        raise ValueError(f"responses: expected a list of two, got {short(sides)}")
    try:
        left, right = (to_response(side) for side in sides)
        if left.text == right.text:
            raise ValueError("expected two different texts")
    except ValueError as error:
        raise ValueError(f"responses: {error}, got {short(sides)}") from error
    prompt = record.get("prompt")
    try:
        return Candidate((left.history or "") if prompt is None else to_prompt(prompt), left.text, right.text, record)
    except ValueError as error:
        raise ValueError(f"prompt: {error}, got {short(prompt)}") from error
