"""``plm portfolio`` on a device that is not the CPU: its members are trained, write, are measured and judged there.

`test_pretend_device.py` runs these cases; by hand: pytest tests/device/portfolio_cases.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from plm.backbones import reference
from plm.cli import main
from plm.portfolio import written
from tests.device.pretend_device import NAME, pretend_device, pretend_trainer_options
from tests.portfolio.test_written import recipe


def portfolio(folder: Path, oracle: str) -> dict[str, Any]:
    """What is written of the policies of one small portfolio."""
    folder.mkdir()
    path = recipe(folder, oracle=oracle, num_samples=1, max_new_tokens=4)
    config = json.loads(path.read_text()) | {"seeds": 1, "sizes": [2], "num_users": 3}
    config["policies"]["fit"]["epochs"] = 1
    path.write_text(json.dumps(config | {"output": str(folder / "out")}))
    assert main(["portfolio", "--config", str(path)]) == 0
    (found,) = folder.rglob("portfolio.json")
    policies: dict[str, Any] = json.loads(found.read_text())["policies"]
    return policies


@pytest.mark.parametrize("oracle", ["lora_dpo", "logits"])
def test_a_portfolio_is_there_what_it_is_on_the_cpu(
    oracle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_device():  # before anything is differentiated
        expected = portfolio(tmp_path / "here", oracle)
        for module in (reference, written):
            monkeypatch.setattr(module, "device", lambda: NAME)
        made, there_too = L.Trainer, pretend_trainer_options()

        def trainer(**options: Any) -> L.Trainer:
            return made(**options) if "accelerator" in options else made(**{**options, **there_too})

        monkeypatch.setattr(L, "Trainer", trainer)
        found = portfolio(tmp_path / "there", oracle)
    assert len(found["solved"]) == len(expected["solved"]) > 2
    for one, two in zip(found["solved"], expected["solved"], strict=True):
        assert one["weights"] == two["weights"] and one["rewards"] == two["rewards"]
        assert one["divergence"] == pytest.approx(two["divergence"], abs=1e-4)
