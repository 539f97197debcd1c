"""Are verdicts right, and is nobody harmed? Personal methods on planted data sets, and what is claimed and lost there.

Usage: python benchmarks/verdicts.py [--datasets 100] [--minutes 30] [--methods LoRe PAL VPL]

Three kinds of worlds in feature space: nobody differs; only seen users differ, and strangers want what the population
wants; all differ. In the first, no verdict may claim that personalisation helps or harms; in the second none on unseen
users; in the third it should help. Kinds take turns until the data sets or the minutes are used up, one process of one
thread for each core. Each data set has its own users, pairs and seed; the fits are the shipped methods with their
defaults.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from plm.evaluation import summarize, verdict
from plm.method import PersonalizationMethod
from plm.methods.lore import LoRe
from plm.methods.pal import PAL
from plm.methods.vpl import VPL
from plm.metrics import PreferenceMetric
from plm.testing import PlantedData

WORLDS: dict[str, dict[str, float]] = {
    "nobody differs": {"spread": 0.0},
    "only seen users differ": {"spread": 0.7, "unseen_spread": 0.0},
    "all differ": {"spread": 0.7},
}
METHODS: dict[str, Callable[[int, int], PersonalizationMethod]] = {
    "LoRe": lambda users, dim: LoRe(users, dim, num_bases=4),
    "PAL": lambda users, dim: PAL(users, dim, num_prototypes=4, residual="bradley_terry"),
    "VPL": lambda users, dim: VPL(users, dim, latent_dim=4, hidden_dim=16),
}
HELPS, HARMS = "personalisation helps", "personalisation harms"
GROUPS = ("seen", "unseen")


class Outcome(NamedTuple):
    """What a fit says about a group of users of one data set."""

    helps: bool
    harms: bool
    gain: float
    """Accuracy less that of the population's state."""
    over_bradley_terry: float
    """Accuracy less that of the ridge-tuned Bradley-Terry model."""
    loss: float
    """Log-loss less that of the ridge-tuned Bradley-Terry model, in nats."""


def planted(world: str, seed: int) -> PlantedData:
    """A data set of a world: 60 seen and 60 unseen users with 20 to 30 pairs each."""
    sizes: dict[str, Any] = {"num_users": 60, "num_unseen": 60, "pairs_per_user": 30, "num_shots": 20, "num_test": 20}
    return PlantedData(**sizes, **WORLDS[world], seed=seed)


def fit(name: str, data: PlantedData, seed: int, max_epochs: int = 60) -> PersonalizationMethod:
    """A method with four bases, prototypes or latent dimensions."""
    L.seed_everything(seed, verbose=False)
    method = METHODS[name](data.num_users, data.feature_dim)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        check_val_every_n_epoch=max_epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=data)
    return method.eval()


def outcomes(method: PersonalizationMethod, data: PlantedData) -> dict[str, Outcome]:
    """What is claimed about seen and unseen users, and what they gain."""
    found = {}
    for group, batch in zip(GROUPS, (data.test_batch, data.unseen_batch), strict=True):
        with torch.no_grad():
            facts = method.evaluate(batch)
        assert batch.user_row is not None
        metric = PreferenceMetric(len(data.all_user_ids))
        metric.update(facts.pop("margin"), batch.user_row, **facts)
        numbers = summarize(metric.table(), num_resamples=1000)
        sentence = verdict(group, numbers)
        found[group] = Outcome(
            HELPS in sentence,
            HARMS in sentence,
            numbers["personal_minus_global"],
            numbers["personal_minus_bradley_terry"],
            numbers["log_loss"] - numbers["bradley_terry_log_loss"],
        )
    return found


class Job(NamedTuple):
    """A data set and the methods that are fitted to it."""

    seed: int
    world: str
    methods: Sequence[str]
    end: float = float("inf")
    """Nothing is done after this time, in seconds since 1970."""


def judge(job: Job) -> dict[str, dict[str, Outcome]]:
    """Method -> group -> outcome."""
    if time.time() > job.end:
        return {}
    data = {name: planted(job.world, job.seed) for name in job.methods}
    return {name: outcomes(fit(name, one, job.seed), one) for name, one in data.items()}


def simulate(
    datasets: int, methods: Sequence[str] = tuple(METHODS), worlds: Sequence[str] = tuple(WORLDS), minutes: float = 1e9
) -> dict[tuple[str, str], dict[str, list[Outcome]]]:
    """(world, method) -> group -> one outcome per data set; no data set is begun after so many minutes."""
    results = {(world, name): {group: [] for group in GROUPS} for world in worlds for name in methods}
    end = time.time() + 60 * minutes
    jobs = [Job(seed, world, methods, end) for seed, world in product(range(datasets), worlds)]
    workers = max(1, min(os.cpu_count() or 1, len(jobs)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool:
        for job, found in zip(jobs, pool.map(judge, jobs), strict=True):
            for name, groups in found.items():
                for group, outcome in groups.items():
                    results[job.world, name][group].append(outcome)
    return results


def _begin() -> None:
    """Make a process one that computes with one thread and does not tell of its fits."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=100, help="of each kind")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args(arguments)
    results = simulate(options.datasets, options.methods, minutes=options.minutes)
    heads = ("world", "method", "users", "worlds", "helps", "harms", "gain", "over BT", "log-loss − BT")
    table = Table(*heads, title="Verdicts; gains in points")
    for (world, name), groups in results.items():
        for group, found in groups.items():
            if not found:
                continue
            helps, harms, gain, over, loss = np.array(found, dtype=float).mean(0)
            shares = (f"{100 * helps:.0f} %", f"{100 * harms:.0f} %")
            table.add_row(
                world, name, group, str(len(found)), *shares, f"{100 * gain:+.2f}", f"{100 * over:+.2f}", f"{loss:+.4f}"
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
