"""Users learned, scored and forgotten from Python, by a method of ``load_method``."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import plm.checkpoint
from plm.adapting import adapt_user, learn_users
from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.data.schema import make_pairs
from plm.method import PersonalizationMethod
from plm.methods.lore import LoRe
from plm.scoring import response_row, score_responses
from plm.testing import saved
from plm.types import Context, UserState

TEA = ("What to drink?", "strong tea with milk", "black coffee")
WALK = ("What to do?", "a long walk by the sea", "an evening of films")


@pytest.fixture
def path() -> Iterator[Path]:
    """A checkpoint of two random bases; ben was trained on five pairs, which are not kept."""
    torch.manual_seed(0)
    method = LoRe(1, 64, backbone=HashingBackbone(dim=64).spec(), num_bases=2)
    method.user_ids = ["ben"]
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_()
    method.num_pairs.fill_(5)
    with saved(method) as checkpoint:
        yield checkpoint


def margin(method: PersonalizationMethod, user_id: str, pair: tuple[str, str, str]) -> float:
    rewards = method.score([pair[1], pair[2]], user_id=user_id, prompts=pair[0])
    return float(rewards[0] - rewards[1])


def test_a_user_is_learned_from_texts_and_forgotten(path: Path) -> None:
    method, other = load_method(path), load_method(path)
    assert method.learn("anna", [TEA, {"prompt": WALK[0], "chosen": WALK[1], "rejected": WALK[2]}]) == 2
    assert "anna" in method.users and method.users.ids == ["ben", "anna"]
    population = float(method.score([TEA[1]], prompts=TEA[0]) - method.score([TEA[2]], prompts=TEA[0]))
    assert margin(method, "anna", TEA) > population
    assert margin(other, "anna", TEA) == margin(method, "anna", TEA)  # seen by who was loaded before
    assert method.forget("anna").was_stored and not other.forget("anna").was_stored
    with pytest.warns(UserWarning, match="treated as the population: 'anna'"):
        assert margin(other, "anna", TEA) == population


def test_pairs_one_by_one_teach_what_all_at_once_do(path: Path) -> None:
    method = load_method(path)
    assert [method.learn("one", [pair]) for pair in (TEA, WALK)] == [1, 2]
    method.learn("both", [TEA, WALK])
    one, both = method.known_users(["one"]), method.known_users(["both"])
    assert all(torch.equal(one.tensors[name], value) for name, value in both.tensors.items())
    assert method.learn("one", [WALK], anew=True) == 1
    assert method.users.pairs(["one"])["one"] == [dict(zip(("prompt", "chosen", "rejected"), WALK, strict=True))]


def test_a_pair_that_is_sent_again_counts_once_with_its_latest_weight(path: Path) -> None:
    method = load_method(path)
    tea = dict(zip(("prompt", "chosen", "rejected"), TEA, strict=True))
    method.learn("late", [{**tea, "weight": 1.0}, WALK])
    method.learn("late", [{**tea, "weight": 5.0}])
    method.learn("once", [{**tea, "weight": 5.0}, WALK])
    late, once = method.known_users(["late"]), method.known_users(["once"])
    assert all(torch.equal(late.tensors[name], value) for name, value in once.tensors.items())
    assert late.num_pairs.tolist() == [2]


def test_pairs_are_not_added_to_a_state_whose_pairs_were_not_kept(path: Path) -> None:
    method = load_method(path)
    with pytest.raises(ValueError, match=r"'ben' was learned from 5 pairs that were not kept.*give anew to learn"):
        method.learn("ben", [TEA])
    assert method.known_users(["ben"]).num_pairs.tolist() == [5]
    assert method.learn("ben", [TEA], anew=True) == 1 and method.learn("ben", [WALK]) == 2


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "expected preference pairs, got none"),
        ([("p", "a")], r"expected pairs \(prompt, chosen, rejected\), got \('p', 'a'\)"),
        (["pcr"], "expected pairs"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "wieght": 2}], r"got the keys \['wieght'\]"),
        ([("p", "", "b")], "empty text"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}], "expected a weight"),
    ],
)
def test_malformed_pairs_are_refused_and_nothing_is_stored(path: Path, pairs: list[Any], message: str) -> None:
    method = load_method(path)
    with pytest.raises(ValueError, match=message):
        method.learn("anna", pairs)
    assert "anna" not in method.users


def test_threads_learn_and_score_at_once_and_no_pair_is_lost(path: Path) -> None:
    method = load_method(path)
    expected = margin(method, "ben", TEA)
    wrong: list[object] = []

    def work(name: int) -> None:
        for turn in range(3):
            method.learn("shared", [("p", f"good {name} {turn}", "bad")])
            if method.learn(f"own {name}", [("p", f"good {turn}", "bad")]) != turn + 1:
                wrong.append((name, turn))
            if margin(method, "ben", TEA) != expected:
                wrong.append("ben")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(method.users.pairs(["shared"])["shared"]) == 9
    assert method.known_users(["shared"]).num_pairs.tolist() == [9]


@pytest.mark.parametrize("is_new", [True, False])
def test_who_is_deleted_while_being_learned_stays_deleted(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    method = load_method(path)
    if not is_new:
        method.learn("anna", [WALK])
    learned = plm.checkpoint.adapt_user

    def slowly(*args: Any) -> Any:
        load_method(path).forget("anna")
        return learned(*args)

    monkeypatch.setattr("plm.checkpoint.adapt_user", slowly)
    assert method.learn("anna", [TEA]) == 0
    assert "anna" not in method.users and method.users.pairs(["anna"]) == {}


def test_learning_needs_a_loaded_method() -> None:
    with pytest.raises(ValueError, match="knows no user ids; load it with"):
        LoRe(1, 8, num_bases=1).learn("anna", [TEA])


def test_users_of_a_table_are_learned_in_bounded_chunks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state is that of the user alone, whoever shares the chunk; one user has as many pairs as all the others."""
    counts, draw = [1, 4, 80, 2, 7, 1, 3, 3, 1, 9, 2] * 2, random.Random(0)
    words = "tea milk sea walk film home black strong evening long".split()
    pairs: dict[str, list[dict[str, Any]]] = {f"user {row:02}": [] for row in range(len(counts))}
    for (user_id, own), count in zip(pairs.items(), counts, strict=True):
        for number in range(count):
            sides = {side: " ".join(draw.choices(words, k=4)) for side in ("chosen", "rejected")}
            own.append({"user_id": user_id, "prompt": f"{number}?", "weight": draw.random(), **sides})
    rows = [pair for own in pairs.values() for pair in own if pair["chosen"] != pair["rejected"]]
    draw.shuffle(rows)
    method, table = load_method(path), make_pairs(rows, "pair")
    widest = 2 * 64 * 40 + 2 + 4
    monkeypatch.setattr("plm.adapting.MAX_FLOATS", widest)
    cells: list[int] = []
    adapt = type(method).adapt

    def watched(self: PersonalizationMethod, context: Context) -> UserState:
        cells.append(context.mask.numel() if len(context.mask) > 1 else 0)
        return adapt(self, context)

    monkeypatch.setattr(type(method), "adapt", watched)
    chunks = [part.user_ids for part in learn_users(method, table)]
    assert len(cells) > 3 and max(cells) * 2 * 64 <= widest
    learned = {user_id: method.users.get([user_id])[0] for ids in chunks for user_id in ids}
    assert sorted(learned) == table.user_ids and sum(map(len, chunks)) == len(counts)
    for user_id, state in learned.items():
        alone = adapt_user(method, user_id, [pair for pair in rows if pair["user_id"] == user_id])
        assert int(state.num_pairs) == int(alone.num_pairs) == len([row for row in rows if row["user_id"] == user_id])
        for name, value in state.tensors.items():
            torch.testing.assert_close(value, alone.tensors[name], rtol=1e-5, atol=1e-6)


def test_rows_are_scored_alike_in_parts_and_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one text lie together, so that a text is read again only where a part ends."""
    method, draw = load_method(path), random.Random(0)
    method.learn("anna", [TEA, WALK])
    texts = [*TEA[1:], *WALK[1:], "a long evening"]
    rows = [
        response_row({"response": draw.choice(texts), "user_id": draw.choice(["ben", "anna", "nobody", None])})
        for _ in range(40)
    ]
    reference = [response_row({"response": text}) for text in texts[:3]]
    whole = score_responses(method, rows, reference)
    alone = torch.stack([score_responses(method, [row], reference).rewards[0] for row in rows])
    monkeypatch.setattr("plm.scoring.ROWS_AT_ONCE", 7)
    read: list[str] = []
    encode = HashingBackbone.encode

    def watched(self: HashingBackbone, some: list[str]) -> torch.Tensor:
        read.extend(some)
        return encode(self, some)

    monkeypatch.setattr(HashingBackbone, "encode", watched)
    parts = score_responses(method, rows, reference)
    assert len(read) <= len(texts) + 40 // 7 + len(reference)
    assert whole.win_probability is not None and parts.win_probability is not None
    for found in (whole.rewards, parts.rewards):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.win_probability, whole.win_probability, rtol=0, atol=1e-6)
    assert parts.is_known.tolist() == whole.is_known.tolist() == [row.user_id in ("ben", "anna") for row in rows]
