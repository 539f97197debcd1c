from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from plm.backbones import HashingBackbone
from plm.methods.lore import LoRe
from plm.serving.app import make_app
from plm.serving.server import running
from plm.serving.service import RewardService
from plm.testing import saved


@contextmanager
def checkpoint_of_two() -> Iterator[Path]:
    """Two random bases; ben and eva have random weights, and were trained on pairs that are not kept."""
    torch.manual_seed(0)
    method = LoRe(2, 64, backbone=HashingBackbone(dim=64).spec(), num_bases=2)
    method.user_ids = ["ben", "eva"]
    with torch.no_grad():
        method.bases.normal_()
        method.weights.normal_()
    method.num_pairs.fill_(5)
    with saved(method) as checkpoint:
        yield checkpoint


@pytest.fixture
def path() -> Iterator[Path]:
    with checkpoint_of_two() as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def shared_path() -> Iterator[Path]:
    """The checkpoint of all tests of a module."""
    with checkpoint_of_two() as checkpoint:
        yield checkpoint


@pytest.fixture
def service(path: Path) -> RewardService:
    return RewardService(path, name="lore")


@pytest.fixture
def client(service: RewardService) -> Iterator[httpx.Client]:
    with running(make_app(service)) as url, httpx.Client(base_url=url, timeout=60) as made:
        yield made
