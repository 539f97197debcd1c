"""Work that workers of Ray do, on this machine or a cluster: texts encoded into a cache, and commands by shares.

A worker writes files itself, so that what is done stays done whoever is killed.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from plm.data.features import FeatureCache

CPUS = 0.5
"""CPUs that a worker asks for: tasks that hand out texts need some, too, and would wait for ever."""
RETRIES = 3
"""How often a share is run again whose worker dies."""
BLOCK_TEXTS = (64, 2048)
"""Fewest and most texts that a worker is given at once; what it loses when it is killed is a shard of them."""


def encode_by_ray(cache: FeatureCache, texts: list[str], workers: int | None = None) -> Iterator[int]:
    """Encode rendered texts by an actor pool of Ray Data; a worker that dies is replaced, and its texts given again.

    Args:
        cache: What is filled; workers must see its folder.
        texts: Rendered texts.
        workers: How many; None = one for each GPU, or for each CPU but one.

    Yields:
        How many texts are done since the last number.

    Raises:
        ValueError: If there are more workers than there is room for, or one of them cannot encode a text.
    """
    with _running():
        yield from _encode(cache, texts, workers)


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    output: str
    errors: str


def run_shares(command: Sequence[str], workers: int | None = None) -> Iterator[Ended]:
    """Run a command of plm once for each worker, a share each; where a worker dies, its share is run again.

    Args:
        command: Verb and options without ``--shard``; the files and folders that it names must be at the same place
            for all workers.
        workers: How many; None = one for each GPU, or for each CPU but one.

    Yields:
        What each share printed, in their order.

    Raises:
        ValueError: If there are more workers than there is room for.
    """
    with _running():
        import ray

        size, gpus = _room(workers)
        task = ray.remote(num_cpus=CPUS, num_gpus=min(1.0, gpus / size), max_retries=RETRIES)(_run)
        shares = [[*command, "--shard", f"{index}/{size}"] for index in range(1, size + 1)]
        for ended in [task.remote(share, os.getcwd()) for share in shares]:
            yield ray.get(ended)


def _run(command: Sequence[str], folder: str) -> Ended:
    """Run a command of plm to its end."""
    ended = subprocess.run([sys.executable, "-m", "plm", *command], cwd=folder, capture_output=True, text=True)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@contextmanager
def _running() -> Iterator[None]:
    """A Ray that runs: the one that is there, or one of our own while the block lasts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()


def _room(workers: int | None) -> tuple[int, float]:
    """How many workers there are to be, and how many GPUs for all of them.

    Raises:
        ValueError: If there is no room for as many.
    """
    import ray

    room = ray.cluster_resources()
    cpus, gpus = room.get("CPU", 0.0), room.get("GPU", 0.0)
    size = workers or int(gpus) or max(1, int(cpus) - 1)
    if workers is None and cpus < 2:
        raise ValueError(
            f"--engine ray: expected two CPUs or more, got {cpus:g}; leave it out, and this process does the work"
        )
    if size * CPUS > cpus - 1:
        raise ValueError(
            f"--workers: expected at most {int((cpus - 1) / CPUS)} where Ray has {cpus:g} CPUs, of which a worker "
            f"takes {CPUS} and other tasks one, got {size}"
        )
    return size, gpus


def _encode(cache: FeatureCache, texts: list[str], workers: int | None) -> Iterator[int]:
    """Encode in a Ray that runs."""
    import ray

    size, gpus = _room(workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # plans, and that there is no bar
    step = int(np.clip(-(-len(texts) // (4 * size)), *BLOCK_TEXTS))
    parts = [texts[start : start + step] for start in range(0, len(texts), step)]
    kind = pa.schema({"text": pa.large_binary()})  # a text may hold half of a character, which has no UTF-8
    blocks = [pa.table({"text": [text.encode("utf-8", "surrogatepass") for text in part]}, kind) for part in parts]
    done = ray.data.from_arrow(blocks).map_batches(
        _Worker,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=size),
        fn_constructor_args=(cache,),
        num_cpus=CPUS,
        num_gpus=min(1.0, gpus / size),
    )
    for row in done.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        yield row["count"]


class _Worker:
    """A process that encodes."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def __call__(self, block: pa.Table) -> pa.Table:
        """Encode a block of texts; Ray would try again what raises, or show where in its own code it was raised."""
        texts = [text.decode("utf-8", "surrogatepass") for text in block["text"].to_pylist()]
        try:
            self.cache.encode(texts)
        except ValueError as error:
            return pa.table({"count": [0], "error": [str(error)]})
        return pa.table({"count": [len(texts)], "error": [""]})
