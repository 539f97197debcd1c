"""Learn users of a fitted method from a table of their pairs."""

from __future__ import annotations

import hashlib
import json
import warnings
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plm.arrays import BoolArray, IntArray
from plm.data.collate import EpochPlace, EvalBatches, FeaturedPairs, SupportDraws, build_context
from plm.data.columns import joined
from plm.data.encoding import TextReader, encode_pairs
from plm.data.keys import content_keys, digest, in_share
from plm.data.schema import PairTable, make_pairs, pair_table
from plm.data.splits import TEST, TRAIN, UNSEEN, GroupBy, nested_supports, split_pairs
from plm.functional import user_chunks
from plm.method import PersonalizationMethod
from plm.method.policy import PolicyMethod
from plm.metrics import FewShotMetric, FewShotTable
from plm.types import Tokens, UserState

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from plm.users import UserStore

MAX_FLOATS = 2**22
"""Numbers of padded pairs and of states that are made at once (16 MiB)."""


PREDICTED_USERS = 2_000
"""New users whose pairs are predicted, at most: enough for an interval of a point."""
PREDICTED_PAIRS = 32
"""Pairs of one of them that are predicted, at most."""
USERS_AT_ONCE = 10_000
"""Users who are looked up in the store at once."""


class Learned(NamedTuple):
    """U users whose states were stored in one transaction."""

    user_ids: list[str]
    num_pairs: IntArray
    """``(U,)`` pairs that the state was fitted on."""
    num_known: int
    """Those of them who were there before."""
    num_added: int
    """Those of these whose pairs are kept, so that the state was fitted to the former pairs and the new ones."""
    num_gone: int
    """Others, who were deleted while they were learned, and are not stored."""


def learn_users(
    method: PersonalizationMethod,
    table: PairTable,
    keep_pairs: bool = False,
    on_encoded: Callable[[FeaturedPairs], None] | None = None,
) -> Iterator[Learned]:
    """Learn every user of a table and store them; nobody else's row is touched.

    A user whose pairs are kept is fitted to these and the new ones, each once, and all of them are kept. Any other user
    is fitted to the new pairs alone, also one who was there before: of former pairs that were not kept nothing is left.
    Other processes may learn and delete users meanwhile; a user whom one of them has changed is learned again.

    Args:
        method: A method that was loaded by `plm.load_method`.
        table: Pairs.
        keep_pairs: Whether to keep the pairs of users of whom none are kept yet, so that later pairs can be added.
        on_encoded: Is given the pairs of users of whom none were kept, once, with what the method reads.
    """
    store, users = method.users, np.unique(table.user)
    since = store.num_erasures  # of the first round: what came before an erasure is not stored after it
    while len(users):
        changed: list[str] = []
        names = [table.user_ids[row] for row in users.tolist()]
        version, keeps = _former(store, names)
        part = table.take(np.isin(table.user, users))
        kept_names = [name for name, kept in zip(names, keeps.tolist(), strict=True) if kept]
        data = _encoded(method, _with_kept(store, part, kept_names))
        if on_encoded is not None:
            is_kept = np.isin(data.table.user_ids, kept_names)
            on_encoded(replace(data, table=data.table.take(~is_kept[data.table.user])))
            on_encoded = None
        new_rows = _rows_by_user(part)
        for user_ids, states in _batched(method, data):
            at = np.array([bisect_left(names, user_id) for user_id in user_ids])
            keeping = [
                user_id for user_id, kept in zip(user_ids, keeps[at].tolist(), strict=True) if kept or keep_pairs
            ]
            before = store.pairs(keeping)
            pairs = {
                name: distinct_pairs([*before.get(name, ()), *_as_dicts(part, new_rows(name))]) for name in keeping
            }
            versions = dict(zip(user_ids, version[at].tolist(), strict=True))
            written = set(store.add(user_ids, states, pairs=pairs, since=since, versions=versions))
            is_written = np.array([user_id in written for user_id in user_ids])
            again = store.there_since([user_id for user_id in user_ids if user_id not in written], since)
            changed += again
            yield Learned(
                [user_id for user_id in user_ids if user_id in written],
                states.num_pairs.numpy()[is_written],
                int((version[at][is_written] > 0).sum()),
                int(keeps[at][is_written].sum()),
                len(user_ids) - len(written) - len(again),
            )
        users = np.array([bisect_left(table.user_ids, name) for name in sorted(changed)], dtype=np.int64)


def _former(store: UserStore, user_ids: Sequence[str]) -> tuple[IntArray, BoolArray]:
    """Versions ``(U,)`` of users in the store, 0 = unknown, and ``(U,)`` whether all pairs of theirs are kept."""
    version, keeps = np.zeros(len(user_ids), dtype=np.int64), np.zeros(len(user_ids), dtype=np.bool_)
    for start in range(0, len(user_ids), USERS_AT_ONCE):
        page = user_ids[start : start + USERS_AT_ONCE]
        found = store.found(page)
        for row, user_id in enumerate(page if found else (), start):
            if user_id in found:
                one = found[user_id]
                version[row], keeps[row] = one.version, one.keeps_pairs or not one.num_pairs
    return version, keeps


def _with_kept(store: UserStore, table: PairTable, user_ids: Sequence[str]) -> PairTable:
    """A table and the pairs that are kept of some of its users, each pair once and as it stands in the table."""
    tables = [table]
    for start in range(0, len(user_ids), USERS_AT_ONCE):
        kept = store.pairs(user_ids[start : start + USERS_AT_ONCE])
        rows = [{**pair, "user_id": user_id} for user_id, pairs in kept.items() for pair in distinct_pairs(pairs)]
        tables += [make_pairs(rows, "kept pair")] if rows else []
    return table if len(tables) == 1 else _joined(tables)


def _joined(tables: Sequence[PairTable]) -> PairTable:
    """The pairs of tables, each once, as it stands in the first that holds it, as far as learning and errors ask."""

    def numbered(name: str) -> tuple[list[str], list[IntArray]]:
        """All distinct texts of a field, and for each table the numbers of its own."""
        numbers: dict[str, int] = {}
        rows = [[numbers.setdefault(text, len(numbers)) for text in getattr(table, name)] for table in tables]
        return list(numbers), [np.array(row, dtype=np.int64) for row in rows]

    def together(column: Callable[[int, PairTable], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([column(number, table) for number, table in enumerate(tables)])

    user_ids, users = numbered("user_ids")
    prompts, prompt_rows = numbered("prompts")
    responses, response_rows = numbered("responses")
    dialogues, dialogue_rows = numbered("dialogues")
    files, file_rows = numbered("files")
    columns = {
        "user": together(lambda number, table: users[number][table.user]),
        "prompt": together(lambda number, table: prompt_rows[number][table.prompt]),
        "chosen": together(lambda number, table: response_rows[number][table.items[table.chosen, 1]]),
        "rejected": together(lambda number, table: response_rows[number][table.items[table.rejected, 1]]),
        "tie": together(lambda _, table: table.tie),
    }
    first = np.sort(np.unique(joined([column.astype(np.int64) for column in columns.values()]), return_index=True)[1])
    columns["weight"] = together(lambda _, table: table.weight)
    columns["dialogue"] = together(lambda number, table: np.append(dialogue_rows[number], -1)[table.dialogue])
    if all(table.files for table in tables):
        files_of = together(lambda number, table: file_rows[number][table.where[:, 0]])
        columns["where"] = np.stack([files_of, together(lambda _, table: table.where[:, 1])], axis=1)
    kept: dict[str, Any] = {name: column[first] for name, column in columns.items()}
    files = files if "where" in kept else []
    return pair_table(user_ids, prompts, responses, dialogues=dialogues, files=files, **kept)


def _rows_by_user(table: PairTable) -> Callable[[str], IntArray]:
    """What finds the rows of a user, in their order."""
    order = np.argsort(table.user, kind="stable")
    ends = np.cumsum(np.bincount(table.user, minlength=table.num_users))

    def rows(user_id: str) -> IntArray:
        user = bisect_left(table.user_ids, user_id)
        return order[ends[user - 1] if user else 0 : ends[user]]

    return rows


def _as_dicts(table: PairTable, rows: IntArray) -> list[dict[str, Any]]:
    """Pairs of a table as they are kept in the store."""
    return [
        {
            "prompt": table.prompts[table.prompt[row]],
            "chosen": table.responses[table.items[table.chosen[row], 1]],
            "rejected": table.responses[table.items[table.rejected[row], 1]],
            "tie": bool(table.tie[row]),
            "weight": float(table.weight[row]),
        }
        for row in rows.tolist()
    ]


def distinct_pairs(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each pair once, where it first came and as it came last: what is sent again is no second answer."""
    last: dict[str, Mapping[str, Any]] = {}
    for pair in pairs:
        texts = [pair.get(name) for name in ("prompt", "chosen", "rejected")]
        last[json.dumps([*texts, pair.get("tie") or False], default=str)] = pair
    return list(last.values())


def users_of_share(table: PairTable, share: tuple[int, int]) -> PairTable:
    """The pairs of the i-th of n equal shares of the users, ``share = (i, n)``, by a hash of their ids alone."""
    return table if share == (1, 1) else table.take(in_share(digest(table.user_ids), share)[table.user])


def _batched(method: PersonalizationMethod, data: FeaturedPairs) -> Iterator[tuple[list[str], UserState]]:
    """User ids and states, on the CPU, of so many users that these are worth a transaction; the fewest pairs first.

    Each is learned from the user's pairs alone, in chunks, as `plm.functional.user_chunks` makes them: however many
    users there are, and however many pairs one of them has, what is in memory beside the features is bounded. A user of
    whom no pair is short enough for the method is left out.
    """
    user_ids: list[str] = []
    states: list[UserState] = []
    for some_ids, some in _adapted(method, data):
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
        states = method.adapt(context.map(lambda value: value.to(method.device))).to("cpu")
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
    one = build_context(data, np.arange(data.table.num_pairs), np.zeros(1, dtype=np.int64))
    one = one.map(lambda value: value.to(method.device))
    if isinstance(one.chosen, Tokens):
        raise ValueError(f"predicting answers needs a method that reads features, got {type(method).__name__}")
    num_pairs = one.mask.shape[1]
    judged = torch.arange(max(0, num_pairs - num_last), num_pairs, device=method.device)
    before = torch.arange(num_pairs, device=method.device) < judged[:, None]  # (R, S)

    def fitted(mask: Tensor) -> UserState:
        return method.adapt(one.map(lambda value: value * mask.reshape(*mask.shape, *[1] * (value.dim() - 2))))

    at_once = max(1, MAX_FLOATS // max(1, one.chosen.numel()))
    states = UserState.cat([fitted(mask) for mask in torch.split(before, at_once)])
    asked = one.map(lambda value: value[0, judged])

    @torch.no_grad()
    def chances(users: UserState) -> Tensor:
        rewards = [method.score(side, users, prompt_features=asked.prompt) for side in asked.features]
        return torch.sigmoid(rewards[0] - rewards[1])

    with torch.no_grad():
        usual = chances(method.population_state(len(judged)))
    is_tie = torch.zeros_like(judged, dtype=torch.bool) if asked.tie is None else asked.tie
    return Foretold(chances(states).cpu(), usual.cpu(), is_tie.cpu())


def predicted_new_users(
    method: PersonalizationMethod, data: FeaturedPairs, shots: Sequence[int], group_by: GroupBy = "auto"
) -> FewShotTable | None:
    """How well new users are predicted before any of their pairs is learned, and after some.

    About half of a user's pairs are predicted and the others may be learned, divided as those of the unseen users of a
    fit are: what makes a group is on one side. Nothing is stored.

    Args:
        method: A method that reads features.
        data: Pairs; those of users whom the method was trained on are left out.
        shots: Numbers of pairs to choose from: the largest that half of the users have to learn is taken, and users who
            have fewer are left out.
        group_by: What a group is; see `split_pairs`.

    Returns:
        No pairs and the chosen number of pairs, for at most `PREDICTED_USERS`; None if there are no such users, or,
        with a warning, if their pairs cannot be divided so.
    """
    table = _new_users(data.table, set(method.user_ids))
    try:
        stage, keys = split_pairs(table, group_by=group_by, test_rows=0.5).stage, content_keys(table).pair
    except ValueError as error:  # the users are learned all the same
        warnings.warn(f"new users are not predicted before they are learned: {error}", stacklevel=2)
        return None
    pool, query = np.flatnonzero(stage == TRAIN), np.flatnonzero(stage == TEST)
    num_pool, num_query = (np.bincount(table.user[side], minlength=table.num_users) for side in (pool, query))
    possible = [count for count in shots if 0 < count <= np.median(num_pool[num_query > 0])] if len(query) else []
    if not possible:
        return None
    users = np.flatnonzero((num_pool >= max(possible)) & (num_query > 0))
    query = query[np.isin(table.user[query], users)]
    query = nested_supports(query, table.user[query], keys[query], PREDICTED_PAIRS)
    support = SupportDraws(pool, keys[pool], [(0, 0), (max(possible), 0)], 0)
    pairs = replace(data, table=table, user_index=np.full(table.num_users, -1))
    weight = np.ones(len(query), dtype=np.float32)
    metric = FewShotMetric(users.tolist(), [0, max(possible)], 1)
    for batch in EvalBatches(pairs, query, weight, users, support, True, lambda: EpochPlace(0, 1, 0)):
        with torch.no_grad():
            margin = method.evaluate(move_data_to_device(batch, method.device))["margin"].cpu()
        assert batch.user_row is not None and batch.num_shots is not None and batch.repeat is not None
        metric.update(margin, batch.user_row, batch.num_shots, batch.repeat, batch.tie)
    return metric.table()


def _new_users(table: PairTable, trained: Collection[str]) -> PairTable:
    """Pairs of at most `PREDICTED_USERS` users who are not among the trained ones, chosen by a hash, all as unseen."""
    new = [row for row in np.unique(table.user).tolist() if table.user_ids[row] not in trained]
    order = np.argsort(digest([table.user_ids[row] for row in new]), kind="stable")[:PREDICTED_USERS]
    rows = np.flatnonzero(np.isin(table.user, np.array(new, dtype=np.int64)[order]))
    users, user = np.unique(table.user[rows], return_inverse=True)
    return replace(
        table.take(rows),
        user_ids=[table.user_ids[row] for row in users.tolist()],
        user=user,
        user_split=np.full(len(rows), UNSEEN),
        row_split=np.full(len(rows), -1),
    )


def _pairs_of(user_id: str, pairs: Sequence[Mapping[str, Any]]) -> PairTable:
    """Check pairs of one user."""
    return make_pairs([{**pair, "user_id": user_id} for pair in pairs], "pair")


def _encoded(method: PersonalizationMethod, table: PairTable, is_remembered: bool = False) -> FeaturedPairs:
    """Pairs of new users with the features, or tokens, that the method reads, or has read lately."""
    if isinstance(method, PolicyMethod):
        return encode_pairs(table, method.causal_lm)
    encoder = method.text_encoder
    if method.view == "tokens" and not method.has_features:
        return encode_pairs(table, encoder.backbone)
    reader = encoder.recent if is_remembered else encoder
    return encode_pairs(table, encoder.backbone, reader, prompt_features=method.reads_prompts)
