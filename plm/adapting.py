"""Learn new users of a fitted method from a table of their pairs."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plm.data.collate import FeaturedPairs, build_context
from plm.data.encoding import TextReader, encode_pairs
from plm.data.keys import digest, in_share
from plm.data.schema import PairTable, make_pairs
from plm.functional import user_chunks
from plm.method import PersonalizationMethod
from plm.method.policy import PolicyMethod
from plm.types import Context, Tokens, UserState

MAX_FLOATS = 2**22
"""Numbers of padded pairs and of states that are made at once (16 MiB)."""


def users_of_share(table: PairTable, share: tuple[int, int]) -> PairTable:
    """The pairs of the i-th of n equal shares of the users, ``share = (i, n)``, by a hash of their ids alone."""
    return table if share == (1, 1) else table.take(in_share(digest(table.user_ids), share)[table.user])


def adapt_users(method: PersonalizationMethod, table: PairTable) -> Iterator[tuple[list[str], UserState]]:
    """Learn the state of every user of a table from the user's pairs alone; the method stays as it is.

    They are learned in chunks, as `plm.functional.user_chunks` makes them: however many users there are, and however
    many pairs one of them has, what is in memory beside the table and the features of its texts is bounded.

    Args:
        method: A method that was loaded with its language model, as `plm.load_method` does.
        table: Pairs. A user of whom no pair is short enough for the method is left out.

    Yields:
        User ids and their states, on the CPU, of so many users that these are worth a transaction; users with the
        fewest pairs come first.
    """
    user_ids: list[str] = []
    states: list[UserState] = []
    for some_ids, some in _adapted(method, _encoded(method, table)):
        user_ids, states = [*user_ids, *some_ids], [*states, some]
        if sum(value.numel() for state in states for value in (*state.tensors.values(), state.num_pairs)) > MAX_FLOATS:
            yield user_ids, UserState.cat(states)
            user_ids, states = [], []
    if states:
        yield user_ids, UserState.cat(states)


def _adapted(method: PersonalizationMethod, data: FeaturedPairs) -> Iterator[tuple[list[str], UserState]]:
    """User ids and states chunk by chunk."""
    count = np.bincount(data.table.user, minlength=data.table.num_users)
    rows, user = np.flatnonzero(count), (np.cumsum(count > 0) - 1)[data.table.user]
    prior = method.population_state(1).tensors
    own = sum(value.numel() for value in prior.values())
    width = 2 * data.items.width + (0 if data.prompts is None else data.prompts.width)
    for chunk in user_chunks(torch.from_numpy(user), len(rows), width, own, MAX_FLOATS):
        users = rows[chunk.users.numpy()]
        context = build_context(data, chunk.rows.numpy(), users)
        states = method.adapt(_to(context, method.device)).to("cpu")
        yield [data.table.user_ids[row] for row in users.tolist()], states


def adapt_user(method: PersonalizationMethod, user_id: str, pairs: Sequence[Mapping[str, Any]]) -> UserState:
    """Learn the state of one user from pairs as dicts of ``prompt``, ``chosen``, ``rejected``, ``tie`` and ``weight``.

    Raises:
        ValueError: If a pair is malformed, or none is short enough for the method.
    """
    ((_, state),) = _adapted(method, _encoded(method, _pairs_of(user_id, pairs), is_remembered=True))
    return state


class RecentFeatures:
    """Reads features as an encoder does and remembers the last ones, as users are learned from the same texts again.

    One thread at a time. Texts are not kept: features are found by a hash of prompt and response.

    Args:
        encoder: What reads the others; tokens are not remembered.
        most: Texts whose features are kept.
    """

    def __init__(self, encoder: TextReader, most: int = 8192) -> None:
        self.encoder, self.most = encoder, most
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> Tensor | Tokens:
        """Features ``(B, D)`` of B responses to B prompts."""
        keys = [_digest(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        found = self._read(
            keys, lambda rows: self.encoder([prompts[row] for row in rows], [texts[row] for row in rows])
        )
        assert found is not None
        return found

    def prompts(self, prompts: Sequence[str]) -> Tensor | Tokens | None:
        """Features ``(B, F)`` of B prompts alone."""
        keys = [_digest(prompt) for prompt in prompts]
        return self._read(keys, lambda rows: self.encoder.prompts([prompts[row] for row in rows]))

    def _read(
        self, keys: Sequence[bytes], encode: Callable[[Sequence[int]], Tensor | Tokens | None]
    ) -> Tensor | Tokens | None:
        unread = [row for row, key in enumerate(keys) if key not in self._rows]
        if unread or not keys:
            features = encode(unread)
            if not keys or not isinstance(features, Tensor):
                return features
            self._rows.update((keys[row], one.clone()) for row, one in zip(unread, features, strict=True))
        read = torch.stack([self._rows[key] for key in keys])
        for key in keys:
            self._rows.move_to_end(key)
        while len(self._rows) > self.most:
            self._rows.popitem(last=False)
        return read


def _digest(*texts: str) -> bytes:
    return hashlib.sha256(json.dumps(texts).encode()).digest()


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
    data = _encoded(method, _pairs_of("user", pairs), is_remembered=True)
    one = _to(build_context(data, np.arange(data.table.num_pairs), np.zeros(1, dtype=np.int64)), method.device)
    if isinstance(one.chosen, Tokens):
        raise ValueError(f"predicting answers needs a method that reads features, got {type(method).__name__}")
    num_pairs = one.mask.shape[1]
    judged = torch.arange(max(0, num_pairs - num_last), num_pairs, device=method.device)
    before = torch.arange(num_pairs, device=method.device) < judged[:, None]  # (R, S)

    def fitted(mask: Tensor) -> UserState:
        return method.adapt(
            Context(*[_map(v, lambda v: v * mask.reshape(*mask.shape, *[1] * (v.dim() - 2))) for v in one])
        )

    def of_judged(values: Tensor) -> Tensor:
        return values[0, judged]

    at_once = max(1, MAX_FLOATS // max(1, one.chosen.numel()))
    states = UserState.cat([fitted(mask) for mask in torch.split(before, at_once)])
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


def _pairs_of(user_id: str, pairs: Sequence[Mapping[str, Any]]) -> PairTable:
    """Check pairs of one user."""
    return make_pairs([{**pair, "user_id": user_id} for pair in pairs], "pair")


def _encoded(method: PersonalizationMethod, table: PairTable, is_remembered: bool = False) -> FeaturedPairs:
    """Pairs of new users with the features, or tokens, that the method reads, or has read lately."""
    if isinstance(method, PolicyMethod):
        return encode_pairs(table, method.causal_lm)
    encoder = method.text_encoder
    reader = encoder.recent if is_remembered else encoder
    return encode_pairs(table, encoder.backbone, reader, prompt_features=method.reads_prompts)


def _to(context: Context, device: torch.device) -> Context:
    """Move a context to another device."""
    moved: list[Any] = [None if value is None else value.to(device) for value in context]
    return Context(*moved)
