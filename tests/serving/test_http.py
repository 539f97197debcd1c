"""The server as its clients see it: vLLM's and OpenRLHF's, and some that mean no good."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from plm.cli import main
from plm.serving import gate, server
from plm.serving.app import make_app
from plm.serving.check import check
from plm.serving.server import Settings, running
from plm.serving.service import RewardService
from plm.users import StoreError, UserStore, store_path

PAIRS = {"pairs": [{"prompt": "What to drink?", "chosen": "strong tea", "rejected": "black coffee"}]}
JSON = {"content-type": "application/json"}


@pytest.fixture
def narrow(service: RewardService) -> Iterator[httpx.Client]:
    """A server with a key, and room for one request of 1000 bytes that comes within 0.3 s."""
    app = make_app(service, keys=["k" * 16], max_body=1000, max_queue=1, body_seconds=0.3)
    with running(app) as url, httpx.Client(base_url=url, headers={"authorization": "Bearer " + "k" * 16}) as made:
        yield made


def problem(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, message and parameter of an error, whose body is that of vLLM's."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == response.status_code
    return response.status_code, error["message"], error["param"]


def sooner_or_later(holds: Callable[[], bool]) -> None:
    """Wait until something holds that another thread is about to bring about."""
    for _ in range(2_000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it never held")


# ---------------------------------------------------------------------- clients of others
def test_a_client_of_vllm(client: httpx.Client, service: RewardService) -> None:
    """The bodies of vLLM's documentation, and what it finds in the responses."""
    body = {
        "model": "lore",
        "input": ["strong tea", "black coffee"],
        "user": "ben",
        "use_activation": False,
        "truncate_prompt_tokens": -1,
        "priority": 0,
        "add_special_tokens": True,
        "request_id": "mine",
    }
    found = client.post("/classify", json=body).json()
    assert found["id"] == "classify-mine" and found["object"] == "list" and found["model"] == "lore"
    expected = service.method.score(body["input"], user_id="ben").tolist()
    assert [(entry["index"], entry["probs"], entry["num_classes"]) for entry in found["data"]] == [
        (0, [expected[0]], 1),
        (1, [expected[1]], 1),
    ]
    assert found["usage"].keys() >= {"prompt_tokens", "total_tokens"}
    chat = {"messages": [{"role": "user", "content": "Drink?"}, {"role": "assistant", "content": "strong tea"}]}
    assert client.post("/classify", json={**chat, "user": "ben"}).json()["data"][0]["probs"] == [expected[0]]
    score = {"model": "", "text_1": "Drink?", "text_2": body["input"], "user": "ben"}
    for path in ("/score", "/v1/score"):
        found = client.post(path, json=score).json()
        assert [entry["score"] for entry in found["data"]] == expected
        assert found["data"][0]["object"] == "score" and found["id"].startswith("score-")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["lore"]
    health = client.get("/health")
    assert health.status_code == 200 and health.content == b""


def test_a_client_of_openrlhf(client: httpx.Client, service: RewardService) -> None:
    body = {"query": ["Drink? strong tea"], "prompts": ["Drink? "], "labels": [None]}
    found = client.post("/get_reward", params={"user": "ben"}, json=body).json()
    assert found["rewards"] == found["scores"] == service.method.score(["strong tea"], user_id="ben").tolist()
    assert found["extra_logs"] == {"user_known": [1.0]}
    empty = client.post("/get_reward", json={"query": ["Drink? "], "prompts": ["Drink? "], "labels": ["x"]})
    assert empty.json() == {"rewards": [0.0], "scores": [0.0], "extra_logs": {"user_known": [0.0]}}  # no words


# ---------------------------------------------------------------------- users
def test_a_user_is_learned_read_and_forgotten(client: httpx.Client, path: Path) -> None:
    """Whatever characters the id has; another process knows the user as soon as the answer is there."""
    asked = {"pool": [{"prompt": "p", "responses": ["strong tea", "water"]}]}
    for user_id in ("anna", "a/b", "x/pairs", "..", "Ännä 水", "50%", "%2F", "?user=ben", "ben#"):
        where = f"/v1/users/{quote(user_id, safe='')}".replace("/..", "/%2E%2E")
        assert client.get(where).status_code == 404
        learned = client.post(f"{where}/pairs", json=PAIRS).json()
        assert (learned["user"], learned["num_pairs"], learned["served"]) == (user_id, 1, "personal")
        assert user_id in UserStore(store_path(path)) and client.get(where).json() == learned
        assert client.post(f"{where}/next-question", json=asked).json()["user_known"]
        gone = client.delete(where).json()
        assert gone["was_stored"] and gone["is_wiped"] and len(gone["receipt"]) == 64
        assert client.get(where).status_code == 404 and user_id not in UserStore(store_path(path))
        assert not client.delete(where).json()["was_stored"]


def test_what_cannot_be_an_id_is_refused(client: httpx.Client) -> None:
    for name in ("%00", "%ff", "%0A", "a" * 513, "%E2%80%AE", "%20"):
        for response in (client.get(f"/v1/users/{name}"), client.post(f"/v1/users/{name}/pairs", json=PAIRS)):
            assert problem(response)[0] == 400, name
        assert problem(client.post(f"/get_reward?user={name}", json={"query": ["a"], "prompts": [""]}))[0] == 400, name


def test_pairs_that_were_not_kept_are_a_conflict(client: httpx.Client) -> None:
    status, message, _ = problem(client.post("/v1/users/ben/pairs", json=PAIRS))
    assert status == 409 and "were not kept" in message
    assert client.post("/v1/users/ben/pairs", json={**PAIRS, "anew": True}).json()["num_pairs"] == 1


def test_a_store_that_cannot_be_read_is_unavailable(
    client: httpx.Client, service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise StoreError("the user store cannot be read")

    monkeypatch.setattr(type(service.method.users), "get", fail)
    assert problem(client.post("/classify", json={"input": "x"}))[:2] == (503, "the user store cannot be read")


# ---------------------------------------------------------------------- what is refused
BAD = [
    (b'{"input": NaN}', None),
    (b'{"input": "x", "priority": -Infinity}', None),
    (b'{"input": "\\ud800"}', None),
    (b'{"input": "x", "\\udfff": 1}', None),
    (b'{"input": "x", "input": "y"}', None),
    (b'{"input": "\xff"}', None),
    (b"", None),
    (b"[" * 100_000, None),
    (b"1" * 5000, None),
    (b"5", "body"),
    (b'{"input": "x", "usr": "ben"}', "body.usr"),
    (b'{"input": 1}', "body.input"),
    (b'{"input": [1, 2]}', "body.input"),
    (b'{"input": "x", "use_activation": true}', "body.use_activation"),
    (b'{"input": "x", "user": "a\\u0000"}', "body.user"),
]
"""Bodies, and the field that is named."""


def test_bad_bodies_are_errors_of_the_sender(client: httpx.Client) -> None:
    for body, param in BAD:
        status, message, where = problem(client.post("/classify", content=body, headers=JSON))
        assert (status, where) == (400, param) and len(message) < 500, body
        assert client.post("/classify", json={"input": "x"}).status_code == 200


def test_limits_models_and_addresses(client: httpx.Client) -> None:
    def status(method: str, where: str, **options: Any) -> int:
        return problem(client.request(method, where, **options))[0]

    assert status("POST", "/classify", json={"input": ["x"] * 2049}) == 422
    assert status("POST", "/classify", json={"input": "x" * 200_001}) == 422
    assert status("POST", "/classify", content=b"x" * 10_000_000, headers=JSON) == 413
    assert status("POST", "/classify", content=iter([b"x" * 10**6] * 10), headers=JSON) == 413  # of unknown length
    assert status("POST", "/classify", content=b"{}", headers={"content-type": "text/plain"}) == 415
    unknown = problem(client.post("/classify", json={"input": "x", "model": "gpt-2"}))
    assert unknown == (404, "The model `gpt-2` does not exist.", None)
    assert status("POST", "/classify?user=ben", json={"input": "x"}) == 400
    assert status("POST", "/get_reward?user=a&user=b", json={"query": ["a"], "prompts": ["a"]}) == 400
    assert status("GET", "/classify") == 405 and status("GET", "/nope") == 404 and status("GET", "/v1/users/") == 404


def test_keys(narrow: httpx.Client) -> None:
    assert narrow.get("/v1/models").status_code == 200
    for key in ("", "Bearer", "Bearer wrong", "Basic " + "k" * 16, "Bearer " + "k" * 17):
        response = narrow.get("/v1/models", headers={"authorization": key})
        assert problem(response)[0] == 401 and response.headers["www-authenticate"] == "Bearer"
        assert narrow.get("/health", headers={"authorization": key}).status_code == 200


def test_a_page_of_another_host_is_not_let_in(client: httpx.Client, narrow: httpx.Client) -> None:
    """Whose name resolves to this machine, so that a browser takes it for the same origin; keys let everybody in."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:8000"):
        assert problem(client.get("/v1/users", headers={"host": host}))[0] == 403
        assert narrow.get("/v1/users", headers={"host": host}).status_code == 200
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "127.8.8.8"):
        assert client.get("/v1/users", headers={"host": host}).status_code == 200


def test_a_full_queue_and_slow_bodies(
    narrow: httpx.Client, service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is worked on takes the only place; one whose body does not come takes none."""
    place = urlsplit(str(narrow.base_url))
    head = b"POST /classify HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer kkkkkkkkkkkkkkkk\r\n"
    head += b"content-type: application/json\r\ncontent-length: 14\r\n\r\n"
    body = b'{"input": "x"}'
    assert place.hostname and place.port
    with service.method.one_thread(), socket.create_connection((place.hostname, place.port)) as first:
        first.sendall(head + body)
        sooner_or_later(lambda: narrow.post("/classify", json={"input": "x"}).headers.get("retry-after") == "1")
        assert problem(narrow.post("/classify", json={"input": "x"}))[0] == 429
        assert narrow.get("/health").status_code == 200
    sooner_or_later(lambda: narrow.post("/classify", json={"input": "x"}).status_code == 200)
    with socket.create_connection((place.hostname, place.port)) as slow:
        slow.sendall(head + body[:3])
        assert narrow.post("/classify", json={"input": "x"}).status_code == 200
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        while slow.recv(1000):
            pass  # it is closed


def test_a_client_that_does_not_read_gives_up_its_place(service: RewardService) -> None:
    """An answer of more than the system holds for a connection is waited for, for a while."""
    big = make_app(service, max_queue=1, body_seconds=0.3)
    pool = [{"responses": [letter * 190_000, letter * 180_000]} for letter in "abcdefghij"]
    body = json.dumps({"pool": pool, "num_pairs": 10}).encode()
    with running(big) as url, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", urlsplit(url).port))
        head = "POST /v1/users/a/next-question HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        lazy.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert lazy.recv(12) == b"HTTP/1.1 200"
        sooner_or_later(lambda: httpx.post(f"{url}/classify", json={"input": "x"}).status_code == 200)


def test_many_who_learn_leave_threads_for_rewards(
    client: httpx.Client, service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the database hangs, 16 wait for it; the others are told to try again, and rewards come."""
    hangs = threading.Event()
    monkeypatch.setattr(type(service.method), "forget", lambda *_: hangs.wait(20))
    statuses: list[int] = []

    def forget() -> None:
        statuses.append(httpx.delete(client.base_url.join("/v1/users/a"), timeout=60).status_code)

    threads = [threading.Thread(target=forget) for _ in range(45)]
    for thread in threads:
        thread.start()
    sooner_or_later(lambda: len(statuses) == 45 - 16)
    assert set(statuses) == {429} and client.post("/classify", json={"input": "x"}).status_code == 200
    hangs.set()
    for thread in threads:
        thread.join()


def test_connections_without_a_request_are_closed(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    place = urlsplit(str(client.base_url))
    assert place.hostname and place.port
    idle = [socket.create_connection((place.hostname, place.port)) for _ in range(100)]
    for number, connection in enumerate(idle):
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\nx-" if number % 2 else b"")
    assert client.post("/classify", json={"input": "x"}).status_code == 200
    assert all(connection.recv(1) == b"" for connection in idle)
    for connection in idle:
        connection.close()


# ---------------------------------------------------------------------- what is told
def test_the_log_has_ids_of_requests_and_neither_texts_nor_users(
    client: httpx.Client, service: RewardService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    body = {"input": "secret words", "user": "secret-person"}
    answer = client.post("/classify", json=body, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert len(client.get("/v1/users/secret-person", headers={"x-request-id": "a b"}).headers["x-request-id"]) == 32

    def fail(*args: Any) -> Any:
        raise KeyError(body["input"])

    monkeypatch.setattr(type(service.method.text_encoder), "__call__", fail)
    status, message, _ = problem(client.post("/classify", json=body))
    assert status == 500 and "secret" not in message
    sooner_or_later(lambda: any("KeyError" in record.getMessage() for record in caplog.records))
    ours = [record for record in caplog.records if not record.name.startswith("httpx")]
    assert any("abc-1 POST /classify 200" in record.getMessage() for record in ours)
    told = [record.getMessage() for record in ours if "secret" in record.getMessage() or record.exc_info]
    assert told == []


def test_metrics_count(client: httpx.Client) -> None:
    for body in ({"input": "x"}, {"input": "x"}, {"inptu": "x"}):
        client.post("/classify", json=body)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    (worker,) = {name.split('worker="')[1].split('"')[0] for name in lines}
    assert lines[f'plm_requests_total{{route="/classify",status="200",worker="{worker}"}}'] == "2"
    assert lines[f'plm_requests_total{{route="/classify",status="400",worker="{worker}"}}'] == "1"
    assert lines[f'plm_request_seconds_bucket{{le="+Inf",route="/classify",worker="{worker}"}}'] == "3"
    assert int(lines[f'process_resident_memory_bytes{{worker="{worker}"}}']) > 10**7


def test_the_document_names_all_that_is_answered(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/classify", "/score", "/get_reward", "/v1/rewards", "/v1/users/{user_id}/pairs"} <= document[
        "paths"
    ].keys()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {"400", "401", "413", "422", "429", "500"} <= operation["responses"].keys()
    assert "HTTPValidationError" not in document["components"]["schemas"]


# ---------------------------------------------------------------------- the command
def test_the_check_of_the_command(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main(["serve", "--ckpt_path", str(path), "--check"]) == 0
    assert capsys.readouterr().out == "40 of 40 requests give the rewards of plm score, to the last bit\n"
    found = check(Settings(str(path)))
    assert {one.user for one in found} == {"ben", "eva", "nobody who is known", None}
    assert len({tuple(one.found) for one in found}) == 9  # three prompts for three states
    monkeypatch.setattr("fastapi.Request.json", _changed)
    assert main(["serve", "--ckpt_path", str(path), "--check"]) == 1
    assert "different: /score for 'ben' gives" in capsys.readouterr().out


async def _changed(self: Any) -> Any:
    """A server that takes everybody for eva in /score."""
    value = json.loads(await self.body())
    return {**value, "user": "eva"} if "documents" in value else value


def test_threads_do_not_spin_between_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells them so is set before torch reads it, unless somebody has set it."""
    seen: list[str] = []
    monkeypatch.setattr(server, "serve", lambda *_: seen.append(os.environ["OMP_WAIT_POLICY"]))
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main(["serve", "--ckpt_path", "x.ckpt"]) == 0
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["serve", "--ckpt_path", "x.ckpt"]) == 0
    assert seen == ["active", "passive"]


@pytest.mark.parametrize(
    ("lines", "is_fine"),
    [("# mine\n\nabcdefghijklmnop\n", True), ("", False), ("short\n", False), ("a" * 16 + " b", False)],
)
def test_files_of_keys(path: Path, tmp_path: Path, lines: str, is_fine: bool, capsys: Any) -> None:
    (tmp_path / "keys").write_text(lines)
    settings = Settings(str(path), api_keys=str(tmp_path / "keys"))
    if is_fine:
        assert settings.app().digests == {gate._digest("abcdefghijklmnop")}  # type: ignore[attr-defined]
    else:
        with pytest.raises(ValueError, match="--api_keys: expected a file with a key a line"):
            settings.app()
