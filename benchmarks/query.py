"""Accuracy for new users after asked pairs against as many, and more, random ones.

Usage: python benchmarks/query.py [--users 200] [--asked 10] [--random 16]

A method is fitted on planted users. Every new user then answers one pair at a time, chosen by its information from a
pool of its own, and the method adapts after each answer; against this stand random pairs of the same pool. Accuracy is
that on further pairs of the user; intervals are 95 % bootstrap intervals over users.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.method import PersonalizationMethod
from plm.methods.lore import LoRe
from plm.methods.vpl import VPL
from plm.querying import choose_pairs, posterior_samples, sampled_chances
from plm.testing import PlantedData, quiet_trainer
from plm.types import Context

POOL, TEST, SAMPLES = 100, 200, 64


class Panel:
    """New users who can answer any pair of their pool."""

    def __init__(self, data: PlantedData, num_users: int) -> None:
        self.pool = data.context
        self.batch = data.unseen_batch
        self.num_users = num_users

    def after(self, method: PersonalizationMethod, rows: Tensor) -> Tensor:
        """Accuracy of every user ``(U,)`` after the answers to ``rows (U, S)``."""
        users = method.adapt(self.answers(rows))
        assert self.batch.context_row is not None
        with torch.no_grad():
            margin = method.margin(self.batch, users.take(self.batch.context_row))
        return (margin > 0).double().view(self.num_users, -1).mean(-1)

    def answers(self, rows: Tensor) -> Context:
        """The chosen pairs as a context."""
        index = rows[..., None].expand(-1, -1, self.pool.chosen.shape[-1])
        mask = torch.ones(rows.shape, dtype=torch.bool)
        return Context(self.pool.chosen.gather(1, index), self.pool.rejected.gather(1, index), mask, mask.float())

    def ask(self, method: PersonalizationMethod, count: int) -> Tensor:
        """Rows ``(U, count)`` asked one by one, each for what its answer tells after the answers before it."""
        asked = torch.zeros(self.num_users, 0, dtype=torch.long)
        for turn in range(count):
            users = method.adapt(self.answers(asked)) if turn else method.population_state(self.num_users)
            best = []
            for user in range(self.num_users):
                samples = posterior_samples(users.take(torch.tensor([user])), SAMPLES, seed=turn)
                free = torch.ones(POOL, dtype=torch.bool).scatter(0, asked[user], False).nonzero()[:, 0]
                chances = sampled_chances(method, self.pool.chosen[user, free], self.pool.rejected[user, free], samples)
                best.append(int(free[choose_pairs(chances, 1)[0].row]))
            asked = torch.cat([asked, torch.tensor(best)[:, None]], 1)
        return asked


def interval(values: np.ndarray) -> str:
    """Mean and 95 % bootstrap interval over users, in points."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return f"{100 * values.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--asked", type=int, default=10)
    parser.add_argument("--random", type=int, default=16)
    parser.add_argument("--signal", type=float, default=4.0, help="how sure users are")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = PlantedData(
        300, options.users, pairs_per_user=40, num_shots=POOL, num_test=TEST, feature_dim=16, rank=4,
        signal=options.signal,
    )  # fmt: skip
    torch.manual_seed(0)
    methods = {
        "LoRe": LoRe(300, 16, num_bases=5),
        "VPL": VPL(300, 16, latent_dim=6, decoder="bilinear", kl_weight=0.1, num_samples=8, lr=0.01),
    }
    table = Table(title=f"{options.users} planted users, accuracy in % and its difference in points")
    asked, drawn = f"{options.asked} asked", f"{options.random} random"
    for column in ("method", "0", f"{options.asked} random", drawn, asked, f"{asked} - {drawn}", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, method in methods.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = quiet_trainer(folder, max_epochs=300, check_val_every_n_epoch=100)
            trainer.fit(method, datamodule=data)
        method.trainer = None  # type: ignore[assignment]
        method.eval()
        panel = Panel(data, options.users)
        order = torch.rand(options.users, POOL, generator=torch.Generator().manual_seed(1)).argsort(-1)
        accuracy = {
            "0": panel.after(method, order[:, :0]),
            "few": panel.after(method, order[:, : options.asked]),
            "random": panel.after(method, order[:, : options.random]),
            "asked": panel.after(method, panel.ask(method, options.asked)),
        }
        means = [f"{100 * float(value.mean()):.1f}" for value in accuracy.values()]
        gain = (accuracy["asked"] - accuracy["random"]).numpy()
        table.add_row(name, *means, interval(gain), f"{time.perf_counter() - began:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
