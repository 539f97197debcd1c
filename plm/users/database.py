"""The tables of users, and transactions on them: SQLite in a file, or PostgreSQL by URL.

SQLite is written ahead (WAL): readers see the last commit and never wait for a writer. A commit is on the disk when it
returns (``synchronous=FULL``), and what is deleted is overwritten (``secure_delete``). Writers take a lock file, which
the system gives back when a process is killed, so that only one connection at a time moves the log into the database:
versions of SQLite before 3.51.3 can damage a database where two do. A connection is opened for a transaction and closed
after it: nothing is carried over a fork, and while nobody is at work the database is one file that can be copied. A
process that works with it all the time keeps its connections (``held_open``).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import NullPool, Pool, QueuePool

from plm.atomic import replace

SCHEMA = 1
"""Version of the tables below; a store of a later version is refused, and a new version says how to bring an older one
up to it."""
MAX_ID = 512
"""Characters of a user id, at most."""
WAIT = 60.0
"""Seconds that a writer waits for the others."""
PATIENCE = 5.0
"""Seconds that a deletion waits for readers of the former state."""
KEPT = 8
"""Connections that stay open while a database is held open; more are opened where more threads work at once."""
_WRITERS = 5_127_460_091
"""Key of the lock that writers of a PostgreSQL database take for their transaction."""

_tables = sa.MetaData()
_INTEGER = sa.BigInteger().with_variant(sa.Integer, "sqlite")

FACTS = sa.Table(
    "plm_facts",
    _tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
"""``schema``, ``shared_hash``, ``secret`` (key of the receipts), ``layout`` of a state, ``imported``."""
USERS = sa.Table(
    "plm_users",
    _tables,
    sa.Column("number", _INTEGER, primary_key=True),
    sa.Column("user_id", sa.Text, nullable=False, unique=True),
    sa.Column("state", sa.LargeBinary, nullable=False),  # safetensors
    sa.Column("num_pairs", _INTEGER, nullable=False),
    sa.Column("version", _INTEGER, nullable=False),
    sa.Column("created", sa.Double, nullable=False),  # seconds since 1970
    sa.Column("updated", sa.Double, nullable=False),
)
PAIRS = sa.Table(
    "plm_pairs",
    _tables,
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("place", _INTEGER, primary_key=True),
    sa.Column("pair", sa.Text, nullable=False),  # JSON
)
ERASURES = sa.Table(
    "plm_erasures",
    _tables,
    sa.Column("number", _INTEGER, primary_key=True),
    sa.Column("receipt", sa.Text, nullable=False, index=True),
    sa.Column("erased", sa.Double, nullable=False),
    sqlite_autoincrement=True,
)


class StoreError(ValueError):
    """A database of users cannot be read or written at the moment."""


class Database:
    """Transactions on the tables of one store.

    Args:
        place: A file, which need not exist, or a URL ``postgresql+psycopg://...``.

    Raises:
        ValueError: If the URL is of another kind of database.
    """

    def __init__(self, place: str | Path) -> None:
        self.path = None if "://" in str(place) else Path(place)
        self.name = str(place)
        self._is_made = False
        self._opened: os.stat_result | None = None
        """The file that is held open."""
        if self.path is not None:
            self._use(self._engine(NullPool))
        else:
            url = sa.make_url(self.name)
            self.name = str(url)  # without the password
            if url.drivername != "postgresql+psycopg":
                raise ValueError(f"users: expected a file or a URL postgresql+psycopg://..., got {self.name!r}")
            try:
                self._use(sa.create_engine(url, pool_pre_ping=True))
            except ModuleNotFoundError as error:
                raise ValueError(f"users: {self.name!r} needs psycopg; pip install 'plm[postgres]'") from error

    def _use(self, engine: sa.Engine) -> None:
        """Take the connections of all transactions from an engine."""
        self._reader, self._writer = engine, engine.execution_options(plm_writes=True)
        if self.path is None:  # else each statement would see another state; a writer sees what was before its lock
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ")

    def _engine(self, pool: type[Pool], **options: Any) -> sa.Engine:
        """Transactions on the file, by connections that a pool keeps or closes."""
        engine = sa.create_engine("sqlite://", creator=self._connect, poolclass=pool, **options)
        sa.event.listen(engine, "begin", _begin)
        return engine

    def _connect(self) -> sqlite3.Connection:
        """Open the file; where its folder cannot be written, as a file that does not change."""
        path = self.path
        assert path is not None
        uri = f"file:{quote(str(path.absolute()))}?mode={'ro&immutable=1' if self._is_frozen() else 'rw'}"
        connection = sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA secure_delete=ON")
        return connection

    def _is_frozen(self) -> bool:
        """Whether nobody can write the file."""
        assert self.path is not None
        return not os.access(self.path.parent, os.W_OK) and not Path(f"{self.path}-wal").exists()

    def _check_opened(self, *_: Any) -> None:
        """Refuse another file, or none, in the place of the one that is held open.

        Raises:
            StoreError: If there is one: what is written would go into a file that nobody finds.
        """
        with suppress(FileNotFoundError):
            if self._opened is None or (self.path and os.path.samestat(self._opened, self.path.stat())):
                return
        raise StoreError(
            f"the user store {self.name!r} was removed or replaced while it is open; end what works with it, remove "
            "the files beside it whose names end in -wal and -shm, put the store there again, and start"
        )

    # ------------------------------------------------------------------ transactions
    @property
    def exists(self) -> bool:
        """Whether anything has been stored."""
        if self.path is not None:
            self._check_opened()
            return self.path.exists()
        if not self._is_made:
            with self._errors("read"):
                self._is_made = sa.inspect(self._reader).has_table(FACTS.name)
        return self._is_made

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of a database that exists."""
        with self._errors("read"), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self, shared_hash: str) -> Iterator[sa.Connection]:
        """The only writing transaction; the database is made for ``shared_hash`` where there is none.

        It is durable once the block has ended, and undone where the block raises.

        Raises:
            StoreError: If another writer does not end, or the database cannot be written.
        """
        with self._errors("written"), self._only_writer():
            if self.path is not None and not self.exists:
                self._make_file(self.path, shared_hash)
            with self._writer.begin() as connection:
                if self.path is None:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS)))
                    if not sa.inspect(connection).has_table(FACTS.name):
                        _make_tables(connection, shared_hash)
                yield connection

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Keep connections to SQLite open, for a process that works with it all the time.

        Opening one costs more than a read; and whoever closes the last moves the log into the database, which takes as
        long as a commit. Another file in the place of the one that is held open is refused.
        """
        if self.path is None or not self.path.exists() or self._is_frozen():
            yield
            return
        alone, opened = self._reader, self._opened
        kept = self._engine(QueuePool, pool_size=KEPT, max_overflow=-1)
        sa.event.listen(kept, "checkout", self._check_opened)
        self._opened = self.path.stat()
        self._use(kept)
        try:
            with self.reading() as connection:
                connection.execute(sa.select(FACTS))  # opens the log, too
            yield
        finally:
            self._use(alone)
            self._opened = opened
            with self._only_writer():
                kept.dispose()

    def wipe(self) -> bool:
        """Remove what has been deleted from the write-ahead log too; whether nothing is left of it.

        Of PostgreSQL that is the work of the server: ``VACUUM FULL``, and its own log.
        """
        if self.path is None or not self.path.exists():
            return self.path is not None
        with self._errors("written"), self._only_writer():
            connection = self._connect()
            try:  # a reader's snapshot keeps the log for as long as it is open
                connection.execute(f"PRAGMA busy_timeout={round(1000 * PATIENCE)}")
                is_busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                connection.close()
        return not is_busy

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Hold the lock file of a SQLite database."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=WAIT, poll_interval=0.002)
        except Timeout:
            raise StoreError(f"the user store {self.name!r} is written by another process; try again later") from None
        try:
            yield
        finally:
            lock.release()

    def _make_file(self, path: Path, shared_hash: str) -> None:
        """Make an empty database that appears whole; what a killed process left of another is replaced."""
        new = path.with_name(f"{path.name}.new")
        for left in (new, Path(f"{new}-wal"), Path(f"{new}-shm")):
            left.unlink(missing_ok=True)
        new.touch()
        copy = Database(new)
        connection = copy._connect()
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
        with copy._writer.begin() as tables:
            _make_tables(tables, shared_hash)
        for left in (Path(f"{path}-wal"), Path(f"{path}-shm")):  # of a database that is gone: its rows would rise again
            left.unlink(missing_ok=True)
        replace(new, path)

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        """Say of an error of the database what it is, without the values of the statement."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            reason = str(error.orig).strip().partition("\n")[0]
        except sqlite3.Error as error:
            reason = str(error)
        else:
            return
        raise StoreError(f"the user store {self.name!r} cannot be {verb}: {reason}")


def problem_of_id(user_id: str) -> str:
    """What keeps a text from being the id of a user, or an empty string."""
    if not 1 <= len(user_id) <= MAX_ID:
        return f"which is not 1 to {MAX_ID} characters long"
    if "\0" in user_id or (not user_id.isascii() and any("\ud800" <= mark <= "\udfff" for mark in user_id)):
        return "which holds a character that cannot be stored"
    return ""


def rows_of(
    connection: sa.Connection, user_ids: Iterable[str], *columns: sa.ColumnElement[Any], order: tuple[Any, ...] = ()
) -> Sequence[Any]:
    """The rows of many users, of whom none need be there; the first of the columns is that of their ids."""
    return connection.execute(_select(connection.dialect.name, columns, order), _ids(user_ids)).all()


def delete_rows_of(connection: sa.Connection, user_ids: Iterable[str], column: sa.Column[str]) -> None:
    """Delete the rows of many users, of whom none need be there, from the table whose column holds their ids."""
    connection.execute(_delete(connection.dialect.name, column), _ids(user_ids))


def _ids(user_ids: Iterable[str]) -> dict[str, list[str]]:
    """Those of the ids that can be stored: a database refuses the others."""
    return {"ids": [user_id for user_id in user_ids if not problem_of_id(user_id)]}


def receipt_of(secret: str, user_id: str) -> str:
    """HMAC-SHA256 of an id, whatever characters it holds."""
    return hmac.new(bytes.fromhex(secret), user_id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def erased_since(connection: sa.Connection, user_ids: Iterable[str], since: int) -> set[str]:
    """Users who were erased after the erasure of that number."""
    receipts = set(connection.execute(sa.select(ERASURES.c.receipt).where(ERASURES.c.number > since)).scalars())
    if not receipts:
        return set()
    secret = connection.execute(sa.select(FACTS.c.value).where(FACTS.c.name == "secret")).scalar_one()
    return {user_id for user_id in user_ids if receipt_of(secret, user_id) in receipts}


@cache  # to make a statement takes longer than to read a user
def _select(dialect: str, columns: tuple[Any, ...], order: tuple[Any, ...]) -> sa.Select[Any]:
    return sa.select(*columns).where(_among(dialect, columns[0])).order_by(*order)


@cache
def _delete(dialect: str, column: sa.Column[str]) -> sa.Delete:
    return sa.delete(column.table).where(_among(dialect, column))


def _among(dialect: str, column: sa.Column[str]) -> sa.ColumnElement[bool]:
    """The condition that a column is one of many ids, bound as one value."""
    if dialect == "postgresql":
        return column == sa.any_(sa.bindparam("ids", type_=postgresql.ARRAY(sa.Text)))
    each = sa.func.json_each(sa.bindparam("ids", type_=sa.JSON)).table_valued("value")
    return column.in_(sa.select(each.c.value))


@cache
def upsert(dialect: str, table: sa.Table, key: str, counts: str | None = None) -> sa.Insert:
    """A statement that inserts a row, or replaces the values of the row with the same ``key``.

    Args:
        dialect: The kind of database.
        table: The table.
        key: Its unique column.
        counts: A column that goes up by one instead.
    """
    insert: postgresql.Insert | sqlite.Insert
    insert = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    kept = {key, "number", "created", counts}
    changes: dict[str, Any] = {name: insert.excluded[name] for name in set(table.columns.keys()) - kept}
    if counts is not None:
        changes[counts] = table.c[counts] + 1
    return insert.on_conflict_do_update(index_elements=[key], set_=changes)


def _begin(connection: sa.Connection) -> None:
    """A writer takes its lock when it begins: one that has read before it writes could not wait for another."""
    writes = connection.get_execution_options().get("plm_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _make_tables(connection: sa.Connection, shared_hash: str) -> None:
    """Make the tables of an empty store."""
    _tables.create_all(connection)
    facts = {"schema": str(SCHEMA), "shared_hash": shared_hash, "secret": secrets.token_hex(32)}
    connection.execute(sa.insert(FACTS), [{"name": name, "value": value} for name, value in facts.items()])
