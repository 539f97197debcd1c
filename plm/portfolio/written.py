"""Portfolios whose members write: made from the weights that the free oracle chose, measured, and judged anew.

Axes: U users, M members, R objectives, X prompts, N texts of a member on a prompt, S pairs of a user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from plm.arrays import Float64Array
from plm.backbones import CausalLM, device
from plm.data.sources.population import CandidatePool, best_and_worst
from plm.evaluation import MIN_USERS, Section, TableRow, cluster_bootstrap, section_table
from plm.generation import Sample, sample
from plm.judging.written import Written, judgement
from plm.messages import Problems
from plm.methods.clap.latents import ClapLatents
from plm.methods.palm.selection import Portfolio, Solver, choose_portfolio
from plm.portfolio.held_out import HeldOutLosses, Values, held_out
from plm.portfolio.latents import LatentFit, LatentPortfolio, pool_means, solve_latents
from plm.portfolio.measured import MixedPolicies, PolicyOracle, TrainedPolicies, written
from plm.portfolio.objectives import Deployment
from plm.portfolio.policies import Decoding, PolicyPortfolio
from plm.portfolio.sampled import SampledRewards
from plm.portfolio.training import LoRADPOFit, train_adapters, weighted_pairs
from plm.portfolio.writing import WritingPortfolio
from plm.types import Context, UserState

AnyPortfolio = TypeVar("AnyPortfolio", bound=WritingPortfolio)


class Finished(NamedTuple):
    """A portfolio of policies that write."""

    oracle: PolicyOracle
    """Has made and measured the policies; of these its portfolio keeps the members."""
    oracle_name: str
    """How it makes them, see `WrittenMembers`."""
    portfolio: Portfolio
    rows: list[int]
    """Numbers of the members among the policies that the oracle has solved."""
    texts: list[list[list[Sample]]]
    """M x X x N, what the members wrote on the prompts of the test."""
    raw: Float64Array
    """``(M, X, N, R)`` objectives of these texts."""
    losses: HeldOutLosses
    """What users lose on these prompts."""
    notes: list[str]
    """Sentences about weights from which nothing can be learned."""

    @property
    def method(self) -> WritingPortfolio:
        """The method that routes users to the members."""
        return self.oracle.portfolio

    @property
    def divergence(self) -> list[float]:
        """KL of each member from the unaligned policy, in nats per response."""
        return [float(value) for value in self.oracle.divergence[self.rows]]

    def record(self) -> dict[str, Any]:
        """What ``portfolio.json`` holds of it."""
        solved = self.oracle.solved
        return {
            "oracle": self.oracle_name,
            "oracle_error": self.oracle.error,
            "divergence": self.divergence,
            "solved": [
                {"weights": w.tolist(), "rewards": r.tolist(), "divergence": float(kl)}
                for w, r, kl in zip(solved.weights, solved.rewards, self.oracle.divergence, strict=True)
            ],
            "held_out": self.losses.record(self.method.user_ids),
        }


class WrittenMembers:
    """Members that are policies of a language model instead of best-of-n ones.

    The weights that the free oracle chose and the vertices of the simplex are solved; of these policies the portfolio
    is chosen, by what they write on prompts that nothing was trained on, and judged on the prompts of the test.

    Args:
        backbone: The language model.
        oracle: lora_dpo = a policy is trained for every weight vector, all of them together; latent_dpo = a latent to
            write from is solved for every weight vector; merged = mixtures of the weight changes of single-objective
            policies; logits = mixtures of their next-token distributions.
        fit: How policies are trained.
        clap: Checkpoint of the CLaP model over ``backbone`` whose latents latent_dpo solves.
        latent_fit: How latents are solved.
        rounds: Most weight vectors that are solved besides, one after the other, where the certificate is worst.
        num_samples: Texts on each prompt, to measure and to judge by.
        max_new_tokens: Tokens after which a text is cut.
        cache_dir: Folder of the cache.
    """

    def __init__(
        self,
        backbone: CausalLM,
        oracle: Literal["lora_dpo", "latent_dpo", "merged", "logits"] = "lora_dpo",
        fit: LoRADPOFit | None = None,
        clap: str | None = None,
        latent_fit: LatentFit | None = None,
        rounds: int = 1,
        num_samples: int = 4,
        max_new_tokens: int = 64,
        cache_dir: str = "~/.cache/plm",
    ) -> None:
        self.backbone, self.oracle, self.fit = backbone, oracle, fit or LoRADPOFit()
        self.clap, self.latent_fit = clap, latent_fit or LatentFit()
        self.rounds = rounds
        self.num_samples, self.max_new_tokens, self.cache_dir = num_samples, max_new_tokens, cache_dir
        problems = Problems("policies.")
        problems.at_least(0, rounds=rounds)
        problems.at_least(1, num_samples=num_samples, max_new_tokens=max_new_tokens)
        if (clap is None) == (oracle == "latent_dpo"):
            problems.say(
                "policies.clap: expected the checkpoint of a CLaP model with oracle latent_dpo, and none with another, "
                f"got {clap!r} with oracle {oracle}"
            )
        elif clap is not None and not Path(clap).is_file():
            advice = ", which does not exist; train one by plm fit, see recipes/clap_imdb_tiny.yaml"
            problems.add("clap", "the checkpoint of a CLaP model", clap, advice)
        problems.check()

    def make(
        self,
        rewards: SampledRewards,
        deployment: Deployment,
        wanted: Float64Array,
        size: int,
        solver: Solver,
        beta: float,
    ) -> Finished:
        """Solve ``wanted`` weights ``(M, R)`` and the vertices, choose ``size`` policies, route the users to them."""
        oracle = self._oracle(rewards, deployment, beta)
        num = oracle.num_objectives
        oracle.solve(np.concatenate([np.eye(num), wanted]))
        chosen = choose_portfolio(oracle, oracle.solved, size, solver, self.rounds)
        rows = oracle.members_for(chosen.members.weights)
        method, pool = oracle.portfolio, rewards.candidates(num, "judge")
        texts = written(method, torch.arange(len(oracle.solved.weights)), pool.prompts, **self._settings)
        raw = objectives_of(method, pool.prompts, texts)
        values = Values(raw.mean(2) - oracle.solved.costs[:, None, None], pool.scores, beta)
        losses = held_out(values, rows, chosen.members.net, deployment.weights)
        trained = np.eye(num) if isinstance(oracle, MixedPolicies) else oracle.solved.weights
        instead = "the unaligned one" if self.clap is None else "to write from the mean of the latents' prior"
        notes = undecided(rewards.candidates(num), trained, rewards.names[:num], instead)
        method.keep(rows)
        users = torch.as_tensor(deployment.weights, dtype=torch.float32) if deployment.user_ids else None
        method.install(chosen, users)
        return Finished(oracle, self.oracle, chosen, rows, [texts[row] for row in rows], raw[rows], losses, notes)

    @property
    def _settings(self) -> dict[str, Any]:
        """How texts are drawn that members are judged by: not as those that they were chosen by."""
        return {"num_samples": self.num_samples, "max_new_tokens": self.max_new_tokens, "temperature": 1.0, "seed": 1}

    def _oracle(self, rewards: SampledRewards, deployment: Deployment, beta: float) -> PolicyOracle:
        num, pool = deployment.weights.shape[1], rewards.candidates(deployment.weights.shape[1])
        options = {"beta": beta, "num_samples": self.num_samples, "max_new_tokens": self.max_new_tokens}
        prompts, ids = rewards.prompts_to_measure, deployment.user_ids
        if self.clap is not None:
            latents = self._latents(self.clap)
            points = LatentPortfolio(
                len(ids), num, rewards.features(num).spec(), latents.spec(), sharpness=rewards.sharpness
            )
            solve = partial(solve_latents, pool, pool_means(pool, latents), fit=self.latent_fit)
            return TrainedPolicies(_ready(points, ids), solve, prompts, **options)
        decoding: Decoding = "merged" if self.oracle == "merged" else "logits" if self.oracle == "logits" else "own"
        portfolio = PolicyPortfolio(
            len(ids),
            num,
            self.backbone.spec(),
            rewards.features(num).spec(),
            decoding=decoding,
            rank=self.fit.rank,
            alpha=self.fit.alpha,
            sharpness=rewards.sharpness,
        )
        train = partial(train_adapters, pool, backbone=self.backbone, fit=self.fit, cache_dir=self.cache_dir)
        if decoding == "own":
            return TrainedPolicies(_ready(portfolio, ids), train, prompts, **options)
        return MixedPolicies(_ready(portfolio, ids), train(np.eye(num)), prompts, **options)

    def _latents(self, path: str) -> ClapLatents:
        """The CLaP model.

        Raises:
            ValueError: If it was trained over another language model.
        """
        latents = ClapLatents(path)
        expected, found = self.backbone.fingerprint(), latents.method.causal_lm.fingerprint()
        if expected != found:
            raise ValueError(
                f"policies.clap: expected a CLaP model over policies.backbone ({expected}), got one over {found} in "
                f"{path!r}; set policies.backbone.init_args.model to its language model"
            )
        return latents

    # ------------------------------------------------------------------ judging
    def judge_texts(self, finished: Finished, prompts: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
        """Judge what the members wrote on new prompts: each objective, and a member's own mix against other members.

        Args:
            finished: The portfolio.
            prompts: X prompts that nothing was chosen on.
            names: Of the objectives.
        """
        unaligned = finished.method.unaligned
        first = sample(unaligned, prompts, **self._settings)
        reference = objectives_of(finished.method, prompts, [first])
        cold_start = finished.method.cold_start  # the member of an unknown user
        weights = finished.method.member_weights.double().cpu().numpy()
        texts = [first, finished.texts[cold_start], *finished.texts]
        raw = np.concatenate([reference, finished.raw[cold_start : cold_start + 1], finished.raw])
        members = [f"{place}: {member_name(row, names)}" for place, row in enumerate(weights)]  # no two alike
        drawn = {name: value for name, value in self._settings.items() if name != "num_samples"}  # seen by the texts
        result = judgement(Written(unaligned, prompts, members, texts, names, raw), raw, names, drawn)
        values = np.concatenate([reference, finished.raw]).mean(2)
        mixes = [mix._asdict() for mix in own_mixes(values, weights, finished.divergence)]
        return {**result, "own_mix": mixes}


def _ready(portfolio: AnyPortfolio, user_ids: Sequence[str]) -> AnyPortfolio:
    """Prepare a portfolio without members to write for these users."""
    portfolio.user_ids = list(user_ids)
    portfolio.configure_model()
    return portfolio.to(device()).eval()


def objectives_of(
    method: WritingPortfolio, prompts: Sequence[str], texts: Sequence[Sequence[Sequence[Sample]]]
) -> Float64Array:
    """Measure objectives ``(M, X, N, R)`` of what M policies wrote on X prompts, M x X x N."""
    shape = (len(texts), len(prompts), len(texts[0][0]))
    repeated = [prompt for _ in texts for prompt in prompts for _ in range(shape[2])]
    read = method.objectives.represent(repeated, [text.text for rows in texts for row in rows for text in row])
    assert isinstance(read, Tensor)
    values: Float64Array = read.double().numpy().reshape(*shape, -1)
    return values


def undecided(pool: CandidatePool, weights: Float64Array, names: Sequence[str], instead: str) -> list[str]:
    """Write a sentence about each of the weights ``(V, R)`` by which all responses to every prompt are worth the same.

    Args:
        pool: What policies are made from.
        weights: Of the policies.
        names: Of the objectives.
        instead: What the policy for such weights is.
    """
    decided = {int(user) for user in weighted_pairs(pool, weights).user_ids}
    return [
        f"by {member_name(row, names)} all responses are worth the same: there is nothing to learn, and the policy for "
        f"these weights is {instead}"
        for place, row in enumerate(weights)
        if place not in decided
    ]


class OwnMix(NamedTuple):
    """What a member's texts are worth by the mix it was made for, with 95 % intervals over prompts."""

    gain: tuple[float, float, float]
    """Over the unaligned policy: mean, low, high."""
    rival: int | None
    """The best other member by this mix."""
    lead: tuple[float, float, float] | None
    """Over the rival."""
    divergence: float
    """KL from the unaligned policy in nats per response, as measured before."""


def own_mixes(values: Float64Array, weights: Float64Array, divergence: Sequence[float]) -> list[OwnMix]:
    """Compare every member, by its own mix, with the unaligned policy and with the best of the other members.

    Args:
        values: ``(1 + M, X, R)`` mean objectives on each prompt, the unaligned policy first.
        weights: ``(M, R)``.
        divergence: ``(M,)``.
    """

    def interval(differences: Float64Array) -> tuple[float, float, float]:
        low, high = cluster_bootstrap(differences)
        return float(differences.mean()), float(low), float(high)

    mixes = []
    for member, mix in enumerate(weights):
        mixed = values @ mix  # (1 + M, X)
        worth, others = mixed[1 + member], [other for other in range(len(weights)) if other != member]
        rival = max(others, key=lambda other: float(mixed[1 + other].mean()), default=None)
        lead = None if rival is None else interval(worth - mixed[1 + rival])
        mixes.append(OwnMix(interval(worth - mixed[0]), rival, lead, divergence[member]))
    return mixes


def own_mix_lines(result: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Say of each member whether it serves its own weights best, and from which price of KL on it is not worth it."""

    def shown(value: float, low: float, high: float) -> str:
        return f"{value:+.3f}" + ("" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")

    lines = []
    for member, (name, mix) in enumerate(zip(names, result["own_mix"], strict=True)):
        gain, rival, lead = mix["gain"][0], mix["rival"], mix["lead"]
        line = f"member {member} by its own mix, {name}: {shown(*mix['gain'])} over unaligned"
        if lead is not None:
            verdict = "better than" if lead[1] > 0 else "WORSE than" if lead[2] < 0 else "not distinguishable from"
            verdict = f"no verdict, for want of {MIN_USERS} prompts, against" if math.isnan(lead[1]) else verdict
            line += f"; {verdict} member {rival}, the best other, {shown(*lead)}"
        if mix["divergence"] > 0:
            line += f"; KL {mix['divergence']:.1f} nats, a gain of {gain / mix['divergence']:.3f} for each"
        lines.append(line)
    return lines


def member_name(weights: Float64Array, names: Sequence[str]) -> str:
    """``0.70 brief + 0.30 positive``, the largest share first.

    >>> member_name(np.array([0.3, 0.0, 0.7]), ["positive", "negative", "brief"])
    '0.70 brief + 0.30 positive'
    """
    parts = sorted(zip(weights.tolist(), names, strict=True), reverse=True)
    return " + ".join(f"{weight:.2f} {name}" for weight, name in parts if weight >= 0.005)


def inferred(method: WritingPortfolio, pool: CandidatePool, weights: Float64Array) -> UserState:
    """Learn users ``(U, R)`` from nothing but their best and worst response to each prompt of a pool."""
    shown = np.tile(np.arange(len(pool.prompts)), (len(weights), 1))
    columns = best_and_worst(pool.scores, weights, shown)  # (U, S, 2)
    mask = torch.as_tensor(columns[..., 0] >= 0).to(method.device)
    chosen, rejected = (
        torch.as_tensor(np.nan_to_num(pool.scores[shown, columns[..., side]]), dtype=torch.float32).to(method.device)
        for side in (0, 1)
    )
    return method.adapt(Context(chosen, rejected, mask, mask.float()))


def users_table(method: WritingPortfolio, learned: UserState, num_pairs: int, names: Sequence[str]) -> Table:
    """Show which member serves whom, by the weights given and by those learned from pairs."""
    title = f"Users: weights given, and learned from {num_pairs} pairs on the prompts that members were measured on"
    heads = ("user", "weights", "member", "regret within the oracle", "learned", "posterior sd", "member by pairs")
    rows = []
    with torch.no_grad():
        known = method.user_states(torch.arange(method.num_users, device=method.device)).to("cpu").tensors
    fits = learned.to("cpu").tensors
    for row, user_id in enumerate(method.user_ids):
        weights, fitted = (state["weights"][row].double().numpy() for state in (known, fits))
        spread = np.sqrt(np.diag(simplex_covariance(fits["precision"][row].double().numpy())))
        cells = [
            user_id,
            member_name(weights, names),
            str(int(known["member"][row])),
            f"{float(known['regret'][row]):.3f}",
            member_name(fitted, names),
            " ".join(f"{value:.2f}" for value in spread),
            str(int(fits["member"][row])),
        ]
        rows.append(TableRow(cells))
    return section_table(Section(title, heads, rows))


def simplex_covariance(precision: Float64Array) -> Float64Array:
    """Covariance ``(R, R)`` of weights of this precision whose sum is known.

    >>> simplex_covariance(np.eye(2)).round(2).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    num = len(precision)
    along = np.linalg.svd(np.ones((1, num)))[2][1:].T  # (R, R - 1), what leaves the sum alone
    covariance: Float64Array = along @ np.linalg.pinv(along.T @ precision @ along) @ along.T
    return covariance
