"""Many connections at one server, and two servers whose users are in one PostgreSQL."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from plm.serving.server import _allow_many_connections
from plm.users import UserStore
from tests.marks import slow_but
from tests.serving.test_hostile import in_threads, pair, server_of

NUM_IDLE, NUM_HALF = 1000, 200
HALVES = (
    b"POST /classify HTTP/1.1\r\nhost: localhost\r\nx-",
    b"POST /classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
    b'{"input": "',
)
"""The half of a head, and a head with the half of a body."""


def resident(client: httpx.Client) -> int:
    """Bytes of memory that the server holds."""
    [line] = [row for row in client.get("/metrics").text.splitlines() if row.startswith("process_resident_memory_by")]
    return int(line.rsplit(" ", 1)[1])


@pytest.mark.slow
def test_a_thousand_idle_connections_leave_the_rest_served(path: Path) -> None:
    """And 200 that have sent a half; the server began with a limit of 256 open files."""
    _allow_many_connections()
    with server_of(path) as (process, client), ExitStack() as stack:
        port = client.base_url.port
        assert port and client.post("/classify", json={"input": "x"}).status_code == 200
        before = resident(client)
        for number in range(NUM_IDLE + NUM_HALF):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            if number >= NUM_IDLE:
                connection.sendall(HALVES[number % 2])
        for _ in range(20):
            assert client.post("/classify", json={"input": "x"}).status_code == 200
        assert httpx.get(client.base_url.join("/health")).status_code == 200  # by a connection of its own
        assert len(os.listdir(f"/proc/{process.pid}/fd")) > NUM_IDLE + NUM_HALF
        held = resident(client) - before
        assert held < 32 * 2**20


# ---------------------------------------------------------------------- two servers
def at_once(*works: Callable[[], None]) -> None:
    for thread in in_threads(*works):
        thread.join()


@pytest.mark.parametrize("num_races", slow_but([3, 100], 3))
def test_two_servers_on_one_database(path: Path, database: str, num_races: int) -> None:
    """All users are there, with all their pairs, and all deletions hold, whichever of two requests comes first."""
    with server_of(path, database) as (_, one), server_of(path, database) as (_, other):
        learned = race_to_teach(one, other, num_races)
        assert sorted(UserStore(database).ids) == sorted(learned)
        bystanders = race_to_forget(one, other, UserStore(database), num_races)
        assert sorted(UserStore(database).ids) == sorted([*learned, *bystanders])


def race_to_teach(one: httpx.Client, other: httpx.Client, num_races: int) -> list[str]:
    """Both teach the same user, and then one of its own each; the users."""
    answers: list[int] = []

    def teach(client: httpx.Client, name: str, turn: int) -> None:
        for user in (f"shared-{turn}", f"{name}-{turn}"):
            answers.append(client.post(f"/v1/users/{user}/pairs", json=pair(name)).status_code)

    for turn in range(num_races):
        at_once(partial(teach, one, "one", turn), partial(teach, other, "other", turn))
    assert answers == [200] * 4 * num_races
    names = [f"{name}-{turn}" for turn in range(num_races) for name in ("one", "other", "shared")]
    for name in names:
        found = one.get(f"/v1/users/{name}").json()
        assert found["num_pairs"] == (2 if "shared" in name else 1) and other.get(f"/v1/users/{name}").json() == found
    return names


def race_to_forget(one: httpx.Client, other: httpx.Client, store: UserStore, num_races: int) -> list[str]:
    """One is taught a new pair of a user whom the other deletes, and a bystander, who is returned.

    Whichever comes first, nothing of the user's old pair is left: the user is gone, or knows the new pair alone.
    """
    statuses: list[int] = []

    def teach(turn: int) -> None:
        statuses.append(one.post(f"/v1/users/raced-{turn}/pairs", json=pair("new")).status_code)
        statuses.append(one.post(f"/v1/users/new-{turn}/pairs", json=pair("new")).status_code)

    def forget(turn: int) -> None:
        for user in ("old", "raced"):
            statuses.append(other.delete(f"/v1/users/{user}-{turn}").status_code)

    for turn in range(num_races):
        for user in ("old", "raced"):
            assert one.post(f"/v1/users/{user}-{turn}/pairs", json=pair("old")).status_code == 200
        statuses.clear()
        at_once(partial(teach, turn), partial(forget, turn))
        assert sorted(statuses) in ([200] * 4, [200, 200, 200, 409])
        for client in (one, other):
            assert client.get(f"/v1/users/old-{turn}").status_code == 404
            assert client.get(f"/v1/users/new-{turn}").json()["num_pairs"] == 1
            left = client.get(f"/v1/users/raced-{turn}").status_code
            kept = [row["chosen"] for row in store.pairs([f"raced-{turn}"]).get(f"raced-{turn}", [])]
            assert (left, kept) in ((404, []), (200, ["new"]))
        assert left == 404 or 409 not in statuses  # who is told so stays deleted
    for turn in range(num_races):
        assert one.delete(f"/v1/users/raced-{turn}").status_code == 200
        assert other.get(f"/v1/users/raced-{turn}").status_code == 404
    return [f"new-{turn}" for turn in range(num_races)]
