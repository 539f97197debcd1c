"""Users learned from a table again and again: only those of the table change, to what all their pairs together give."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import plm.adapting
from plm.adapting import learn_users
from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.data.schema import make_pairs
from plm.method import PersonalizationMethod
from plm.methods.lore import LoRe
from plm.methods.pal import PAL
from plm.methods.vpl import VPL
from plm.testing import saved
from plm.testing.checks import assert_same
from plm.types import UserState

WORDS = "tea milk sea walk film home black strong evening long".split()
BACKBONE = HashingBackbone(dim=64).spec()
METHODS = {
    "LoRe": lambda: LoRe(1, 64, backbone=BACKBONE, num_bases=3),
    "PAL": lambda: PAL(1, 64, backbone=BACKBONE, num_prototypes=3),
    "VPL": lambda: VPL(1, 64, backbone=BACKBONE, latent_dim=3, hidden_dim=8),
}


@pytest.fixture(params=list(METHODS))
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A checkpoint of random weights that was trained on ben, whose pairs are not kept."""
    torch.manual_seed(0)
    method = METHODS[request.param]()
    method.user_ids = ["ben"]
    method.num_pairs.fill_(3)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_()
    with saved(method) as checkpoint:
        yield checkpoint


def pairs_of(user_id: str, count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(f"{user_id} {seed}")
    sides = [draw.sample([" ".join(words) for words in combinations(WORDS, 3)], 2) for _ in range(count)]
    return [
        {
            "user_id": user_id,
            "prompt": f"{row}?",
            "chosen": better,
            "rejected": worse,
            "weight": draw.choice([0.5, 1.0]),
        }
        for row, (better, worse) in enumerate(sides)
    ]


def learn(method: PersonalizationMethod, rows: list[dict[str, Any]], keep_pairs: bool = False) -> tuple[int, ...]:
    """New users, those whose pairs were added, and those learned anew."""
    parts = list(learn_users(method, make_pairs(rows, "pair"), keep_pairs))
    count, known, added = (
        sum(len(part.user_ids) for part in parts),
        sum(part.num_known for part in parts),
        sum(part.num_added for part in parts),
    )
    return count - known, added, known - added


def state(method: PersonalizationMethod, user_id: str) -> UserState:
    return method.users.get([user_id])[0]


def test_new_users_are_those_without_kept_pairs(path: Path) -> None:
    """What is predicted before it is learned are their pairs alone, with the dialogues and lines of the file."""
    method, seen = load_method(path), []
    learn(method, pairs_of("anna", 3, 1), keep_pairs=True)
    rows = [
        {**row, "dialogue_id": f"talk {number // 2}"}
        for number, row in enumerate([*pairs_of("anna", 2, 2), *pairs_of("dora", 3, 1)])
    ]
    list(learn_users(method, make_pairs(rows, "new"), on_encoded=lambda data: seen.append(data.table)))
    (table,) = seen
    found = {
        table.position(row): (table.user_ids[table.user[row]], table.dialogues[table.dialogue[row]])
        for row in range(table.num_pairs)
    }
    assert found == {f"new:{number}": ("dora", f"talk {number // 2}") for number in (2, 3, 4)}


def test_new_pairs_of_known_users_touch_their_rows_alone(path: Path, tmp_path: Path) -> None:
    """Anna's state is that of all her pairs, however they came; carl's and ben's stay as they are, to the bit."""
    method = load_method(path)
    anna = pairs_of("anna", 7, 1), pairs_of("anna", 5, 2)
    assert learn(method, [*anna[0], *pairs_of("carl", 4, 1)], keep_pairs=True) == (2, 0, 0)
    others = [method.users.find(name) for name in ("ben", "carl")]
    assert learn(method, [*anna[1], *pairs_of("dora", 3, 1)]) == (1, 1, 0)
    whole = load_method(path, users=tmp_path / "whole.db")
    learn(whole, [*anna[0], *anna[1], *pairs_of("dora", 3, 1), *pairs_of("carl", 4, 1)])
    for name in ("anna", "carl", "dora"):
        assert_same(state(method, name), state(whole, name), 1e-5)
    assert state(method, "anna").num_pairs.tolist() == [12]
    assert [method.users.find(name) for name in ("ben", "carl")] == others
    kept = method.users.pairs(["anna", "carl", "dora", "ben"])
    assert {name: len(pairs) for name, pairs in kept.items()} == {"anna": 12, "carl": 4}
    texts = [(pair["prompt"], pair["chosen"], pair["weight"], pair["tie"]) for pair in kept["anna"]]
    assert texts == [(row["prompt"], row["chosen"], row["weight"], False) for row in (*anna[0], *anna[1])]
    assert method.learn("anna", [("again?", "tea", "milk")]) == 13  # as one by one
    before = method.users.find("anna"), state(method, "carl")
    method.forget("dora")
    assert (method.users.find("anna"), method.users.ids) == (before[0], ["ben", "anna", "carl"])
    assert_same(state(method, "carl"), before[1])


def test_what_is_learned_again_is_the_same_and_counts_once_with_its_latest_weight(path: Path) -> None:
    method, rows = load_method(path), pairs_of("anna", 6, 1)
    learn(method, rows, keep_pairs=True)
    first = state(method, "anna")
    assert learn(method, list(reversed(rows))) == (0, 1, 0)
    assert_same(state(method, "anna"), first, 1e-5)
    heavy = [{**rows[0], "weight": 3.0}]
    learn(method, heavy)
    learn(method, [{**row, "user_id": "like her"} for row in [*heavy, *rows[1:]]])
    assert_same(state(method, "anna"), state(method, "like her"), 1e-5)
    kept = method.users.pairs(["anna"])["anna"]
    assert [pair["weight"] for pair in kept] == [3.0, *(row["weight"] for row in rows[1:])]


def test_who_has_no_kept_pairs_is_learned_anew_from_the_new_ones(path: Path, tmp_path: Path) -> None:
    method = load_method(path)
    learn(method, pairs_of("anna", 7, 1))
    assert learn(method, [*pairs_of("anna", 3, 2), *pairs_of("ben", 2, 1)]) == (0, 0, 2)
    alone = load_method(path, users=tmp_path / "alone.db")
    learn(alone, pairs_of("anna", 3, 2))
    assert_same(state(method, "anna"), state(alone, "anna"), 1e-5)
    assert state(method, "ben").num_pairs.tolist() == [2] and method.users.pairs(["anna", "ben"]) == {}


def test_what_others_change_meanwhile_is_not_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the table is learned a server learns anna and eva, who was unknown, and forgets carl."""
    method = load_method(path)
    rows = [row for name in ("anna", "carl", "dora", "eva") for row in pairs_of(name, 4, 1)]
    learn(method, rows[:8], keep_pairs=True)
    adapt, calls = plm.adapting._batched, []

    def meanwhile(*args: Any) -> Any:
        for part in adapt(*args):
            if not calls:
                server = load_method(path)
                server.learn("anna", [("served?", "tea", "milk")])
                server.learn("eva", [("served?", "tea", "milk")])
                server.forget("carl")
            calls.append(sorted(part[0]))
            yield part

    monkeypatch.setattr("plm.adapting._batched", meanwhile)
    parts = list(learn_users(method, make_pairs([*rows[8:], *pairs_of("anna", 2, 2), *pairs_of("carl", 2, 2)], "pair")))
    assert calls == [["anna", "carl", "dora", "eva"], ["anna", "eva"]]
    assert [sorted(part.user_ids) for part in parts] == [["dora"], ["anna", "eva"]]
    assert [part.num_gone for part in parts] == [1, 0] and "carl" not in method.users
    kept = method.users.pairs(["anna", "eva", "dora"])
    assert {name: len(pairs) for name, pairs in kept.items()} == {"anna": 4 + 1 + 2, "eva": 1 + 4}
    assert state(method, "anna").num_pairs.tolist() == [7] and state(method, "eva").num_pairs.tolist() == [5]


def test_users_who_are_learned_again_keep_their_own_pairs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user is a transaction, fewest pairs first, and all three are changed before the first of them ends."""
    method = load_method(path)
    learn(method, [*pairs_of("bea", 2, 1), *pairs_of("anna", 4, 1)], keep_pairs=True)
    learn(method, pairs_of("carl", 20, 1))
    monkeypatch.setattr("plm.adapting.MAX_FLOATS", 1)
    adapt, rounds = plm.adapting._batched, []

    def meanwhile(*args: Any) -> Any:
        rounds.append(len(rounds))
        for part in adapt(*args):
            if rounds == [0]:
                rounds.append(1)
                server = load_method(path)
                server.learn("anna", [("served?", "tea", "milk")])
                server.learn("bea", [("served?", "tea", "milk")])
                learn(server, pairs_of("carl", 20, 5))
            yield part

    monkeypatch.setattr("plm.adapting._batched", meanwhile)
    learn(method, [*pairs_of("bea", 1, 2), *pairs_of("anna", 2, 2), *pairs_of("carl", 20, 2)])
    kept = method.users.pairs(["anna", "bea", "carl"])
    assert {name: len(pairs) for name, pairs in kept.items()} == {"anna": 4 + 1 + 2, "bea": 2 + 1 + 1}
    for name, pairs in kept.items():
        assert state(method, name).num_pairs.tolist() == [len(pairs)]


def test_what_came_before_an_erasure_is_not_stored_for_one_who_is_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, rows = load_method(path), pairs_of("anna", 4, 1)
    learn(method, rows, keep_pairs=True)
    for module, name in (("plm.adapting", "_batched"), ("plm.checkpoint", "adapt_user")):
        make = getattr(sys.modules[module], name)

        def back(*args: Any, make: Any = make, calls: list[int] = []) -> Any:  # noqa: B006
            made = make(*args)
            made = made if isinstance(made, UserState) else list(made)
            if not calls:
                calls.append(1)
                server = load_method(path)
                server.forget("anna")
                learn(server, [{**rows[0], "prompt": "new?"}], keep_pairs=True)
            return made

        with monkeypatch.context() as patched:
            patched.setattr(f"{module}.{name}", back)
            if name == "_batched":
                (part,) = [*learn_users(method, make_pairs(rows, "pair"))]
                assert (part.user_ids, part.num_gone) == ([], 1)
            else:
                assert method.learn("anna", [("old?", "tea", "milk")]) == 0
        assert [pair["prompt"] for pair in method.users.pairs(["anna"])["anna"]] == ["new?"]
