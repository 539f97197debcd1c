"""``plm serve --check`` on a fitted checkpoint of five methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plm.cli import main
from plm.method import PersonalizationMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.methods.lore import LoRe
from plm.methods.pal import PAL
from plm.methods.vpl import VPL
from plm.serving import bodies
from plm.serving.check import check
from plm.serving.server import Settings
from plm.serving.service import RewardService
from plm.testing import PlantedData, TinyBackbone, quiet_trainer, saved
from tests.contract.test_latent_dpo import PlantedLatents
from tests.marks import slow_but

METHODS: dict[str, tuple[Callable[..., PersonalizationMethod], dict[str, Any]]] = {
    "LoRe": (LoRe, {"num_bases": 3}),
    "PAL": (PAL, {"num_prototypes": 2}),
    "VPL": (VPL, {"latent_dim": 3, "decoder": "bilinear", "kl_weight": 0.1, "lr": 0.01}),
    "BradleyTerry": (BradleyTerry, {}),
}


def fitted(method: PersonalizationMethod, data: PlantedData, folder: Path) -> PersonalizationMethod:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(str(folder), max_epochs=10).fit(method, datamodule=data)
    method.trainer = None
    return method.eval()


def differ(path: Path) -> None:
    """What is compared are rewards that mean something: those of users differ from those of the population."""
    found = {(one.endpoint, one.user, len(one.found)): one.found for one in check(Settings(str(path)))}
    assert found["/score", "seen-0", 3] != found["/score", None, 3]
    assert all(len(set(rewards)) == len(rewards) for rewards in found.values())


@pytest.mark.parametrize("name", slow_but(METHODS, "LoRe", "VPL"))
def test_served_rewards_are_those_of_plm_score(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, options = METHODS[name]
    torch.manual_seed(0)
    data = PlantedData(6)
    method = make(6, 8, backbone=TinyBackbone(8).spec(), **options)
    with saved(fitted(method, data, tmp_path)) as path:
        assert main(["serve", "--ckpt_path", str(path), "--check"]) == 0
        assert "50 of 50 requests give the rewards of plm score" in capsys.readouterr().out
        if name != "BradleyTerry":
            differ(path)
        service = RewardService(path)
        sure = service.rewards(bodies.RewardsRequest(responses=["tea", "coffee"], user="seen-0")).data[0].reward_sd
        assert (sure is None) == (name == "BradleyTerry") and (sure is None or sure > 0)
        pairs = bodies.PairsRequest(pairs=[{"prompt": "p", "chosen": "tea", "rejected": "coffee"}])
        assert service.learn("new", pairs).num_pairs == 1


def test_served_latents_are_those_of_plm_score(
    steered: Callable[[int], CLaP], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    with saved(steered(4)) as clap:
        spec = ClapLatents(str(clap)).spec()
        method = fitted(LatentDPO(6, 8, spec, prompt_dim=0, family="vector"), PlantedLatents(6, 4), tmp_path)
        with saved(method) as path:
            assert main(["serve", "--ckpt_path", str(path), "--check"]) == 0
            assert "50 of 50 requests give the rewards of plm score" in capsys.readouterr().out
            differ(path)
