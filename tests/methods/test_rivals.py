"""What holds for every method of another paper that solves or reads its users from frozen features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plm.method import PersonalizationMethod
from plm.methods.dpl import DPL
from plm.methods.fast_weights import FastWeights
from plm.methods.gpo import GPO
from plm.methods.mrm import MRM
from plm.methods.pref import PReF
from plm.methods.user_embedding import UserEmbedding
from plm.testing import PlantedData, quiet_trainer
from plm.types import Context

USERS, DIM = 6, 8

METHODS: dict[str, Callable[[], PersonalizationMethod]] = {
    "dpl": lambda: DPL(USERS, DIM),
    "dpl_atoms": lambda: DPL(USERS, DIM, kind="categorical", risk=0.01),
    "fast_weights": lambda: FastWeights(USERS, DIM, num_keys=4),
    "gpo": lambda: GPO(USERS, DIM, width=8, heads=2, max_context=12),
    "mrm": lambda: MRM(USERS, DIM, num_bases=3),
    "pref": lambda: PReF(USERS, DIM, num_features=3),
    "user_embedding": lambda: UserEmbedding(USERS, DIM, embedding_dim=3, hidden_dim=8),
}


def data_with_weights() -> PlantedData:
    """Every third pair is a tie, weights are unequal, and some pairs weigh nothing."""
    data = PlantedData(USERS, 3, pairs_per_user=15)
    place = torch.arange(data.train_batch.num_pairs)
    data.train_batch = data.train_batch._replace(weight=(place * 7 % 10) / 5.0, tie=place % 3 == 0)
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_a_fit_under_autocast_keeps_states_in_their_precision(name: str, tmp_path: Path) -> None:
    data = data_with_weights()
    torch.manual_seed(0)
    method = METHODS[name]()
    trainer = quiet_trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2, precision="bf16-mixed")
    trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    dtypes = {key: value.dtype for key, value in method.population_state(1).tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        under = method.eval().adapt(data.context)
    state = method.adapt(data.context)
    for key, value in under.tensors.items():
        assert value.dtype == state.tensors[key].dtype == dtypes[key]
        torch.testing.assert_close(value.float(), state.tensors[key].float(), atol=0.1, rtol=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in METHODS if "dpl" not in name])
def test_seen_users_have_the_states_that_their_training_pairs_give(name: str, tmp_path: Path) -> None:
    """So that seen and unseen users measure one thing; from a context whose labels, weights and ties are theirs."""
    data = data_with_weights()
    torch.manual_seed(0)
    method = METHODS[name]()
    quiet_trainer(tmp_path, max_epochs=10, check_val_every_n_epoch=10).fit(method, datamodule=data)
    method.eval()
    batch = data.train_batch
    parts = [value.unflatten(0, (USERS, 15)) for value in (*batch.features, batch.weight, batch.tie)]
    chosen, rejected, weight, tie = parts
    context = Context(chosen, rejected, torch.ones(USERS, 15).bool(), weight, tie=tie)
    adapted, seen = method.adapt(context), method.user_states(torch.arange(USERS))
    assert torch.equal(adapted.num_pairs, seen.num_pairs)
    for key, value in seen.tensors.items():
        assert not torch.equal(value[0], value[1]) or key == "length", f"{key}: all users have the same"
        torch.testing.assert_close(adapted.tensors[key].float(), value.float(), atol=1e-3, rtol=1e-3)
