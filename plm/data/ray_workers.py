"""Texts that workers of Ray encode into a cache, on this machine or a cluster.

A worker writes the shards of `plm.data.features` itself, so that what is done stays done whoever is killed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from plm.data.features import FeatureCache

CPUS = 0.5
"""CPUs that a worker asks for: tasks that hand out texts need some, too, and would wait for ever."""
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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield from _encode(cache, texts, workers)
    finally:
        if is_ours:
            ray.shutdown()


def _encode(cache: FeatureCache, texts: list[str], workers: int | None) -> Iterator[int]:
    """Encode in a Ray that runs."""
    import ray

    room = ray.cluster_resources()
    cpus, gpus = room.get("CPU", 0.0), room.get("GPU", 0.0)
    size = workers or int(gpus) or max(1, int(cpus) - 1)
    if workers is None and cpus < 2:
        raise ValueError(
            f"--engine ray: expected two CPUs or more, got {cpus:g}; leave it out, and this process encodes"
        )
    if size * CPUS > cpus - 1:
        raise ValueError(
            f"--workers: expected at most {int((cpus - 1) / CPUS)} where Ray has {cpus:g} CPUs, of which a worker "
            f"takes {CPUS} and other tasks one, got {size}"
        )
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
