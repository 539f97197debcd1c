"""Many users: seconds and peak memory of learning, scoring and refreshing them, at growing sizes.

Usage: python benchmarks/scale.py [--only fit open adapt skewed score refresh features] [--bases 8]
       [--users 20000 100000 1000000]

``plm fit``, ``plm adapt`` and ``plm score`` run as commands on Parquet files, with hashed words of width 256 and LoRe:
10 pairs of each user, out of 200,000 distinct texts, in which planted tastes choose; scored is one response of each
user, all of whom are known. "fit" reads, splits, encodes, trains for 3 epochs in batches of about 20,000 pairs, solves
all seen users and tests, few-shot curve and controls included; what it found of unseen users is printed beside it.
"skewed" is 1,000 users of whom one has 4,000 pairs and the others one each. "refresh" is `LoRe.refresh_users`, which
solves all seen users at every candidate spread: once per validation of a fit. "open" reads and checks the pairs as
JSONL and as CSV, beside the time that Arrow alone takes to read the file. Every size is a process of its own; its peak
is what the operating system says of it (``ru_maxrss``), 0.5 GB of libraries included. "score" is timed beside "encode",
the time that the same texts take to become features. "features" is a cache of so many texts, of width 384, in both
precisions, and batches of 4,096 in random order until all are read: from memory, where a fit holds features up to 1
GiB, and from files that are mapped into memory, where it finds more. The operating system counts what it keeps of such
files, and gives it up when memory is short; "own" is what a process holds without them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

DIM, PAIRS, TEXTS, SKEWED = 256, 10, 200_000, 4_000
WORDS, TRAITS = 250, 4
"""Of how many words texts are made, and how many numbers say what a user thinks of a word."""
CACHED_DIM, SHARD = 384, 1_000
"""Width of cached features, and how many texts are in a file."""
ROWS = 500_000
"""Rows of a Parquet file that are made at once."""
RECIPE = """
defaults: [{{backbone: hashing}}, {{trainer: cpu}}, {{logger: csv}}]
model:
  class_path: plm.methods.lore.LoRe
  init_args: {{num_bases: {bases}}}
data:
  source: {{class_path: plm.data.sources.pairs.PairFiles, init_args: {{path: {folder}/file.parquet}}}}
  backbone: {{init_args: {{dim: {dim}}}}}
  cache_dir: {folder}/cache
  batch_size: 20000
trainer: {{max_epochs: 3, check_val_every_n_epoch: 3, default_root_dir: {folder}/runs}}
"""


class Run(NamedTuple):
    """What a process needed."""

    seconds: float
    processor: float
    """Seconds of all cores."""
    peak: float
    """Resident memory at its most, in GB."""
    output: str


def run(*command: str) -> Run:
    """Run a command to its end.

    Raises:
        SystemExit: If it fails.
    """
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9, output)


def child(what: str, *arguments: object) -> Run:
    """Run a function of this file in a process of its own; whoever starts a process lends it the memory it has."""
    return run(sys.executable, __file__, "--child", what, *map(str, arguments))


# ---------------------------------------------------------------------- in processes of their own
def make_checkpoint(path: str, bases: str, users: str) -> None:
    """A checkpoint of random bases that knows so many users."""
    import torch

    from plm.backbones import HashingBackbone
    from plm.methods.lore import LoRe
    from plm.testing import saved
    from plm.types import UserState
    from plm.users import UserStore, shared_hash, store_path

    torch.manual_seed(0)
    method = LoRe(1, DIM, backbone=HashingBackbone(dim=DIM).spec(), num_bases=int(bases))
    torch.nn.init.normal_(method.bases)
    with saved(method) as made:
        shutil.copy(made, path)
    store = UserStore(store_path(path), shared_hash(method.state_dict(), method.user_tables))
    for start in range(0, int(users), 100_000):
        state = method.population_state(min(100_000, int(users) - start)).detach()
        drawn = UserState({**state.tensors, "weights": torch.randn(state.num_users, int(bases))}, state.num_pairs + 1)
        store.add([f"user-{start + row:07d}" for row in range(state.num_users)], drawn)


def make_file(path: str, kind: str, users: str) -> None:
    """Pairs of users, pairs of which one user has most, or responses to score."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(WORDS)])
    drawn = draw.integers(len(words), size=(TEXTS, 12))
    texts = pa.array([" ".join(line) for line in words[drawn].tolist()])
    traits = (draw.normal(size=(len(words), TRAITS)) / TRAITS**0.5)[drawn].mean(1) * drawn.shape[1] ** 0.5
    names = pa.array([f"user-{number:07d}" for number in range(int(users))])
    tastes = draw.normal(size=(int(users), TRAITS))
    count = np.full(int(users), PAIRS if kind == "pairs" else 1)
    if kind == "skewed":
        count[0] = SKEWED
    user = np.repeat(np.arange(int(users)), count)
    writer = None
    for start in range(0, len(user), ROWS):
        part = user[start : start + ROWS]
        first = draw.integers(TEXTS, size=len(part))
        other = (first + draw.integers(1, TEXTS, size=len(part))) % TEXTS
        likes = (tastes[part] * (traits[first] - traits[other])).sum(-1) + draw.logistic(size=len(part)) > 0
        first, other = np.where(likes, first, other), np.where(likes, other, first)
        columns = {"user_id": names.take(pa.array(part)), "prompt": pa.array(["which?"] * len(part))}
        sides = {"response": first} if kind == "responses" else {"chosen": first, "rejected": other}
        table = pa.table(columns | {name: texts.take(pa.array(rows)) for name, rows in sides.items()})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def make_lines(path: str, users: str) -> None:
    """The same pairs as JSONL or CSV."""
    import csv
    import json

    import pyarrow.parquet as pq

    make_file(f"{path}.parquet", "pairs", users)
    parquet = pq.ParquetFile(f"{path}.parquet")
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.endswith(".csv"):
            writer = csv.DictWriter(file, parquet.schema_arrow.names)
            writer.writeheader()
            write = writer.writerows
        else:
            write = lambda rows: file.writelines(json.dumps(row) + "\n" for row in rows)  # noqa: E731
        for batch in parquet.iter_batches():
            write(batch.to_pylist())


def open_pairs(path: str) -> None:
    """Read pairs, and say how many seconds it took."""
    import warnings

    from plm.data.schema import read_pairs

    warnings.simplefilter("ignore")  # of pairs that occur twice
    began = time.perf_counter()
    read_pairs([path])
    print(time.perf_counter() - began)


def open_by_arrow(path: str) -> None:
    """Read a file by Arrow alone."""
    import pyarrow.csv
    import pyarrow.json

    began = time.perf_counter()
    pyarrow.csv.read_csv(path) if path.endswith(".csv") else pyarrow.json.read_json(path)
    print(time.perf_counter() - began)


def encode(path: str) -> None:
    """Turn the responses of a file into features, and say how many seconds it took."""
    import pyarrow.parquet as pq

    from plm.backbones import HashingBackbone

    rows = pq.read_table(path).to_pydict()
    began = time.perf_counter()
    HashingBackbone(dim=DIM).represent(rows["prompt"], rows["response"])
    print(time.perf_counter() - began)


def refresh(users: str, bases: str) -> None:
    """Solve so many users as a validation does, and say how many seconds it took."""
    import torch

    from plm.methods.lore import LoRe
    from plm.types import PreferenceBatch

    torch.manual_seed(0)
    count = int(users)
    method = LoRe(count, DIM, num_bases=int(bases), temperature=1.0)
    user = torch.arange(count).repeat_interleave(PAIRS)
    texts = torch.nn.functional.normalize(torch.randn(TEXTS, DIM), dim=-1)

    def batches(rows: torch.Tensor) -> list[PreferenceBatch]:
        """Batches of whole users, which are made when they are read, as a loader does."""
        for part in torch.split(rows, 100 * PAIRS * PAIRS * 10):
            first, other = torch.randint(TEXTS, (2, len(part)), generator=torch.Generator().manual_seed(int(part[0])))
            ones = torch.ones(len(part))
            yield PreferenceBatch(texts[first], texts[other], user[part], ones, ones > 1)

    every = torch.arange(len(user))
    method.train_pass = lambda: batches(every)
    method.val_pass = lambda: batches(every[::PAIRS])
    method.sum_over_processes = lambda values: values
    began = time.perf_counter()
    method.refresh_users()
    print(time.perf_counter() - began)


def fill(folder: str, texts: str, dtype: str) -> None:
    """A cache of random features."""
    import torch

    from plm.backbones import HashingBackbone
    from plm.data import features

    class Random(HashingBackbone):
        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.randn(len(texts), CACHED_DIM)

    features.SHARD_TEXTS = (SHARD, SHARD)
    cache = features.FeatureCache(Random(dim=CACHED_DIM), folder, dtype=dtype)
    cache.fill([("", f"text {number}") for number in range(int(texts))])


def epoch(folder: str, texts: str, dtype: str, kind: str) -> None:
    """Find features and read them all; the seconds of both, and GB that no file backs."""
    from pathlib import Path

    import numpy as np

    from plm.backbones import HashingBackbone
    from plm.data.features import FeatureCache
    from plm.data.rows import FeatureRows, MappedRows

    pairs = [("", f"text {number}") for number in range(int(texts))]
    cache = FeatureCache(HashingBackbone(dim=CACHED_DIM), folder, dtype=dtype)
    began = time.perf_counter()
    rows = MappedRows(*cache.mapped(pairs)) if kind == "mapped" else FeatureRows(cache.features(pairs).numpy())
    found = time.perf_counter()
    for part in np.array_split(np.random.default_rng(0).permutation(len(pairs)), max(1, len(pairs) // 4096)):
        rows.gather(part)
    own = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]
    print(found - began, time.perf_counter() - found, int(own) * 1024 / 1e9)


CHILDREN = {"fill": fill, "epoch": epoch}
CHILDREN |= {"checkpoint": make_checkpoint, "file": make_file, "encode": encode, "refresh": refresh}
CHILDREN |= {"lines": make_lines, "open": open_pairs, "arrow": open_by_arrow}


# ---------------------------------------------------------------------- the table
def measured(what: str, users: int, bases: int, folder: Path) -> list[tuple[str, ...]]:
    """Rows of the table: what, size, seconds, seconds of processors, GB at its most."""

    def row(name: str, size: str, found: Run, seconds: float | None = None) -> tuple[str, ...]:
        shown = found.seconds if seconds is None else seconds
        return name, size, f"{shown:.1f}", f"{found.processor:.1f}", f"{found.peak:.2f}"

    if what == "refresh":
        found = child("refresh", users, bases)
        return [row(f"refresh, K = {bases}", f"{users:,} x {PAIRS}", found, float(found.output.split()[-1]))]
    if what == "open":
        rows = []
        for ending in ("jsonl", "csv"):
            path = folder / f"file.{ending}"
            child("lines", path, users)
            size = f"{path.stat().st_size / 1e9:.2f} GB {ending}"
            for name, kind in (("open", "open"), ("pyarrow", "arrow")):
                found = child(kind, path)
                rows.append(row(name, size, found, float(found.output.split()[-1])))
            path.unlink()
        return rows
    if what == "features":
        rows = []
        for dtype in ("float32", "float16"):
            child("fill", folder, users, dtype)
            for kind in ("held", "mapped"):
                found = child("epoch", folder, users, dtype, kind)
                seconds = [float(number) for number in found.output.split()[-3:]]
                name, size = f"features, {dtype}, {kind}", f"{users:,} texts"
                rows.append(row(f"{name}: found", size, found, seconds[0]))
                rows.append(row(f"{name}: read, own {seconds[2]:.2f} GB", size, found, seconds[1]))
        return rows
    path, checkpoint = folder / "file.parquet", folder / f"{what}-{users}.ckpt"
    child("file", path, {"fit": "pairs", "adapt": "pairs", "skewed": "skewed", "score": "responses"}[what], users)
    plm = [sys.executable, "-m", "plm"]
    if what == "fit":
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(bases=bases, folder=folder, dim=DIM))
        found = run(*plm, "fit", "--config", str(recipe))
        (report,) = folder.glob("runs/*/metrics.json")
        unseen = json.loads(report.read_text())["unseen"]
        gain = f"{100 * unseen['personal_minus_bradley_terry']:+.1f} over Bradley-Terry"
        return [row(f"fit: unseen {100 * unseen['accuracy']:.1f} %, {gain}", f"{users:,} x {PAIRS}", found)]
    child("checkpoint", checkpoint, bases, users if what == "score" else 0)
    if what == "score":
        found = run(
            *plm, "score", "--ckpt_path", str(checkpoint), "--responses", str(path), "--output", str(folder / "scores")
        )
        alone = child("encode", path)
        return [
            row("score", f"{users:,} rows", found),
            row("encode", f"{users:,} rows", alone, float(alone.output.split()[-1])),
        ]
    found = run(*plm, "adapt", "--ckpt_path", str(checkpoint), "--pairs", str(path))
    size = f"{users - 1:,} x 1 and 1 x {SKEWED:,}" if what == "skewed" else f"{users:,} x {PAIRS}"
    return [row(f"adapt, {what}" if what == "skewed" else "adapt", size, found)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["fit", "open", "adapt", "skewed", "score", "refresh", "features"])
    parser.add_argument("--users", nargs="+", type=int, default=[20_000, 100_000, 1_000_000])
    parser.add_argument("--bases", type=int, default=8)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.child[0]](*options.child[1:])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "size", "seconds", "processor seconds", "peak GB", title=f"D = {DIM}, K = {options.bases}")
    for what in options.only:
        for users in [1_000] if what == "skewed" else options.users:
            with tempfile.TemporaryDirectory() as folder:
                for cells in measured(what, users, options.bases, Path(folder)):
                    print(*cells, sep="  ", file=sys.stderr)
                    table.add_row(*cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
