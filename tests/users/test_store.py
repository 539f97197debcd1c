"""The store of users, on both databases; what is peculiar to one stands at the end."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import save_file

import plm.users.store
from plm.types import UserState
from plm.users import StoreError, UserStore, shared_hash, store_path
from plm.users.rows import from_rows, to_rows


def state(*values: float) -> UserState:
    """One user per value: weights (value, 2 * value), a scalar, and value pairs."""
    column = torch.tensor(values, dtype=torch.float32)
    return UserState({"weights": torch.stack([column, 2 * column], 1), "scale": column}, column.long())


def values_of(store: UserStore, *user_ids: str) -> list[float]:
    """The values of known users; -1 for an unknown one."""
    found, known = store.get(user_ids)
    if not known.any():
        return [-1.0] * len(user_ids)
    return torch.where(known, found.tensors["scale"], torch.tensor(-1.0)).tolist()


def test_what_is_written_is_read_to_the_bit_by_another_store(place: str) -> None:
    written = UserState({"w": torch.tensor([[0.1, -1e-30], [3.0, float("inf")]])}, torch.tensor([3, 0]))
    UserStore(place, "h").add(["anna", "b/ö\n"], written)
    other = UserStore(place)
    assert other.ids == ["anna", "b/ö\n"]
    rows, known = other.get(["b/ö\n", "anna"])
    assert torch.equal(rows.tensors["w"], torch.tensor([[3.0, float("inf")], [0.1, -1e-30]]))
    assert rows.num_pairs.tolist() == [0, 3] and known.all()


def test_get_marks_unknown_users_and_repeats_known_ones(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["a", "b"], state(1, 2))
    rows, known = store.get(["b", "nobody", "b", None, "x\0", "\ud800"])
    assert known.tolist() == [True, False, True, False, False, False]
    assert rows.tensors["weights"].tolist() == [[2, 4], [0, 0], [2, 4], [0, 0], [0, 0], [0, 0]]
    assert rows.tensors["scale"].tolist() == [2, 0, 2, 0, 0, 0]
    nobody, known = store.get(["nobody", None])
    assert nobody.tensors == {} and nobody.num_pairs.tolist() == [0, 0] and not known.any()


def test_a_store_that_was_never_written_is_empty_and_leaves_no_file(tmp_path: Path) -> None:
    store = UserStore(tmp_path / "new" / "x.users.db", "h")
    assert not store.exists and store.ids == [] and len(store) == 0 and "a" not in store and store.num_erasures == 0
    assert store.pairs(["a"]) == {} and not store.get(["a"])[1].any()
    assert list(tmp_path.iterdir()) == []


def test_add_replaces_known_rows_and_appends_new_ones(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["a", "b"], state(1, 2))
    first = store.find("a")
    assert store.add(["c", "a"], state(3, 5)) == ["c", "a"]
    assert len(store) == 3 and "c" in store and "d" not in store and store.ids == ["a", "b", "c"]
    rows, known = store.get(["a", "b", "c"])
    assert rows.num_pairs.tolist() == [5, 2, 3] and known.all()
    second = store.find("a")
    assert first is not None and second is not None
    assert (first.version, second.version, second.num_pairs) == (1, 2, 5)
    assert first.created == second.created <= first.updated <= second.updated


def test_a_method_without_personal_part_still_counts_pairs(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["a"], UserState({}, torch.tensor([4])))
    store.add(["b"], UserState({}, torch.tensor([7])))
    rows, known = store.get(["b", "a"])
    assert rows.tensors == {} and rows.num_pairs.tolist() == [7, 4] and known.all()


def test_deletion_can_be_repeated_and_says_what_it_did(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["a", "b", "c"], state(1, 2, 3), pairs={"b": [{"chosen": "x"}]})
    first, unknown = store.delete(["b", "nobody", "b"])
    assert first.was_stored and not unknown.was_stored and first.receipt != unknown.receipt
    assert store.ids == ["a", "c"] and store.pairs(["b"]) == {} and store.num_erasures == 2
    (again,) = store.delete(["b"])
    assert again.receipt == first.receipt and not again.was_stored
    assert len(first.receipt) == 64 and first.erased.endswith("+00:00")
    assert store.delete(["\ud800"])[0].was_stored is False


def test_other_stores_see_additions_and_deletions_at_once(place: str) -> None:
    writer = UserStore(place, "h")
    reader = UserStore(place, "h")
    writer.add(["a", "b"], state(1, 2))
    assert values_of(reader, "a", "b", "c") == [1, 2, -1]
    writer.delete(["a"])
    assert values_of(reader, "a", "b", "c") == [-1, 2, -1]


def test_a_snapshot_is_of_one_moment(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is deleted between its statements is there in all of it, with the erasures of before."""
    store, other = UserStore(place, "h"), UserStore(place)
    store.add(["anna"], state(1), pairs={"anna": [{"prompt": "tea?"}]})
    read = plm.users.store.pairs_of

    def deleted_first(connection: sa.Connection, user_ids: list[str]) -> Any:
        monkeypatch.setattr("plm.users.store.pairs_of", read)
        other.delete(["anna"])
        return read(connection, user_ids)

    monkeypatch.setattr("plm.users.store.pairs_of", deleted_first)
    monkeypatch.setattr("plm.users.database.PATIENCE", 0.05)
    found = store.snapshot("anna")
    assert found.user is not None and found.pairs == [{"prompt": "tea?"}] and found.num_erasures == 0
    assert store.snapshot("anna") == (None, [], 1)


def test_a_user_who_is_deleted_while_being_learned_stays_deleted(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["a", "b"], state(1, 2))
    since = store.num_erasures
    UserStore(place).delete(["b", "new"])
    assert store.add(["a", "b", "new"], state(4, 5, 6), since=since) == ["a"]
    assert values_of(store, "a", "b", "new") == [4, -1, -1]
    assert store.add(["b"], state(7), since=store.num_erasures) == ["b"]  # learned after the deletion


def test_a_state_made_from_a_former_version_is_refused(place: str) -> None:
    store = UserStore(place, "h")
    assert store.add(["a"], state(1), versions={"a": 0}) == ["a"]
    assert store.add(["a"], state(2), versions={"a": 0}) == []
    assert store.add(["a"], state(3), versions={"a": 1}) == ["a"]
    assert values_of(store, "a") == [3]


def test_pairs_are_kept_in_order_and_go_with_their_state(place: str) -> None:
    store = UserStore(place, "h")
    pairs = [{"prompt": "p", "chosen": f"ö{row}", "rejected": "\0"} for row in range(12)]
    store.add(["a", "b"], state(1, 2), pairs={"a": pairs})
    assert store.pairs(["a", "b", "\0"]) == {"a": pairs}
    store.add(["a"], state(2))  # learned anew from other pairs, which are not kept
    assert store.pairs(["a"]) == {}


def test_export_is_readable_and_whole_or_not_there(place: str, tmp_path: Path) -> None:
    store = UserStore(place, "h")
    store.add(["a", "b"], state(1, 2), pairs={"b": [{"chosen": "x"}]})
    path = tmp_path / "out" / "b.jsonl"
    store.export(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {"user_id": "a", "num_pairs": 1, "state": {"weights": [1.0, 2.0], "scale": 1.0}},
        {"user_id": "b", "num_pairs": 2, "state": {"weights": [2.0, 4.0], "scale": 2.0}, "pairs": [{"chosen": "x"}]},
    ]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"unknown \['c'\]"):
        store.export(path, ["b", "c"])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("ids", "states", "message"),
    [
        (["a", "a"], state(1, 2), "1 distinct"),
        (["a"], state(1, 2), "2 states"),
        (["c"], UserState({"w": torch.ones(1, 3)}, torch.ones(1).long()), "another method"),
        (["c"], UserState({"weights": torch.ones(1, 2).half(), "scale": torch.ones(1)}, torch.ones(1).long()), "anoth"),
        ([""], state(1), "1 to 512 characters"),
        (["x" * 513], state(1), "1 to 512 characters"),
        (["a\0"], state(1), "cannot be stored"),
        (["a\ud800"], state(1), "cannot be stored"),
    ],
)
def test_rows_that_do_not_fit_are_refused(place: str, ids: list[str], states: UserState, message: str) -> None:
    store = UserStore(place, "h")
    store.add(["z"], state(9))
    with pytest.raises(ValueError, match=message):
        store.add(ids, states)
    assert store.ids == ["z"]


def test_a_store_of_other_weights_is_refused_when_opened_and_when_it_changes(place: str) -> None:
    store = UserStore(place, "one")
    store.add(["a"], state(1))
    with pytest.raises(ValueError, match="belongs to other shared weights"):
        UserStore(place, "two")
    UserStore.begin(place, "two", ["b"], UserState({"other": torch.ones(1, 1)}, torch.ones(1).long()))
    assert UserStore(place, "two").ids == ["b"]
    for refused in (lambda: store.get(["a"]), lambda: store.add(["a"], state(1)), lambda: store.delete(["a"])):
        with pytest.raises(ValueError, match="belongs to other shared weights"):
            refused()


def test_a_fit_that_is_repeated_keeps_the_users_of_the_same_weights(place: str) -> None:
    UserStore.begin(place, "h", ["a"], state(1))
    UserStore(place).add(["adapted"], state(5))
    UserStore.begin(place, "h", ["a"], state(2))
    assert values_of(UserStore(place), "a", "adapted") == [2, 5]


def test_a_store_of_a_later_format_is_refused(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["a"], state(1))
    with store._database.writing("h") as connection:
        connection.execute(sa.text("UPDATE plm_facts SET value = '2' WHERE name = 'schema'"))
    with pytest.raises(ValueError, match="format 2, expected 1; update plm"):
        UserStore(place)


def test_threads_share_a_store(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["z"], state(9))

    def work(name: int) -> None:
        for turn in range(4):
            store.add([f"{name}-{turn}"], state(name))
            assert values_of(store, "z", f"{name}-{turn}") == [9, name]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) == 17


def test_what_fails_in_a_transaction_leaves_no_trace(place: str) -> None:
    store = UserStore(place, "h")
    store.add(["a"], state(1))
    with pytest.raises(RuntimeError), store._database.writing("h") as connection:
        connection.execute(sa.text("DELETE FROM plm_users"))
        raise RuntimeError
    assert store.ids == ["a"]


# ---------------------------------------------------------------------- SQLite
def test_every_change_is_durable_and_deleted_bytes_leave_the_files(tmp_path: Path) -> None:
    store = UserStore(tmp_path / "x.users.db", "h")
    with store._database.writing("h"):
        pass
    connection = store._database._connect()
    pragmas = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS}
    connection.close()
    assert pragmas == PRAGMAS
    store.add([f"person-{row}" for row in range(300)], state(*[1234.5 + row for row in range(300)]))
    secret = torch.tensor([1234.5 + 77]).numpy().tobytes()
    assert secret in (tmp_path / "x.users.db").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"x.users.db", "x.users.db.lock"}  # one file to copy
    (receipt,) = store.delete(["person-77"])
    assert receipt.is_wiped
    for file in tmp_path.iterdir():
        data = file.read_bytes()
        assert b"person-77" not in data and secret not in data, file
    assert values_of(store, "person-76", "person-78") == [1310.5, 1312.5]


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}


def test_a_store_that_is_held_open_deletes_as_thoroughly_and_ends_as_one_file(tmp_path: Path) -> None:
    """Its log lives as long as the block, so that no call has to move it into the database."""
    place = tmp_path / "m.users.db"
    store = UserStore(place, "h")
    with store.held_open():
        assert not place.exists()  # nothing to hold yet
    store.add(["anna", "person-7"], state(1, 7))
    with store.held_open():
        store.add(["ben"], state(2))
        assert Path(f"{place}-wal").stat().st_size > 0 and UserStore(place).ids == ["anna", "person-7", "ben"]
        assert store.delete(["person-7"])[0].is_wiped
        assert not any(b"person-7" in file.read_bytes() for file in tmp_path.glob("m.users.db*"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.users.db", "m.users.db.lock"]
    assert store.ids == ["anna", "ben"]


def test_a_store_that_is_held_open_keeps_its_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = UserStore(tmp_path / "m.users.db", "h")
    store.add(["anna"], state(1))
    connect, opened = sqlite3.connect, []
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: opened.append(1) or connect(*args, **options))
    with store.held_open():
        for value in range(2, 6):
            store.add(["anna"], state(value))
            assert values_of(store, "anna") == [value]
        assert len(opened) == 1
    assert values_of(store, "anna") == [5] and len(opened) == 2


def test_another_file_in_the_place_of_one_that_is_held_open_is_refused(tmp_path: Path) -> None:
    """Its users would not be those that are read, and what is learned would go into a file without a name."""
    store, other = UserStore(tmp_path / "m.users.db", "h"), UserStore(tmp_path / "other.users.db", "h")
    store.add(["anna"], state(1))
    other.add(["ben"], state(2))
    with store.held_open():
        (tmp_path / "other.users.db").replace(tmp_path / "m.users.db")
        for call in (lambda: store.find("anna"), lambda: store.add(["eve"], state(3)), lambda: store.delete(["anna"])):
            with pytest.raises(StoreError, match="replaced while it is open"):
                call()
    assert store.ids == ["ben"]


def test_a_store_that_is_removed_while_it_is_held_open_is_not_an_empty_one(tmp_path: Path) -> None:
    """Nobody is served as a stranger in silence, and what its log still holds does not rise in a store made later."""
    place = tmp_path / "m.users.db"
    store = UserStore(place, "h")
    store.add(["anna"], state(1))
    with store.held_open():
        store.add(["ben"], state(2))
        place.unlink()
        for call in (lambda: store.find("anna"), lambda: store.ids, lambda: store.add(["eve"], state(3))):
            with pytest.raises(StoreError, match="was removed or replaced while it is open"):
                call()
        assert not place.exists()
    Path(f"{place}-wal").write_bytes(b"left by a killed process")
    UserStore(place, "h").add(["eve"], state(3))
    assert UserStore(place).ids == ["eve"] and values_of(store, "eve") == [3]


def test_what_a_killed_deletion_left_in_the_log_goes_with_the_next(tmp_path: Path) -> None:
    store = UserStore(tmp_path / "x.users.db", "h")
    store.add(["person-a", "person-b"], state(1, 2))
    other = sqlite3.connect(tmp_path / "x.users.db")  # keeps the log from being emptied at the end of the transaction
    other.execute("SELECT * FROM plm_users").fetchall()
    with store._database.writing("h") as connection:  # a deletion that is killed before it wipes
        connection.execute(sa.text("DELETE FROM plm_users WHERE user_id = 'person-a'"))
    assert any(b"person-a" in file.read_bytes() for file in tmp_path.iterdir())
    assert store.delete(["person-a"])[0].is_wiped
    assert not any(b"person-a" in file.read_bytes() for file in tmp_path.iterdir())
    other.close()


def test_an_open_snapshot_delays_the_wiping_and_the_receipt_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = UserStore(tmp_path / "x.users.db", "h")
    store.add(["a", "b"], state(1, 2))
    monkeypatch.setattr("plm.users.database.PATIENCE", 0.05)
    with store._database.reading() as connection:
        connection.execute(sa.text("SELECT count(*) FROM plm_users"))
        assert not store.delete(["a"])[0].is_wiped
    assert store.delete(["a"])[0].is_wiped


def test_a_store_is_used_after_a_fork_and_when_another_takes_its_place(tmp_path: Path) -> None:
    store = UserStore(tmp_path / "x.users.db", "h")
    store.add(["a"], state(1))
    child = os.fork()
    if child == 0:
        os._exit(0 if values_of(store, "a") == [1] and store.add(["b"], state(2)) == ["b"] else 1)
    assert os.waitpid(child, 0)[1] == 0 and store.ids == ["a", "b"]
    other = UserStore(tmp_path / "y.users.db", "h")
    other.add(["c"], state(3))
    os.replace(tmp_path / "y.users.db", tmp_path / "x.users.db")
    assert values_of(store, "a", "b", "c") == [-1, -1, 3]


def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = UserStore(tmp_path / "x.users.db", "h")
    store.add(["a"], state(1))
    monkeypatch.setattr("plm.users.database.os.access", lambda *_: False)
    frozen = UserStore(tmp_path / "x.users.db", "h")
    assert frozen.ids == ["a"]
    assert {file.name for file in tmp_path.iterdir()} == {"x.users.db", "x.users.db.lock"}
    with pytest.raises(ValueError, match="cannot be written: attempt to write a readonly database"):
        frozen.add(["b"], state(2))


@pytest.mark.parametrize("content", [b"hello", b"SQLite format 3\0" + b"\1" * 200])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.users.db").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        UserStore(tmp_path / "x.users.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (a)").connection.close()
    with pytest.raises(ValueError, match=r"cannot be read: no such table: plm_facts"):
        UserStore(tmp_path / "other.db")
    with pytest.raises(ValueError, match=r"expected a file or a URL postgresql\+psycopg://..., got 'mysql://a"):
        UserStore("mysql://a/b")


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        UserStore("postgresql+psycopg://me:secret@/db?host=/nowhere")
    assert "secret" not in str(caught.value) and "me:***@" in str(caught.value)


# ---------------------------------------------------------------------- bytes, names, folders of earlier versions
def test_rows_are_safetensors_files_of_one_user() -> None:
    from safetensors.torch import load

    tensors = {
        "b": torch.tensor([[1.5, -2.0], [0.25, 8.0]], dtype=torch.bfloat16),
        "a": torch.tensor([3, 4]),
        "flag": torch.tensor([[True], [False]]),
        "none": torch.zeros(2, 0, 3),
    }
    rows = to_rows(tensors, 2)
    for row, data in enumerate(rows):
        alone = load(data)
        assert alone.keys() == tensors.keys()
        assert all(torch.equal(alone[name], value[row]) for name, value in tensors.items())
    both = from_rows(rows[::-1])
    assert all(torch.equal(both[name], value.flip(0)) for name, value in tensors.items())
    assert from_rows(to_rows({}, 2)) == {} and to_rows({}, 0) == []
    with pytest.raises(ValueError, match="different layouts"):
        from_rows([rows[0], to_rows({"b": torch.zeros(1, 1)}, 1)[0]])
    with pytest.raises(ValueError, match="expected the state of a user as safetensors"):
        from_rows([rows[0][:-1]])


def former_store(folder: Path, user_ids: list[Any], states: UserState) -> None:
    """A folder as plm wrote it before users were rows of a database."""
    folder.mkdir()
    tensors = {f"state.{name}": value for name, value in states.tensors.items()}
    save_file({**tensors, "num_pairs": states.num_pairs}, folder / "users-0123456789ab.safetensors")
    index = {"format": 1, "shared_hash": "h", "tensors": "users-0123456789ab.safetensors", "user_ids": user_ids}
    (folder / "index.json").write_text(json.dumps(index))


def test_a_folder_of_an_earlier_version_is_imported_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = UserState({"w": torch.randn(3, 4), "p": torch.randn(3, 4, 4)}, torch.tensor([3, 0, 7]))
    former_store(tmp_path / "best.users", ["anna", "ö", "7"], states)
    store = UserStore(store_path(tmp_path / "best.ckpt"), "h")
    found, known = store.get(["7", "anna", "ö"])
    order = torch.tensor([2, 0, 1])
    assert known.all() and torch.equal(found.num_pairs, states.num_pairs[order])
    assert all(torch.equal(found.tensors[name], value[order]) for name, value in states.tensors.items())
    assert store.ids == ["anna", "ö", "7"] and not (tmp_path / "best.users").exists()
    store.delete(["anna"])
    former_store(tmp_path / "best.users", ["anna", "ö", "7"], states)  # as if the import had been killed at its end
    assert UserStore(store_path(tmp_path / "best.ckpt"), "h").ids == ["ö", "7"]
    assert not (tmp_path / "best.users").exists()


def test_a_damaged_folder_of_an_earlier_version_is_kept_and_named(tmp_path: Path) -> None:
    former_store(tmp_path / "best.users", ["anna", "anna"], state(1, 2))
    for name, content in {"": "", "users-0123456789ab.safetensors": "cut", "index.json": "[" * 100_000}.items():
        if name:
            (tmp_path / "best.users" / name).write_text(content)
        with pytest.raises(ValueError, match=r"the users in the folder .* cannot be read"):
            UserStore(store_path(tmp_path / "best.ckpt"))
    assert (tmp_path / "best.users" / "index.json").exists() and not store_path(tmp_path / "best.ckpt").exists()


def test_shared_hash_ignores_user_rows_and_nothing_else() -> None:
    shared, users = torch.tensor([1.0, 2.0]), torch.zeros(3, 2)
    assert shared_hash({"v": torch.zeros(()).expand(1)}) == shared_hash({"v": torch.zeros(1)})
    base = shared_hash({"v": shared, "w": users}, ["w"])
    assert base == shared_hash({"w": users + 1, "v": shared.clone()}, ["w"])
    assert base != shared_hash({"v": shared, "w": users})
    assert base != shared_hash({"v": torch.tensor([1.0, 2.0000002]), "w": users}, ["w"])
    assert base != shared_hash({"v": shared.reshape(2, 1), "w": users}, ["w"])
    assert shared_hash({"s": torch.tensor(1.0)}) != shared_hash({"s": torch.tensor(2.0)})  # a scalar has bits too


def test_store_path_stands_beside_the_checkpoint() -> None:
    assert store_path("runs/epoch=1-loss=0.25.ckpt") == Path("runs/epoch=1-loss=0.25.users.db")
