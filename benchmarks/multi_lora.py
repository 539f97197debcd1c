"""Adapters of many users trained together, against one training run for each user.

Usage: OMP_NUM_THREADS=2 python benchmarks/multi_lora.py [--users 64 --pairs 8 --per_step 2 --epochs 2]

Both take the same optimizer steps on the same pairs over one random GPT-2-style network, with reference
log-probabilities known before, and end with the same adapters: "apart" is the largest difference between them.

- steps: a plain loop of loss, backward pass and optimizer step over batches made before; the network is loaded once for
  all separate runs. Alone it is ``LoRADPO`` with one shared adapter and torch's fused AdamW, together mode per_user.
- fits: the same through ``lightning.Trainer`` and ``PreferenceDataModule``, as ``plm fit`` does it, the network loaded
  by every run; imports, tokenising and the cached reference are not counted.

Rounds time both in turns, so that a busy machine slows both alike; "ratio" is the median over rounds.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.backbones import FreshCausalLM
from plm.data.datamodule import PreferenceDataModule
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource
from plm.methods.lora_dpo import LoRADPO
from plm.optimizer import RowAdam
from plm.testing.contract import quiet_trainer
from plm.types import PreferenceBatch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
Seconds = list[float]


class People(PairSource):
    """Random words: so many pairs of each user, which depend on the user alone."""

    name = "people"

    def __init__(self, users: Sequence[int], pairs: int, prompt_words: int, response_words: int) -> None:
        self.users, self.pairs = list(users), pairs
        self.prompt_words, self.response_words = prompt_words, response_words

    def load(self) -> PairTable:
        prompts, responses = [], []
        for user in self.users:
            random = np.random.default_rng(user)

            def text(words: int, random: np.random.Generator = random) -> str:
                return " ".join("".join(random.choice(list(LETTERS), 5)) for _ in range(words))

            for _ in range(self.pairs):
                prompts.append(text(self.prompt_words))
                for _ in range(2):
                    responses.append(
                        " " + text(int(random.integers(self.response_words // 2, self.response_words + 1)))
                    )
        pair = np.arange(len(prompts))
        ids, owner = [f"user {user:04d}" for user in self.users], np.repeat(np.arange(len(self.users)), self.pairs)
        return pair_table(ids, prompts, responses, user=owner, prompt=pair, chosen=2 * pair, rejected=2 * pair + 1)


class Setting:
    """The network, and the pairs of some of the users."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        people = People(range(options.users), options.pairs, options.prompt_words, options.response_words)
        texts = [text for pair in people.load().texts() for text in pair]
        self.backbone = FreshCausalLM(
            str(folder / "model"),
            vocab_size=options.vocabulary,
            width=options.width,
            num_layers=options.layers,
            num_heads=4,
            max_positions=512,
        )
        self.backbone.prepare(texts)

    def data(self, users: Sequence[int], at_once: int) -> PreferenceDataModule:
        options = self.options
        return PreferenceDataModule(
            People(users, options.pairs, options.prompt_words, options.response_words),
            self.backbone,
            str(self.folder / "cache"),
            unseen_users=0.0,
            val_rows=0.0,
            test_rows=0.0,
            pairs_per_user=options.per_step,
            batch_size=at_once * options.per_step,
            reference_logps=True,
        )

    def method(self, num_users: int, mode: str) -> LoRADPO:
        spec = self.backbone.spec()
        options = {"rank": self.options.rank, "alpha": 16.0, "lr": 1e-3, "warmup": 0.0, "schedule": "constant"}
        return LoRADPO(num_users=num_users, feature_dim=self.options.width, backbone=spec, mode=mode, **options)  # type: ignore[arg-type]


def seconds_since(began: float) -> float:
    return time.perf_counter() - began


def walk(method: LoRADPO, optimizer: torch.optim.Optimizer, batches: Sequence[PreferenceBatch]) -> None:
    """One optimizer step for each batch."""
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        method.loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def batches_of(data: PreferenceDataModule, epochs: int) -> list[PreferenceBatch]:
    data.setup("fit")
    loader = data.train_dataloader()
    return [batch for _ in range(epochs) for batch in loader]


def steps(setting: Setting) -> tuple[Seconds, Seconds, float]:
    """Seconds of a round, together and apart, and the largest difference of their adapters."""
    options = setting.options
    everybody = range(options.users)
    together, alone = setting.method(options.users, "per_user"), setting.method(1, "shared")
    together.configure_model()
    alone.configure_model()
    joint = batches_of(setting.data(everybody, options.at_once), options.epochs)
    single = [batches_of(setting.data([user], 1), options.epochs) for user in everybody]
    times: tuple[Seconds, Seconds] = ([], [])
    difference = 0.0
    for _ in range(options.rounds):
        with torch.no_grad():
            together.adapters.copy_(together.fresh.expand_as(together.adapters))
        began = time.perf_counter()
        walk(together, RowAdam([{"params": [together.adapters]}], lr=1e-3), joint)
        times[0].append(seconds_since(began))
        found: list[Tensor] = []
        began = time.perf_counter()
        for batches in single:
            with torch.no_grad():
                alone.shared.copy_(alone.fresh[None])
            walk(alone, torch.optim.AdamW([alone.shared], lr=1e-3, weight_decay=0.0, fused=True), batches)
            found.append(alone.shared.detach()[0].clone())
        times[1].append(seconds_since(began))
        difference = max(difference, float((torch.stack(found) - together.adapters.detach()).abs().max()))
    return *times, difference


def fits(setting: Setting) -> tuple[Seconds, Seconds, float]:
    """The same through the Trainer, once."""
    options = setting.options

    def fit(users: Sequence[int], mode: str, at_once: int) -> tuple[float, Tensor]:
        data, method = setting.data(users, at_once), setting.method(len(users), mode)
        data.setup("fit")
        began = time.perf_counter()
        quiet_trainer(setting.folder, max_epochs=options.epochs).fit(method, datamodule=data)
        return seconds_since(began), (method.shared if mode == "shared" else method.adapters).detach()

    fit([0], "shared", 1)  # what is imported late
    took, together = fit(range(options.users), "per_user", options.at_once)
    alone = [fit([user], "shared", 1) for user in range(options.users)]
    difference = float((torch.cat([adapter for _, adapter in alone]) - together).abs().max())
    return [took], [sum(one for one, _ in alone)], difference


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "users": 64,
        "at_once": 64,
        "pairs": 8,
        "per_step": 2,
        "epochs": 2,
        "prompt_words": 6,
        "response_words": 4,
        "width": 64,
        "layers": 2,
        "vocabulary": 1024,
        "rank": 8,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no_fits", action="store_true", help="leave out the fits through the Trainer")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(options, Path(folder))
        rows = {"steps": steps(setting)}
        if not options.no_fits:
            rows["fits"] = fits(setting)
        method = setting.method(1, "shared")
        method.configure_model()
        weights = sum(value.numel() for value in method.policy.parameters())
        [batch, *_] = batches_of(setting.data(range(options.users), options.users), 1)
    tokens = int(batch.chosen.attention_mask.sum() + batch.rejected.attention_mask.sum())  # type: ignore[union-attr]
    num_steps = options.epochs * -(-options.pairs // options.per_step)
    console = Console()
    sizes = f"network of {weights / 1e6:.2f} million weights, adapters of {method.shape.num_parameters:,}"
    per_pair = f"{tokens / len(batch.tie):.0f} tokens a pair"
    table = Table(
        title=f"{options.users} users, {num_steps} steps of {options.per_step} pairs each, {per_pair}; {sizes}"
    )
    for column in ("what", "together s", "alone s", "ratio", "apart"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, (together, alone, difference) in rows.items():
        ratio = statistics.median(slow / fast for fast, slow in zip(together, alone, strict=True))
        shown = [f"{statistics.median(times):.2f}" for times in (together, alone)]
        table.add_row(name, *shown, f"{ratio:.1f}x", f"{difference:.1e}")
    console.print(table)
    console.print(f"{torch.get_num_threads()} CPU threads of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
