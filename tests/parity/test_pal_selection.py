"""The number of prototypes, chosen on validation pairs by ``select:`` of a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from plm.checkpoint import load_method
from plm.cli import main
from plm.methods.pal import PAL

RECIPE = """
defaults: [{backbone: hashing}, {trainer: cpu}, {logger: csv}, {eval: quick}]
model: {class_path: PAL}
data:
  source:
    class_path: SyntheticPairs
    init_args: {world: conflicting_groups, num_users: 40, pairs_per_user: 20, num_objectives: 1, noise: 0.0}
  backbone: {init_args: {dim: 32}}
  shots: []
select: {model.init_args.num_prototypes: [1, 2]}
trainer: {max_epochs: 30, check_val_every_n_epoch: 30, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.mark.slow
def test_conflicting_groups_ask_for_more_than_one_prototype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prototype is the same reward for everybody: right half of the time, so validation prefers two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plm"])
    Path("recipe.yaml").write_text(RECIPE)
    assert main(["fit", "--config", "recipe.yaml", "--data.cache_dir", str(tmp_path / "cache")]) == 0
    (run,) = Path("runs").iterdir()
    table = json.loads((run / "select.json").read_text())
    one, two = (candidate["val/seen/log_loss"] for candidate in table["candidates"])
    assert table["candidates"][table["selected"]]["num_prototypes"] == 2 and two < one - 0.1
    loaded = load_method(run / "checkpoints" / "best.ckpt")
    assert isinstance(loaded, PAL) and loaded.num_prototypes == 2
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["method"]["name"] == "PAL" and numbers["method"]["dead_prototypes"] == 0
    assert numbers["seen"]["personal_minus_global"] > 0.2
    assert "Selection on validation rows" in capsys.readouterr().out
