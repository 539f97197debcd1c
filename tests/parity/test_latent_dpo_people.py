"""Latent DPO of many people at once: each of them is trained exactly as if alone, and stops when done."""

from __future__ import annotations

import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from plm.functional import bt_losses
from plm.method import constructor_arguments
from plm.methods.latent_dpo import LatentDPO
from plm.methods.latent_dpo.maths import Gaussian, expected_bt_losses, gaussian, response_rewards
from plm.methods.latent_dpo.options import Options
from plm.methods.latent_dpo.user_pairs import make_user_pairs, pair_grades, pairs_of_context
from plm.testing import Batches, PlantedData, quiet_trainer
from plm.types import Context, PreferenceBatch, UserState
from tests.groups import method_options

PAPER, NEWTON = method_options("latent_dpo_paper"), method_options("latent_dpo_newton")
WIDTH, PROMPT, SIZES = 4, 3, (1, 0, 9, 5, 14)
EVERY: list[dict[str, Any]] = [
    {"family": "vector", "rule": "evidence", "num_samples": 3},
    {"family": "vector", "variance": "free", "rule": "soft", "num_samples": 3, "marginal": True},
    {"family": "linear", "variance": "fixed_entropy", "rule": "all_pairs", "num_samples": 3},
    {"family": "linear", "variance": "free", "rule": "direct", "num_samples": 3},
    {"family": "mlp", "hidden_dim": 5, "rule": "closed_form", "weight_decay": 0.1},
    {"family": "mlp", "hidden_dim": 5, "rule": "topk", "num_samples": 3},
    {"family": "mlp", "hidden_dim": 5, "variance": "free", "rule": "expectation", "num_samples": 3},
    {**PAPER, "family": "mlp", "hidden_dim": 5, "num_samples": 3},
    NEWTON,
]
STEPPED = {"lr": 0.02, "num_steps": 12, "batch_size": 4}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def people_context() -> Context:
    """People of different sizes, with weights and ties."""
    size, longest = len(SIZES), max(SIZES)
    mask = torch.arange(longest) < torch.tensor(SIZES)[:, None]
    chosen, rejected = (
        torch.cat([draw(size, longest, WIDTH, seed=seed), -1.0 + 0.3 * draw(size, longest, WIDTH, seed=seed + 5)], -1)
        for seed in (1, 2)
    )
    prompt, tie = draw(size, longest, PROMPT, seed=3), torch.arange(size * longest).view(size, longest) % 6 == 5
    weight = torch.linspace(0.5, 2, size * longest).view(size, longest)
    return Context(chosen * mask[..., None], rejected * mask[..., None], mask, weight * mask, prompt, tie & mask)


def tensors(context: Context) -> dict[str, Tensor]:
    return {name: value for name, value in context._asdict().items() if isinstance(value, Tensor)}


def make(**options: Any) -> LatentDPO:
    stepped = {} if options.get("rule") == "newton" else STEPPED
    return LatentDPO(2, 2 * WIDTH, prompt_dim=PROMPT, **{**stepped, **options})


# ---------------------------------------------------------------------- everybody as if alone
@pytest.mark.parametrize("options", EVERY, ids=lambda options: "-".join(map(str, options.values())))
def test_batched_training_equals_one_person_at_a_time(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of float32, whether or not everybody fits into memory at once."""
    method, context = make(**options), people_context()
    together = method.adapt(context).tensors["policy"]
    monkeypatch.setattr("plm.methods.latent_dpo.training.MAX_FLOATS", {"cpu": 1})
    in_parts = method.adapt(context).tensors["policy"]
    torch.testing.assert_close(in_parts, together, rtol=0, atol=1e-6)
    for person, size in enumerate(SIZES):
        cut = {name: value[person : person + 1, : max(size, 1)] for name, value in tensors(context).items()}
        alone = method.adapt(Context(**cut)).tensors["policy"][0]
        torch.testing.assert_close(together[person], alone, rtol=0, atol=1e-6)
    assert torch.equal(together[1], method.start)
    assert (together[[0, 2, 3, 4]] != method.start).any(1).all()


@pytest.mark.parametrize("options", [{"family": "vector"}, {"hidden_dim": 5}], ids=["vector", "mlp"])
def test_adapting_seven_people_together_equals_each_alone(options: dict[str, Any]) -> None:
    """Who has few pairs reads them in the same order beside somebody with many; what is left is rounding."""
    sizes = (3, 1000, 1, 70, 10, 64, 0)
    method = LatentDPO(0, 2 * WIDTH, prompt_dim=PROMPT, num_steps=40, **options)
    everybody, mask = draw(7, 1000, 4 * WIDTH + PROMPT, seed=8), torch.arange(1000) < torch.tensor(sizes)[:, None]

    def context(person: slice, most: int) -> Context:
        chosen, rejected, prompt = everybody[person, :most].split([2 * WIDTH, 2 * WIDTH, PROMPT], -1)
        here = mask[person, :most]
        return Context(chosen, rejected, here, here.float(), prompt)

    whole = context(slice(None), 1000)
    together, people = method.adapt(whole).tensors["policy"], pairs_of_context(whole, method.seed)
    for person, size in enumerate(sizes):
        own = context(slice(person, person + 1), max(size, 1))
        alone = pairs_of_context(own, method.seed)
        for step in range(3 if size else 0):
            shared, single = (some.minibatch(torch.full_like(some.num_pairs, step), 64) for some in (people, alone))
            read, expected = shared.weight[person] > 0, single.weight[0] > 0
            assert torch.equal(shared.response_key[person, read], single.response_key[0, expected])
            assert torch.equal(shared.weight[person, read], single.weight[0, expected])
        torch.testing.assert_close(together[person], method.adapt(own).tensors["policy"][0], rtol=0, atol=5e-7)
    assert torch.equal(together[6], method.start)


def closed_form_loss(policy: Gaussian, chosen: Gaussian, rejected: Gaussian, target: Tensor, beta: float) -> Tensor:
    (one, one_var), (two, two_var) = response_rewards(chosen, policy), response_rewards(rejected, policy)
    return expected_bt_losses(beta * (one - two), beta**2 * (one_var + two_var), target)


def test_a_person_is_trained_as_a_plain_module_would_be() -> None:
    """nn.Module, torch.optim.AdamW and a warm-up, on all pairs of one person at every step."""
    options = {"hidden_dim": 5, "variance": "free", "weight_decay": 0.1, "warmup": 0.5}
    method = make(**options, batch_size=64, kl_coef=0.03)
    context = people_context()
    trained = method.adapt(context).tensors["policy"]
    for person in (2, 4):
        first, last = torch.nn.Linear(PROMPT, 5), torch.nn.Linear(5, 2 * WIDTH)
        parameters = [first.weight, first.bias, last.weight, last.bias]
        torch.nn.utils.vector_to_parameters(torch.zeros(method.family.size), parameters)
        first.weight.data = method.start[: 5 * PROMPT].view(PROMPT, 5).T.contiguous()
        rows = context.mask[person]
        chosen, rejected, prompt, tie = (
            tensors(context)[name][person][rows] for name in ("chosen", "rejected", "prompt", "tie")
        )
        weight = context.weight[person][rows]
        optimizer = torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 6, 1.0))
        for _ in range(12):
            out = last(F.silu(first(prompt / prompt.square().mean(-1, keepdim=True).sqrt())))
            policy = Gaussian(out[:, :WIDTH], out[:, WIDTH:])
            losses = closed_form_loss(policy, gaussian(chosen), gaussian(rejected), 1 - 0.5 * tie.float(), 0.1)
            prior = Normal(torch.zeros(WIDTH), torch.ones(WIDTH))
            kl = kl_divergence(Normal(policy.mean, (policy.log_var / 2).exp()), prior).sum(-1)
            loss = (weight / weight.mean() * (losses + 0.03 * kl)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rise.step()
        expected = torch.cat([value.t().flatten() for value in parameters])
        torch.testing.assert_close(trained[person], expected, rtol=1e-4, atol=2e-6)


def test_a_pass_reads_every_pair_once_and_passes_differ() -> None:
    context = people_context()
    people = pairs_of_context(context, seed=0)
    assert torch.equal(people.num_pairs, torch.tensor(SIZES))
    for person, size in enumerate(SIZES):
        passes = []
        for turn in range(2):
            seen: list[float] = []
            for number in range(-(-size // 4)):
                step = torch.full((len(SIZES),), turn * -(-size // 4) + number)
                batch = people.minibatch(step, 4)
                real = batch.weight[person] > 0
                expected = people.weight[people.slots[person]][:size].mean()
                assert expected.item() == pytest.approx(1, abs=1e-6)
                assert int(real.sum()) == min(4, size - 4 * number)
                seen += batch.responses.mean[person, real, 0, 0].tolist()
            assert sorted(seen) == sorted(context.chosen[person, :size, 0].tolist())  # type: ignore[index]
            passes.append(seen)
        assert size <= 4 or passes[0] != passes[1]


def test_minibatches_in_a_row_are_those_of_each_step() -> None:
    """Passes of different lengths begin at different steps; who has few pairs reads all of them again."""
    everybody = pairs_of_context(people_context(), seed=0)
    for people in (everybody, everybody.take(torch.tensor([0])), everybody.take(torch.tensor([0, 4]))):
        for step, batch in enumerate(people.minibatches(range(2, 13), 4), start=2):
            alone = people.minibatch(torch.full_like(people.num_pairs, step), 4)
            for person in range(people.num_users):
                real = batch.weight[person] > 0
                kept = alone.weight[person] > 0
                assert sorted(batch.response_key[person, real, 0]) == sorted(alone.response_key[person, kept, 0])
                assert torch.equal(batch.noise(2).prior[person, real].sum(), alone.noise(2).prior[person, kept].sum())


def test_draws_are_named_by_person_step_and_pair() -> None:
    """Two people with the same pair draw apart, as do two steps; exchanging the responses exchanges their draws."""
    responses, prompts = draw(3, 2, 2 * WIDTH), draw(3, PROMPT, seed=1)
    both, grades = torch.cat([responses, responses[:1]]), pair_grades(torch.zeros(4).bool(), responses)
    user, more = torch.tensor([0, 0, 0, 1]), torch.cat([prompts, prompts[:1]])
    people = make_user_pairs(both, grades, torch.ones(4), more, user, 2, seed=0)

    def drawn(person: int, step: int, of: Any = people) -> Any:
        batch = of.minibatch(torch.full((2,), step), 4)
        place = (batch.responses.mean[person] == responses[0, :, :WIDTH]).flatten(1).all(1).nonzero()[0, 0]
        return [value[person, place] for value in batch.noise(2)]

    one = drawn(0, 0)
    for other in (
        drawn(1, 0),
        drawn(0, 1),
        drawn(0, 0, make_user_pairs(both, grades, torch.ones(4), more, user, 2, 1)),
    ):
        assert all((a != b).all() for a, b in zip(one, other, strict=True))
    exchanged = make_user_pairs(both.flip(1), grades, torch.ones(4), more, user, 2, seed=0)
    one, two = (given.minibatch(torch.zeros(2).long(), 4).noise(2) for given in (people, exchanged))
    assert torch.equal(one.prior, two.prior) and torch.equal(one.posterior, two.posterior.flip(2))


# ---------------------------------------------------------------------- what is learned
@pytest.mark.parametrize("rule", ["newton", "closed_form", "evidence", "all_pairs", "soft", "direct"])
def test_flipped_labels_flip_the_mean(rule: Any) -> None:
    options: dict[str, Any] = NEWTON if rule == "newton" else {"family": "vector", "rule": rule}
    method, context = make(**options).double(), people_context()
    context = Context(
        **{name: value.double() if value.is_floating_point() else value for name, value in tensors(context).items()}
    )
    mean = method.adapt(context).tensors["policy"]
    flipped = method.adapt(context._replace(chosen=context.rejected, rejected=context.chosen)).tensors["policy"]
    ties = 1e-4 if rule == "evidence" else 1e-9  # which rewards round to 1 is not the mirror image of which round to 0
    torch.testing.assert_close(flipped, -mean, rtol=0, atol=ties)
    assert mean[[0, 2, 3, 4]].abs().sum(1).min() > 0.05


def test_steps_arrive_where_newton_does() -> None:
    """With posteriors as sharp as they may be, the closed form is the logistic loss of their means."""
    context = people_context()
    sharp = [torch.cat([side[..., :WIDTH], torch.full_like(side[..., WIDTH:], -8.0)], -1) for side in context[:2]]  # type: ignore[index]
    context = context._replace(chosen=sharp[0], rejected=sharp[1])
    exact = make(**NEWTON).adapt(context).tensors["policy"]
    by_steps = make(family="vector", num_steps=800, batch_size=64).adapt(context).tensors["policy"]
    assert exact.norm(dim=1)[2:].min() > 0.5
    torch.testing.assert_close(by_steps, exact, rtol=0, atol=5e-3)


def test_the_reward_is_the_mean_implicit_reward_of_the_posterior() -> None:
    method, context = make(family="mlp", hidden_dim=5, variance="free"), people_context()
    state = method.adapt(context).take(torch.tensor([2, 4, 4]))
    responses, prompts = context.chosen[2, :3], context.prompt[2, :3]  # type: ignore[index]
    reward = method.score(responses, state, prompt_features=prompts)
    policy = method.latent_policies(state, prompts)
    own, prior = Normal(policy.mean, (policy.log_var / 2).exp()), Normal(0.0, 1.0)
    mean, log_var = responses.chunk(2, -1)
    drawn = mean + (log_var / 2).exp() * draw(100_000, 3, WIDTH)
    sampled = 0.1 * (own.log_prob(drawn) - prior.log_prob(drawn)).sum(-1)
    assert ((sampled.mean(0) - reward).abs() < 4 * sampled.std(0) / 100_000**0.5).all()


# ---------------------------------------------------------------------- fitting seen users
class People(PlantedData):
    """A few planted users whose responses are posteriors with prompts, or one of them alone."""

    view = "latents"

    def __init__(self, only: int | None = None) -> None:
        super().__init__(num_users=3, feature_dim=WIDTH, pairs_per_user=11, num_test=6)
        self.feature_dim = 2 * WIDTH
        for name in ("train_batch", "val_batch", "test_batch"):
            batch: PreferenceBatch = getattr(self, name)
            chosen, rejected = (torch.cat([side, side.square() - 2], -1) for side in batch[:2])  # type: ignore[operator, list-item, union-attr]
            batch = batch._replace(chosen=chosen, rejected=rejected, prompt=self._normal(batch.num_pairs, PROMPT))
            if only is not None:
                rows = batch.user_index == only
                batch = PreferenceBatch(*(None if value is None else value[rows] for value in batch[:-4]))  # type: ignore[index, arg-type]
                batch = batch._replace(user_index=torch.zeros_like(batch.user_index), other_index=None)
            setattr(self, name, batch)
        if only is not None:
            self.num_users, self.user_ids = 1, [f"seen-{only}"]

    def val_dataloader(self) -> list[Batches]:
        return [Batches(self.val_batch)]


def fit(data: People, folder: Path, epochs: int = 30, **options: Any) -> LatentDPO:
    method = LatentDPO(data.num_users, 2 * WIDTH, prompt_dim=PROMPT, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(folder, max_epochs=epochs)
        trainer.fit(method, datamodule=data)
    method.logged = dict(trainer.callback_metrics)  # type: ignore[assignment]
    method.epochs = trainer.current_epoch  # type: ignore[assignment]
    return method


def test_metrics_of_newton_are_those_of_the_solution(tmp_path: Path) -> None:
    """Not of the prior it starts from, whose KL is 0."""
    method = fit(People(), tmp_path, **NEWTON)
    means = method.user_states(torch.arange(3)).tensors["policy"]
    found = method.report()
    assert found["latent/kl"] == pytest.approx(float(means.square().sum(-1).mean() / 2), rel=1e-5) != 0
    assert found["latent/mu_norm"] > 0 and found["loss"] < math.log(2)


@pytest.mark.parametrize("options", [EVERY[4], EVERY[3], EVERY[8]], ids=["mlp", "linear", "newton"])
def test_seen_users_get_what_adapting_to_their_pairs_gives(options: dict[str, Any], tmp_path: Path) -> None:
    """And the fit ends when all have finished."""
    stepped = {} if options.get("rule") == "newton" else STEPPED
    data = People()
    method = fit(data, tmp_path, **stepped, **options)
    batch = data.train_batch
    pairs = [value.view(3, 11, *value.shape[1:]) for value in (*batch[:2], batch.weight, batch.prompt)]  # type: ignore[union-attr, misc, operator]
    adapted = method.adapt(Context(pairs[0], pairs[1], torch.ones(3, 11).bool(), pairs[2], pairs[3]))
    seen = method.user_states(torch.arange(3))
    torch.testing.assert_close(seen.tensors["policy"], adapted.tensors["policy"], rtol=0, atol=1e-6)
    assert torch.equal(seen.num_pairs, torch.full((3,), 11))
    assert method.epochs == (12 if stepped else 1)


def test_everybody_stops_on_their_own_validation_pairs(tmp_path: Path) -> None:
    """Each of three users gets the policy, and the step, of a fit alone; another user's stop changes nothing."""
    options: dict[str, Any] = {"family": "linear", "lr": 0.3, "num_steps": 25, "patience": 2, "kl_coef": 0.0}
    together = fit(People(), tmp_path, **options)
    for user in range(3):
        alone = fit(People(user), tmp_path, **options)
        for name in ("policies", "best_policies", "best_loss", "steps"):
            torch.testing.assert_close(getattr(together, name)[user], getattr(alone, name)[0], rtol=0, atol=1e-6)
    steps = together.steps.tolist()
    assert min(steps) < 25 and len(set(steps)) > 1, steps
    assert torch.equal(together.user_states(torch.arange(3)).tensors["policy"], together.best_policies)
    assert (together.best_policies != together.policies).any()


def test_metrics_have_the_names_of_trl_and_say_what_they_say(tmp_path: Path) -> None:
    data = People()
    method = fit(data, tmp_path, epochs=1, family="linear", lr=0.1, variance="free")
    start = {name: value.item() for name, value in method.logged.items() if name.startswith("train/")}  # type: ignore[union-attr, operator]
    assert start.pop("train/latent/reward_policy") == pytest.approx(0.5, abs=0.1)
    assert start.pop("train/loss") == pytest.approx(0.693147, abs=1e-6)
    names = ["rewards/" + name for name in ("chosen", "rejected", "margins", "accuracies")]
    names += ["latent/" + name for name in ("kl", "mu_norm", "logvar_min", "logvar_max")]
    assert start == {f"train/{name}": 0.0 for name in names}  # a margin of zero is not right: accuracies are strict
    found = {name: value.item() for name, value in method.loss(data.train_batch).items()}
    batch = data.train_batch
    states, prompt = method.user_states(batch.user_index), batch.prompt
    policy = method.latent_policies(states, prompt)  # type: ignore[arg-type]
    own, prior = Normal(policy.mean, (policy.log_var / 2).exp()), Normal(0.0, 1.0)
    h = [0.1 * (own.log_prob(z) - prior.log_prob(z)).sum(-1) for z in (side[:, :WIDTH] for side in batch[:2])]  # type: ignore[index, operator, union-attr]
    assert found["rewards/chosen"] == pytest.approx(h[0].mean().item(), abs=1e-6)
    assert found["rewards/margins"] == pytest.approx((h[0] - h[1]).mean().item(), abs=1e-6)
    assert found["rewards/accuracies"] == pytest.approx((h[0] > h[1]).float().mean().item())
    kl = kl_divergence(own, Normal(torch.zeros(WIDTH), torch.ones(WIDTH))).sum(-1).mean()
    assert found["latent/kl"] == pytest.approx(kl.item(), abs=1e-6)
    assert found["latent/mu_norm"] == pytest.approx(policy.mean.norm(dim=-1).mean().item() / WIDTH**0.5, abs=1e-6)
    assert found["latent/logvar_min"] < 0 < found["latent/logvar_max"] < 1
    assert method.report().keys() == found.keys()


def test_evaluation_runs_a_network_once_for_all_of_a_users_pairs(tmp_path: Path) -> None:
    data = People()
    method = fit(data, tmp_path, hidden_dim=5, lr=0.05, num_steps=5)
    batch = data.test_batch
    with torch.no_grad():
        facts = method.evaluate(batch)
        assert batch.other_index is not None
        expected = {"margin": None, "population_margin": method.population_state(batch.num_pairs)}
        expected["other_margin"] = method.user_states(batch.other_index)
        for name, users in expected.items():
            torch.testing.assert_close(facts[name], method.margin(batch, users), rtol=0, atol=1e-6)
    assert facts["population_margin"].abs().min() > 0 and facts["margin"].abs().min() > 0


# ---------------------------------------------------------------------- arguments
def test_the_default_and_the_groups_of_conf() -> None:
    fast, paper, newton = (Options(**options) for options in ({}, PAPER, NEWTON))
    assert (fast.family, fast.rule, fast.variance, fast.kl_coef, fast.num_steps, fast.lr) == (
        *("mlp", "closed_form", "unit"),
        *(0.01, 200, 1e-3),
    )
    assert (paper.family, paper.latent_temperature, paper.warmup) == ("full", 0.0, 0.1)
    assert (paper.rule, paper.variance, paper.kl_coef, paper.num_samples, paper.evidence_ratio, paper.beta) == (
        *("evidence", "free", 0.0),
        *(16, 0.5, 0.1),
    )
    assert (paper.batch_size, paper.num_steps, paper.lr, newton.family, newton.rule) == (
        64,
        0,
        1e-4,
        "vector",
        "newton",
    )
    assert not Options(**{**PAPER, **method_options("latent_dpo_marginal")}).problems().found
    assert LatentDPO(1, 64, prompt_dim=768).family.size == 768 * 128 + 128 + 128 * 32 + 32
    assert LatentDPO(1, 64, prompt_dim=768, variance="free").family.size == 106_688
    assert LatentDPO(1, 64, **NEWTON).policies.shape == (1, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0, "lr": -1.0}, "model.lr: expected a finite number >= 0, got -1.0\nmodel.beta: expected a finite"),
        ({"kl_coef": float("nan")}, "model.kl_coef: expected a finite number >= 0, got nan"),
        ({"beta": float("nan")}, "model.beta: expected a finite number > 0, got nan"),
        ({"num_samples": 2.5, "rule": "topk"}, "model.num_samples: expected an integer >= 1, got 2.5"),
        ({"family": "lora"}, "model.family: expected one of vector, linear, mlp, full, got 'lora'"),
        ({"rule": "foo"}, "model.rule: expected one of "),
        ({}, "model.family mlp reads features of prompts, got none: set data.prompt_features: true, or take"),
        ({"rule": "newton"}, "model.family: expected vector with model.rule newton, got 'mlp'"),
        ({**NEWTON, "kl_coef": 0.0}, "model.kl_coef: expected a number > 0 with model.rule newton"),
        ({**NEWTON, "num_steps": 3}, "model.num_steps acts only with another model.rule than newton, got 3"),
        ({"family": "vector", "hidden_dim": 3}, "model.hidden_dim acts only with model.family mlp, got 3"),
        ({"marginal": True}, "model.marginal acts only with a model.rule that samples, got True"),
        ({"evidence_ratio": 0.0, "rule": "evidence"}, "model.evidence_ratio: expected a share in (0, 1], got 0.0"),
        ({"feature_dim": 7}, "expected features of even width, mean and log-variance side by side, got 7"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LatentDPO(**{"num_users": 2, "feature_dim": 8, **options})
    assert message in str(error.value)


def test_policies_that_read_prompts_need_them() -> None:
    method, context = make(family="linear"), people_context()
    with pytest.raises(ValueError, match=r"width 3, got None; set data.prompt_features: true, or take model.family"):
        method.adapt(context._replace(prompt=None))
    states = UserState({"policy": method.start.repeat(2, 1)}, torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"got \(2, 5\)"):
        method.score(draw(2, 2 * WIDTH), states, prompt_features=draw(2, 5))


def test_newton_states_are_the_logistic_optimum_of_posterior_means() -> None:
    """A state is a stationary point of the mean loss plus the KL, |mean|^2 / 2 times its coefficient."""
    context = people_context()
    method = make(**NEWTON, kl_coef=0.05)
    for person in (2, 3, 4):
        rows = context.mask[person]
        chosen, rejected, tie = (
            tensors(context)[name][person][rows].double() for name in ("chosen", "rejected", "tie")
        )
        weight = context.weight[person][rows].double()
        mean = method.adapt(context).tensors["policy"][person].double().requires_grad_()
        margin = 0.1 * (chosen - rejected)[:, :WIDTH] @ mean
        loss = (weight / weight.mean() * bt_losses(margin, 1 - tie / 2)).mean() + 0.025 * mean.square().sum()
        (slope,) = torch.autograd.grad(loss, mean)
        assert slope.abs().max() < 1e-7


@pytest.mark.parametrize("options", [EVERY[0], EVERY[4], EVERY[8]], ids=["evidence", "mlp", "newton"])
def test_the_order_of_people_and_of_their_pairs_changes_nothing(options: dict[str, Any]) -> None:
    method, context = make(**options), people_context()
    states = method.adapt(context).tensors["policy"]
    people = torch.tensor([3, 0, 4, 2, 1])
    longest = max(SIZES)
    places = torch.stack([torch.randperm(longest, generator=torch.Generator().manual_seed(n)) for n in range(5)])
    moved = Context(**{name: value[people[:, None], places] for name, value in tensors(context).items()})
    torch.testing.assert_close(method.adapt(moved).tensors["policy"], states[people], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_hard_labels_leave_the_prior_and_soft_ones_do_not() -> None:
    """One direction explains all pairs. A typical draw of the prior has |z|^2 / 2 = 8; the KL is |mean|^2 / 2."""
    direction, width = torch.nn.functional.normalize(draw(1, 1, 16, seed=9), dim=-1), 16
    sides = draw(2, 1, 60, width, seed=3) * 0.75**0.5
    first = ((sides[0] - sides[1]) * direction).sum(-1, keepdim=True) > 0
    both = torch.where(first, sides[0], sides[1]), torch.where(first, sides[1], sides[0])
    chosen, rejected = (torch.cat([side, torch.full_like(side, 0.25).log()], -1) for side in both)
    mask = torch.ones(1, 60, dtype=torch.bool)
    context = Context(chosen, rejected, mask, mask.float())

    @cache
    def kl(rule: str, steps: int, kl_coef: float = 0.0) -> float:
        method = LatentDPO(1, 2 * width, family="vector", rule=rule, num_steps=steps, lr=0.05, kl_coef=kl_coef)  # type: ignore[arg-type]
        return float(method.latent_policies(method.adapt(context)).mean.square().sum() / 2)

    for rule in ("evidence", "topk", "direct"):
        assert kl(rule, 150) > 8 * 8
    assert kl("direct", 300) > 2 * kl("direct", 150)
    for rule, kl_coef in (("soft", 0.0), ("expectation", 0.0), ("evidence", 0.01), ("closed_form", 0.01)):
        assert 0.3 < kl(rule, 300, kl_coef) < 8
        assert kl(rule, 300, kl_coef) == pytest.approx(kl(rule, 150, kl_coef), rel=0.1)


@pytest.mark.parametrize(
    ("options", "where"),
    [(NEWTON, "chosen"), ({"hidden_dim": 5}, "chosen"), ({"hidden_dim": 5}, "prompt")],
)
def test_a_number_that_is_not_finite_is_named(options: dict[str, Any], where: str, tmp_path: Path) -> None:
    context, data = people_context(), People()
    tensors(context)[where][3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"in 1 of 29 pairs, rows \[12\], of 1 of 5 people, numbers \[3\]"):
        make(**options).adapt(context)
    getattr(data.train_batch, where)[13, 1] = torch.inf
    with pytest.raises(ValueError, match=r"in 1 of 33 pairs, rows \[13\], of 1 of 3 people, numbers \[1\]"):
        fit(data, tmp_path, epochs=1, **options)


def test_every_option_is_known_and_kept_in_checkpoints() -> None:
    """Also those that were left out: a checkpoint must not depend on the defaults of the version that reads it."""
    method = LatentDPO(3, 8, family="vector", num_steps=7)
    assert method.hparams["num_steps"] == 7 and method.hparams["kl_coef"] == 0.01
    assert {"num_steps", "kl_coef", "lr", "seed", "backbone"} <= constructor_arguments(LatentDPO)
