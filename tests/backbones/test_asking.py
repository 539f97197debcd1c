"""Language models that are asked questions, by a server or in this process; and texts that go by as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plm.backbones import Answer, LocalChat, Patience, PlainText, RemoteChat, RemoteError
from plm.testing import tiny_causal_lm
from plm.testing.judge import ChatServer, count_words
from tests.http_servers import LocalServer, PolicyHandler, answering

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tea or coffee?"}]


def test_bytes_give_texts_back() -> None:
    pairs = [("Tea – 茶?", "yes\n"), ("", "\U0001f600"), ("a" * 50, "b")]
    tokens = PlainText().represent(*map(list, zip(*pairs, strict=True)))
    assert PlainText.texts(tokens) == pairs
    assert PlainText.texts(tokens.take(torch.tensor([2, 0]))) == [pairs[2], pairs[0]]
    alone = PlainText().represent_prompts(["Tea?"])
    assert PlainText.texts(alone) == [("Tea?", "")]
    with pytest.raises(ValueError, match="at least one character"):
        PlainText().completion("Tea?", "")
    with pytest.raises(ValueError, match="gives features of texts, got"):
        PlainText().encode(["Tea?"])


# ---------------------------------------------------------------------- by a server
def test_a_server_is_asked_in_openais_words() -> None:
    asked: list[tuple[Any, ...]] = []

    def chat(*arguments: Any) -> Answer:
        asked.append(arguments)
        return Answer("PREFERENCE: A", [("PREFERENCE: ", {}), ("A", {"A": -0.1, "B": -2.0})], 12, 3)

    server = ChatServer(chat)
    with answering(server):
        answer = RemoteChat(server.url, None, Patience())(MESSAGES, 7, 0.5, 11)
    assert asked == [(MESSAGES, 7, 0.5, 11)]
    assert answer == Answer("PREFERENCE: A", [("PREFERENCE: ", {}), ("A", {"A": -0.1, "B": -2.0})], 12, 3)


class Bare(LocalServer):
    """Gives what it is told and keeps what it was sent."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(BareHandler)
        self.models, self.body = ["bare"], body
        self.sent: list[Any] = []


class BareHandler(PolicyHandler):
    server: Bare  # type: ignore[assignment]

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append((sent, self.headers["Authorization"]))
        self.answer(200, self.server.body, {})


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "B"}}]},
        {"choices": [{"message": {"content": "B"}, "logprobs": None}], "usage": None},
        {"choices": [{"message": {"content": "B"}, "logprobs": {"content": None}}], "usage": {"prompt_tokens": None}},
    ],
)
def test_a_server_may_give_no_log_probabilities(body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLM_POLICY_KEY", "secret")
    server = Bare(body)
    with server.running():
        answer = RemoteChat(server.url, "bare", Patience())(MESSAGES, 7, 0.0, 0)
    assert answer == Answer("B", [], 0, 0)
    ((sent, key),) = server.sent
    assert key == "Bearer secret" and sent["logprobs"] is True and sent["top_logprobs"] == 20


def test_a_server_may_refuse_log_probabilities() -> None:
    class Refusing(BareHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.sent.append(sent)
            if "logprobs" in sent:
                self.answer(400, {"error": "logprobs is not supported"}, {})
            else:
                self.answer(200, {"choices": [{"message": {"content": "A"}}]}, {})

    server = Bare({})
    server.RequestHandlerClass = Refusing
    with server.running():
        chat = RemoteChat(server.url, None, Patience())
        assert [chat(MESSAGES, 7, 0.0, 0).text for _ in range(2)] == ["A", "A"]
    assert ["logprobs" in sent for sent in server.sent] == [True, False, False]


@pytest.mark.parametrize(
    "entry", [{"token": "A", "top_logprobs": None}, {"token": "A", "top_logprobs": [{"token": "A", "logprob": None}]}]
)
def test_log_probabilities_may_be_missing(entry: dict[str, Any]) -> None:
    server = Bare({"choices": [{"message": {"content": None}, "logprobs": {"content": [entry]}}]})
    with server.running():
        assert RemoteChat(server.url, None, Patience())(MESSAGES, 7, 0.0, 0) == Answer("", [("A", {})], 0, 0)


def test_a_server_that_speaks_otherwise_or_has_not_the_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Bare({"choices": ["x"]})
    with server.running():
        with pytest.raises(ValueError, match=r"expected an answer in OpenAI's words from http://.*\['x'\]"):
            RemoteChat(server.url, None, Patience())(MESSAGES, 7, 0.0, 0)
        with pytest.raises(ValueError, match=r"model.policy: expected one of the models.*'bare'.*got 'other'"):
            RemoteChat(server.url, "other", Patience())
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # what is for this machine goes through no other
        assert RemoteChat(server.url, None, Patience()).name == "bare"
    with pytest.raises((ValueError, RemoteError), match="failed"):
        RemoteChat("http://127.0.0.1:9/v1", None, Patience(retries=0))


# ---------------------------------------------------------------------- in this process
def test_a_local_model_gives_its_own_likeliest_tokens(causal_lm: Callable[[str], Path]) -> None:
    chat = LocalChat(str(causal_lm("llama")))
    answer = chat(MESSAGES, 4, 0.0, 0, "PREFERENCE:")
    ids = (
        chat.lm.prompt_tokens(json.dumps(MESSAGES))
        + chat.lm.tokenizer("PREFERENCE:", add_special_tokens=False)["input_ids"]
    )
    assert answer.num_prompt_tokens == len(ids) and 1 <= answer.num_tokens <= 4
    with torch.no_grad():
        for text, likely in answer.tokens:
            logits = chat.network(input_ids=torch.tensor([ids])).logits[0, -1]
            best = int(logits.argmax())
            assert text == chat.lm.tokenizer.decode([best]) == max(likely, key=lambda token: likely[token])
            assert likely[text] == pytest.approx(float(torch.log_softmax(logits.float(), -1)[best]), abs=1e-4)
            ids.append(best)
    assert chat(MESSAGES, 4, 0.0, 5, "PREFERENCE:") == answer


def test_a_local_model_draws_by_the_seed_and_leaves_the_random_state(causal_lm: Callable[[str], Path]) -> None:
    chat = LocalChat(str(causal_lm("llama")))
    before = torch.get_rng_state()
    first, again, other = (chat(MESSAGES, 12, 1.0, seed).text for seed in (1, 1, 2))
    assert first == again != other and torch.equal(before, torch.get_rng_state())


def test_a_local_model_without_a_chat_template_reads_roles_as_words() -> None:
    chat = LocalChat(tiny_causal_lm().model)
    assert chat.lm.template == "plain" and "user: " in chat.lm._text(json.dumps(MESSAGES), None)
    assert chat([{"role": "user", "content": "Hi"}], 2, 0.0, 0).num_tokens <= 2


# ---------------------------------------------------------------------- the stand-in for one
def test_the_stand_in_prefers_the_words_that_were_preferred() -> None:
    from plm.methods.persona_judge import Demo, Persona
    from plm.methods.persona_judge.prompts import ask_pair, ask_persona, ask_score, probability, score

    demos = (Demo("", "green tea", "black coffee", "A"), Demo("", "old coffee", "new tea", "B"))
    written = count_words(ask_persona(demos), 9, 0.0, 0).text
    assert written.splitlines()[0].startswith("Likes: tea") and "coffee" in written.splitlines()[1]
    persona = Persona(written)
    [nobody, by_persona, by_demos] = [
        probability(count_words(ask_pair(told, "", "a cup of tea", "a cup of coffee", False), 9, 0.0, 0)).value  # type: ignore[union-attr]
        for told in (Persona(), persona, Persona("", demos))
    ]
    assert nobody == pytest.approx(0.5)
    assert by_persona == pytest.approx(1 / (1 + math.exp(-2 / 4))) and by_demos == pytest.approx(1 / (1 + math.exp(-1)))
    assert score(count_words(ask_score(persona, "", "tea", False), 9, 0.0, 0)) == 6
    assert score(count_words(ask_score(persona, "", "coffee", False), 9, 0.0, 0)) == 4
