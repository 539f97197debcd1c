"""Learn new users of a fitted method from a table of their pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from plm.data.collate import FeaturedPairs, build_context
from plm.data.encoding import encode_pairs
from plm.data.schema import PairTable, make_pairs
from plm.method import PersonalizationMethod
from plm.method.policy import PolicyMethod
from plm.types import Context, UserState


def adapt_users(
    method: PersonalizationMethod, table: PairTable, users_at_once: int = 1024
) -> tuple[list[str], UserState]:
    """Learn the state of every user of a table from the user's pairs alone; the method stays as it is.

    Args:
        method: A method that was loaded with its language model, as `plm.load_method` does.
        table: Pairs. A user of whom no pair is short enough for the method is left out.
        users_at_once: Users whose padded pairs are in memory at once.

    Returns:
        User ids, those with the fewest pairs first, and their states in the same order, on the CPU.
    """
    data = _encoded(method, table)
    table = data.table
    num_pairs = np.bincount(table.user, minlength=table.num_users)
    by_length = np.argsort(num_pairs, kind="stable")  # little padding per group
    by_length = by_length[num_pairs[by_length] > 0]
    groups = [by_length[start : start + users_at_once] for start in range(0, len(by_length), users_at_once)]
    contexts = (build_context(data, np.arange(table.num_pairs), group) for group in groups)
    states = [method.adapt(_to(context, method.device)).to("cpu") for context in contexts]
    return [table.user_ids[row] for row in by_length], UserState.cat(states)


def adapt_user(method: PersonalizationMethod, user_id: str, pairs: Sequence[Mapping[str, Any]]) -> UserState:
    """Learn the state of one user from pairs as dicts of ``prompt``, ``chosen``, ``rejected``, ``tie`` and ``weight``.

    Raises:
        ValueError: If a pair is malformed, or none is short enough for the method.
    """
    return adapt_users(method, make_pairs([{**pair, "user_id": user_id} for pair in pairs], "pair"))[1]


def _encoded(method: PersonalizationMethod, table: PairTable) -> FeaturedPairs:
    """Pairs of new users with the features, or tokens, that the method reads."""
    if isinstance(method, PolicyMethod):
        return encode_pairs(table, method.causal_lm)
    encoder = method.text_encoder
    return encode_pairs(table, encoder.backbone, encoder, prompt_features=method.reads_prompts)


def _to(context: Context, device: torch.device) -> Context:
    """Move a context to another device."""
    moved: list[Any] = [None if value is None else value.to(device) for value in context]
    return Context(*moved)
