"""Texts per second of the feature cache against sentence-transformers and against one text at a time.

Usage: python benchmarks/features.py --model PATH_OR_HUB_ID   (default: the environment variable PLM_ENCODER)

Every round times all of them on the same texts, in turns, so that a busy machine slows all alike. "ratio" is the median
over rounds of how much faster the cache was, "best" compares the fastest rounds. The model must be one whose
sentence-transformers pipeline is mean pooling and scaling to length 1.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

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
MAX_LENGTH = 256


def make_texts(count: int, words: int = 30, seed: int = 0) -> list[str]:
    """Distinct texts of sentences; their lengths are skewed as answers are: ``words`` is the median, 170 the most."""
    draw = random.Random(seed)
    texts = []
    for index in range(count):
        left = max(3, min(170, int(draw.lognormvariate(math.log(words), 0.8))))
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("PLM_ENCODER"), help="folder or hub id of the encoder")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--words", type=int, default=30, help="median length of a text")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if not options.model:
        parser.error("give --model, or set PLM_ENCODER, to the folder or hub id of a sentence-transformers encoder")

    from sentence_transformers import SentenceTransformer

    texts = make_texts(options.texts, options.words)
    pairs = [("", text) for text in texts]
    some = texts[: max(1, len(texts) // 4)]
    backbone = HFBackbone(options.model, pooling="mean", normalize=True, template="response", max_length=MAX_LENGTH)
    peer = SentenceTransformer(options.model)
    assert backbone.encode(texts[:1]).shape[1] == peer.encode(texts[:1]).shape[1]
    lengths = [len(row) for row in peer.tokenizer(texts)["input_ids"]]
    assert max(lengths) <= MAX_LENGTH, (
        "both must read the whole text: sentence-transformers cuts the end off, plm the start"
    )

    times: dict[str, list[float]] = {"cache": [], "again": [], "peer": [], "single": []}
    difference = 0.0
    for turn in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            kept: dict[str, torch.Tensor] = {}

            def fill(folder: str = folder, kept: dict[str, torch.Tensor] = kept) -> None:
                kept["cache"] = FeatureCache(backbone, folder).features(pairs)

            def encode(kept: dict[str, torch.Tensor] = kept) -> None:
                kept["peer"] = torch.as_tensor(peer.encode(texts, convert_to_tensor=True)).cpu()

            runs = [
                ("cache", fill, len(texts)),
                ("peer", encode, len(texts)),
                ("single", lambda: [backbone.encode([text]) for text in some], len(some)),
            ]
            for name, run, count in runs[turn % 3 :] + runs[: turn % 3]:
                times[name].append(seconds(run) / count)
            times["again"].append(seconds(fill))
            difference = max(difference, float((kept["cache"] - kept["peer"]).abs().max()))

    names = {"cache": "plm FeatureCache", "peer": "sentence-transformers", "single": "one text at a time"}
    table = Table(title=f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {options.rounds} rounds")
    for column in ("texts per second", "median", "fastest", "ratio", "best"):
        table.add_column(column, justify="left" if column == "texts per second" else "right")
    for name, label in names.items():
        ratio = statistics.median(one / ours for one, ours in zip(times[name], times["cache"], strict=True))
        best = min(times[name]) / min(times["cache"])
        speeds = [f"{1 / statistics.median(times[name]):.0f}", f"{1 / min(times[name]):.0f}"]
        table.add_row(label, *speeds, *([] if name == "cache" else [f"{ratio:.2f}x", f"{best:.2f}x"]))
    console = Console()
    console.print(table)
    console.print(f"second pass, all cached: {1000 * statistics.median(times['again']):.1f} ms for {len(texts)} texts")
    console.print(f"largest difference to sentence-transformers: {difference:.1e}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    console.print(f"device: {device}")


if __name__ == "__main__":
    main()
