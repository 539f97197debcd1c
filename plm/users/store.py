"""The store of user states: what is known about each user, kept beside a checkpoint instead of inside it.

A user is a row. Adding, exporting or deleting one never touches the shared weights or another row, every change is one
durable transaction, and nothing is kept in memory: what another process adds or deletes is seen at the next look-up.

Axes: U users, B looked-up users.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
import torch
from torch import Tensor

from plm.atomic import whole_file
from plm.messages import counted
from plm.types import UserState
from plm.users.database import (
    ERASURES,
    FACTS,
    PAIRS,
    SCHEMA,
    USERS,
    Database,
    delete_rows_of,
    erased_since,
    problem_of_id,
    receipt_of,
    rows_of,
    upsert,
)
from plm.users.folder import read_folder
from plm.users.rows import from_rows, header_of, to_rows
from plm.users.stored import KNOWN, Snapshot, StoredUser, num_erasures, pairs_of, users_of

_Read = TypeVar("_Read")
_NO_ROWS: Sequence[Any] = ()
_AT_ONCE = 10_000
"""Rows in memory while all users are read or written."""


def shared_hash(state_dict: Mapping[str, Tensor], user_tables: Iterable[str] = ()) -> str:
    """SHA-256 of a method's shared part: every tensor of its state dict but the tables with one row per seen user.

    Args:
        state_dict: Name -> tensor, as ``method.state_dict()`` or a checkpoint's ``"state_dict"``.
        user_tables: Names left out, ``method.user_tables``.

    Returns:
        64 hexadecimal digits; equal for equal names, dtypes, shapes and bits.
    """
    digest = hashlib.sha256()
    for name in sorted(set(state_dict) - set(user_tables)):
        value = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        flat = value.reshape(-1)
        flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)  # one expanded number
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def store_path(checkpoint: str | Path) -> Path:
    """Where the users of a checkpoint live: ``runs/best.ckpt`` -> ``runs/best.users.db``."""
    return Path(checkpoint).with_suffix(".users.db")


class Receipt(NamedTuple):
    """What the log of erasures says of one; the id does not stand in it."""

    receipt: str
    """HMAC-SHA256 of the id, under a key of the store, in hexadecimal digits."""
    erased: str
    """When, as an ISO date in UTC."""
    was_stored: bool
    """Whether there was a row to delete."""
    is_wiped: bool
    """Whether the bytes are gone from the files too; else the database removes them later."""


class UserStore:
    """Maps a user id to a row of named tensors, in a database.

    It may be used by threads and processes at once: each call is a transaction of its own. A reader sees the last
    commit and never fails while others write.

    Args:
        place: File of a SQLite database, which is made by the first change, or ``postgresql+psycopg://...``.
        shared_hash: Hash of the shared part that the states must belong to, see `shared_hash`; None = take what is
            there.

    Raises:
        ValueError: If the place is no store, is damaged or cannot be reached; by every method if the states there
            belong to other shared weights.
    """

    def __init__(self, place: str | Path, shared_hash: str | None = None) -> None:
        self._database = Database(place)
        self.shared_hash = shared_hash
        self.place = self._database.name
        if self._database.path is not None:
            self._import(self._database.path.with_suffix(""))
        self._read(lambda _: None, None)  # a store that cannot be read is reported now

    @classmethod
    def begin(cls, place: str | Path, shared_hash: str, user_ids: Sequence[str], state: UserState) -> UserStore:
        """Write the trained users of a new checkpoint; users of other weights at the same place are removed."""
        store = cls(place)
        with store._database.writing(shared_hash) as connection:
            if store._facts(connection)["shared_hash"] != shared_hash:
                for table in (USERS, PAIRS):
                    connection.execute(sa.delete(table))
                _set(connection, layout="", shared_hash=shared_hash)
            store.shared_hash = shared_hash
            store._write(connection, user_ids, state)
        return store

    # ------------------------------------------------------------------ reading
    @property
    def exists(self) -> bool:
        """Whether a user was ever stored."""
        return self._database.exists

    @property
    def ids(self) -> list[str]:
        """User ids in the order in which they were added."""
        return [user.user_id for user in self]

    def __iter__(self) -> Iterator[StoredUser]:
        """All users in the order in which they were added, read in parts."""
        last = -1
        while page := self.page(last):
            yield from page.values()
            last = max(page)

    def page(self, after: int = -1, count: int = _AT_ONCE) -> dict[int, StoredUser]:
        """Number -> user, of ``count`` users with a number above ``after``, in the order in which they were added."""
        query = sa.select(USERS.c.number, *KNOWN).where(USERS.c.number > after).order_by(USERS.c.number).limit(count)
        rows = self._read(lambda connection: connection.execute(query).all(), _NO_ROWS)
        return {row.number: StoredUser(*row[1:]) for row in rows}

    def __len__(self) -> int:
        """Number of users."""
        query = sa.select(sa.func.count()).select_from(USERS)
        return self._read(lambda connection: int(connection.execute(query).scalar_one()), 0)

    def held_open(self) -> AbstractContextManager[None]:
        """For a process that works with the store all the time: calls inside the block take less time."""
        return self._database.held_open()

    def __repr__(self) -> str:
        """How many, and where."""
        return f"{counted(len(self), 'user')} of {self.place}"

    def __contains__(self, user_id: object) -> bool:
        """Whether the user has a row."""
        return isinstance(user_id, str | int) and self.find(str(user_id)) is not None

    def find(self, user_id: str) -> StoredUser | None:
        """What is known of a user besides the state; None if the user is unknown."""
        return self.found([user_id]).get(user_id)

    def found(self, user_ids: Sequence[str]) -> dict[str, StoredUser]:
        """What is known of users besides their states; unknown ones are left out."""
        return self._read(lambda connection: users_of(connection, user_ids), {})

    def get(self, user_ids: Sequence[str | None]) -> tuple[UserState, Tensor]:
        """Look users up; only their rows are read.

        Args:
            user_ids: B ids, known or not, repeated or not; None is a user without an id, unknown.

        Returns:
            States with leading axis B, and ``(B,)`` bool, True = known; the rows of unknown users hold zeros. Where
            nobody is known there are no tensors.
        """
        distinct = list(dict.fromkeys(user_id for user_id in user_ids if user_id is not None))
        columns = USERS.c.user_id, USERS.c.state, USERS.c.num_pairs
        rows = self._read(lambda connection: rows_of(connection, distinct, *columns), _NO_ROWS)
        place = {user_id: row for row, (user_id, _, _) in enumerate(rows)}
        row_of = torch.tensor([place.get(user_id, -1) for user_id in user_ids], dtype=torch.long)
        known = row_of >= 0
        read = from_rows([state for _, state, _ in rows]) if rows else {}
        counts = torch.tensor([num_pairs for _, _, num_pairs in rows], dtype=torch.long)

        def gather(values: Tensor) -> Tensor:
            out = values.new_zeros((len(row_of), *values.shape[1:]))
            out[known] = values[row_of[known]]
            return out

        return UserState({name: gather(values) for name, values in read.items()}, gather(counts)), known

    def pairs(self, user_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """The pairs that were kept with the states of users, the oldest first; users without any are left out."""
        return self._read(lambda connection: pairs_of(connection, user_ids), {})

    @property
    def num_erasures(self) -> int:
        """How many erasures the log holds, see ``add``."""
        return self._read(num_erasures, 0)

    def snapshot(self, user_id: str) -> Snapshot:
        """What is stored of a user besides the state."""

        def look(connection: sa.Connection) -> Snapshot:
            user = users_of(connection, [user_id]).get(user_id)
            kept = pairs_of(connection, [user_id]) if user is not None and user.keeps_pairs else {}
            return Snapshot(user, kept.get(user_id, []), num_erasures(connection))

        return self._read(look, Snapshot(None, [], 0))

    def there_since(self, user_ids: Sequence[str], since: int) -> list[str]:
        """Those of the users who have a row and were not erased after erasure ``since``, though they may be back."""

        def there(connection: sa.Connection) -> list[str]:
            erased = erased_since(connection, user_ids, since)
            return [user_id for (user_id,) in rows_of(connection, user_ids, USERS.c.user_id) if user_id not in erased]

        return self._read(there, [])

    # ------------------------------------------------------------------ changes
    def add(
        self,
        user_ids: Sequence[str],
        state: UserState,
        *,
        pairs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        since: int | None = None,
        versions: Mapping[str, int] | None = None,
    ) -> list[str]:
        """Write one row per user: a known user's row is replaced, a new user's appended.

        Args:
            user_ids: U distinct ids.
            state: Their states, of the same method as those already stored.
            pairs: The pairs that states were fitted on, to keep: they replace those that were kept before, which
                without this argument are removed.
            since: `num_erasures` before the states were fitted: a user who was erased meanwhile stays erased.
            versions: Version of a user whose state the new one was made from, 0 = no row; the user is left out if
                somebody else has written meanwhile.

        Returns:
            The ids that were written.

        Raises:
            ValueError: If ids and states do not fit each other or the rows already there; then nothing is written.
        """
        if len(set(user_ids)) != len(user_ids) or len(user_ids) != state.num_users:
            raise ValueError(
                f"expected one state per distinct user id, got {len(user_ids)} ids ({len(set(user_ids))} distinct) "
                f"and {state.num_users} states"
            )
        for user_id in user_ids:
            if problem := problem_of_id(user_id):
                raise ValueError(f"expected the id of a user, got {user_id!r}, {problem}")
        with self._database.writing(self._expected_hash()) as connection:
            outdated = self._outdated(connection, user_ids, since, versions or {})
            rows = [row for row, user_id in enumerate(user_ids) if user_id not in outdated]
            written = [user_ids[row] for row in rows]
            self._write(connection, written, state.take(torch.tensor(rows, dtype=torch.long)), pairs or {})
        return written

    def delete(self, user_ids: Sequence[str]) -> list[Receipt]:
        """Remove users with all that is known of them, and note each in the log of erasures.

        An id without a row is noted too, so that a state that is being fitted at this moment is not stored; what a
        killed deletion left in the files is removed.

        Returns:
            A receipt for each id.
        """
        user_ids = list(dict.fromkeys(user_ids))
        now = time.time()
        stored: set[str] = set()
        receipts = dict.fromkeys(user_ids, "")
        if self.exists or self.shared_hash is not None:
            with self._database.writing(self._expected_hash()) as connection:
                secret = self._facts(connection)["secret"]
                stored = {user_id for (user_id,) in rows_of(connection, user_ids, USERS.c.user_id)}
                for table in (USERS, PAIRS):
                    delete_rows_of(connection, user_ids, table.c.user_id)
                receipts = {user_id: receipt_of(secret, user_id) for user_id in user_ids}
                log = [{"receipt": receipt, "erased": now} for receipt in receipts.values()]
                connection.execute(sa.insert(ERASURES), log)
        is_wiped = self._database.wipe()
        date = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        return [Receipt(receipts[user_id], date, user_id in stored, is_wiped) for user_id in user_ids]

    def export(self, path: str | Path, user_ids: Sequence[str] | None = None) -> None:
        """Write users as readable JSONL: one object per user with pair count, tensors and the pairs that were kept.

        Args:
            path: The file, which is replaced when all is written.
            user_ids: Whom; None = everybody.

        Raises:
            ValueError: If an id is not stored.
        """
        ids = self.ids if user_ids is None else list(dict.fromkeys(user_ids))
        with whole_file(path, "w") as file:
            for start in range(0, len(ids), _AT_ONCE):
                page = ids[start : start + _AT_ONCE]
                state, known = self.get(page)
                unknown = [user_id for user_id, is_known in zip(page, known.tolist(), strict=True) if not is_known]
                if unknown and user_ids is not None:
                    raise ValueError(f"expected ids of stored users, got unknown {unknown[:5]!r}")
                rows = {name: value.tolist() for name, value in state.tensors.items()}
                kept = self.pairs(page)
                for row, (user_id, num_pairs) in enumerate(zip(page, state.num_pairs.tolist(), strict=True)):
                    if user_id in unknown:  # deleted since the ids were read
                        continue
                    tensors = {name: values[row] for name, values in rows.items()}
                    record = {"user_id": user_id, "num_pairs": num_pairs, "state": tensors}
                    if user_id in kept:
                        record["pairs"] = kept[user_id]
                    file.write(json.dumps(record) + "\n")

    # ------------------------------------------------------------------ inside a transaction
    def _read(self, query: Callable[[sa.Connection], _Read], nothing: _Read) -> _Read:
        """What a query gives in one transaction, or ``nothing`` where nothing has been stored yet."""
        if not self.exists:
            return nothing
        with self._database.reading() as connection:
            self._facts(connection)
            return query(connection)

    def _facts(self, connection: sa.Connection) -> dict[str, str]:
        """The facts of the store, after a check that it is one and belongs to the weights."""
        facts: dict[str, str] = {name: value for name, value in connection.execute(sa.select(FACTS))}
        if int(facts["schema"]) > SCHEMA:
            raise ValueError(f"user store {self.place!r} has format {facts['schema']}, expected {SCHEMA}; update plm")
        if self.shared_hash not in (None, facts["shared_hash"]):
            raise ValueError(
                f"the user store {self.place!r} belongs to other shared weights than its checkpoint; adapt its users "
                "again, or remove it"
            )
        return facts

    def _expected_hash(self) -> str:
        """Hash of the weights that users belong to, for a store that does not exist yet."""
        if self.shared_hash is None:
            if not self.exists:
                raise ValueError(f"no users are stored in {self.place!r}; give the hash of the weights they belong to")
            with self._database.reading() as connection:
                return self._facts(connection)["shared_hash"]
        return self.shared_hash

    def _outdated(
        self, connection: sa.Connection, user_ids: Sequence[str], since: int | None, versions: Mapping[str, int]
    ) -> set[str]:
        """Users who were erased after erasure ``since``, or whose row has another version than the one given."""
        outdated = set() if since is None else erased_since(connection, user_ids, since)
        rows = rows_of(connection, versions, USERS.c.user_id, USERS.c.version)
        there: dict[str, int] = {user_id: version for user_id, version in rows}
        return outdated | {user_id for user_id, version in versions.items() if there.get(user_id, 0) != version}

    def _write(
        self,
        connection: sa.Connection,
        user_ids: Sequence[str],
        state: UserState,
        pairs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Write the rows of users and the pairs that are kept of them."""
        state, now = state.detach().to("cpu"), time.time()
        layout = header_of(state.tensors)[8:].decode().strip()
        here = self._facts(connection).get("layout")
        if here and here != layout:
            raise ValueError(f"expected user states with rows of {here}, got {layout}; they belong to another method")
        if here != layout:
            _set(connection, layout=layout)
        encoded = to_rows(state.tensors, len(user_ids))
        statement = upsert(connection.dialect.name, USERS, "user_id", counts="version")
        for start in range(0, len(user_ids), _AT_ONCE):
            page = user_ids[start : start + _AT_ONCE]
            rows = [
                {
                    "user_id": user_id,
                    "state": encoded[row],
                    "num_pairs": int(state.num_pairs[row]),
                    "version": 1,
                    "created": now,
                    "updated": now,
                }
                for row, user_id in enumerate(page, start)
            ]
            connection.execute(statement, rows)
            delete_rows_of(connection, page, PAIRS.c.user_id)
        kept = [
            {"user_id": user_id, "place": place, "pair": json.dumps(pair)}
            for user_id in user_ids
            for place, pair in enumerate((pairs or {}).get(user_id, ()))
        ]
        if kept:
            connection.execute(sa.insert(PAIRS), kept)

    def _import(self, folder: Path) -> None:
        """Take over the users of a folder that an earlier version of plm wrote, once, and remove it."""
        former = read_folder(folder)
        if former is None:
            return
        with self._database.writing(former.shared_hash) as connection:
            if "imported" not in self._facts(connection):
                self._write(connection, former.user_ids, former.state)
                _set(connection, imported=folder.name)
        shutil.rmtree(folder)


def _set(connection: sa.Connection, **facts: str) -> None:
    """Write facts of the store."""
    rows = [{"name": name, "value": value} for name, value in facts.items()]
    connection.execute(upsert(connection.dialect.name, FACTS, "name"), rows)
