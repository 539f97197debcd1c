"""Latent DPO learns a user as a small policy over the latent of a language model that does not run meanwhile.

Paper: Zhang, Bai, Li, Wang, Li, Lin, Rong, "Disentangling Preference Representation and Text Generation for Efficient
    Individual Preference Alignment" (arXiv 2412.20834).
Reference code: zhangjf-nlp/LatentDPO (no licence; nothing is taken from it).
Deviations: ``conf/method/latent_dpo_paper.yaml`` is the released variant A. Log-densities are exact and their
    log-variances clamped. The default takes the expected loss of a pair in closed form instead of sampling latents,
    holds users near the prior by its KL, and keeps their variance at 1. ``conf/method/latent_dpo_newton.yaml`` is the
    exact optimum of a user who is one point of the latent space. Thousands of users train in one batch, each as if
    alone.

Axes: B pairs or responses, U users, N pairs of several users, F width of prompt features, Z latent width, P numbers of
one user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from plm.backbones import Backbone, CausalLM, LatentBackbone, Policy, TextWriter
from plm.method import PersonalizationMethod
from plm.method.abilities import LatentWriter, Mixable
from plm.method.episodes import places
from plm.methods.latent_dpo.families import FAMILIES, Family, Full
from plm.methods.latent_dpo.maths import Gaussian, draw_latents, gaussian, product_of_experts, response_rewards
from plm.methods.latent_dpo.newton import solve_users
from plm.methods.latent_dpo.noise import fold, normals
from plm.methods.latent_dpo.options import Options
from plm.methods.latent_dpo.population import learn, pooled
from plm.methods.latent_dpo.training import (
    make_optimizer,
    num_steps,
    step_in_parts,
    whole_losses,
)
from plm.methods.latent_dpo.user_pairs import UserPairs, pairs_of_batch, pairs_of_context
from plm.optimizer import RowAdam, row_gradient
from plm.types import Context, PreferenceBatch, Tokens, UserState, take_rows


class LatentDPO(PersonalizationMethod, LatentWriter, Mixable):
    """A policy p(z|x) over latents per user, learned by DPO from pairs of responses whose latents are cached.

    Responses come as the mean and log-variance of their posterior q(z|x,y) side by side. A user's reward of a response
    is ``beta E log p(z|x) / N(z; 0, I)`` over that posterior.

    Args:
        num_users: Number of seen users; linked from the data.
        feature_dim: Width 2Z of a response, twice that of the latent; linked from the data.
        backbone: What makes the latents; linked from the data.
        prompt_dim: Width F of the prompt features, 0 = the data have none; linked from the data.
        seed: Seed of what is drawn; every user draws from a stream of the user's own.
        **options: See `plm.methods.latent_dpo.options.Options`.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "latents"
    user_tables: tuple[str, ...] = ("policies", "steps", "num_pairs")
    options_class: ClassVar[type[Options]] = Options

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None = None,
        prompt_dim: int = 0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        settings = Options(**options)
        problems = settings.problems()
        if feature_dim < 2 or feature_dim % 2:
            expected = "features of even width, mean and log-variance side by side"
            problems.say(f"expected {expected}, got {feature_dim!r}")
        problems.check()
        super().__init__(num_users=num_users, feature_dim=feature_dim, backbone=backbone, lr=settings.lr)
        self.hparams.update(asdict(settings))  # a checkpoint names them all, whatever later defaults are
        self.hparams.pop("conditioning", None)  # of features; latents are left as they are
        self.options, self.prompt_dim, self.seed = settings, prompt_dim, seed
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
        self.policies = torch.nn.Parameter(start.repeat(num_users, 1), requires_grad=settings.rule != "newton")
        for name in ("steps", "num_pairs"):
            self.register_buffer(name, torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("wanted", torch.ones(num_users, dtype=torch.long), persistent=False)  # steps of each user
        if settings.patience:
            self.user_tables = (*self.user_tables, "best_policies", "best_loss", "stale")
            self.register_buffer("best_policies", start.repeat(num_users, 1))
            self.register_buffer("best_loss", torch.full((num_users,), torch.inf))
            self.register_buffer("stale", torch.zeros(num_users, dtype=torch.long))
        self._trained = torch.zeros(num_users, dtype=torch.bool)  # rows that this process trains
        self._cache: tuple[Tensor, Tensor, UserPairs] | None = None  # features of the batch they belong to, rows, pairs
        self._report: dict[str, Tensor] = {}

    def _family(self) -> Family:
        """The family of the users' policies; `Full` is made of the model that made the latents.

        Raises:
            ValueError: If prompts come as what the family does not read.
        """
        options, latent_dim = self.options, self.feature_dim // 2
        reads = options.family != "vector" and self.can_write
        tokens = reads and isinstance(self.latents.prompt_backbone, CausalLM)
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
                "or take model.family vector or model.rule newton, which are the same at every prompt"
            )
        if tokens:
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuse policies over latents of another model.

        Raises:
            ValueError: If they are.
        """
        specs = (checkpoint.get("hyper_parameters", {}).get("backbone"), self.hparams.get("backbone"))
        saved, content = ((spec or {}).get("init_args", {}).get("content") for spec in specs)
        if None not in (saved, content) and saved != content:
            raise ValueError(
                f"the checkpoint was trained on latents of the model {saved}, the data give those of {content}; "
                "set data.backbone to the one it was trained with, or train again"
            )
        super().on_load_checkpoint(checkpoint)

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
        everyone = pooled([self._pairs_of(batch)[1] for batch in self.train_pass()], self.seed)
        self.population.copy_(learn(everyone, self.start, self.family, self.options)[0])

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Mean over users of each user's loss at the user's next step, and of the metrics; without a graph."""
        users, pairs = self._cached_pairs(batch)
        _, metrics = step_in_parts(self.policies[users], self.family, pairs, self.steps[users], self.options)
        return _means(metrics)

    @torch.no_grad()
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One step of every user who has not finished, as if the others were not there."""
        users, pairs = self._cached_pairs(batch)
        optimizer: Any = self.optimizers()
        self._trained[users], self.num_pairs[users] = True, pairs.num_pairs
        self.wanted[users] = num_steps(pairs, self.options)
        rows = self._unfinished()[users].nonzero()[:, 0]
        if not len(rows):
            return self.policies.new_zeros(())
        here, active = users[rows], pairs if len(rows) == len(users) else pairs.take(rows)
        exact = self.options.rule == "newton"
        if exact:  # before the metrics, which are then those of the solution
            self.policies[here] = solve_users(active, self.options.beta, self.options.kl_coef)
        gradient, metrics = step_in_parts(self.policies[here], self.family, active, self.steps[here], self.options)
        if not exact:
            self.policies.grad = row_gradient(self.policies, here, gradient)
        optimizer.step()
        self.policies.grad = None
        self.steps[here] += 1
        self._report = _means(metrics)
        self.log_dict({f"train/{key}": value for key, value in self._report.items()}, batch_size=batch.num_pairs)
        return self._report["loss"]

    def _cached_pairs(self, batch: PreferenceBatch) -> tuple[Tensor, UserPairs]:
        """Rows of the batch's users and their pairs, kept while the same batch comes again."""
        chosen, _ = batch.features
        if self._cache is None or self._cache[0] is not chosen:
            self._cache = chosen, *self._pairs_of(batch)
        return self._cache[1:]

    def _pairs_of(self, batch: PreferenceBatch) -> tuple[Tensor, UserPairs]:
        return pairs_of_batch(batch._replace(prompt=self._prompts(batch.prompt)), self.seed)

    def _prompts(self, prompts: Tensor | Tokens | None) -> Tensor | Tokens | None:
        """Prompt features, or tokens, where policies depend on them.

        Raises:
            ValueError: If they are missing or of another width.
        """
        if not self.reads_prompts:
            return None
        if isinstance(self.family, Full):
            fits, expected = isinstance(prompts, Tokens), "tokens of prompts"
        else:
            fits = isinstance(prompts, Tensor) and prompts.shape[-1] == self.prompt_dim
            expected = f"prompt features of width {self.prompt_dim}"
        if not fits:
            got = prompts if prompts is None else tuple(getattr(prompts, "shape", ("tokens",)))
            raise ValueError(
                f"LatentDPO with model.family {self.options.family} reads {expected}, got {got!r}; "
                "set data.prompt_features: true, or take model.family vector"
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
            users, pairs = self._pairs_of(batch)
            losses = whole_losses(self.policies[users], self.family, pairs, self.options)
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
        prompt_features = self.encode_prompts(prompts) if self.encode_prompts is not None else None
        if prompt_features is not None:
            prompt_features = prompt_features.to(keys.device)
        options, policy = self.options, self.latent_policies(users, prompt_features, rows)
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
        text = torch.arange(len(rows), device=table.device).repeat_interleave(num_experts)
        parts = self._policies_at(table.flatten(0, 1), row, take_rows(prompt_features, text))
        experts = Gaussian(*(value.view(len(rows), num_experts, -1).transpose(0, 1) for value in parts))
        return product_of_experts(experts, weights[rows].T)

    def mixed(self, users: UserState, weights: Tensor) -> UserState:
        """Mix A users into U others, at every prompt the product of their policies by weights ``(U, A)``."""
        policies = users.tensors["policy"].expand(len(weights), -1, -1)
        tensors = {"policy": policies, "weights": weights.to(policies)}
        return UserState(tensors, users.num_pairs.sum().expand(len(weights)))

    def _policies_at(self, table: Tensor, row: Tensor, prompts: Tensor | Tokens | None) -> Gaussian:
        """Policies ``(B, Z)`` of the users at ``row`` ``(B,)`` of a table ``(U, P)``; no user's numbers are copied."""
        prompts = self._prompts(prompts)
        if prompts is None:
            policy = self.family.policy(self.family.split(table), None)
            return Gaussian(policy.mean[row, 0], policy.log_var[row, 0])
        place = places(row)
        width = int(place.max()) + 1 if len(place) else 1

        def spread(values: Tensor) -> Tensor:
            padded = values.new_zeros(len(table), width, values.shape[-1])
            padded[row, place] = values
            return padded

        padded = prompts.map(spread) if isinstance(prompts, Tokens) else spread(prompts)
        policy = self.family.policy(self.family.split(table), self.family.inputs(padded))
        return Gaussian(policy.mean[row, place], policy.log_var[row, place])

    def _score(
        self, responses: Tensor | Tokens, users: UserState, prompt_features: Tensor | Tokens | None = None
    ) -> Tensor:
        """``beta E h(z)`` over the posterior of each response: ``(B, 2Z)`` -> ``(B,)``."""
        return self._reward(responses, self.latent_policies(users, prompt_features))

    def _score_rows(self, responses: Tensor | Tokens, users: UserState, rows: Tensor, **prompts: Any) -> Tensor:
        """The same without a copy of a user's network for every response."""
        return self._reward(responses, self.latent_policies(users, prompts.get("prompt_features"), rows))

    def _reward(self, responses: Tensor | Tokens, policy: Gaussian) -> Tensor:
        assert isinstance(responses, Tensor), "a method whose view is latents gets features"
        return self.options.beta * response_rewards(gaussian(responses), policy)[0]

    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """As in the base class, but a user's network reads all the user's prompts instead of being copied for each."""
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
        """Policies of seen users, the last or the best (``patience``); without pairs, the population state."""
        return UserState({"policy": self._served(user_index)}, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The state of one user who had the pairs of all seen users; untrained, the prior N(0, I)."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        return UserState({"policy": self.population.expand(num_users, -1)}, num_pairs)

    def _adapt(self, context: Context) -> UserState:
        """Latent DPO from the prior, all users side by side; nothing but the cached latents is read.

        A user without pairs gets the population state.
        """
        pairs = pairs_of_context(context._replace(prompt=self._prompts(context.prompt)), self.seed)
        policies = learn(pairs, self.start, self.family, self.options)
        served = torch.where(pairs.num_pairs[:, None] > 0, policies, self.population)
        return UserState({"policy": served}, pairs.num_pairs)


def _means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over users."""
    return {name: value.mean() for name, value in metrics.items()}
