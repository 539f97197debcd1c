"""Rows that people's comparisons of sampled responses are written as: pairs, or the scores behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from plm.data.schema import PairTable
from plm.data.sources.sampled import SampledPairs
from plm.data.values import ROW_SPLITS, from_prompt


def users_as_rewards(ckpt_path: str, users: Sequence[str] | None) -> dict[str, Any]:
    """Make the argument ``rewards`` of `SampledPairs` from users of a checkpoint; None = its population."""
    names: list[str | None] = [None] if users is None else [*users]
    return {
        user or "population": {
            "class_path": "plm.learned_rewards.MethodReward",
            "init_args": {"ckpt_path": ckpt_path, "user": user},
        }
        for user in names
    }


def pair_rows(table: PairTable) -> Iterator[dict[str, Any]]:
    """Rows of a file of pairs."""
    responses = [table.responses[row] for row in table.items[:, 1]]
    for row in range(table.num_pairs):
        yield {
            "user_id": table.user_ids[table.user[row]],
            "prompt": from_prompt(table.prompts[table.prompt[row]]),
            "chosen": responses[table.chosen[row]],
            "rejected": responses[table.rejected[row]],
            "chosen_score": float(table.chosen_score[row]),
            "rejected_score": float(table.rejected_score[row]),
            "row_split": ROW_SPLITS[table.row_split[row]],
        }


def score_rows(source: SampledPairs) -> Iterator[dict[str, Any]]:
    """Rows of a file of samples, each prompt with its distinct responses and the scores that each reward gives them."""
    pool = source.pool
    for row, prompt in enumerate(pool.prompts):
        columns = [column for column, item in enumerate(pool.candidates[row].tolist()) if item >= 0]
        scores = pool.scores[row, columns]
        assert all(map(math.isfinite, scores.flat))
        yield {
            "prompt": from_prompt(prompt),
            "responses": [pool.responses[pool.candidates[row, column]] for column in columns],
            "scores": {name: scores[:, place].tolist() for place, name in enumerate(source.rewards)},
            "split": ROW_SPLITS[2] if pool.test[row] else ROW_SPLITS[0],
        }
