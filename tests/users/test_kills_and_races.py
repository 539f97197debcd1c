"""Processes that are killed at any moment, and processes that change the same store at once.

What was acknowledged is there, what was deleted stays deleted, and nobody who reads ever fails. A handful of cases is
run by default; ``-m slow`` runs 200 kills and 100 races.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.methods.lore import LoRe
from plm.testing import saved
from plm.types import UserState
from plm.users import UserStore, store_path
from tests.marks import slow_but

CLEAN = multiprocessing.get_context("forkserver")
"""Children of a process without threads: a fork of the tests' own waits forever for threads that it did not inherit."""
CLEAN.set_forkserver_preload(["plm.cli", "plm.methods.lore"])
KILLS = slow_but(range(100), 0)
"""Seeds, on each of the two databases."""
RACES = slow_but(range(50), 0)
"""Seeds, of each of two races."""


def state(*values: float) -> UserState:
    """One user per value, with 64 numbers each and value pairs."""
    column = torch.tensor(values, dtype=torch.float32)
    return UserState({"w": column[:, None].expand(-1, 64)}, column.long())


def together(*works: Callable[[], object]) -> list[int]:
    """Run each in a process of its own, all at once; their exit codes."""
    processes = [CLEAN.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [-99 if process.exitcode is None else process.exitcode for process in processes]


# ---------------------------------------------------------------------- kills
def change_at_random(place: str, seed: int, export: Path, log: Connection) -> None:
    """Add, replace, delete and export until killed; a change is announced, and acknowledged once it has returned."""
    draw = random.Random(seed)
    store = UserStore(place, "h")
    for turn in range(1, 10_000):
        name = f"person-{draw.randrange(12)}"
        verb = draw.choice(["add", "add", "delete", "export"])
        log.send(("try", verb, name, turn))
        if verb == "add":
            store.add([name], state(turn), pairs={name: [{"chosen": str(turn)}]})
        elif verb == "delete":
            store.delete([name])
        else:
            store.export(export)
        log.send(("done", verb, name, turn))


def received(reading: Connection) -> Iterator[tuple[str, str, str, int]]:
    """What was sent before the sender was killed."""
    with reading, suppress(EOFError):
        while True:
            yield reading.recv()


@pytest.mark.parametrize("seed", KILLS)
def test_a_kill_loses_nothing_that_was_acknowledged(place: str, seed: int, tmp_path: Path) -> None:
    store, export = UserStore(place, "h"), tmp_path / "users.jsonl"
    store.add(["person-0", "bystander"], state(7, 7))
    store.export(export)
    reading, writing = CLEAN.Pipe(duplex=False)
    child = CLEAN.Process(target=change_at_random, args=(place, seed, export, writing))
    child.start()
    writing.close()
    first = reading.recv()
    time.sleep(random.Random(f"wait {seed}").uniform(0, 0.3))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    told = [first, *received(reading)]

    expected: dict[str, set[int]] = {"person-0": {7}, "bystander": {7}}  # value, 0 = unknown, after each change
    for word, verb, name, turn in told:
        value = {"add": turn, "delete": 0}.get(verb)
        if value is not None:
            expected[name] = {value} if word == "done" else {value, *expected.get(name, {0})}
    rows, known = UserStore(place, "h").get(list(expected))
    for row, (name, values) in enumerate(expected.items()):
        found = int(rows.num_pairs[row]) if known[row] else 0
        assert found in values, f"{name}: {found}, expected one of {values}; the last changes: {told[-4:]}"
        assert not known[row] or rows.tensors["w"][row].tolist() == [found] * 64
        assert name == "bystander" or store.pairs([name]).get(name, []) in ([{"chosen": str(found)}][: bool(found)], [])
    whole = [json.loads(line) for line in export.read_text().splitlines()]
    assert any(row["user_id"] == "bystander" for row in whole) and all(len(row["state"]["w"]) == 64 for row in whole)

    # the next deletion cleans up: of deleted users nothing is left in the files
    store.delete([name for name in expected if name != "bystander"])
    assert store.ids == ["bystander"]
    if "://" not in place:
        with sqlite3.connect(place) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        assert not any(b"person-" in file.read_bytes() for file in tmp_path.glob("m.users.db*"))


# ---------------------------------------------------------------------- races
def write_and_count(place: str, name: int) -> None:
    """Write six users of its own, and count up the shared one after each."""
    store = UserStore(place, "h")
    for turn in range(6):
        assert store.add([f"{name}-{turn}"], state(turn))
        while True:  # read, change, write: refused where somebody else has written meanwhile
            user = store.find("shared")
            assert user is not None
            if store.add(["shared"], state(user.num_pairs + 1), versions={"shared": user.version}):
                break


def test_writers_at_once_lose_no_change(place: str) -> None:
    """Three processes write 6 users each, and count up the same one: no update is lost."""
    store = UserStore(place, "h")
    store.add(["shared"], state(0))
    assert together(*[partial(write_and_count, place, name) for name in range(3)]) == [0] * 3
    assert sorted(store.ids) == sorted(["shared", *(f"{name}-{turn}" for name in range(3) for turn in range(6))])
    shared = store.find("shared")
    assert shared is not None and (shared.num_pairs, shared.version) == (18, 19)


def read_all_the_time(place: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rows, known = UserStore(place, "h").get(["stays", "7"])
        assert known[0] and rows.tensors["w"][0, 0] == 3
        assert "stays" in UserStore(place).ids


def write_all_the_time(place: str, seconds: float, seed: int) -> None:
    """Add users and delete some of them."""
    draw, store, end = random.Random(seed), UserStore(place, "h"), time.monotonic() + seconds
    while time.monotonic() < end:
        names = [str(draw.randrange(50)) for _ in range(5)]
        store.add(sorted(set(names)), state(*range(len(set(names)))))
        store.delete(names[:2])


def test_readers_never_fail_while_others_write(place: str) -> None:
    UserStore(place, "h").add(["stays", *map(str, range(50))], state(3, *range(50)))
    writers = [partial(write_all_the_time, place, 1, seed) for seed in (1, 2)]
    assert together(*[partial(read_all_the_time, place, 1)] * 2, *writers) == [0] * 4


@pytest.fixture(scope="module")
def pairs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A file with the pairs of ten users whose names begin with a letter."""
    folder = tmp_path_factory.mktemp("pairs")

    def write(letter: str) -> str:
        rows = [
            {"user_id": f"{letter}{user}", "prompt": "p", "chosen": f"{letter} yes {user}", "rejected": "no"}
            for user in range(10)
        ]
        (folder / f"{letter}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder / f"{letter}.jsonl")

    return write


def lore() -> LoRe:
    """Two trained users, whose store another process is going to change."""
    method = LoRe(2, 16, backbone=HashingBackbone(dim=16).spec(), num_bases=2)
    method.user_ids = ["anna", "ben"]
    return method


def run(*args: str) -> None:
    """Run one command and leave with its exit code."""
    sys.exit(main(list(args)))


def command(*args: str) -> Callable[[], None]:
    """What a process does that runs one command."""
    return partial(run, *args)


@pytest.mark.parametrize("seed", RACES)
def test_two_adaptations_at_once_keep_the_users_of_both(seed: int, pairs_of: Callable[[str], str]) -> None:
    with saved(lore()) as path:
        adapt = ["adapt", "--ckpt_path", str(path), "--pairs"]
        assert together(*[command(*adapt, pairs_of(letter)) for letter in "cd"]) == [0, 0]
        method = load_method(path)
        assert set(method.known_users.store.ids) == {"anna", "ben", *(f"{x}{row}" for x in "cd" for row in range(10))}
        assert method.known_users(["c3", "d9"]).num_pairs.tolist() == [1, 1]


@pytest.mark.parametrize("seed", RACES)
def test_a_deletion_beside_an_adaptation_holds(seed: int, pairs_of: Callable[[str], str]) -> None:
    """Of others who are deleted, and of those who are being learned: deleted before they were stored or after."""
    with saved(lore()) as path:
        adapt = ["adapt", "--ckpt_path", str(path), "--pairs", pairs_of("c")]
        delete = ["users", "delete", "--ckpt_path", str(path), "--user", "anna", "ben"]
        assert together(command(*adapt), command(*delete)) == [0, 0]
        assert set(UserStore(store_path(path)).ids) == {f"c{row}" for row in range(10)}
