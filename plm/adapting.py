"""Learn new users of a fitted method from a table of their pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plm.data.collate import FeaturedPairs, build_context
from plm.data.encoding import encode_pairs
from plm.data.schema import PairTable, make_pairs
from plm.method import PersonalizationMethod
from plm.method.policy import PolicyMethod
from plm.types import Context, Tokens, UserState


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


class Foretold(NamedTuple):
    """R answers of a user as they were predicted before they were learned, oldest first."""

    chances: Tensor
    """``(R,)`` probability of the response that was chosen, by the model of the user."""
    population_chances: Tensor
    """``(R,)`` the same by the model of the population."""
    is_tie: Tensor
    """``(R,)`` bool, True = the user had no preference."""


def foretold_chances(method: PersonalizationMethod, pairs: Sequence[Mapping[str, Any]], num_last: int) -> Foretold:
    """Probability of each answer of a user before it was learned, by the user's model and by the population's.

    Answer k is predicted by the state that is fitted to answers 1 to k - 1, the one that was served when it was given:
    no answer is judged by a model that has seen it, and the share of chances above one half is an honest estimate of
    accuracy (prequential, Dawid 1984).

    Args:
        method: A loaded method that reads features.
        pairs: The user's S pairs in the order of learning, as `adapt_user` takes them, each once.
        num_last: How many of them to predict, R = min(S, ``num_last``); the others are only learned.

    Raises:
        ValueError: If a pair is malformed, or the method reads tokens.
    """
    data = _encoded(method, make_pairs([{**pair, "user_id": "user"} for pair in pairs], "pair"))
    one = _to(build_context(data, np.arange(data.table.num_pairs), np.zeros(1, dtype=np.int64)), method.device)
    if isinstance(one.chosen, Tokens):
        raise ValueError(f"predicting answers needs a method that reads features, got {type(method).__name__}")
    num_pairs = one.mask.shape[1]
    judged = torch.arange(max(0, num_pairs - num_last), num_pairs, device=method.device)
    before = torch.arange(num_pairs, device=method.device) < judged[:, None]  # (R, S)

    def repeated(values: Tensor) -> Tensor:
        return values * before.reshape(*before.shape, *[1] * (values.dim() - 2))

    def of_judged(values: Tensor) -> Tensor:
        return values[0, judged]

    states = method.adapt(Context(*[_map(value, repeated) for value in one]))
    better, worse, prompts = (_map(value, of_judged) for value in (one.chosen, one.rejected, one.prompt))

    @torch.no_grad()
    def chances(users: UserState) -> Tensor:
        rewards = [method.score(side, users, prompt_features=prompts) for side in (better, worse)]
        return torch.sigmoid(rewards[0] - rewards[1])

    with torch.no_grad():
        usual = chances(method.population_state(len(judged)))
    is_tie = torch.zeros_like(judged, dtype=torch.bool) if one.tie is None else one.tie[0, judged]
    return Foretold(chances(states).cpu(), usual.cpu(), is_tie.cpu())


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a tensor, or every tensor of tokens; None stays None."""
    return value.map(change) if isinstance(value, Tokens) else None if value is None else change(value)


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
