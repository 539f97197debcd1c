"""Users who are solved in chunks are those who are solved all at once, whichever method they belong to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import plm.functional
from plm.leaderboard.per_user import PerUserBradleyTerry
from plm.method import PersonalizationMethod
from plm.method.strangers import NO_SPREAD
from plm.methods.lore import LoRe, PublishedLoRe
from plm.methods.pal import PAL
from plm.methods.vpl import VPL
from plm.types import Context, PreferenceBatch, UserState

D, K = 6, 3
COUNTS = [4, 0, 1, 23, 2, 9, 1, 0, 30, 5, 2, 16]
METHODS: dict[str, Any] = {
    "LoRe": lambda: LoRe(len(COUNTS), D, num_bases=K),
    "PublishedLoRe": lambda: PublishedLoRe(len(COUNTS), D, num_bases=K, prior_precision=0.1),
    "PAL": lambda: PAL(len(COUNTS), D, num_prototypes=K, residual="bradley_terry"),
    "PAL, nonlinear": lambda: PAL(
        len(COUNTS), D, num_prototypes=K, user_learner="f(Pw)", projector="mlp2-relu-dropout0"
    ),
    "PAL, table": lambda: PAL(len(COUNTS), D, num_prototypes=K, users="table", head="angle"),
    "VPL": lambda: VPL(len(COUNTS), D, latent_dim=K, hidden_dim=8),
    "VPL, attention": lambda: VPL(len(COUNTS), D, latent_dim=K, hidden_dim=8, posterior="attention", max_context=12),
    "per user": lambda: PerUserBradleyTerry(len(COUNTS), D),
}


def pairs(counts: list[int], seed: int) -> PreferenceBatch:
    """Ragged pairs in random order, some of them ties, of users who disagree."""
    draw, tastes = torch.Generator().manual_seed(seed), torch.randn(len(counts), D, generator=torch.manual_seed(9))
    user = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    user = user[torch.randperm(len(user), generator=draw)]
    one, two = torch.randn(2, len(user), D, generator=draw)
    wins = ((one - two) * tastes[user]).sum(-1, keepdim=True) > 0
    weight, tie = 0.5 + torch.rand(len(user), generator=draw), torch.rand(len(user), generator=draw) < 0.1
    return PreferenceBatch(torch.where(wins, one, two), torch.where(wins, two, one), user, weight, tie)


def refreshed(name: str) -> PersonalizationMethod:
    """A method of random shared weights after its users were solved."""
    torch.manual_seed(0)
    method: Any = METHODS[name]()
    with torch.no_grad():
        for value in method.parameters():
            value.copy_(torch.randn_like(value) / 2)
    method.sum_over_processes = lambda values: values
    method.train_pass, method.val_pass = lambda: iter([pairs(COUNTS, 1)]), lambda: iter([pairs([9] * len(COUNTS), 2)])
    method.refresh_users()
    return method.eval()  # type: ignore[no-any-return]


def context() -> Context:
    """Users of 0 to 9 pairs."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.arange(9) < torch.tensor([4, 0, 1, 9, 2, 0, 7])[:, None]
    chosen, rejected = torch.randn(2, 7, 9, D, generator=draw) * mask[..., None]
    return Context(chosen, rejected, mask, mask * torch.rand(7, 9, generator=draw), tie=mask & (chosen[..., 0] > 1.5))


def states(method: PersonalizationMethod) -> list[UserState]:
    """Seen users and unseen ones."""
    with torch.no_grad():
        return [method.user_states(torch.arange(len(COUNTS))), method.adapt(context())]


@pytest.mark.parametrize("name", METHODS)
def test_chunked_users_equal_those_solved_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = refreshed(name)
    together = states(method)
    if name == "LoRe":
        assert float(method.prior_scale) > NO_SPREAD
    monkeypatch.setattr(plm.functional, "MAX_CELLS", 40)  # a few pairs; one user alone may have more
    monkeypatch.setattr("plm.methods.vpl.MAX_FLOATS", 100)
    method = refreshed(name)
    for whole, parts in zip(together, states(method), strict=True):
        assert torch.equal(whole.num_pairs, parts.num_pairs)
        for key, value in whole.tensors.items():
            torch.testing.assert_close(parts.tensors[key], value, rtol=1e-6, atol=1e-6)
    if name == "PublishedLoRe" or name == "PAL, table":  # trained tables: a seen user without pairs keeps the row
        return
    population = method.population_state(1).tensors
    for state, users in zip(states(method), ([1, 7], [1, 5]), strict=True):
        for key, value in population.items():
            assert torch.equal(state.tensors[key][users], value.detach().expand(2, *value.shape[1:])), key
