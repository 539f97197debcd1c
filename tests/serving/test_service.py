"""Rewards, learning and forgetting through `RewardService`, without a server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sklearn.feature_extraction.text import HashingVectorizer

from plm.checkpoint import load_method
from plm.scoring import response_row, score_responses
from plm.serving import bodies
from plm.serving.batching import Batcher
from plm.serving.interviews import Interviews
from plm.serving.service import RequestError, RewardService, _Job

TEXTS = ["strong tea with milk", "black coffee", "a long walk by the sea"]
WALK = {"prompt": "What to do?", "chosen": "a long walk by the sea", "rejected": "films", "weight": 2.0}
PAIR = {"prompt": "What to drink?", "chosen": "strong tea with milk", "rejected": "black coffee"}


def by_hand(path: Path, user: str | None, texts: list[str]) -> list[float]:
    """Counts of hashed words, times the bases, times the weights of a user, in float64."""
    state = torch.load(path, weights_only=True)["state_dict"]
    words = HashingVectorizer(n_features=64).transform(texts).toarray()
    weights = [1.0, 0.0] if user is None else state["weights"][["ben", "eva"].index(user)].double().numpy()
    return list(words @ state["bases"].double().numpy() @ weights)


@pytest.mark.parametrize("user", ["ben", "eva", None])
def test_rewards_are_features_times_bases_times_weights(service: RewardService, path: Path, user: str | None) -> None:
    found = service.classify(bodies.ClassifyRequest(input=TEXTS, user=user))
    assert [entry.probs[0] for entry in found.data] == pytest.approx(by_hand(path, user, TEXTS), abs=1e-5)
    assert [entry.global_reward for entry in found.data] == pytest.approx(by_hand(path, None, TEXTS), abs=1e-5)
    assert {entry.user_known for entry in found.data} == {user is not None}


def test_an_unknown_user_gets_the_reward_of_the_population_to_the_bit(service: RewardService) -> None:
    for texts in (TEXTS, TEXTS[:1]):
        unknown, nobody = (
            service.classify(bodies.ClassifyRequest(input=texts, user=user)).data for user in ("zoe", None)
        )
        assert [entry.probs for entry in unknown] == [[entry.global_reward] for entry in nobody]
        assert not any(entry.user_known for entry in unknown)


def test_all_endpoints_give_the_rewards_of_plm_score(service: RewardService, path: Path) -> None:
    rows = [response_row({"response": text, "prompt": "What next?", "user_id": "ben"}) for text in TEXTS]
    expected = score_responses(load_method(path), rows).rewards.tolist()
    query = [f"What next?{text}<eos>" for text in TEXTS]
    asked = bodies.GetRewardRequest(query=query, prompts=["What next?"] * 3, users=["ben"] * 3)
    service.end_of_turn = "<eos>"
    assert service.get_reward(asked).rewards == expected
    for prompts in ("What next?", ["What next?"], ["What next?"] * 3):
        found = service.score(bodies.ScoreRequest(queries=prompts, documents=TEXTS, user="ben"))
        assert [entry.score for entry in found.data] == expected
    rewards = service.rewards(bodies.RewardsRequest(prompt="What next?", responses=TEXTS, user="ben"))
    assert [entry.reward for entry in rewards.data] == expected


def test_spread_and_wins_of_rewards(service: RewardService, path: Path) -> None:
    """The spread of ``x B w`` for ``w ~ N(m, P^-1)`` is the root of ``(x B) P^-1 (x B)'``; a win is a logistic."""
    found = service.rewards(bodies.RewardsRequest(responses=TEXTS, user="ben"))
    state = torch.load(path, weights_only=True)["state_dict"]
    words = torch.from_numpy(HashingVectorizer(n_features=64).transform(TEXTS).toarray())
    along = words @ state["bases"].double()
    spread = (along @ state["precision"][0].double().inverse() * along).sum(1).sqrt()
    assert [entry.reward_sd for entry in found.data] == pytest.approx(spread.tolist(), rel=0.35)  # of 64 draws
    values = torch.tensor([entry.reward for entry in found.data]).double()
    wins = [torch.sigmoid(values[i] - values[[j for j in range(3) if j != i]]).mean().item() for i in range(3)]
    assert [entry.win_probability for entry in found.data] == pytest.approx(wins)
    assert service.rewards(bodies.RewardsRequest(responses=TEXTS[:1])).data[0].win_probability is None


def test_openrlhf_names_users_by_labels_by_the_address_or_in_the_body(service: RewardService) -> None:
    def rewards(user: str | None = None, **body: Any) -> list[float]:
        asked = bodies.GetRewardRequest(query=["a tea", "a coffee"], prompts=["a", "a"], **body)
        return service.get_reward(asked, user).rewards

    ben, eva, nobody = rewards("ben"), rewards("eva"), rewards()
    assert len({tuple(ben), tuple(eva), tuple(nobody)}) == 3
    assert rewards(labels=["ben", "eva"]) == nobody
    service.label_is_user = True
    assert rewards(labels=["ben", "eva"]) == [ben[0], eva[1]]
    assert rewards("ben", labels=["eva", None]) == [eva[0], ben[1]]
    assert rewards(labels=["ben", "ben"], users=["eva", "eva"]) == eva
    with pytest.raises(RequestError, match="expected a string or an integer"):
        rewards(labels=["ben", {"a": 1}])
    with pytest.raises(RequestError, match="begins with its prompt"):
        service.get_reward(bodies.GetRewardRequest(query=["<bos>a tea"], prompts=["a"]))


def test_who_has_the_state_of_the_population_is_said_to_be_served_it(service: RewardService) -> None:
    service.learn("few", bodies.PairsRequest(pairs=[PAIR]))
    assert service.user("few").served == "personal"
    least: torch.Tensor = service.method.least_pairs  # type: ignore[assignment]
    before = least.clone()
    least.fill_(3)
    try:
        assert service.learn("few", bodies.PairsRequest(pairs=[WALK])).served == "population"
    finally:
        least.copy_(before)
    service.forget("few")


def test_a_user_is_learned_asked_and_forgotten(service: RewardService, path: Path) -> None:
    assert service.learn("anna", bodies.PairsRequest(pairs=[PAIR])).num_pairs == 1
    assert service.learn("anna", bodies.PairsRequest(pairs=[WALK])).num_pairs == 2
    reference = load_method(path)
    reference.learn("twin", [PAIR, WALK])
    pair = bodies.RewardsRequest(prompt=PAIR["prompt"], responses=TEXTS, user="anna")
    expected = reference.score(TEXTS, user_id="twin", prompts=PAIR["prompt"]).tolist()
    assert [entry.reward for entry in service.rewards(pair).data] == expected
    pool = [{"prompt": "p", "responses": TEXTS[:2]}, {"prompt": "p", "responses": TEXTS[1:]}]
    asked = Interviews(service).next_question("anna", bodies.QuestionRequest(pool=pool, num_pairs=2))
    assert asked.user_known and sorted(entry.index for entry in asked.data) == [0, 1]
    assert service.user("anna").version == 2 and service.user("anna").served == "personal"
    assert service.forget("anna").was_stored and not service.forget("anna").was_stored
    with pytest.raises(RequestError, match="no such user") as error:
        service.user("anna")
    assert error.value.status == 404
    assert not service.rewards(pair).user_known
    assert not Interviews(service).next_question("anna", bodies.QuestionRequest(pool=pool)).user_known


def test_who_is_deleted_while_being_learned_is_a_conflict(
    service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the pairs are stored, or after and before the answer: not that there is no such user."""
    learn = type(service.method).learn

    def learn_and_forget(self: Any, user_id: str, *args: Any) -> int:
        num_pairs = learn(self, user_id, *args)
        self.forget(user_id)
        return num_pairs

    for change in (learn_and_forget, lambda *_: 0):
        monkeypatch.setattr(type(service.method), "learn", change)
        with pytest.raises(RequestError, match="no such user any more") as error:
            service.learn("gone", bodies.PairsRequest(pairs=[PAIR]))
        assert error.value.status == 409


def test_an_answer_that_comes_late_adds_nobody(service: RewardService) -> None:
    """An interview that goes on elsewhere does not bring back who was forgotten."""
    late = bodies.PairsRequest(pairs=[PAIR], must_exist=True)
    for known in (True, False):
        if known:
            service.learn("late", bodies.PairsRequest(pairs=[PAIR]))
            assert service.learn("late", late).num_pairs == 1
            service.forget("late")
        with pytest.raises(RequestError, match="no such user any more") as error:
            service.learn("late", late)
        assert error.value.status == 409 and "late" not in service.method.users


def test_two_services_share_the_users_of_a_server(path: Path, postgres: str) -> None:
    """PostgreSQL: nobody is known to begin with; what one service learns, from two threads, the other knows."""
    url = postgres.format("postgres")
    one, other = (RewardService(path, users=url) for _ in "ab")
    assert not other.rewards(bodies.RewardsRequest(responses=TEXTS, user="ben")).user_known

    def teach(service: RewardService, name: str) -> None:
        for turn in range(3):
            pair = {"prompt": "p", "chosen": f"good {name} {turn}", "rejected": "bad"}
            service.learn("shared", bodies.PairsRequest(pairs=[pair]))

    threads = [threading.Thread(target=teach, args=(service, name)) for service, name in ((one, "one"), (other, "two"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.user("shared") == other.user("shared") and one.user("shared").num_pairs == 6
    asked = bodies.RewardsRequest(responses=TEXTS, user="shared")
    assert one.rewards(asked).data == other.rewards(asked).data and one.rewards(asked).user_known
    assert one.forget("shared").was_stored and not other.rewards(asked).user_known


def test_pairs_are_not_added_to_pairs_that_were_not_kept(service: RewardService) -> None:
    with pytest.raises(RequestError, match="were not kept") as error:
        service.learn("ben", bodies.PairsRequest(pairs=[PAIR]))
    assert error.value.status == 409
    assert service.learn("ben", bodies.PairsRequest(pairs=[PAIR], anew=True)).num_pairs == 1


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (bodies.ClassifyRequest, {}),
        (bodies.ClassifyRequest, {"input": "a", "messages": [{"role": "assistant", "content": "a"}]}),
        (bodies.ClassifyRequest, {"messages": [{"role": "user", "content": "a"}]}),
        (bodies.ClassifyRequest, {"input": [1, 2]}),
        (bodies.ClassifyRequest, {"input": "a", "use_activation": True}),
        (bodies.ClassifyRequest, {"input": "a", "priority": 1}),
        (bodies.ClassifyRequest, {"input": "a", "priority": False}),
        (bodies.ClassifyRequest, {"input": "a", "use_activation": 0}),
        (bodies.ScoreRequest, {"queries": "a", "documents": "b", "max_tokens_per_doc": False}),
        (bodies.ClassifyRequest, {"input": "a", "softmax": False}),
        (bodies.ClassifyRequest, {"input": "a", "user": "a\nb"}),
        (bodies.ClassifyRequest, {"input": " "}),
        (bodies.ScoreRequest, {"queries": "a"}),
        (bodies.ScoreRequest, {"queries": "a", "text_2": "b"}),
        (bodies.ScoreRequest, {"queries": ["a", "b"], "documents": ["c", "d", "e"]}),
        (bodies.GetRewardRequest, {"query": ["ab"], "prompts": ["a", "b"]}),
        (bodies.PairsRequest, {"pairs": []}),
        (bodies.PairsRequest, {"pairs": [{**PAIR, "weight": float("nan")}]}),
        (bodies.PairsRequest, {"pairs": [{**PAIR, "wieght": 2}]}),
        (bodies.QuestionRequest, {"pool": [{"responses": ["a", "a"]}]}),
    ],
)
def test_what_cannot_be_honoured_is_refused(model: type[bodies.ClassifyRequest], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model(**body)


def test_requests_that_come_together_get_the_rewards_of_each_alone(service: RewardService) -> None:
    """And a bad one among them fails by itself."""
    users = ["ben", "eva", "zoe", None]
    alone = [service.score(bodies.ScoreRequest(queries="p", documents=TEXTS, user=user)).data for user in users]
    wrong: list[object] = []

    def ask(turn: int) -> None:
        for number, user in enumerate(users):
            found = service.score(bodies.ScoreRequest(queries="p", documents=TEXTS, user=user)).data
            if found != alone[number]:
                wrong.append((turn, user))

    threads = [threading.Thread(target=ask, args=(turn,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_jobs_that_wait_are_done_together_and_fail_apart() -> None:
    """While the first is worked on, three come; a batch is closed at four units."""
    first, sizes = threading.Event(), []

    def work(jobs: list[int]) -> list[int | Exception]:
        sizes.append(list(jobs))
        if jobs == [1]:
            first.wait(10)
        return [ValueError("two") if job == 2 else 10 * job for job in jobs]

    batch: Batcher[int, int] = Batcher(work, lambda job: job, most=4)
    results: dict[int, object] = {}

    def hand_in(job: int) -> None:
        try:
            results[job] = batch(job)
        except ValueError as error:
            results[job] = str(error)

    threads = []
    for job in (1, 2, 3, 4):
        threads.append(threading.Thread(target=hand_in, args=(job,)))
        threads[-1].start()
        while batch._waiting.qsize() < job - 1 or (job == 1 and not sizes):
            pass
    first.set()
    for thread in threads:
        thread.join()
    assert results == {1: 10, 2: "two", 3: 30, 4: 40} and sizes == [[1], [2, 3], [4]] and batch.num_batches == 3


def test_a_bad_row_fails_only_its_own_request(service: RewardService, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = type(service.method.text_encoder).__call__

    def refuse(self: Any, prompts: Any, texts: Any) -> Any:
        if any("bad" in text for text in texts):
            raise ValueError("row 1 of 1: too long")
        return encode(self, prompts, texts)

    monkeypatch.setattr(type(service.method.text_encoder), "__call__", refuse)
    jobs = [_Job([response_row({"response": text})], False) for text in ("good", "bad", "fine")]
    good, bad, fine = service._work(jobs)
    assert isinstance(bad, RequestError) and bad.status == 422
    assert not isinstance(good, Exception) and not isinstance(fine, Exception)
