"""What is asked next, what answers have told, and answers that are taken back, without a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from plm.adapting import RecentFeatures
from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.methods.bradley_terry import BradleyTerry
from plm.querying import PoolPair
from plm.serving import bodies, interviews
from plm.serving.app import make_app
from plm.serving.interviews import Interviews, expected_accuracy, share_right
from plm.serving.server import Settings, running
from plm.serving.service import Places, RequestError, RewardService
from plm.testing import saved

POOL = [PoolPair("What next?", f"a walk in wood {number}", f"a film of {number} hours", {}) for number in range(6)]
SENT = [{"prompt": pair.prompt, "responses": [pair.left, pair.right]} for pair in POOL]


def pair(number: int, **more: Any) -> dict[str, Any]:
    """An answer to a pair of the pool: the walk, but for every third."""
    better, worse = (POOL[number].left, POOL[number].right)[:: -1 if number % 3 == 2 else 1]
    return {"prompt": "What next?", "chosen": better, "rejected": worse, **more}


@pytest.fixture
def asker(service: RewardService) -> Interviews:
    return Interviews(service, POOL)


def teach(asker: Interviews, *pairs: dict[str, Any]) -> bodies.User:
    for one in pairs:
        user = asker.service.learn("anna", bodies.PairsRequest(pairs=[one]))
    return user


def rewards(asker: Interviews) -> list[float]:
    asked = bodies.RewardsRequest(responses=[one.left for one in POOL], user="anna")
    return [entry.reward for entry in asker.service.rewards(asked).data]


def test_expected_accuracy_is_that_of_the_likelier_sides() -> None:
    """Two draws, two pairs: the guesses are left (0.8) and right (0.7); if a draw is true, 85 % or 65 % are right."""
    found = expected_accuracy(torch.tensor([[0.9, 0.2], [0.7, 0.4]]))
    assert found.share == pytest.approx((0.8 + 0.7) / 2)
    assert (found.low, found.high) == pytest.approx((0.655, 0.845))


def test_intervals_of_shares_are_wilsons() -> None:
    assert share_right(7, 10).model_dump() == pytest.approx({"share": 0.7, "low": 0.3968, "high": 0.8922}, abs=1e-4)
    assert (share_right(3, 3).high, share_right(0, 3).low) == pytest.approx((1, 0), abs=1e-12)


def test_answers_are_foretold_by_those_before_them(asker: Interviews, path: Path) -> None:
    """Each by a user who was learned from the earlier ones alone; the tie is learned and not judged."""
    answers = [pair(0), pair(1, tie=True), pair(2), pair(3)]
    teach(asker, *answers, answers[0])  # sent again: counts once
    found = asker.beliefs("anna", bodies.BeliefsRequest()).foretold
    reference, expected, usual = load_method(path), [], []
    for number, one in enumerate(answers):
        if number:
            reference.learn("twin", answers[number - 1 : number])
        texts = [one["chosen"], one["rejected"]]
        better, worse = reference.score(texts, user_id="twin" if number else None, prompts=one["prompt"]).tolist()
        everyone = reference.score(texts, prompts=one["prompt"]).tolist()
        if not one.get("tie"):
            expected.append(torch.tensor(better - worse).sigmoid().item())
            usual.append(float(everyone[0] > everyone[1]))
    assert found is not None and found.chances == pytest.approx(expected, abs=1e-5)
    assert len({round(chance, 4) for chance in found.chances}) == 3
    assert found.accuracy == share_right(sum(chance > 0.5 for chance in expected), 3)
    assert found.population_accuracy == share_right(sum(usual), 3)


def test_beliefs_are_the_pairs_on_which_user_and_population_differ_most(asker: Interviews) -> None:
    nobody = asker.beliefs("anna", bodies.BeliefsRequest())
    assert (nobody.user, nobody.num_kept, nobody.data, nobody.foretold) == (None, 0, [], None)
    user = teach(asker, pair(0), pair(1))
    found = asker.beliefs("anna", bodies.BeliefsRequest(pool=SENT))
    assert found.user == user and found.num_kept == 2
    chances = {}
    for index, one in enumerate(POOL):
        for name in ("anna", None):
            asked = bodies.RewardsRequest(prompt=one.prompt, responses=[one.left, one.right], user=name)
            chances[index, name] = asker.service.rewards(asked).data[0].win_probability
    by_hand = sorted(range(6), key=lambda index: -abs(chances[index, "anna"] - chances[index, None]))[:3]
    assert [entry.index for entry in found.data] == by_hand
    for entry in found.data:
        assert entry.chance == pytest.approx(chances[entry.index, "anna"], abs=1e-5)
        assert entry.population_chance == pytest.approx(chances[entry.index, None], abs=1e-5)
        assert entry.responses == [POOL[entry.index].left, POOL[entry.index].right]


def test_a_pool_for_a_method_that_cannot_choose_is_refused_at_the_start() -> None:
    with saved(BradleyTerry(2, 64, backbone=HashingBackbone(dim=64).spec())) as checkpoint:
        service = RewardService(checkpoint)
        with pytest.raises(ValueError, match="choosing pairs needs users with an uncertainty"):
            Interviews(service, POOL)
        with pytest.raises(RequestError, match="choosing pairs needs users with an uncertainty") as error:
            Interviews(service).next_question("anna", bodies.QuestionRequest(pool=SENT))
        assert error.value.status == 422


def test_what_was_answered_is_not_asked_again(asker: Interviews) -> None:
    """Nor the other way round; without the request for it everything may be asked."""
    teach(asker, pair(0), pair(2))
    asked = asker.next_question("anna", bodies.QuestionRequest(num_pairs=6, skip_answered=True))
    assert sorted(entry.index for entry in asked.data) == [1, 3, 4, 5] and asked.num_open == 4
    assert all(entry.responses == [POOL[entry.index].left, POOL[entry.index].right] for entry in asked.data)
    everything = asker.next_question("anna", bodies.QuestionRequest(num_pairs=6))
    assert len(everything.data) == everything.num_open == 6
    assert everything.expected_accuracy == asked.expected_accuracy
    teach(asker, pair(1), pair(3), pair(4), pair(5))
    done = asker.next_question("anna", bodies.QuestionRequest(skip_answered=True))
    assert done.data == [] and done.num_open == 0


def test_what_a_program_taught_as_chat_messages_is_not_asked_again(asker: Interviews) -> None:
    chat = [{"role": "user", "content": "What next?"}]
    walk, film = ([{"role": "assistant", "content": text}] for text in ("a walk", "a film"))
    asker.method.learn("anna", [{"prompt": chat, "chosen": walk, "rejected": film}])
    pool = [bodies.Candidate(prompt=chat, responses=["a film", "a walk"]), bodies.Candidate(**SENT[0])]
    asked = asker.next_question("anna", bodies.QuestionRequest(pool=pool, num_pairs=2, skip_answered=True))
    assert [entry.index for entry in asked.data] == [1] and asked.num_open == 1


def test_only_so_many_wait_to_be_asked(asker: Interviews, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rewards find a thread; and a place is given back, also by a request that failed."""
    monkeypatch.setattr(asker, "places", Places(1, asker.places.message))
    with asker.places.one():
        for ask in (
            lambda: asker.next_question("anna", bodies.QuestionRequest()),
            lambda: asker.beliefs("anna", bodies.BeliefsRequest()),
        ):
            with pytest.raises(RequestError, match="too many users are asked at once") as error:
                ask()
            assert error.value.status == 429
    assert asker.next_question("anna", bodies.QuestionRequest()).data


def test_a_pool_whose_answers_would_be_refused_is_refused_at_the_start(service: RewardService) -> None:
    pool = [POOL[0], PoolPair("p", "a" * (bodies.MAX_CHARACTERS + 1), "b", {})]
    with pytest.raises(ValueError, match="--pool: pair 2 could not be answered through the server"):
        Interviews(service, pool)


def test_without_a_pool_there_is_nothing_to_ask(service: RewardService) -> None:
    for ask in (Interviews(service).next_question, Interviews(service).beliefs):
        with pytest.raises(RequestError, match="plm serve --pool") as error:
            ask("anna", bodies.QuestionRequest())  # type: ignore[arg-type]
        assert error.value.status == 400 and error.value.param == "body.pool"


def test_a_text_is_encoded_once(asker: Interviews, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the pool at the start; a user's questions, answers and beliefs ask the encoder for nothing more."""
    read: list[str] = []
    encode = type(asker.method.text_encoder).__call__

    def counted(self: Any, prompts: Any, texts: Any) -> Any:
        read.extend(texts)
        return encode(self, prompts, texts)

    monkeypatch.setattr(type(asker.method.text_encoder), "__call__", counted)
    teach(asker, pair(0), pair(2))
    asker.next_question("anna", bodies.QuestionRequest())
    asker.beliefs("anna", bodies.BeliefsRequest())
    assert read == []
    teach(asker, {"prompt": "What next?", "chosen": "to sleep", "rejected": "to dance"}, pair(1))
    assert sorted(read) == ["to dance", "to sleep"]


def test_features_are_those_of_the_encoder_and_few_are_kept() -> None:
    """Of a reader that numbers its calls: what was read lately is read again from memory, in any order and number."""

    class Reader:
        calls = 0

        def __call__(self, prompts: Any, texts: Any) -> torch.Tensor:
            self.calls += 1
            return torch.tensor(
                [[len(prompt), len(text), self.calls] for prompt, text in zip(prompts, texts, strict=True)]
            )

        def prompts(self, prompts: Any) -> torch.Tensor:
            return torch.tensor([[len(prompt)] for prompt in prompts])

    recent = RecentFeatures(Reader(), most=3)  # type: ignore[arg-type]
    assert recent(["a", "ab"], ["x", "x"]).tolist() == [[1, 1, 1], [2, 1, 1]]  # type: ignore[union-attr]
    assert recent(["ab", "a", "", "ab"], ["x"] * 4).tolist() == [[2, 1, 1], [1, 1, 1], [0, 1, 2], [2, 1, 1]]  # type: ignore[union-attr]
    assert recent.prompts(["a", "abc"]).tolist() == [[1], [3]]  # type: ignore[union-attr]
    assert recent(["ab", "a"], ["x", "x"]).tolist() == [[2, 1, 1], [1, 1, 3]]  # type: ignore[union-attr]


# ---------------------------------------------------------------------- undo
def test_undo_fits_the_user_to_the_pairs_before_the_last(asker: Interviews, path: Path) -> None:
    before, expected = teach(asker, pair(0)), rewards(asker)
    version = teach(asker, pair(2), pair(2), pair(0)).version  # an answer that is sent again is none
    assert rewards(asker) != expected
    undone = asker.undo("anna", bodies.UndoRequest(version=version))
    assert (undone.num_pairs, undone.version) == (1, version + 1) and rewards(asker) == expected
    assert load_method(path).users.pairs(["anna"]) == {"anna": [{**pair(0), "tie": False, "weight": 1.0}]}
    with pytest.raises(RequestError, match="another version") as error:
        asker.undo("anna", bodies.UndoRequest(version=before.version))
    assert error.value.status == 409 and rewards(asker) == expected


def test_undo_of_the_only_pair_leaves_the_population(asker: Interviews) -> None:
    """To the bit; and the user may be learned again, but there is nothing more to take back."""
    expected = rewards(asker)
    undone = asker.undo("anna", bodies.UndoRequest(version=teach(asker, pair(0)).version))
    assert (undone.num_pairs, undone.served) == (0, "population") and rewards(asker) == expected
    with pytest.raises(RequestError, match="so the last one cannot be taken back") as error:
        asker.undo("anna", bodies.UndoRequest(version=undone.version))
    assert error.value.status == 409
    assert teach(asker, pair(1)).num_pairs == 1 and rewards(asker) != expected


def test_pairs_that_cannot_be_fitted_any_more_are_told_by_422(
    asker: Interviews, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = teach(asker, pair(0), pair(1)).version

    def refused(*args: Any) -> Any:
        raise ValueError("expected prompts that leave room")

    monkeypatch.setattr("plm.checkpoint.adapt_user", refused)
    with pytest.raises(RequestError, match="leave room") as error:
        asker.undo("anna", bodies.UndoRequest(version=version))
    assert error.value.status == 422


def test_who_was_forgotten_is_not_brought_back_by_undo(asker: Interviews, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether before, or while the user is fitted."""
    version = teach(asker, pair(0), pair(1)).version
    fit = "plm.checkpoint.adapt_user"
    real = __import__("plm.checkpoint", fromlist=["adapt_user"]).adapt_user

    def slowly(*args: Any) -> Any:
        asker.service.forget("anna")
        return real(*args)

    monkeypatch.setattr(fit, slowly)
    for _ in "ab":
        with pytest.raises(RequestError) as error:
            asker.undo("anna", bodies.UndoRequest(version=version))
        assert error.value.status == 404
    assert "anna" not in asker.method.users


# ---------------------------------------------------------------------- by HTTP
def test_users_are_listed_in_parts(service: RewardService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interviews, "USERS_AT_ONCE", 3)
    with running(make_app(service)) as url, httpx.Client(base_url=url) as client:
        for number in range(5):
            client.post(f"/v1/users/user%20{number}/pairs", json={"pairs": [pair(0)]})
        after, seen, counts = -1, [], []
        while after is not None:
            part = client.get("/v1/users", params={"after": after}).json()
            seen += [entry["user"] for entry in part["data"]]
            assert part["num_users"] == 7 and len(part["data"]) <= 3
            counts.append(len(part["data"]))
            after = part["next_after"]
        assert seen == ["ben", "eva", *[f"user {number}" for number in range(5)]] and counts == [3, 3, 1]
        assert client.get("/v1/users").json()["data"][0] == client.get("/v1/users/ben").json()
        assert [client.get(f"/v1/users?after={text}").status_code for text in ("x", "-2", "1&after=1")] == [400] * 3


def test_the_shell_needs_no_key_and_tells_nothing(service: RewardService) -> None:
    with running(make_app(service, POOL, keys=["k" * 16])) as url:
        for path in ("/", "/page.css", "/page.js"):
            found = httpx.get(url + path)
            assert found.status_code == 200 and "default-src 'none'" in found.headers["content-security-policy"]
            assert not any(word in found.text for word in ("lore", "ben", "eva", "a walk in wood"))
        assert 'data-questions="6"' in httpx.get(url).text and 'data-needs-key="yes"' in httpx.get(url).text
        assert httpx.get(f"{url}/v1/users").status_code == 401


def test_the_command_reads_a_pool(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*SENT, SENT[0]]))
    with running(Settings(str(path), pool=str(file)).app()) as url:
        asked = httpx.post(f"{url}/v1/users/anna/next-question", json={}).json()
        assert asked["num_open"] == 6 and asked["data"][0]["responses"] in [one["responses"] for one in SENT]
    rows = [{"prompt": str(number), "responses": ["a", "b"]} for number in range(interviews.MAX_POOL + 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="--pool: expected at most 1024 pairs, got 1025"):
        Settings(str(path), pool=str(file)).app()
    assert main(["serve", "--ckpt_path", str(path), "--pool", str(tmp_path / "none.jsonl")]) != 0
    assert "none.jsonl" in capsys.readouterr().err
