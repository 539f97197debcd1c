"""Latent DPO: a person is a small policy over the latent of a language model that never runs while it is learned.

Paper: Zhang, Bai, Li, Wang, Li, Lin, Rong, "Disentangling Preference Representation and Text Generation for Efficient
    Individual Preference Alignment" (arXiv 2412.20834).
Reference code: zhangjf-nlp/LatentDPO (no licence; nothing is taken from it).
Deviations: ``preset: paper`` is the released variant A. Log-densities are exact and their
    log-variances clamped. The default takes the expected loss of a pair in closed form instead of sampling latents,
    holds people near the prior by its KL, and keeps their variance at 1. ``preset: newton`` is the exact optimum of a
    person who is one point of the latent space. Thousands of people train in one batch, each as if alone.

Axes: B pairs or responses, U users, N pairs of several users, F width of prompt features, Z latent width, P numbers of
one user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from plm.backbones import Backbone, LatentBackbone, Policy, TextWriter
from plm.method import PersonalizationMethod
from plm.method.abilities import LatentWriter, Mixable
from plm.methods.latent_dpo.families import FAMILIES, Family, FamilyName, Full, Variance
from plm.methods.latent_dpo.maths import Gaussian, draw_latents, gaussian, product_of_experts, response_rewards
from plm.methods.latent_dpo.newton import solve_people
from plm.methods.latent_dpo.noise import fold, normals
from plm.methods.latent_dpo.options import PRESETS, Options, Preset
from plm.methods.latent_dpo.people import People, people_of_batch, people_of_context
from plm.methods.latent_dpo.population import learn, pooled
from plm.methods.latent_dpo.rules import RuleName
from plm.methods.latent_dpo.training import (
    make_optimizer,
    num_steps,
    step_in_parts,
    whole_losses,
)
from plm.optimizer import RowAdam, clip_rows, row_gradient
from plm.types import Context, PreferenceBatch, Tokens, UserState


class LatentDPO(PersonalizationMethod, LatentWriter, Mixable):
    """A policy p(z|x) over latents per user, learned by DPO from pairs of responses whose latents are cached.

    Responses come as the mean and log-variance of their posterior q(z|x,y) side by side. A user's reward of a response
    is ``beta E log p(z|x) / N(z; 0, I)`` over that posterior. An argument that is null takes the value of the preset;
    the default preset's is given in brackets.

    Args:
        num_users: Number of seen users; linked from the data.
        feature_dim: Width 2Z of a response, twice that of the latent; linked from the data.
        backbone: What makes the latents; linked from the data.
        prompt_dim: Width F of the prompt features, 0 = the data have none; linked from the data.
        preset: fast = ours; paper = as published; newton = one point per user, solved exactly.
        family: vector = one policy for all prompts; linear, mlp = of the prompt's features; full = an encoder of the
            prompt's tokens for every user, as published; it needs ``prompts: tokens`` of the backbone [mlp; paper full;
            newton vector].
        hidden_dim: Hidden width of an mlp [128].
        variance: unit = 1; free = learned; fixed_entropy = learned, with the entropy of the prior [unit; paper free].
        rule: What a pair teaches. closed_form = expected loss of posterior draws without drawing; direct = the same,
            drawn; evidence = latents of a pool whose reward differs most, as published; all_pairs = all latents of the
            pool, ordered; topk = the best quarter against the worst; soft = all, with soft labels; expectation = the
            expected latent reward itself; newton = posterior means, solved exactly [closed_form; paper evidence].
        beta: Strength of the KL term that DPO implies [0.1].
        kl_coef: Weight of the KL to the prior in nats. Hard labels have no finite optimum without it and leave the
            region the decoder was trained on [0.01; paper 0].
        num_samples: Latents drawn per source [16].
        evidence_ratio: Share of the unordered pairs of latents that evidence keeps [0.5].
        posterior_draws: Whether pools hold draws of the responses' posteriors besides those of the prior [true].
        marginal: Whether every latent dimension is a problem of its own [false].
        batch_size: Most pairs of a user in a step [64].
        num_steps: Steps of a user; 0 = one pass over the user's pairs [200; paper 0].
        warmup: Share of a user's steps over which the learning rate rises [0; paper 0.1].
        clip_norm: Longest gradient of a user; 0 = no bound [0].
        weight_decay: AdamW's [0].
        patience: Validations without improvement after which a user stops; users are served by their best policy. 0 =
            users are served by their last policy [0; paper 10].
        seed: Seed of what is drawn; every user draws from a stream of the user's own.
        lr: Learning rate [0.001; paper 0.0001].
        latent_temperature: What the standard deviation of a policy is multiplied by when a user writes, or the
            population, each text from a draw of its own; 0 = the mean, as published [1; paper 0].
        max_latent_norm: Longest latent to write from in units of sqrt(Z), beyond which the model that writes was not
            trained; null = no bound.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "latents"
    user_tables: tuple[str, ...] = ("policies", "steps", "num_pairs")

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None = None,
        prompt_dim: int = 0,
        preset: Preset = "fast",
        family: FamilyName | None = None,
        hidden_dim: int | None = None,
        variance: Variance | None = None,
        rule: RuleName | None = None,
        beta: float | None = None,
        kl_coef: float | None = None,
        num_samples: int | None = None,
        evidence_ratio: float | None = None,
        posterior_draws: bool | None = None,
        marginal: bool | None = None,
        batch_size: int | None = None,
        num_steps: int | None = None,
        warmup: float | None = None,
        clip_norm: float | None = None,
        weight_decay: float | None = None,
        patience: int | None = None,
        seed: int = 0,
        lr: float | None = None,
        latent_temperature: float | None = None,
        max_latent_norm: float | None = None,
    ) -> None:
        values = locals()
        if preset not in PRESETS:
            raise ValueError(f"model.preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        given = {name: values[name] for name in Options.__dataclass_fields__ if values[name] is not None}
        options = replace(PRESETS[preset], **given)
        problems = options.problems() + options.without_effect(set(given))
        if feature_dim < 2 or feature_dim % 2:
            problems.append(f"expected features of even width, mean and log-variance side by side, got {feature_dim!r}")
        if problems:
            raise ValueError("\n".join(problems))
        super().__init__(num_users=num_users, feature_dim=feature_dim, backbone=backbone, lr=options.lr)
        self.preset, self.options, self.prompt_dim, self.seed = preset, options, prompt_dim, seed
        self.family = self._family()
        self.automatic_optimization = False
        self.start: Tensor
        self.population: Tensor
        self.best_policies: Tensor
        self.best_loss: Tensor
        self.stale: Tensor
        self.steps: Tensor
        self.wanted: Tensor
        self.num_pairs: Tensor
        start = self.family.initial(seed)
        self.register_buffer("start", start)
        self.register_buffer("population", start.clone())
        self.policies = torch.nn.Parameter(start.repeat(num_users, 1), requires_grad=options.rule != "newton")
        for name in ("steps", "num_pairs"):
            self.register_buffer(name, torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("wanted", torch.ones(num_users, dtype=torch.long), persistent=False)  # steps of each user
        if options.patience:
            self.user_tables = (*self.user_tables, "best_policies", "best_loss", "stale")
            self.register_buffer("best_policies", start.repeat(num_users, 1))
            self.register_buffer("best_loss", torch.full((num_users,), torch.inf))
            self.register_buffer("stale", torch.zeros(num_users, dtype=torch.long))
        self._trained = torch.zeros(num_users, dtype=torch.bool)  # rows that this process trains
        self._cache: tuple[Tensor, Tensor, People] | None = None  # features of the batch they belong to, rows, pairs
        self._report: dict[str, Tensor] = {}

    def _family(self) -> Family:
        """What people are; `full` people are made of the model that made the latents.

        Raises:
            ValueError: If prompts come as what the family does not read.
        """
        options, latent_dim = self.options, self.feature_dim // 2
        tokens = self.hparams.get("backbone") is not None and self.latents.prompts_as_tokens
        if options.family == "full":
            if not (tokens and self.prompt_dim):
                raise ValueError(
                    "model.family full reads the tokens of prompts: set data.prompt_features: true and "
                    "data.backbone.init_args.prompts: tokens"
                )
            return Full(latent_dim, self.prompt_dim, options.variance, self.latents.prompt_encoder())
        if options.family != "vector" and not self.prompt_dim:
            raise ValueError(
                f"model.family {options.family} reads features of prompts, got none: set data.prompt_features: true, "
                "or take model.family vector or model.preset newton, which are the same at every prompt"
            )
        if tokens and options.family != "vector":
            raise ValueError(
                f"model.family {options.family} reads features of prompts, got tokens; set "
                "data.backbone.init_args.prompts: hidden, or model.family full"
            )
        return FAMILIES[options.family](latent_dim, self.prompt_dim, options.hidden_dim, options.variance)

    @property
    def reads_prompts(self) -> bool:
        """Whether policies depend on the prompt."""
        return self.family.reads_prompts and self.prompt_dim > 0

    # ------------------------------------------------------------------ training
    def setup(self, stage: str) -> None:
        """Check the precision: nothing scales losses here."""
        super().setup(stage)
        if self._trainer is not None and str(self.trainer.precision) not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision: expected 32-true or bf16-mixed, got {self.trainer.precision!r}")

    def configure_optimizers(self) -> RowAdam:
        """AdamW, of which every user has one."""
        return make_optimizer(self.policies, self.options, lambda: self.wanted)

    def on_train_start(self) -> None:
        """Also check that every user's pairs stay with one process, and learn the population from all pairs."""
        super().on_train_start()
        if self.trainer.world_size > 1 and self.trainer.num_training_batches > 1:
            raise ValueError(
                f"several processes need all pairs in one batch, got {self.trainer.num_training_batches} per process, "
                "between which users would wander; set data.batch_size null"
            )
        self._trained = torch.zeros_like(self.num_pairs, dtype=torch.bool)
        everybody = pooled([self._people_of(batch)[1] for batch in self.train_pass()], self.seed)
        self.population.copy_(learn(everybody, self.start, self.family, self.options)[0])

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Mean over users of each user's loss at the user's next step, and of the metrics; without a graph."""
        users, people = self._people(batch)
        _, metrics = step_in_parts(self.policies[users], self.family, people, self.steps[users], self.options)
        return _means(metrics)

    @torch.no_grad()
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One step of every user who has not finished, as if the others were not there."""
        users, people = self._people(batch)
        optimizer: Any = self.optimizers()
        self._trained[users], self.num_pairs[users] = True, people.num_pairs
        self.wanted[users] = num_steps(people, self.options)
        rows = self._unfinished()[users].nonzero()[:, 0]
        if not len(rows):
            return self.policies.new_zeros(())
        here, active = users[rows], people if len(rows) == len(users) else people.take(rows)
        exact = self.options.rule == "newton"
        if exact:  # before the metrics, which are then those of the solution
            self.policies[here] = solve_people(active, self.options.beta, self.options.kl_coef)
        gradient, metrics = step_in_parts(self.policies[here], self.family, active, self.steps[here], self.options)
        if not exact:
            self.policies.grad = row_gradient(self.policies, here, gradient)
            if self.options.clip_norm:
                clip_rows(self.policies, self.options.clip_norm)
        optimizer.step()
        self.policies.grad = None
        self.steps[here] += 1
        self._report = _means(metrics)
        self.log_dict({f"train/{key}": value for key, value in self._report.items()}, batch_size=batch.num_pairs)
        return self._report["loss"]

    def _people(self, batch: PreferenceBatch) -> tuple[Tensor, People]:
        """Rows of the batch's users and their pairs, kept while the same batch comes again."""
        assert isinstance(batch.chosen, Tensor)
        if self._cache is None or self._cache[0] is not batch.chosen:
            self._cache = batch.chosen, *self._people_of(batch)
        return self._cache[1:]

    def _people_of(self, batch: PreferenceBatch) -> tuple[Tensor, People]:
        return people_of_batch(batch._replace(prompt=self._prompts(batch.prompt)), self.seed)

    def _prompts(self, prompts: Tensor | Tokens | None) -> Tensor | None:
        """Prompt features, where policies depend on them.

        Raises:
            ValueError: If they are missing or of another width.
        """
        if not self.reads_prompts:
            return None
        if not isinstance(prompts, Tensor) or prompts.shape[-1] != self.prompt_dim:
            got = tuple(prompts.shape) if isinstance(prompts, Tensor) else prompts
            raise ValueError(
                f"LatentDPO with model.family {self.options.family} reads prompt features of width {self.prompt_dim}, "
                f"got {got!r}; set data.prompt_features: true, or take model.family vector"
            )
        return prompts

    def _unfinished(self) -> Tensor:
        """``(U,)`` bool, True = takes another step."""
        more = self.steps < self.wanted
        return more & (self.stale < self.options.patience) if self.options.patience else more

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Bring processes together, keep every user's best policy so far, and end the fit when all have finished."""
        self._share(("policies", "steps", "wanted", "num_pairs"), self._trained)
        if self.options.patience:
            self._keep_best()
        if not self._unfinished().any():
            self.trainer.should_stop = True

    def _keep_best(self) -> None:
        """Compare every user's policy with the best so far, on the user's own validation pairs."""
        judged = torch.zeros_like(self._trained)
        for batch in self.val_pass():
            users, people = self._people_of(batch)
            losses = whole_losses(self.policies[users], self.family, people, self.options)
            better = losses < self.best_loss[users]
            self.stale[users] = torch.where(better, 0, self.stale[users] + 1)
            self.best_loss[users] = torch.where(better, losses, self.best_loss[users])
            self.best_policies[users[better]] = self.policies[users[better]]
            judged[users] = True
        self._share(("best_policies", "best_loss", "stale"), judged)

    def _share(self, names: tuple[str, ...], owned: Tensor) -> None:
        """Rows ``owned`` ``(U,)`` by this process go to all others."""
        if self.trainer.world_size == 1:
            return
        owners = self.sum_over_processes(owned.long())
        for name in names:
            table = getattr(self, name).data
            column = [-1, *[1] * (table.dim() - 1)]
            rows = self.sum_over_processes(torch.where(owned.view(column), table, 0))
            table.copy_(torch.where(owners.view(column) > 0, rows, table))

    def report(self) -> dict[str, float]:
        """The metrics of the last training step."""
        return {name: float(value) for name, value in self._report.items()}

    # ------------------------------------------------------------------ text
    @cached_property
    def latents(self) -> LatentBackbone:
        """The model that made the latents, and writes from them; its weights are read when needed.

        Raises:
            ValueError: If it is not known.
        """
        spec = self.hparams.get("backbone")
        backbone = Backbone.from_spec(spec) if spec else None
        if not isinstance(backbone, LatentBackbone):
            raise ValueError(
                "LatentDPO writes with the model that made its latents, got none; set data.backbone to a "
                "plm.methods.clap.latents.ClapLatents"
            )
        return backbone

    @property
    def can_write(self) -> bool:
        """Whether the model that made the latents is known."""
        return bool(self.hparams.get("backbone"))

    @property
    def policy(self) -> Policy:
        """The language model that writes."""
        return self.latents.policy

    def latent_states(self, users: UserState, rows: Tensor, prompts: Sequence[str], keys: Tensor) -> UserState:
        """Latents ``(B, Z)`` of B texts, each drawn from its user's policy at its prompt by its key, ``(B,)`` int64."""
        asked = self.encode_prompts(prompts) if self.encode_prompts is not None else None
        asked = None if asked is None else asked.to(keys.device)
        options, policy = self.options, self.latent_policies(users, asked, rows)
        noise = normals(fold(keys, 1), policy.mean.shape[-1])
        latent = draw_latents(policy, noise, options.latent_temperature, options.max_latent_norm)
        return UserState({"latent": latent}, users.num_pairs[rows])

    def writing(self, users: UserState, prompts: Sequence[str]) -> TextWriter:
        """A batch of texts, one for each latent of `latent_states`."""
        return self.latents.writing(users.tensors["latent"])

    # ------------------------------------------------------------------ use
    def latent_policies(
        self, users: UserState, prompt_features: Tensor | Tokens | None = None, rows: Tensor | None = None
    ) -> Gaussian:
        """Policies p(z|x) ``(B, Z)`` at B prompts ``(B, F)``, of the users at ``rows`` ``(B,)``; default: one each."""
        table, weights = users.tensors["policy"], users.tensors.get("weights")
        rows = torch.arange(users.num_users, device=table.device) if rows is None else rows
        if weights is None:
            return self._policies_at(table, rows, prompt_features)
        num_experts = weights.shape[1]
        row = (rows[:, None] * num_experts + torch.arange(num_experts, device=table.device)).flatten()
        given = prompt_features.repeat_interleave(num_experts, 0) if isinstance(prompt_features, Tensor) else None
        parts = self._policies_at(table.flatten(0, 1), row, given)
        experts = Gaussian(*(value.view(len(rows), num_experts, -1).transpose(0, 1) for value in parts))
        return product_of_experts(experts, weights[rows].T)

    def mixed(self, users: UserState, weights: Tensor) -> UserState:
        """Mix A users into U others, at every prompt the product of their policies by weights ``(U, A)``."""
        policies = users.tensors["policy"].expand(len(weights), -1, -1)
        tensors = {"policy": policies, "weights": weights.to(policies)}
        return UserState(tensors, users.num_pairs.sum().expand(len(weights)))

    def _policies_at(self, table: Tensor, row: Tensor, prompts: Tensor | Tokens | None) -> Gaussian:
        """Policies ``(B, Z)`` of the users at ``row`` ``(B,)`` of a table ``(U, P)``; no user's numbers are copied."""
        given = self._prompts(prompts)
        if given is None:
            policy = self.family.policy(self.family.split(table), None)
            return Gaussian(policy.mean[row, 0], policy.log_var[row, 0])
        order = row.argsort(stable=True)
        count = torch.bincount(row, minlength=len(table))
        place = torch.empty_like(row)
        place[order] = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row[order]]
        padded = given.new_zeros(len(table), max(int(count.max()), 1), self.prompt_dim)
        padded[row, place] = given
        policy = self.family.policy(self.family.split(table), self.family.inputs(padded))
        return Gaussian(policy.mean[row, place], policy.log_var[row, place])

    def _score(
        self, responses: Tensor | Tokens, users: UserState, prompt_features: Tensor | Tokens | None = None
    ) -> Tensor:
        """``beta E h(z)`` over the posterior of each response: ``(B, 2Z)`` -> ``(B,)``."""
        return self._reward(responses, self.latent_policies(users, prompt_features))

    def _score_rows(self, responses: Tensor | Tokens, users: UserState, rows: Tensor, **asked: Any) -> Tensor:
        """The same without a copy of a user's network for every response."""
        return self._reward(responses, self.latent_policies(users, asked.get("prompt_features"), rows))

    def _reward(self, responses: Tensor | Tokens, policy: Gaussian) -> Tensor:
        assert isinstance(responses, Tensor)
        return self.options.beta * response_rewards(gaussian(responses), policy)[0]

    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """As for every method, but a user's network reads all the user's prompts instead of being copied for each."""
        if batch.context is not None and batch.context_row is not None:
            adapted = self.adapt(batch.context).tensors["policy"]
            own, other = batch.context_row, batch.other_row
            policies: Callable[[Tensor], Tensor] = adapted.__getitem__
        else:
            policies, own, other = self._served, batch.user_index, batch.other_index
        facts = {"margin": self._margins(batch, policies, own)}
        if batch.num_shots is None:
            facts["population_margin"] = self._margins(batch, self.population[None].__getitem__, torch.zeros_like(own))
        if other is not None:
            facts["other_margin"] = self._margins(batch, policies, other)
        return facts

    def _margins(self, batch: PreferenceBatch, policies: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``(B,)`` for the users at ``rows``, whose numbers ``policies`` gives."""
        users, row = torch.unique(rows, return_inverse=True)
        policy = self._policies_at(policies(users), row, batch.prompt)
        return self._reward(batch.chosen, policy) - self._reward(batch.rejected, policy)

    def _served(self, users: Tensor) -> Tensor:
        """Policies that seen users are served by: rows ``(R,)`` -> ``(R, P)``."""
        own = self.policies[users]
        if self.options.patience:
            own = torch.where(self.best_loss[users, None].isfinite(), self.best_policies[users], own)
        return torch.where(self.num_pairs[users, None] > 0, own, self.population)

    def user_states(self, user_index: Tensor) -> UserState:
        """Policies of seen users: the last ones, or with ``patience`` the best; who has no pairs is the population."""
        return UserState({"policy": self._served(user_index)}, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """What one person would be who had the pairs of all seen users; untrained, the prior N(0, I)."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        return UserState({"policy": self.population.expand(num_users, -1)}, num_pairs)

    def _adapt(self, context: Context) -> UserState:
        """Latent DPO from the prior, everybody side by side; nothing but the cached latents is read.

        Who has no pairs is the population.
        """
        people = people_of_context(context._replace(prompt=self._prompts(context.prompt)), self.seed)
        policies = learn(people, self.start, self.family, self.options)
        own = torch.where(people.num_pairs[:, None] > 0, policies, self.population)
        return UserState({"policy": own}, people.num_pairs)


def _means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over people."""
    return {name: value.mean() for name, value in metrics.items()}
