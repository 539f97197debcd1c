"""The population of Latent DPO: one person with everybody's pairs, against whom personal policies are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plm.methods.latent_dpo import LatentDPO
from plm.methods.latent_dpo.population import pooled
from plm.methods.latent_dpo.user_pairs import pairs_of_batch
from plm.testing import PlantedData, quiet_trainer
from plm.types import Context, PreferenceBatch
from tests.groups import method_options

WIDTH, PROMPT, USERS = 4, 3, 6
KINDS: dict[str, dict[str, Any]] = {
    "newton": method_options("latent_dpo_newton"),
    "mlp": {"hidden_dim": 5, "lr": 0.1, "num_steps": 40},
}


class Tastes(PlantedData):
    """Users who all want the same of a latent, or every other one the opposite."""

    view = "latents"

    def __init__(self, opposite: bool) -> None:
        super().__init__(num_users=USERS, feature_dim=WIDTH, pairs_per_user=200, num_test=40, spread=0.0, signal=20.0)
        self.feature_dim = 2 * WIDTH
        for name in ("train_batch", "val_batch", "test_batch"):
            batch: PreferenceBatch = getattr(self, name)
            turned = ((batch.user_index % 2 == 1) & opposite)[:, None]
            chosen, rejected = (torch.cat([side, torch.full_like(side, -3.0)], -1) for side in batch[:2])  # type: ignore[list-item, arg-type]
            sides = torch.where(turned, rejected, chosen), torch.where(turned, chosen, rejected)
            prompt = self._normal(batch.num_pairs, PROMPT)
            setattr(self, name, batch._replace(chosen=sides[0], rejected=sides[1], prompt=prompt))


def fit(data: PlantedData, folder: Path, **options: Any) -> LatentDPO:
    method = LatentDPO(data.num_users, 2 * WIDTH, prompt_dim=PROMPT, **options)
    quiet_trainer(folder, max_epochs=100).fit(method, datamodule=data)
    method.trainer = None
    return method.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_identical_people_gain_nothing_over_the_population_and_opposite_ones_much(kind: str, tmp_path: Path) -> None:
    gains = {}
    for opposite in (False, True):
        data = Tastes(opposite)
        with torch.no_grad():
            facts = fit(data, tmp_path / str(opposite), **KINDS[kind]).evaluate(data.test_batch)
        own, population = ((facts[name] > 0).float().mean().item() for name in ("margin", "population_margin"))
        assert own > 0.8
        gains[opposite] = own - population
    assert abs(gains[False]) < 0.05, gains
    assert gains[True] > 0.3, gains


@pytest.mark.filterwarnings("ignore")
def test_the_population_is_one_person_with_everybodys_pairs_kept_and_served(tmp_path: Path) -> None:
    data = Tastes(opposite=False)
    method = fit(data, tmp_path, **KINDS["newton"])
    batch = data.train_batch
    mask = torch.ones(1, batch.num_pairs, dtype=torch.bool)
    assert isinstance(batch.chosen, torch.Tensor) and isinstance(batch.rejected, torch.Tensor)
    context = Context(batch.chosen[None], batch.rejected[None], mask, mask.float())
    alone = method.adapt(context).tensors["policy"][0]
    torch.testing.assert_close(method.population, alone, rtol=0, atol=1e-4)
    assert alone.norm() > 0.5
    copy = LatentDPO(USERS, 2 * WIDTH, prompt_dim=PROMPT, **KINDS["newton"])
    assert not copy.population.any()
    copy.load_state_dict(method.state_dict())
    assert torch.equal(copy.population_state(2).tensors["policy"], method.population.expand(2, -1))
    copy.num_pairs[1] = 0
    served = copy.user_states(torch.tensor([0, 1])).tensors["policy"]
    assert torch.equal(served[1], copy.population) and torch.equal(served[0], method.policies[0])
    nobody = context._replace(mask=torch.zeros_like(mask))
    assert torch.equal(copy.adapt(nobody).tensors["policy"][0], copy.population)


def test_users_count_the_same_however_many_pairs_they_have() -> None:
    """Whether they come in one batch or in several."""
    batch = Tastes(opposite=False).train_batch
    batch = batch._replace(weight=torch.linspace(0.5, 2, batch.num_pairs))
    rows = torch.cat([torch.arange(30), torch.arange(200, 205), torch.arange(400, 440)])
    parts = [
        PreferenceBatch(*(None if value is None else value[take] for value in batch[:6]))  # type: ignore[arg-type]
        for take in (rows, rows[:35], rows[35:])
    ]
    people = pooled([pairs_of_batch(parts[0], 0)[1]], 0)
    assert people.num_pairs.tolist() == [75]
    shares = [people.weight[:30].sum(), people.weight[30:35].sum(), people.weight[35:].sum()]
    torch.testing.assert_close(torch.stack(shares), torch.full((3,), 25.0))
    ratio = people.weight[:30].sort().values / batch.weight[:30]
    torch.testing.assert_close(ratio, ratio.mean().expand(30))
    apart = pooled([pairs_of_batch(part, 0)[1] for part in parts[1:]], 0)
    torch.testing.assert_close(apart.weight[apart.slots[0]], people.weight[people.slots[0]])
