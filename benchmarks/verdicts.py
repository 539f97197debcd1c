"""Is the verdict right? LoRe fitted on planted data sets with and without a personal signal, and what is claimed.

Usage: python benchmarks/verdicts.py [--datasets 100]

Three worlds in feature space: users who differ, users who all want the same, and users who differ but whose pairs were
dealt out to each other at random. Only in the first may the verdict say that personalisation helps, and there it
should. Each data set has its own users, pairs and seed; the fit is the shipped method with its defaults.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from plm.evaluation import summarize, verdict
from plm.method import PersonalizationMethod
from plm.methods.lore import LoRe
from plm.metrics import PreferenceMetric
from plm.testing import PlantedData

WORLDS: dict[str, dict[str, float | bool]] = {
    "personal": {"spread": 0.7},
    "all alike": {"spread": 0.0},
    "shuffled": {"spread": 0.7, "shuffle_users": True},
}
CLAIM = "personalisation helps"


def planted(world: str, seed: int) -> PlantedData:
    """A data set of a world: 60 seen and 60 unseen users with 20 to 30 pairs each."""
    sizes = {"num_users": 60, "num_unseen": 60, "pairs_per_user": 30, "num_shots": 20, "num_test": 20}
    return PlantedData(**sizes, **WORLDS[world], seed=seed)  # type: ignore[arg-type]


def fit(data: PlantedData, seed: int, max_epochs: int = 60) -> PersonalizationMethod:
    """LoRe with four bases."""
    L.seed_everything(seed, verbose=False)
    method = LoRe(num_users=data.num_users, feature_dim=data.feature_dim, num_bases=4)
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


def verdicts(method: PersonalizationMethod, data: PlantedData) -> dict[str, str]:
    """The verdicts on seen and unseen users."""
    sentences = {}
    for group, batch in (("seen", data.test_batch), ("unseen", data.unseen_batch)):
        with torch.no_grad():
            facts = method.evaluate(batch)
        assert batch.user_row is not None
        metric = PreferenceMetric(len(data.all_user_ids))
        metric.update(facts.pop("margin"), batch.user_row, **facts)
        sentences[group] = verdict(group, summarize(metric.table(), num_resamples=1000))
    return sentences


def claims(world: str, datasets: int) -> dict[str, int]:
    """In how many data sets of a world each group's verdict claims personalisation."""
    counts = {"seen": 0, "unseen": 0}
    for seed in range(datasets):
        data = planted(world, seed)
        for group, sentence in verdicts(fit(data, seed), data).items():
            counts[group] += CLAIM in sentence
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate and print; status 1 if more than 5 of 100 verdicts are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=100)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    table = Table("world", "seen users", "unseen users", title=f'"{CLAIM}", out of {options.datasets} data sets')
    wrong = 0
    for world in WORLDS:
        counts = claims(world, options.datasets)
        errors = [options.datasets - count if world == "personal" else count for count in counts.values()]
        wrong = max(wrong, *errors)
        table.add_row(world, *map(str, counts.values()))
    Console().print(table)
    if wrong > 0.05 * options.datasets:
        raise SystemExit(f"{wrong} of {options.datasets} verdicts of one kind are wrong")


if __name__ == "__main__":
    main()
