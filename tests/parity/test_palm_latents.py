"""Portfolios of latents against logistic regression in float64, Latent DPO's own writing and recomputed likelihoods."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from plm.backbones import Completion, completion_tokens
from plm.checkpoint import load_method, read_checkpoint
from plm.data.rewards import Length
from plm.data.sources.population import CandidatePool
from plm.generation import sample, sample_logps
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.methods.palm.selection import choose_portfolio
from plm.portfolio.features import RewardFeatures, reward_spec
from plm.portfolio.latents import LatentFit, LatentPortfolio, pool_means, solve_latents
from plm.portfolio.measured import TrainedPolicies
from plm.testing import saved
from plm.types import UserState
from tests.groups import method_options

WIDTH, PROMPTS = 8, ["ab", "ba", "b"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "num_samples": 2, "seed": 3}


@pytest.fixture(scope="module")
def clap(steered: Callable[[int], CLaP]) -> Iterator[Path]:
    with saved(steered(WIDTH)) as path:
        yield path


def portfolio(clap: Path, users: int = 0) -> LatentPortfolio:
    objectives = RewardFeatures(
        {"words": reward_spec(Length())}, {"long": "words", "short": "-words"}, [0.0, -8.0], [8.0, 8.0]
    )
    made = LatentPortfolio(users, 2, objectives.spec(), ClapLatents(str(clap)).spec())
    made.user_ids = [f"u{row}" for row in range(users)]
    return made.eval()


def points() -> torch.Tensor:
    """Three."""
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


def candidates() -> CandidatePool:
    """Twelve prompts, three responses, of which one is missing; both objectives tie on the last prompt."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([one := rng.random((12, 3, 1)), 1 - one], axis=2)
    scores[11], scores[0, 2] = 0.5, np.nan
    rows = np.arange(36).reshape(12, 3)
    rows[0, 2] = -1
    return CandidatePool(
        [f"p{n}" for n in range(12)], [f"so {n}" for n in range(36)], rows, scores, np.zeros(12, dtype=bool)
    )


def test_each_weight_vector_is_a_logistic_regression_on_latents_of_its_best_and_worst(clap: Path) -> None:
    pool, fit, backbone = candidates(), LatentFit(beta=0.7, kl_coef=0.02), ClapLatents(str(clap))
    means = pool_means(pool, backbone)
    read = backbone.represent(["p4", "p4"], ["so 13", "so 14"])
    assert isinstance(read, torch.Tensor) and means.shape == (12, 3, WIDTH) and means[0, 2].isnan().all()
    torch.testing.assert_close(means[4, 1:], read[:, :WIDTH], rtol=0, atol=1e-5)
    weights = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
    found = solve_latents(pool, means, weights, fit)
    assert not found[1].any()  # to whom everything is alike
    table = means.double().numpy()
    for row in (0, 2):
        values = pool.scores @ weights[row]
        pairs = [(np.nanargmax(own), np.nanargmin(own)) for own in values[:11]]
        design = np.stack([table[x, best] - table[x, worst] for x, (best, worst) in enumerate(pairs)])

        def loss(point: np.ndarray, design: np.ndarray = design) -> float:
            return float(np.logaddexp(0, -0.7 * design @ point).mean() + 0.02 * point @ point / 2)

        best = minimize(loss, np.zeros(WIDTH), tol=1e-12).x
        assert found[row].numpy() == pytest.approx(best, abs=1e-4)


def test_members_write_as_latent_dpo_does_and_are_measured_by_what_they_write(clap: Path) -> None:
    made = portfolio(clap)
    assert made.add(points()[:1]).tolist() == [0] and made.add(points()[1:]).tolist() == [1, 2]
    spec = ClapLatents(str(clap)).spec()
    person = LatentDPO(1, 2 * WIDTH, spec, **method_options("latent_dpo_newton"), latent_temperature=0.0)
    for member in (0, 2):
        state = UserState({"member": torch.full((3,), member)}, torch.zeros(3, dtype=torch.long))
        texts = sample(made, PROMPTS, state, **SETTINGS)
        own = UserState({"policy": points()[[member] * 3]}, state.num_pairs)
        assert texts == sample(person, PROMPTS, own, **SETTINGS)
    flat = [one for row in texts for one in row]
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    lm = made.unaligned.backbone
    tokens = completion_tokens(
        [Completion(lm.prompt_tokens(p), list(one.token_ids)) for p, one in zip(asked, flat, strict=True)]
    )
    scorer = load_method(clap)
    latent = UserState({"latent": points()[[2] * 6]}, torch.zeros(6, dtype=torch.long))
    expected = scorer.score(tokens, latent) - sample_logps(made.unaligned, asked, flat)
    torch.testing.assert_close(made.log_ratios(tokens, 2), expected, rtol=1e-4, atol=1e-4)
    made.keep([2, 0])
    assert torch.equal(made.points, points()[[2, 0]])


def test_a_portfolio_of_latents_is_chosen_saved_and_found_again(
    clap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pool = portfolio(clap, users=2), candidates()
    means = pool_means(pool, made.latents)
    fit = LatentFit(beta=1.0, kl_coef=0.001)
    solve = partial(solve_latents, pool, means, fit=fit)
    oracle = TrainedPolicies(made, solve, PROMPTS, num_samples=2, max_new_tokens=6)
    oracle.solve(np.eye(2))
    chosen = choose_portfolio(oracle, oracle.solved, 2, rounds=1)
    assert len(made.points) == len(oracle.solved.weights) == oracle.num_calls and np.isfinite(oracle.divergence).all()
    made.keep(oracle.members_for(chosen.members.weights))
    made.install(chosen, torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    with saved(made) as path:
        assert path.stat().st_size < 20_000
        assert {name for name in read_checkpoint(path)["state_dict"] if "policy" in name or "people" in name} == set()
        again = load_method(path)
        assert isinstance(again, LatentPortfolio) and torch.equal(again.points, made.points)
        users = made.user_states(torch.tensor([0, 1, 0]))
        assert sample(again, PROMPTS, users, **SETTINGS) == sample(made, PROMPTS, users, **SETTINGS)
        score = again.score(["a b"], user_id="u0", prompts="ab")
        mix = made.member_weights[int(users.tensors["member"][0])]
        assert score.tolist() == pytest.approx([float(mix[0] * 2 / 8 + mix[1] * 6 / 8)])


def test_a_portfolio_finds_a_latent_model_that_was_moved(clap: Path, tmp_path: Path) -> None:
    """By its name beside the portfolio, as people of Latent DPO do."""
    first, there = tmp_path / "first" / "clap.ckpt", tmp_path / "there"
    first.parent.mkdir()
    there.mkdir()
    shutil.copy(clap, first)
    with saved(portfolio(first)) as path:
        mine = Path(shutil.copy(path, there / "portfolio.ckpt"))
    first.unlink()
    with pytest.raises(ValueError, match=r"which does not exist; .* PLM_CLAP"):
        load_method(mine)
    shutil.copy(clap, there / "clap.ckpt")
    again = load_method(mine)
    assert isinstance(again, LatentPortfolio) and again.latents.latent_dim == WIDTH


def test_what_no_portfolio_of_latents_can_be(clap: Path) -> None:
    with pytest.raises(ValueError, match=r"latent_fit.beta: .* got 0.0\n.*latent_fit.kl_coef: .* got nan"):
        LatentFit(beta=0.0, kl_coef=float("nan"))
    spec = portfolio(clap).objectives.spec()
    with pytest.raises(ValueError, match=r"expected latents to be a plm.backbones.LatentBackbone, got RewardFeatures"):
        LatentPortfolio(0, 2, spec, spec)
    with pytest.raises(ValueError, match=r"sharpness: expected a finite number of nats > 0, got 0.0"):
        LatentPortfolio(0, 2, spec, ClapLatents(str(clap)).spec(), sharpness=0.0)
