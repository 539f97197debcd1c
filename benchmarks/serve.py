"""A served checkpoint with many users under load: how long requests take, how many there can be, what learning costs.

Usage: python benchmarks/serve.py [--users 1000000] [--rate 50] [--seconds 20] [--minilm]

``plm serve`` runs in a process of its own with features of hashed words and LoRe's state of 8 weights. The client sends
requests of 8 texts for random users: first at a fixed rate, each at its time whether the ones before are answered or
not; then as fast as 16 connections take them. Then users are learned from one pair each, which is on the disk when the
answer comes. The stub is a bare FastAPI application that reads the same bodies and answers zeros; "processor" is the
time that a server computes for a request. With ``--minilm`` the texts are encoded by MiniLM inside the server, against
``SentenceTransformer.encode`` alone.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from plm.backbones import Backbone, HashingBackbone, HFBackbone
from plm.methods.lore import LoRe
from plm.testing import saved
from plm.types import UserState
from plm.users import UserStore, store_path

WORDS = "strong tea with milk black coffee a long walk by the sea and films for an evening with friends at home".split()
TEXTS, BASES, CONNECTIONS = 8, 8, 16
LIMITS = httpx.Limits(max_connections=CONNECTIONS)
STUB = """
import sys
import uvicorn
from fastapi import FastAPI
from plm.serving.bodies import Classified, ClassifyRequest, ClassifyResponse
app = FastAPI()
@app.post("/classify")
def classify(request: ClassifyRequest) -> ClassifyResponse:
    entry = {"probs": [0.0], "user_known": True, "global_reward": 0.0}
    data = [Classified(index=index, **entry) for index in range(len(request.input))]
    return ClassifyResponse(id="", created=0, model="", data=data)
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


def text(draw: random.Random) -> str:
    """Twenty words."""
    return " ".join(draw.choices(WORDS, k=20)) + f" {draw.random():.6f}"


@contextmanager
def checkpoint(backbone: Backbone, num_users: int) -> Iterator[Path]:
    """A checkpoint of random bases, with so many users in its store."""
    torch.manual_seed(0)
    method = LoRe(1, backbone.feature_dim, backbone=backbone.spec(), num_bases=BASES)
    torch.nn.init.normal_(method.bases)
    with saved(method) as path:
        store = UserStore(store_path(path))
        state = method.population_state(100_000)
        for start in range(0, num_users, 100_000):
            count = min(100_000, num_users - start)
            drawn = {**state.tensors, "weights": torch.randn(len(state.num_pairs), BASES)}
            users = UserState(drawn, state.num_pairs + 10).take(torch.arange(count))
            store.add([f"user-{number}" for number in range(start, start + count)], users)
        yield path


@contextmanager
def server(path: Path | None) -> Iterator[tuple[str, float, int]]:
    """``plm serve``, or the stub: its address, the seconds until it answered, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    serve = [sys.executable, "-m", "plm", "serve", "--ckpt_path", str(path), "--port", port]
    command = [sys.executable, "-c", STUB, port] if path is None else serve
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while True:
                with suppress(httpx.TransportError):
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                if process.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}", time.perf_counter() - began, process.pid
        finally:
            process.terminate()
            process.wait()


def resident(process: int) -> float:
    """Resident memory of a process in GB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def processor_seconds(process: int) -> float:
    """What a process has used of the processors."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def at_rate(send: Callable[[], None], rate: float, seconds: float) -> np.ndarray:
    """Milliseconds of each request, from the time at which it was to be sent: waiting counts."""
    took: list[float] = []
    began = time.perf_counter() + 0.5

    def one(turn: int) -> None:
        due = began + turn / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        send()
        took.append(1000 * (time.perf_counter() - due))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(one, range(round(rate * seconds))))
    return np.array(took)


def at_once(send: Callable[[], None], seconds: float) -> float:
    """Requests per second that all connections together get through."""
    end = time.perf_counter() + seconds

    def some(_: int) -> int:
        count = 0
        while time.perf_counter() < end:
            send()
            count += 1
        return count

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return sum(pool.map(some, range(CONNECTIONS))) / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--minilm", action="store_true", help="MiniLM of PLM_ENCODER instead of hashed words")
    options = parser.parse_args()
    backbone: Backbone = HashingBackbone(dim=512)
    if options.minilm:
        backbone = HFBackbone(os.environ["PLM_ENCODER"])
    draw, table = random.Random(0), Table("what", "measured", title=f"{options.users:,} users, {TEXTS} texts a request")
    began = time.perf_counter()
    with checkpoint(backbone, options.users) as path:
        print(f"{options.users:,} users stored in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        for name, served in (("stub", None), ("plm serve", path)):
            with (
                server(served) as (url, seconds, process),
                httpx.Client(base_url=url, timeout=60, limits=LIMITS) as client,
            ):
                table.add_row(f"{name}: start, until it answers", f"{seconds:.1f} s, {resident(process):.2f} GB")

                def classify(client: httpx.Client = client) -> None:
                    user = f"user-{draw.randrange(options.users)}"
                    body = {"input": [text(draw) for _ in range(TEXTS)], "user": user}
                    client.post("/classify", json=body).raise_for_status()

                def learn(client: httpx.Client = client) -> None:
                    pair = {"prompt": "p", "chosen": text(draw), "rejected": text(draw)}
                    where = f"/v1/users/new-{draw.random()}/pairs"
                    client.post(where, json={"pairs": [pair]}).raise_for_status()

                sends: list[tuple[str, Callable[[], None], float]] = [("/classify", classify, options.rate)]
                if served is not None:
                    sends.append(("learn one pair, durable", learn, 5.0))
                for what, send, rate in sends:
                    for _ in range(20):
                        send()
                    used = processor_seconds(process)
                    took = at_rate(send, rate, options.seconds)
                    used = 1000 * (processor_seconds(process) - used) / len(took)
                    shown = (
                        f"p50 {np.quantile(took, 0.5):.1f}, p99 {np.quantile(took, 0.99):.1f}, processor {used:.1f} ms"
                    )
                    table.add_row(f"{name}: {what} at {rate:g} requests/s", shown)
                used, most = processor_seconds(process), at_once(classify, options.seconds)
                used = 1000 * (processor_seconds(process) - used) / max(1, most * options.seconds)
                shown = f"{most:.0f} requests/s, {most * TEXTS:.0f} texts/s, processor {used:.1f} ms"
                table.add_row(f"{name}: /classify, saturated", shown)
                table.add_row(f"{name}: memory at the end", f"{resident(process):.2f} GB")
    if options.minilm:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(os.environ["PLM_ENCODER"], device="cpu")
        texts = [text(draw) for _ in range(500)]
        model.encode(texts[:64])
        began, used = time.perf_counter(), time.process_time()
        model.encode(texts, batch_size=64)
        alone, used = (
            len(texts) / (time.perf_counter() - began),
            1000 * TEXTS * (time.process_time() - used) / len(texts),
        )
        shown = f"{alone:.0f} texts/s, processor {used:.1f} ms for {TEXTS}; served {most * TEXTS / alone:.2f}x"
        table.add_row("SentenceTransformer.encode alone", shown)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
