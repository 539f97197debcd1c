"""Texts per second of the feature cache against sentence-transformers and against one text at a time.

Usage: python benchmarks/features.py --model PATH_OR_HUB_ID   (default: the environment variable PLM_ENCODER)

One row per band of lengths. In every round all three read the same texts, in turns, so that a busy machine slows all
alike; a ratio is the median over rounds of how much faster the cache was. The model must be one whose
sentence-transformers pipeline is mean pooling and scaling to length 1.

Goals: 1.0x of sentence-transformers, and 3x of one text at a time. On two CPU cores with a model of 22M parameters the
band "short" meets the second and the others cannot: the cache reads about as many tokens per second in every band, as
many as the cores can. What a batch saves is the overhead of a call, about 5 ms; a text of more than about 20 tokens is
so much work of its own that this is less than two thirds of its time alone. "statements" has the lengths of the votes
in Polis, and misses 3x. `docs/benchmarks.md` says what was measured.

The last lines count the texts that are encoded: when pairs repeat texts, when the same texts come again, and when a
run goes on that was killed (SIGKILL) in the middle.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import plm.data.features
from plm.backbones import HFBackbone
from plm.data.features import FeatureCache

WORDS = (
    "the of and to a in for is on that by this with you it not or be are from at as your all have new more an was "
    "we will home can us about if page my has search free but our one other do no information time they site he up "
    "may what which their news out use any there see only so his when contact here business who web also now help "
    "get view online first am been would how were services some these click its like service than find price date "
    "back top people had list name just over state year day into email two health world next used go work last most "
    "products music buy data make them should product system post her city add policy number such please available "
    "copyright support message after best software then good video well where info rights public books high school "
    "through each links she review years order "
).split()
BANDS = {"short": (3, 6, 10), "statements": (3, 16, 29), "comments": (30, 50, 80), "arguments": (81, 110, 165)}
"""Fewest, most frequent and most words of a text; there are about 7 tokens more."""
MAX_LENGTH = 256
GOALS = {"peer": 1.0, "single": 3.0}
PARTS = 32
"""Texts of a shard of the run that is killed; the cache's own shards take ten seconds."""


class CountingBackbone(HFBackbone):
    """HFBackbone of sentence-transformers' kind that counts the texts it encodes."""

    def __init__(self, model: str) -> None:
        super().__init__(model, pooling="mean", normalize=True, template="response", max_length=MAX_LENGTH)
        self.encoded = 0

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.encoded += len(texts)
        return super().encode(texts)


def make_texts(count: int, fewest: int, usual: int, most: int) -> list[str]:
    """Distinct texts of sentences, of ``fewest`` to ``most`` words."""
    draw = random.Random(most)
    texts = []
    for index in range(count):
        left = round(draw.triangular(fewest, most, usual))
        sentences = [f"Comment {index}."]
        while left > 0:
            size = min(left, draw.randint(4, 20))
            sentences.append(" ".join(draw.choices(WORDS, k=size)).capitalize() + draw.choice(".?!"))
            left -= size
        texts.append(" ".join(sentences))
    return texts


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(backbone: HFBackbone, peer: object, texts: list[str], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds per text of each contender in every round, and the largest difference to the peer."""
    pairs, some = [("", text) for text in texts], texts[:: max(1, len(texts) // 48)]
    times: dict[str, list[float]] = {"cache": [], "peer": [], "single": []}
    difference = 0.0
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            kept: dict[str, torch.Tensor] = {}

            def fill(folder: str = folder, kept: dict[str, torch.Tensor] = kept) -> None:
                kept["cache"] = FeatureCache(backbone, folder).features(pairs)

            def encode(kept: dict[str, torch.Tensor] = kept) -> None:
                kept["peer"] = torch.as_tensor(peer.encode(texts, convert_to_tensor=True)).cpu()  # type: ignore[attr-defined]

            runs = [
                ("cache", fill, len(texts)),
                ("peer", encode, len(texts)),
                ("single", lambda: [backbone.encode([text]) for text in some], len(some)),
            ]
            for name, run, count in runs[turn % 3 :] + runs[: turn % 3]:
                times[name].append(seconds(run) / count)
            difference = max(difference, float((kept["cache"] - kept["peer"]).abs().max()))
    return times, difference


def fill_in_parts(model: str, folder: str, count: str) -> None:
    """What the killed process does: fill the cache in shards of ``PARTS`` texts."""
    plm.data.features.SHARD_TEXTS = (PARTS, PARTS)
    texts = make_texts(int(count), *BANDS["arguments"])
    FeatureCache(CountingBackbone(model), folder).features([("", text) for text in texts])


def repeat(backbone: CountingBackbone, texts: list[str], console: Console) -> None:
    """Count what is encoded when texts come again."""
    draw = random.Random(0)
    pairs = [(f"question {draw.randrange(50)}", draw.choice(texts)) for _ in range(100 * len(texts))]
    with tempfile.TemporaryDirectory() as folder:
        backbone.encoded = 0
        FeatureCache(backbone, folder).features(pairs)
        distinct = len({text for _, text in pairs})
        console.print(f"{len(pairs):,} responses in pairs, {distinct} distinct texts: {backbone.encoded} encoded")
        backbone.encoded = 0
        again = seconds(lambda: FeatureCache(backbone, folder).features([("", text) for text in texts]))
        console.print(f"the {len(texts)} texts again: {backbone.encoded} encoded, {1000 * again:.1f} ms")


def kill(backbone: CountingBackbone, count: int, console: Console) -> None:
    """Kill a process that fills a cache once it has finished some shards, and go on."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import features; features.fill_in_parts(*sys.argv[2:])"
    texts = make_texts(count, *BANDS["arguments"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(Path(__file__).parent), backbone.model, folder, str(count)]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(Path(folder).rglob("*.safetensors"))) < 3:
            time.sleep(0.002)
        process.kill()
        process.wait()
        shards = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.safetensors")}
        backbone.encoded = 0
        FeatureCache(backbone, folder).features([("", text) for text in texts])
        redone = sum(path.stat().st_mtime_ns != when for path, when in shards.items())
        console.print(
            f"{count} texts, killed (exit code {process.returncode}) after {len(shards)} shards of {PARTS}: "
            f"the next run encoded {backbone.encoded}, finished shards redone: {redone}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("PLM_ENCODER"), help="folder or hub id of the encoder")
    parser.add_argument("--tokens", type=int, default=8000, help="of the texts of each band, about")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if not options.model:
        parser.error("give --model, or set PLM_ENCODER, to the folder or hub id of a sentence-transformers encoder")

    from sentence_transformers import SentenceTransformer

    backbone, peer = CountingBackbone(options.model), SentenceTransformer(options.model)
    assert backbone.encode(["warm"]).shape[1] == peer.encode(["warm"]).shape[1]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    table = Table(title=f"about {options.tokens} tokens in each band, {options.rounds} rounds, {device}")
    columns = (
        "band",
        "texts",
        "tokens (median)",
        "texts/s",
        "tokens/s",
        "sentence-transformers",
        "one at a time",
        "diff.",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "band" else "right", no_wrap=True)
    for band, words in BANDS.items():
        texts = make_texts(options.tokens // (words[1] + 7), *words)
        lengths = sorted(len(row) for row in peer.tokenizer(texts)["input_ids"])
        assert lengths[-1] <= MAX_LENGTH, (
            "both must read the whole text: sentence-transformers cuts the end off, plm the start"
        )
        times, difference = compare(backbone, peer, texts, options.rounds)
        cells = [str(len(texts)), f"{lengths[0]} to {lengths[-1]} ({statistics.median(lengths):.0f})"]
        speed = 1 / statistics.median(times["cache"])
        cells += [f"{speed:.0f}", f"{speed * statistics.mean(lengths):.0f}"]
        for name, goal in GOALS.items():
            ratio = statistics.median(one / ours for one, ours in zip(times[name], times["cache"], strict=True))
            verdict = "met" if ratio >= goal else "missed"
            cells.append(f"{1 / statistics.median(times[name]):.0f}/s, {ratio:.2f}x {verdict}")
        table.add_row(band, *cells, f"{difference:.0e}")
    console = Console(width=130)
    console.print(table)
    repeat(backbone, make_texts(256, *BANDS["statements"]), console)
    kill(backbone, 192, console)


if __name__ == "__main__":
    main()
