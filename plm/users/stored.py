"""What is stored of users besides their states, read inside a transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from plm.users.database import ERASURES, PAIRS, USERS, rows_of


class StoredUser(NamedTuple):
    """What is known of a user besides the state."""

    user_id: str
    num_pairs: int
    """Pairs that the state was fitted on."""
    version: int
    """1 when the user was added, one more with every change."""
    created: float
    """When the user was added, in seconds since 1970."""
    updated: float
    """When the state was written."""
    keeps_pairs: bool
    """Whether these pairs are kept, too."""


class Snapshot(NamedTuple):
    """What is stored of one user besides the state, at one moment."""

    user: StoredUser | None
    """None if the user is unknown."""
    pairs: list[dict[str, Any]]
    """The pairs that were kept with the state, the oldest first."""
    num_erasures: int
    """How many erasures the log holds, see `UserStore.add`."""


KNOWN = (
    *(USERS.c[name] for name in StoredUser._fields[:-1]),
    sa.exists().where(PAIRS.c.user_id == USERS.c.user_id),
)
"""Columns of a `StoredUser`."""


def users_of(connection: sa.Connection, user_ids: Sequence[str]) -> dict[str, StoredUser]:
    """What is known of users besides their states; unknown ones are left out."""
    return {row.user_id: StoredUser(*row) for row in rows_of(connection, user_ids, *KNOWN)}


def pairs_of(connection: sa.Connection, user_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The pairs that were kept with the states of users, the oldest first; users without any are left out."""
    kept: dict[str, list[dict[str, Any]]] = {}
    order = (PAIRS.c.user_id, PAIRS.c.place)
    for user_id, pair in rows_of(connection, user_ids, PAIRS.c.user_id, PAIRS.c.pair, order=order):
        kept.setdefault(user_id, []).append(json.loads(pair))
    return kept


def num_erasures(connection: sa.Connection) -> int:
    """How many erasures the log holds."""
    return int(connection.execute(sa.select(sa.func.max(ERASURES.c.number))).scalar() or 0)
