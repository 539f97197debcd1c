"""How often the host waits for the device in one training step: seldom, and no more often for more pairs.

`test_pretend_device.py` runs these cases; by hand: pytest tests/device/waits_cases.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plm.method.policy import PolicyMethod
from plm.optimizer import RowAdam
from plm.testing import TokenContract
from plm.types import PreferenceBatch, Tokens
from tests.contract import test_token_methods as contracts
from tests.device.pretend_device import counted_waits, pretend_device

MOST = {"TestSFT": 2, "TestLoRADPO": 18, "TestLoRADPOPerUser": 26, "TestCLaP": 20}
"""Nine are of every reading of pairs that share their prompt, by the policy and by its reference."""


def waits(contract: TokenContract, num_pairs: int) -> int:
    """Of a second step on the first pairs of the training batch."""
    torch.manual_seed(0)
    with pretend_device() as there:
        data = contract.data()
        method = contract.make(data.num_users, data.feature_dim)
        assert isinstance(method, PolicyMethod)
        method.configure_model()
        method.to(there).train()
        rows = torch.arange(num_pairs)
        columns: list[Any] = [
            None if value is None else (value.take(rows) if isinstance(value, Tokens) else value[rows]).to(there)
            for value in data.train_batch
        ]
        batch = PreferenceBatch(*columns)
        kind = RowAdam if method.user_tables else torch.optim.AdamW
        optimizer: Any = kind(method.param_groups(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            with counted_waits() as counts:
                method.loss(batch)["loss"].backward()
                optimizer.step()
    return sum(counts.values())


@pytest.mark.parametrize("name", MOST)
def test_the_host_waits_seldom_in_a_step(name: str) -> None:
    found = [waits(getattr(contracts, name)(), num_pairs) for num_pairs in (4, 16)]
    assert found[0] == found[1] <= MOST[name]
