from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plm.types import UserState
from plm.users import UserStore, shared_hash, store_path


def state(*values: float) -> UserState:
    """One user per value: weights (value, 2 * value), a scalar, and value pairs."""
    column = torch.tensor(values)
    return UserState({"weights": torch.stack([column, 2 * column], 1), "scale": column}, column.long())


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    store = UserStore(
        "h",
        ["anna", "b/ö\n"],
        UserState({"w": torch.tensor([[0.1, -1e-30], [3.0, float("inf")]])}, torch.tensor([3, 0])),
    )
    store.save(tmp_path / "x.users")
    loaded = UserStore.load(tmp_path / "x.users")
    assert loaded.ids == ["anna", "b/ö\n"] and loaded.shared_hash == "h"
    rows, known = loaded.get(["b/ö\n", "anna"])
    assert torch.equal(rows.tensors["w"], torch.tensor([[3.0, float("inf")], [0.1, -1e-30]]))
    assert rows.num_pairs.tolist() == [0, 3] and known.all()


def test_get_marks_unknown_users_and_repeats_known_ones() -> None:
    rows, known = UserStore("h", ["a", "b"], state(1, 2)).get(["b", "nobody", "b", None])
    assert known.tolist() == [True, False, True, False]
    assert rows.tensors["weights"].tolist() == [[2, 4], [0, 0], [2, 4], [0, 0]]
    assert rows.tensors["scale"].tolist() == [2, 0, 2, 0]


def test_add_replaces_known_rows_and_appends_new_ones() -> None:
    store = UserStore.empty("h")
    store.add(["a", "b"], state(1, 2))
    store.add(["c", "a"], state(3, 5))
    assert len(store) == 3 and "c" in store and "d" not in store
    rows, known = store.get(["a", "b", "c"])
    assert rows.num_pairs.tolist() == [5, 2, 3] and known.all()


def test_a_method_without_personal_part_still_counts_pairs(tmp_path: Path) -> None:
    store = UserStore("h", ["a"], UserState({}, torch.tensor([4])))
    store.add(["b"], UserState({}, torch.tensor([7])))
    store.save(tmp_path / "s")
    rows, _ = UserStore.load(tmp_path / "s").get(["b", "a"])
    assert rows.tensors == {} and rows.num_pairs.tolist() == [7, 4]


def test_delete_removes_the_rows_from_disk_too(tmp_path: Path) -> None:
    store = UserStore("h", ["a", "b", "c"], state(1, 2, 3))
    store.save(tmp_path)
    store.delete(["b"])
    store.save(tmp_path)
    assert UserStore.load(tmp_path).ids == ["a", "c"]
    assert len(list(tmp_path.iterdir())) == 2  # the former rows are gone
    with pytest.raises(ValueError, match=r"unknown \['b'\]"):
        store.delete(["a", "b"])
    assert store.ids == ["a", "c"]


def test_export_is_readable(tmp_path: Path) -> None:
    UserStore("h", ["a", "b"], state(1, 2)).export(["b"], tmp_path / "b.jsonl")
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"user_id": "b", "num_pairs": 2, "state": {"weights": [2.0, 4.0], "scale": 2.0}}
    ]


def test_a_writer_killed_before_the_index_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    UserStore("h", ["a"], state(1)).save(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("plm.atomic.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            UserStore("h", ["b"], state(2)).save(tmp_path)
    assert UserStore.load(tmp_path).ids == ["a"]
    UserStore("h", ["c"], state(3)).save(tmp_path)  # and the next one sweeps up
    assert len(list(tmp_path.iterdir())) == 2 and UserStore.load(tmp_path).ids == ["c"]


@pytest.mark.parametrize(
    ("ids", "states", "message"),
    [
        (["a", "a"], state(1, 2), "1 distinct"),
        (["a"], state(1, 2), "2 states"),
        (["c"], UserState({"w": torch.ones(1, 3)}, torch.ones(1).long()), "another method"),
    ],
)
def test_rows_that_do_not_fit_are_refused(ids: list[str], states: UserState, message: str) -> None:
    store = UserStore("h", ["z"], state(9))
    with pytest.raises(ValueError, match=message):
        store.add(ids, states)
    assert store.ids == ["z"]


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a user store"):
        UserStore.load(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 1, "tensors": "gone.safetensors"}')
    with pytest.raises(ValueError, match="expected a user store"):
        UserStore.load(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="format 2, expected 1"):
        UserStore.load(tmp_path)


def test_shared_hash_ignores_user_rows_and_nothing_else() -> None:
    shared, users = torch.tensor([1.0, 2.0]), torch.zeros(3, 2)
    base = shared_hash({"v": shared, "w": users}, ["w"])
    assert base == shared_hash({"w": users + 1, "v": shared.clone()}, ["w"])
    assert base != shared_hash({"v": shared, "w": users})
    assert base != shared_hash({"v": torch.tensor([1.0, 2.0000002]), "w": users}, ["w"])
    assert base != shared_hash({"v": shared.reshape(2, 1), "w": users}, ["w"])
    assert shared_hash({"s": torch.tensor(1.0)}) != shared_hash({"s": torch.tensor(2.0)})  # a scalar has bits too


def test_store_path_stands_beside_the_checkpoint() -> None:
    assert store_path("runs/epoch=1-loss=0.25.ckpt") == Path("runs/epoch=1-loss=0.25.users")
