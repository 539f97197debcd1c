"""Clients that send anything, processes that are killed, and several servers on one store."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from plm.cli import main
from plm.users import UserStore, store_path
from tests.marks import slow_but

schemathesis = pytest.importorskip("schemathesis")
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["plm.cli", "plm.methods.lore", "plm.serving.server"])
KILLS = slow_but(range(20), 0)


def pair(text: str) -> dict[str, Any]:
    return {"pairs": [{"prompt": "p", "chosen": text, "rejected": "bad"}]}


# ---------------------------------------------------------------------- anything
def without_limits(document: Any) -> Any:
    """A document without the largest sizes of texts and lists: to break these by chance takes long."""
    if isinstance(document, dict):
        left_out = ("maxLength", "maxItems")
        return {key: without_limits(value) for key, value in document.items() if key not in left_out}
    return [without_limits(value) for value in document] if isinstance(document, list) else document


def fuzz(url: str, each: int, only: str = "") -> dict[str, int]:
    """Send made-up requests, so many to each operation that takes something; operation -> how many were sent.

    Args:
        url: The server.
        each: How many.
        only: A path; default: all.

    Raises:
        AssertionError: If one is answered by 5xx, by something that the document does not name, or not at all.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS

    schema = schemathesis.openapi.from_dict(without_limits(httpx.get(f"{url}/openapi.json").json()))
    operations = [operation.ok() for operation in schema.get_all_operations()]
    operations = [operation for operation in operations if only in ("", operation.path)]
    names = ["not_a_server_error", "status_code_conformance", "response_schema_conformance", "content_type_conformance"]
    checks = CHECKS.get_by_names([*names, "negative_data_rejection"])
    counts = {operation.label: 0 for operation in operations}
    for operation in operations:
        takes_any = operation.body or operation.path_parameters
        modes = list(GenerationMode) if takes_any else [GenerationMode.POSITIVE]

        @settings(
            max_examples=each if takes_any else 1,
            database=None,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
        def send(case: Any) -> None:
            counts[case.operation.label] += 1
            case.call_and_validate(base_url=url, checks=checks, timeout=30)

        send()
    return counts


@pytest.mark.filterwarnings("ignore:.* pairs have the same features on both sides")  # made-up words of no letters
@pytest.mark.parametrize("each", slow_but([4, 650], 4))
def test_whatever_is_sent_is_answered_as_the_document_says(client: httpx.Client, each: int) -> None:
    """The slow run sends more than 5,000 requests."""
    counts = fuzz(str(client.base_url).rstrip("/"), each)
    assert len(counts) == 15 and all(count in (1, each) for count in counts.values()), counts


# ---------------------------------------------------------------------- kills and races
def serve_until_killed(path: str, port: int, users: str | None) -> None:
    """Serve, from a process that may hold few files open to begin with."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    place = [] if users is None else ["--users", users]
    sys.exit(main(["serve", "--ckpt_path", path, "--port", str(port), "--model_name", "lore", *place]))


@contextmanager
def server_of(path: Path, users: str | None = None) -> Iterator[tuple[BaseProcess, httpx.Client]]:
    """``plm serve`` in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = CLEAN.Process(target=serve_until_killed, args=(str(path), port, users))
    process.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(3_000):
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    assert process.is_alive()
                    time.sleep(0.02)
            else:
                pytest.fail("the server never answered")
            yield process, client
    finally:
        process.kill()
        process.join()


def in_threads(*works: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("seed", KILLS)
def test_a_killed_server_loses_nothing_that_it_acknowledged(path: Path, seed: int) -> None:
    """Each of three clients learns and deletes a user of its own, over and over, until the server is gone."""
    possible: dict[str, set[int]] = {f"user-{number}": {0} for number in range(3)}  # numbers of pairs, 0 = unknown

    acknowledged: list[str] = []

    def change(client: httpx.Client, name: str) -> None:
        draw, count = random.Random(f"{seed} {name}"), 0
        with suppress(httpx.TransportError):
            for turn in range(1000):
                after = 0 if draw.random() < 0.2 else count + 1
                possible[name] = {count, after}
                where = client.base_url.join(f"/v1/users/{name}")
                if after:
                    assert httpx.post(f"{where}/pairs", json=pair(f"good {turn}")).json()["num_pairs"] == after
                else:
                    assert httpx.delete(where).status_code == 200
                possible[name], count = {after}, after
                acknowledged.append(name)

    with server_of(path) as (process, client):
        threads = in_threads(*[partial(change, client, name) for name in possible])
        while len(acknowledged) < random.Random(seed).randrange(3, 30):
            assert any(thread.is_alive() for thread in threads)
            time.sleep(0.001)
        process.kill()
        for thread in threads:
            thread.join()
    store = UserStore(store_path(path))
    for name, counts in possible.items():
        found = store.find(name)
        assert (0 if found is None else found.num_pairs) in counts
        assert len(store.pairs([name]).get(name, ())) == (0 if found is None else found.num_pairs)
    assert {"ben", "eva"} <= set(store.ids)


@pytest.mark.parametrize("num_pairs", slow_but([5, 50], 5))
def test_two_servers_on_one_store_lose_no_pair(path: Path, num_pairs: int) -> None:
    def teach(client: httpx.Client, name: str) -> None:
        for turn in range(num_pairs):
            assert client.post("/v1/users/shared/pairs", json=pair(f"{name} {turn}")).status_code == 200

    with server_of(path) as (_, one), server_of(path) as (_, other):
        for thread in in_threads(partial(teach, one, "one"), partial(teach, other, "other")):
            thread.join()
        assert one.get("/v1/users/shared").json() == other.get("/v1/users/shared").json()
        assert one.get("/v1/users/shared").json()["num_pairs"] == 2 * num_pairs
        assert one.delete("/v1/users/shared").json()["was_stored"]
        assert other.get("/v1/users/shared").status_code == 404


def test_what_has_begun_is_answered_when_the_server_is_told_to_stop(path: Path) -> None:
    body = b'{"input": "strong tea"}'
    with server_of(path) as (process, client):
        assert client.base_url.port
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as begun:
            head = "POST /classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}"
            begun.sendall(f"{head}\r\n\r\n".encode() + body[:5])
            time.sleep(0.2)
            process.terminate()
            time.sleep(0.2)
            begun.sendall(body[5:])
            assert begun.recv(1000).startswith(b"HTTP/1.1 200")
        process.join(30)
        assert process.exitcode in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_workers_share_the_users(path: Path) -> None:
    """Two processes behind one port: what is learned by one is known by both, and metrics name the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "plm", "serve", "--ckpt_path", str(path), "--port", str(port), "--workers", "2"]
    process = subprocess.Popen(command)
    try:
        url, workers, deadline = f"http://127.0.0.1:{port}", set(), time.monotonic() + 200
        while len(workers) < 2 and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                workers.add(httpx.get(f"{url}/metrics").text.rsplit('worker="', 1)[1].split('"')[0])
        assert len(workers) == 2
        for turn in range(20):
            assert httpx.post(f"{url}/v1/users/anna/pairs", json=pair(f"good {turn}")).json()["num_pairs"] == turn + 1
    finally:
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)
