"""``POST /v1/chat/completions``: users of a policy write, in OpenAI's bodies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from plm.backbones import CausalLM, RemotePolicy
from plm.checkpoint import load_method
from plm.cli import main
from plm.generation import sample
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.methods.lora_dpo import LoRADPO
from plm.serving.app import make_app
from plm.serving.chat import Chat, ChatRequest
from plm.serving.server import running
from plm.serving.service import Places, RequestError, RewardService
from plm.testing import saved
from tests.marks import slow_but
from tests.serving.test_hostile import fuzz

TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DRINK = [{"role": "user", "content": "What to drink?"}]
LONG = [*DRINK, {"role": "assistant", "content": "Tea?"}, {"role": "user", "content": "Something colder."}]
DRAWN: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "seed": 7}
AS_DRAWN = {"max_new_tokens": 20, "temperature": 1.5, "seed": 7}


@pytest.fixture(scope="module")
def checkpoint(causal_lm: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LoRA-DPO: anna and ben have strong random adapters of a random Llama of 256 positions with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    source = causal_lm("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(source)
    network.config.max_position_embeddings = 256
    network.save_pretrained(folder)
    spec = CausalLM(str(folder), template="chat").spec()
    method = LoRADPO(num_users=2, feature_dim=16, backbone=spec, mode="per_user", rank=2)
    method.user_ids = ["anna", "ben"]
    method.configure_model()
    torch.manual_seed(0)
    method.adapters.data.normal_(std=0.5)
    method.num_pairs.fill_(5)
    with saved(method) as path:
        yield path


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> RewardService:
    return RewardService(checkpoint, name="writer")


@pytest.fixture(scope="module")
def client(service: RewardService) -> Iterator[httpx.Client]:
    with running(make_app(service)) as url, httpx.Client(base_url=url, timeout=60) as made:
        yield made


def contents(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_a_client_of_openai(client: httpx.Client, service: RewardService) -> None:
    """The body of OpenAI's documentation, with the options that have a value which changes nothing."""
    body = {
        "model": "writer",
        "messages": [{"role": "developer", "content": "You are helpful."}, {"role": "user", "content": "Hello!"}],
        "user": "anna",
        "n": 2,
        "max_completion_tokens": 30,
        "temperature": 1,
        "top_p": 0.9,
        "seed": 3,
        "stop": None,
        "stream": False,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logprobs": False,
        "response_format": {"type": "text"},
        "store": False,
    }
    response = client.post("/v1/chat/completions", json=body)
    found = response.json()
    assert response.status_code == 200, found
    assert found.keys() == {
        "id", "object", "created", "model", "system_fingerprint", "choices", "usage", "user_known",
    }  # fmt: skip
    assert found["id"].startswith("chatcmpl-") and found["object"] == "chat.completion" and found["model"] == "writer"
    assert abs(found["created"] - time.time()) < 60 and found["user_known"]
    prompt = json.dumps(body["messages"], separators=(",", ":"))
    [expected] = sample(service.method, [prompt], user_id="anna", num_samples=2, max_new_tokens=30, top_p=0.9, seed=3)  # type: ignore[arg-type]
    assert found["choices"] == [
        {
            "index": index,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "finish_reason": "stop" if one.token_ids[-1] == 2 else "length",
            "logprobs": None,
        }
        for index, one in enumerate(expected)
    ]
    num_prompt = len("developer: You are helpful.!user: Hello!!assistant: ")  # a token a character, ! an end
    num_written = sum(len(one.token_ids) for one in expected)
    assert found["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_written,
        "total_tokens": num_prompt + num_written,
    }


def test_texts_are_those_of_plm_generate(client: httpx.Client, checkpoint: Path, tmp_path: Path) -> None:
    """For known users, an unknown one and nobody, who get the population's."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in (DRINK, LONG)))
    command = ["generate", "--ckpt_path", str(checkpoint), "--prompts", str(tmp_path / "prompts.jsonl")]
    command += ["--max_new_tokens", "20", "--temperature", "1.5", "--seed", "7", "--output", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="treated as the population: 'zoe'"):
        assert main([*command, "--user", "anna", "ben", "zoe"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert len(rows) == 6 and len({row["responses"][0] for row in rows}) == 6
    nobody = []
    for row in rows:
        body = {"messages": row["prompt"], "user": row["user_id"], **DRAWN}
        found = client.post("/v1/chat/completions", json=body).json()
        assert contents(found) == row["responses"] and found["user_known"] == (row["user_id"] != "zoe")
        if row["user_id"] == "zoe":
            nobody.append(contents(client.post("/v1/chat/completions", json={**body, "user": None}).json()))
    assert nobody == [row["responses"] for row in rows if row["user_id"] == "zoe"]


def test_latent_users_write_too(steered: Callable[[int], CLaP]) -> None:
    with saved(steered(4)) as clap:
        method = LatentDPO(2, 8, ClapLatents(str(clap)).spec(), prompt_dim=16)
        method.user_ids = ["anna", "ben"]
        torch.manual_seed(1)
        method.policies.data.normal_()
        method.num_pairs.fill_(7)
        with saved(method) as path:
            loaded, chat, prompt = load_method(path), Chat(RewardService(path)), '[{"role":"user","content":"a"}]'
            messages = [{"role": "user", "content": "a"}]
            users = ("anna", "ben", None)
            options: dict[str, Any] = {"messages": messages, "seed": 2, "max_tokens": 20, "n": 6}
            jobs = [chat.job(ChatRequest(user=user, **options)) for user in users]
            together = chat._work(jobs)
            for user, found in zip(users, together, strict=True):
                whose: dict[str, Any] = {} if user is None else {"user_id": user}
                [expected] = sample(loaded, [prompt], seed=2, max_new_tokens=20, num_samples=6, **whose)  # type: ignore[arg-type]
                assert not isinstance(found, Exception)
                assert [one.text for one in found.texts] == [one.text for one in expected]
                assert found.user_known == (user is not None)
            assert len({str(found) for found in together}) == 3


def test_users_share_a_batch_and_write_what_they_write_alone(service: RewardService) -> None:
    """While the first is written, seven wait: three of one seed, one of another, and one each of other options."""
    chat = Chat(service)
    asked = [
        ChatRequest(messages=messages, user=user, **{**DRAWN, **options})
        for messages, user, options in (
            (DRINK, "anna", {}),
            (DRINK, "anna", {}),
            (LONG, "ben", {}),
            (DRINK, "zoe", {}),
            (DRINK, "ben", {"seed": 8}),
            (LONG, "anna", {"n": 3}),
            (LONG, None, {"temperature": 0.0}),
            (DRINK, "anna", {"max_tokens": 256}),  # no room
        )
    ]

    def answer(request: ChatRequest) -> list[str]:
        try:
            found = chat.complete(request)
            return [f"{found.user_known} {choice.message.content}" for choice in found.choices]
        except RequestError as error:
            return [str(error.param)]

    alone = [answer(request) for request in asked]
    assert alone[-1] == ["body.max_tokens"] and len({text for texts in alone[:-1] for text in texts}) == 8
    before, together = chat.batches.num_batches, dict[int, list[str]]()
    threads = [
        threading.Thread(target=lambda place: together.update({place: answer(asked[place])}), args=(place,))
        for place in range(8)
    ]
    with service.method.one_thread():
        for place, thread in enumerate(threads):
            thread.start()
            while chat.batches._waiting.qsize() < place or chat.batches.num_batches == before:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert [together[place] for place in range(8)] == alone and chat.batches.num_batches == before + 2


def test_one_batch_writes_for_all_users_of_equal_options(
    service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is asked once for four jobs, and once more for the one of another temperature."""
    calls: list[tuple[int, float]] = []

    def counted(method: Any, prompts: list[str], *args: Any, **options: Any) -> Any:
        calls.append((len(prompts), options["temperature"]))
        return sample(method, prompts, *args, **options)

    monkeypatch.setattr("plm.serving.chat.sample", counted)
    chat = Chat(service)
    requests = [ChatRequest(messages=DRINK, user=user, **DRAWN) for user in ("anna", "ben", "zoe", None)]
    requests.append(ChatRequest(messages=DRINK, max_tokens=20, temperature=1.0))
    jobs = [chat.job(request) for request in requests]
    assert not any(isinstance(result, Exception) for result in chat._work(jobs))
    assert sorted(calls) == [(1, 1.0), (4, 1.5)]


def test_stops_lengths_and_seeds(client: httpx.Client) -> None:
    """A text ends before a stop, and counts the tokens up to it; without a seed each request draws anew."""

    def post(**options: Any) -> dict[str, Any]:
        body = {"messages": DRINK, "user": "anna", **DRAWN, **options}
        return dict(client.post("/v1/chat/completions", json=body).json())

    [whole] = contents(post())
    assert len(whole) > 10
    for stop in (whole[6:8], [whole[6:8], whole[9:]], ["not there", whole[6:8]]):
        found = post(stop=stop)
        assert contents(found) == [whole[: whole.find(whole[6:8])]]
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] == whole.find(whole[6:8]) + 2  # a token is a character
    short = post(max_tokens=3)
    assert contents(short) == [whole[:3]] and short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert len({contents(post(seed=None))[0] for _ in range(4)}) == 4
    [greedy] = {tuple(contents(post(temperature=0, n=n))) for n in (3,)}
    assert len(greedy) == 3 and len(set(greedy)) == 1
    many = post(max_tokens=None, temperature=2.0, n=16)
    assert {choice["finish_reason"] for choice in many["choices"]} <= {"stop", "length"}
    assert len(post(max_tokens=None, min_tokens=200)["choices"][0]["message"]["content"]) > 150


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"stream": True}, 400, "body.stream"),
        ({"tools": [{"type": "function"}]}, 400, "body.tools"),
        ({"tool_choice": "auto"}, 400, "body.tool_choice"),
        ({"logprobs": True}, 400, "body.logprobs"),
        ({"frequency_penalty": 0.5}, 400, "body.frequency_penalty"),
        ({"frequency_penalty": False}, 400, "body.frequency_penalty"),
        ({"stream": 0}, 400, "body.stream"),
        ({"response_format": {"type": "json_object"}}, 400, "body.response_format.type"),
        ({"reasoning_effort": "low"}, 400, "body.reasoning_effort"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "body.messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, 400, "body.messages.0.content"),
        ({"messages": []}, 400, "body.messages"),
        ({"temperature": 0.001}, 400, "body"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "body"),
        ({"min_tokens": 30}, 400, "body"),
        ({"n": 17}, 400, "body.n"),
        ({"stop": ""}, 400, None),
        ({"user": "a\n"}, 400, "body.user"),
        ({"model": "gpt-5"}, 404, None),
        ({"max_tokens": 250}, 422, "body.max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 422, "body.messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 422, "body.messages"),
        ({"max_tokens": None, "min_tokens": 250}, 422, "body.min_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    client: httpx.Client, changes: dict[str, Any], status: int, param: str | None
) -> None:
    response = client.post("/v1/chat/completions", json={"messages": DRINK, **DRAWN, **changes})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status), error
    assert param is None or error["param"] == param


def test_the_check_of_the_command_reads_texts_too(checkpoint: Path, capsys: Any, monkeypatch: Any) -> None:
    """A text for two known users, an unknown one and nobody; a server that draws by another seed is found out."""
    assert main(["serve", "--ckpt_path", str(checkpoint), "--check"]) == 0
    out = capsys.readouterr().out
    assert out == "40 of 40 requests give the rewards of plm score, to the last bit\n4 of 4 the texts of plm generate\n"
    monkeypatch.setattr(Chat, "job", lambda self, request: make_job(self, request.model_copy(update={"seed": 1})))
    assert main(["serve", "--ckpt_path", str(checkpoint), "--check"]) == 1
    out = capsys.readouterr().out
    assert "different: /v1/chat/completions for 'ben' gives ['" in out and "0 of 4 the texts of plm generate\n" in out


make_job = Chat.job


def test_a_checkpoint_of_rewards_says_what_it_answers(path: Path) -> None:
    chat = Chat(RewardService(path, name="lore"))
    with pytest.raises(RequestError, match="`lore` scores responses and writes none: it answers /classify") as caught:
        chat.complete(ChatRequest(messages=DRINK))
    assert caught.value.status == 404


def test_too_many_conversations_are_told_to_try_again(service: RewardService) -> None:
    chat = Chat(service)
    chat.places = Places(1, chat.places.message)
    with chat.places.one(), pytest.raises(RequestError, match="try again") as caught:
        chat.complete(ChatRequest(messages=DRINK, **DRAWN))
    assert caught.value.status == 429
    assert chat.complete(ChatRequest(messages=DRINK, **DRAWN)).choices


def test_a_failing_conversation_fails_alone(service: RewardService, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(method: Any, prompts: list[str], *args: Any, **options: Any) -> Any:
        if any("Tea" in prompt for prompt in prompts):
            raise ValueError("no tea")
        return sample(method, prompts, *args, **options)

    monkeypatch.setattr("plm.serving.chat.sample", refuse)
    chat = Chat(service)
    good, bad = chat._work([chat.job(ChatRequest(messages=messages, **DRAWN)) for messages in (DRINK, LONG)])
    assert not isinstance(good, Exception) and isinstance(bad, RequestError) and bad.status == 422


def test_plm_is_a_client_of_plm(client: httpx.Client) -> None:
    """`RemotePolicy`, as of --policy_url, asks with vLLM's min_tokens and top_k."""
    policy = RemotePolicy(f"{client.base_url}/v1".replace("//v1", "/v1"), template="chat")
    [texts] = policy.texts(["What to drink?"], 3, max_new_tokens=12, temperature=1.0, top_k=20, min_new_tokens=4)
    assert policy.model == "writer" and len(set(texts)) == 3 and all(len(text) >= 4 for text in texts)


def test_metrics_and_documents_name_it(client: httpx.Client) -> None:
    client.post("/v1/chat/completions", json={"messages": DRINK, **DRAWN})
    lines = client.get("/metrics").text
    assert 'plm_requests_total{route="/v1/chat/completions",status="200"' in lines and "plm_chat_batches_total" in lines
    operation = client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "422", "429", "503"} <= operation["responses"].keys()


@pytest.mark.parametrize("each", slow_but([4, 650], 4))
def test_whatever_is_sent_is_answered_as_the_document_says(client: httpx.Client, each: int) -> None:
    counts = fuzz(str(client.base_url).rstrip("/"), each, only="/v1/chat/completions")
    assert counts == {"POST /v1/chat/completions": each}
