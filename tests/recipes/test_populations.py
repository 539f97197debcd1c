"""Simulated people over AlpacaEval attributes, smaller than the recipe and on hashed words: LoRe against ridge BT."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from plm.cli import main
from plm.evaluation import cluster_bootstrap

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PLM_DATA", ROOT / "../shared/data")).resolve()


def unseen_accuracy(method: str, concentration: float) -> dict[str, float]:
    """Accuracy of every unseen person after a fit."""
    options = {
        "model": method,
        "data.source.init_args.concentration": concentration,
        "data.source.init_args.num_seen": 400,
        "data.source.init_args.num_unseen": 200,
        "data.shots": "[]",
        "data.cache_dir": "cache",
        "name": method,
        "trainer.enable_progress_bar": "false",
    }
    configs = "conf/data/alpaca_eval.yaml conf/backbone/hashing.yaml conf/trainer/cpu.yaml conf/logger/csv.yaml".split()
    args = [part for path in configs for part in ("--config", str(ROOT / path))]
    assert main(["fit", *args, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0
    with (Path("runs") / method / "per_user.csv").open() as stream:
        return {row["user_id"]: float(row["accuracy"]) for row in csv.DictReader(stream) if row["split"] == "unseen"}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("concentration", [0.001, 0.01, 0.1])
def test_lore_beats_bradley_terry_at_every_diversity(
    concentration: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (DATA / "alpaca_eval").is_dir():
        pytest.skip(f"no alpaca_eval in {DATA}; set PLM_DATA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLM_DATA", str(DATA))
    lore, global_ = (unseen_accuracy(name, concentration) for name in ("LoRe", "BradleyTerry"))
    gain = np.array([lore[user] - global_[user] for user in sorted(lore)])
    assert len(gain) == 200 and np.isfinite(gain).all()
    low, _ = cluster_bootstrap(gain)
    assert low > 0.02
