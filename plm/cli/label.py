"""``plm label``: what people would say of sampled responses, as pairs or as scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from plm.atomic import write_text
from plm.cli.options import OptionParser
from plm.data.schema import PairTable
from plm.data.sources.sampled import SampledPairs
from plm.data.values import ROW_SPLITS
from plm.judging.tastes import REWARDS, build, read_tastes


def run(args: list[str]) -> None:
    """Write pairs, or scores.

    Raises:
        ValueError: For whatever the user can mend.
    """
    parser = OptionParser(
        prog="plm label",
        description="Pairs of people who compare the responses that plm sample wrote, the same that a recipe over\n"
        "SampledPairs makes. Output rows: user_id, prompt, chosen, rejected, chosen_score, rejected_score, row_split.\n"
        "--scores writes the samples instead, each with scores: name of a reward -> one number per response.",
    )
    parser.add_argument("--samples", required=True, nargs="+", metavar="FILE", help="JSONL: prompt and responses")
    parser.add_argument("--rewards", metavar="YAML", help=REWARDS)
    parser.add_argument("--ckpt_path", metavar="FILE", help="instead: let users of this checkpoint compare")
    parser.add_argument("--user", nargs="+", metavar="ID", help="who of them; default: the population")
    parser.add_argument("--scores", action="store_true", help="write scores, not pairs")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file")
    options = parser.parse(args)
    if (options.rewards is None) == (options.ckpt_path is None):
        parser.error("give either --rewards or --ckpt_path")
    if options.user and not options.ckpt_path:
        parser.error("--user goes with --ckpt_path")
    if options.rewards is not None:
        source = read_tastes(options.rewards, options.samples)
    else:
        source = build({"rewards": of_users(options.ckpt_path, options.user)}, options.samples)
    if options.scores:
        rows = list(_scores(source))
    else:
        rows = list(_pairs(source.load()))
    write_text(options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} {'scored prompts' if options.scores else 'pairs'} written to {options.output}")


def of_users(ckpt_path: str, users: list[str] | None) -> dict[str, Any]:
    """Rewards of users of a checkpoint, as arguments; of the population where nobody is named."""
    method = "plm.learned_rewards.MethodReward"
    named: list[str | None] = [None] if users is None else [*users]
    return {
        user or "population": {"class_path": method, "init_args": {"ckpt_path": ckpt_path, "user": user}}
        for user in named
    }


def _pairs(table: PairTable) -> Iterator[dict[str, Any]]:
    """Rows of a pairs file."""
    responses = [table.responses[row] for row in table.items[:, 1]]
    for row in range(table.num_pairs):
        chosen_score, rejected_score = float(table.chosen_score[row]), float(table.rejected_score[row])
        yield {
            "user_id": table.user_ids[table.user[row]],
            "prompt": table.prompts[table.prompt[row]],
            "chosen": responses[table.chosen[row]],
            "rejected": responses[table.rejected[row]],
            "chosen_score": chosen_score,
            "rejected_score": rejected_score,
            "row_split": ROW_SPLITS[table.row_split[row]],
        }


def _scores(source: SampledPairs) -> Iterator[dict[str, Any]]:
    """Prompts with their distinct responses and what each reward gives them."""
    pool = source.pool
    for row, prompt in enumerate(pool.prompts):
        columns = [column for column, item in enumerate(pool.candidates[row].tolist()) if item >= 0]
        scores = pool.scores[row, columns]
        assert all(map(math.isfinite, scores.flat))
        yield {
            "prompt": prompt,
            "responses": [pool.responses[pool.candidates[row, column]] for column in columns],
            "scores": {name: scores[:, place].tolist() for place, name in enumerate(source.rewards)},
            "split": ROW_SPLITS[2] if pool.test[row] else ROW_SPLITS[0],
        }
