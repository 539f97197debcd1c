"""VPL: a few pairs of a user become a distribution over a latent, and the reward is decoded with that latent.

Paper: Poddar, Wan, Ivison, Gupta, Jaques, "Personalizing RLHF with Variational Preference Learning" (arXiv 2408.10075).
Reference code: WEIRDLabUW/vpl_llm (nothing is taken from it).
Deviations: ``conf/method/vpl_paper.yaml`` is the published configuration of the language-model part, on cached
    features. The defaults keep the model (pair encoder, set posterior, decoder, Bradley-Terry likelihood, KL) and
    replace what its code does not do well: the latent means the same in training and use, a swapped pair says the
    opposite by construction, evidence adds up so that the variance falls with the number of pairs, bounds are smooth,
    targets share no response with their context, several samples bound the likelihood of all targets of a user at
    once, and the decoder cannot do without the latent. Every replacement is an argument of its own.

Axes: N pairs of several users, B responses or pairs, U users of a batch, C context and T target pairs, M posterior
samples, D feature width, H hidden width, Z latent width, P prepared width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import held_out_losses, kl_to_prior, per_user_sum, targets, unit_mean_per_user, user_chunks
from plm.messages import Problems
from plm.method import PersonalizationMethod
from plm.method.episodes import (
    Arranged,
    TargetRule,
    arrange,
    draw_episodes,
    places,
    rank_within_user,
    shuffling_keys,
)
from plm.method.strangers import least_harmful
from plm.methods.vpl.networks import (
    DECODERS,
    POSTERIORS,
    Anneal,
    AttentionPosterior,
    BilinearDecoder,
    Bounds,
    Gaussian,
    PairEncoder,
    PairTokens,
    anneal_factor,
    on_sphere,
    swap_guide,
    target_bound,
    warn_of_short_annealing,
)
from plm.optimizer import with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

LATENT_SCALES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4)
"""Candidates for what the latent is multiplied by in use, chosen on validation pairs."""

ACTIVE_VARIANCE = 0.005
"""A latent dimension is active when its posterior means vary by more than this over users."""

SHOTS = (1, 2, 4, 8, 16, 32)
"""Where the posterior variance is reported against the number of pairs."""

WARM_UP = 0.03
"""Share of the steps in which the learning rate of the schedule ``cosine`` rises, as published."""

MAX_FLOATS = 2**26
"""Numbers of the features of users who are read at once (256 MiB)."""

RIDGE, BASIS_RIDGE = 0.06, 1.0
"""Precisions of the normal priors on the population's direction and on the bases of the bilinear decoder."""


def is_collapsed(report: Mapping[str, float]) -> bool:
    """Whether rewards depend on the user no more than by chance, from `VPL.report`."""
    return report["active_units"] < 1 or report["val_accuracy"] - report["val_other_accuracy"] < 0.005


class VPL(PersonalizationMethod):
    """Variational preferences: an encoder reads a user's pairs into a normal posterior over a latent of the reward.

    Args:
        latent_dim: Width Z of the latent.
        hidden_dim: Width H of encoder and decoder.
        pair_features: odd_even = both responses go through one network, their difference says what, their sum how
            strongly, so that a swapped pair has the opposite mean; concat = both side by side, as published.
        posterior: product = pairs add precision to the prior; attention = self-attention over the pairs, averaged, as
            published, which cannot tell four pairs from the same four twice.
        latent_map: same = the decoder reads samples in training and the mean in use; sphere = both projected to the
            sphere of radius sqrt(Z); sphere_in_training = only the samples, as published.
        bounds: smooth = tanh bounds; clamp = hard ones, without gradient outside, as published.
        decoder: bilinear = population direction plus ``z @ bases @ x``, the only one that nothing both responses share
            can change; film = hidden units scaled and shifted by z before the nonlinearity, plus bilinear; concat = a
            network on response and z side by side, as published.
        kl_weight: Weight of the KL to the standard normal prior.
        free_bits: Nats of KL per latent dimension, mean over users, that cost nothing: what keeps the latent alive
            while the decoder has not learned to use it.
        anneal: How the KL weight grows from a tenth to all, counted in optimizer steps.
        anneal_steps: Over how many steps.
        cyclical: Whether it starts again afterwards.
        swap_guide: Weight of SPL's pull of the posterior of swapped pairs to the opposite mean (only with concat
            pair_features; SPL uses 1e-5).
        num_samples: Posterior samples per user and step.
        target_rule: What a target may share with its context: response = nothing, rest = responses, any = even the
            pair, as published.
        min_context: Least context pairs per user (not with target_rule response).
        max_context: Most context pairs per user in training; with posterior attention also in use.
        num_targets: Most targets per user and step.
        calibrate: Whether the latent is multiplied by the number of the lowest validation loss.
        weight_decay: AdamW's.
        schedule: How the learning rate decays to zero: linear, or cosine after a warm-up, as published.
        lr: Learning rate.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("mean", "log_var", "num_pairs")
    search_space: ClassVar[dict[str, list[Any]]] = {
        "decoder": ["film", "bilinear"],
        "latent_dim": [8, 16, 32],
        "kl_weight": [0.1, 0.3, 1.0],
        "lr": [0.002, 0.005, 0.01],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        latent_dim: int = 16,
        hidden_dim: int = 64,
        pair_features: Literal["odd_even", "concat"] = "odd_even",
        posterior: Literal["product", "attention"] = "product",
        latent_map: Literal["same", "sphere", "sphere_in_training"] = "same",
        bounds: Bounds = "smooth",
        decoder: Literal["bilinear", "film", "concat"] = "film",
        kl_weight: float = 0.3,
        free_bits: float = 0.1,
        anneal: Anneal = "linear",
        anneal_steps: int = 100,
        cyclical: bool = False,
        swap_guide: float = 0.0,
        num_samples: int = 4,
        target_rule: TargetRule = "response",
        min_context: int = 0,
        max_context: int = 64,
        num_targets: int = 32,
        calibrate: bool = True,
        weight_decay: float = 0.0,
        schedule: Literal["linear", "cosine"] = "linear",
        lr: float = 0.005,
        **options: Any,
    ) -> None:
        odd_even = pair_features == "odd_even"
        problems = Problems("model.")
        problems.integers(1, latent_dim=latent_dim, hidden_dim=hidden_dim, anneal_steps=anneal_steps)
        problems.integers(1, num_samples=num_samples, max_context=max_context, num_targets=num_targets)
        problems.integers(0, min_context=min_context)
        problems.numbers(kl_weight=kl_weight, free_bits=free_bits, swap_guide=swap_guide)
        problems.numbers(weight_decay=weight_decay, lr=lr)
        problems.say(
            f"model.min_context: expected at most model.max_context = {max_context}, got {min_context!r}",
            when=min_context > max_context,
        )
        problems.say(
            "model.swap_guide acts only with model.pair_features concat: with odd_even a swapped pair says the "
            f"opposite by construction; got {swap_guide!r}",
            when=swap_guide != 0 and odd_even,
        )
        problems.say(
            "model.min_context acts only with model.target_rule rest or any: with response the context of an episode "
            f"is whatever falls on its side; got {min_context!r}",
            when=min_context != 0 and target_rule == "response",
        )
        problems.choices(
            pair_features=(pair_features, ("odd_even", "concat")),
            posterior=(posterior, tuple(POSTERIORS)),
            latent_map=(latent_map, ("same", "sphere", "sphere_in_training")),
            bounds=(bounds, get_args(Bounds)),
            decoder=(decoder, tuple(DECODERS)),
            anneal=(anneal, get_args(Anneal)),
            target_rule=(target_rule, get_args(TargetRule)),
            schedule=(schedule, ("linear", "cosine")),
        )
        problems.check()
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.latent_dim, self.latent_map, self.calibrate = latent_dim, latent_map, calibrate
        self.kl_weight, self.free_bits, self.swap_guide = kl_weight, free_bits, swap_guide
        self.anneal, self.anneal_steps, self.cyclical = anneal, anneal_steps, cyclical
        self.target_rule, self.min_context, self.max_context = target_rule, min_context, max_context
        self.num_targets, self.num_samples = num_targets, num_samples
        self.weight_decay, self.schedule = weight_decay, schedule
        self.encoder = PairEncoder(feature_dim, hidden_dim, odd_even)
        self.set_encoder = POSTERIORS[posterior](hidden_dim, latent_dim, odd_even, bounds)
        self.decoder = DECODERS[decoder](feature_dim, hidden_dim, latent_dim)
        self.mean: Tensor
        self.log_var: Tensor
        self.num_pairs: Tensor
        self.latent_scale: Tensor
        self.variance: Tensor
        self.val_accuracies: Tensor
        self.register_buffer("mean", torch.zeros(num_users, latent_dim))
        self.register_buffer("log_var", torch.zeros(num_users, latent_dim))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("latent_scale", torch.ones(()))
        self.register_buffer("variance", -torch.ones(len(SHOTS)))  # -1 = not known; nan is not equal to itself
        self.register_buffer("val_accuracies", -torch.ones(2))
        self._batch: tuple[PreferenceBatch, Arranged] | None = None  # the last training batch

    # ------------------------------------------------------------------ shared by training and use
    def _scaled(self, responses: Tensor) -> Tensor:
        """Features in units in which a difference has about unit variance per number."""
        scaled: Tensor = responses.to(self.feature_scale.dtype) * (self.feature_dim**0.5 / self.feature_scale)
        return scaled

    def _tokens(self, batch: PreferenceBatch, rows: Tensor) -> PairTokens:
        """Tokens of the pairs at ``rows``, an index or mask."""
        chosen, rejected = (self._scaled(side[rows]) for side in batch.features)
        if self.encoder.odd_even:  # what both responses share says nothing
            chosen = (chosen - rejected) / 2
            rejected = -chosen
        tokens: PairTokens = self.encoder(chosen, rejected, targets(batch.tie[rows]).to(chosen))
        return tokens

    def _posterior(self, tokens: PairTokens, weight: Tensor, user: Tensor, num_users: int) -> Gaussian:
        """Tokens ``(N, H)``, ``(N,)`` weights and users -> posteriors of U users; without pairs the prior."""
        posterior: Gaussian = self.set_encoder(tokens, unit_mean_per_user(weight, user, num_users), user, num_users)
        return posterior

    def _read_pairs(self, difference: Tensor, weight: Tensor, user: Tensor) -> Tensor:
        """Pairs ``(N,)`` bool that the posterior reads: all of them, or ``max_context`` of each user as in training.

        Which ones depends on their content alone, never on their order, nor on who won. Attention would see a pair of
        weight 0 as well; it is left out.
        """
        if not isinstance(self.set_encoder, AttentionPosterior):
            return torch.ones_like(user, dtype=torch.bool)
        counts, keys = weight > 0, shuffling_keys(difference, self.feature_scale)
        return counts & (rank_within_user(2 * user + ~counts, keys) < self.max_context)

    def _reward(self, prepared: Tensor, latent: Tensor) -> Tensor:
        """``(..., P)``, ``(..., Z)`` in use -> ``(...)``."""
        if self.latent_map == "sphere":
            latent = on_sphere(latent)
        reward: Tensor = self.decoder.reward(prepared, self.latent_scale * latent)
        return reward

    # ------------------------------------------------------------------ training
    def before_first_step(self) -> None:
        """Start from the Bradley-Terry model of all, where the decoder has a linear path."""
        linear = getattr(self.decoder, "linear", self.decoder)
        if isinstance(linear, BilinearDecoder) and not linear.population.any():  # else an earlier fit goes on
            with torch.no_grad():
                linear.population.copy_(self.bradley_terry * self.feature_scale / self.feature_dim**0.5)

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the bound on the likelihood of the targets plus the annealed KL, over one episode per user."""
        batch, user, nodes = self._arranged(batch)
        sides, num_users = batch.features, int(user.max()) + 1
        context, rows = draw_episodes(
            user,
            nodes,
            self.target_rule,
            self.min_context,
            self.max_context,
            self.num_targets,
        )
        posterior = self._posterior(self._tokens(batch, context), batch.weight[context], user[context], num_users)
        latent = posterior.sample(self.num_samples)
        if self.latent_map != "same":
            latent = on_sphere(latent)
        chosen, rejected = (self.decoder.prepare(self._scaled(side[rows])) for side in sides)
        latent, of_user = latent[user[rows]], user[rows]  # (T, M, Z)
        margin = self.decoder.reward(chosen[:, None], latent) - self.decoder.reward(rejected[:, None], latent)
        target, weight = targets(batch.tie[rows]).to(margin), unit_mean_per_user(batch.weight[rows], of_user, num_users)
        count = torch.bincount(of_user, minlength=num_users)
        bound = target_bound(margin, target, weight, of_user, num_users) / count.clamp_min(1)
        share = per_user_sum(batch.weight, user, num_users) * (count > 0)  # of a user in the loss
        share = share / share.sum().clamp_min(1e-12)
        nll, kl = (share * bound).sum(), (share[:, None] * kl_to_prior(*posterior)).sum(0)
        anneal = anneal_factor(self.trainer.global_step, self.anneal_steps, self.anneal, self.cyclical)
        per_target = self.kl_weight * anneal / (share * count).sum().clamp_min(1)
        loss = nll + per_target * kl.clamp_min(self.free_bits).sum() + self._penalty()
        logged = {"nll": nll, "kl": kl.sum()}
        if self.swap_guide:
            flipped = batch._replace(chosen=batch.rejected, rejected=batch.chosen)
            swapped = self._posterior(self._tokens(flipped, context), batch.weight[context], user[context], num_users)
            logged["swap_guide"] = swap_guide(posterior, swapped)
            loss = loss + self.swap_guide * logged["swap_guide"]
        return {"loss": loss, **logged}

    def _arranged(self, batch: PreferenceBatch) -> Arranged:
        """`arrange` a batch, once while the same batch comes again."""
        if self._batch is None or self._batch[0] is not batch:
            self._batch = (batch, arrange(batch, self.target_rule == "response"))
        return self._batch[1]

    def _penalty(self) -> Tensor:
        """Normal priors of the bilinear decoder, divided by the number of pairs; in units of unscaled features."""
        if not isinstance(self.decoder, BilinearDecoder):
            return self.latent_scale.new_zeros(())
        squares = RIDGE * self.decoder.population.square().sum()
        squares = squares + BASIS_RIDGE * self.decoder.bases.square().sum()
        return 0.5 * self.feature_dim * squares / self.num_train_pairs

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, whose learning rate decays to zero as ``schedule`` says."""
        optimizer = torch.optim.AdamW(self.param_groups(), weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        warn_of_short_annealing(steps, self.anneal_steps, self.anneal, self.kl_weight)
        warm_up = WARM_UP * steps if self.schedule == "cosine" else 0.0

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / (warm_up + 1)
            left = max(1.0 - (step - warm_up) / max(steps - warm_up, 1.0), 0.0)
            return (1 - math.cos(math.pi * left)) / 2 if self.schedule == "cosine" else left

        return with_decay(optimizer, steps, factor)

    # ------------------------------------------------------------------ seen users and collapse
    @torch.no_grad()
    def refresh_users(self) -> None:
        """Read all seen users' training pairs, choose the latent's scale on validation pairs, and look for collapse."""
        mean, log_var = torch.zeros_like(self.mean), torch.zeros_like(self.log_var)
        num_pairs = torch.zeros_like(self.num_pairs)
        spread = self.mean.new_zeros(len(SHOTS), 2)  # summed variance and users at each number of pairs
        for batch in self.train_pass():
            users, user = torch.unique(batch.user_index, return_inverse=True)
            width = 2 * self.feature_dim + self.max_context  # also of a row of attention
            for chunk in user_chunks(user, len(users), width, most=MAX_FLOATS):
                rows = users[chunk.users]
                posterior, num_pairs[rows], of_shots = self._users_of(batch.take(chunk.rows), chunk.user, len(rows))
                mean[rows], log_var[rows] = posterior
                spread += of_shots
        self.mean.copy_(self.sum_over_processes(mean))
        self.log_var.copy_(self.sum_over_processes(log_var))
        self.num_pairs.copy_(self.sum_over_processes(num_pairs))
        total, users_at = self.sum_over_processes(spread).unbind(-1)
        self.variance.copy_(torch.where(users_at > 0, total / users_at, -1.0))
        self.val_accuracies.copy_(torch.tensor(self._choose_scale()))

    def _users_of(self, batch: PreferenceBatch, user: Tensor, num_users: int) -> tuple[Gaussian, Tensor, Tensor]:
        """Posteriors of the users of whole batches, their numbers of pairs, and what ``spread`` sums up of them."""
        count = torch.bincount(user, minlength=num_users)
        rows = self._read_pairs(batch.difference, batch.weight, user)
        tokens, weight, user = self._tokens(batch, rows), batch.weight[rows], user[rows]
        rank, spread = places(user), []
        for shots in SHOTS:
            first, enough = rank < shots, count >= shots
            few = PairTokens(tokens.direction[first], tokens.strength[first])
            variance = self._posterior(few, weight[first], user[first], num_users).log_var.exp().mean(-1)
            spread.append(torch.stack([variance[enough].sum(), enough.sum()]))
        return self._posterior(tokens, weight, user, num_users), count, torch.stack(spread)

    def _choose_scale(self) -> tuple[float, float]:
        """Set ``latent_scale``; accuracy of validation pairs with their users' latents and with those of others.

        It stays 0 where no other scale has a gain larger than its error. Without validation pairs -1 and -1.
        """
        scales = self.mean.new_tensor(LATENT_SCALES if self.calibrate else [1.0])
        losses = torch.zeros(len(scales), self.num_users, dtype=torch.float64, device=self.device)
        sums = torch.zeros(len(scales), 3, dtype=torch.float64, device=self.device)  # right, right shuffled, all
        for batch in self.val_pass():
            chosen, rejected = (self.decoder.prepare(self._scaled(side)) for side in batch.features)
            other = (batch.user_index + 1) % self.num_users if batch.other_index is None else batch.other_index
            for row, scale in enumerate(scales):
                self.latent_scale.copy_(scale)
                margin, shuffled = (
                    self._reward(chosen, self.mean[index]) - self._reward(rejected, self.mean[index])
                    for index in (batch.user_index, other)
                )
                losses[row] += held_out_losses(margin, batch, self.num_users)
                columns = [margin > 0, shuffled > 0, torch.ones_like(margin)]
                sums[row] += torch.stack([(batch.weight * column).sum().double() for column in columns])
        losses, sums = self.sum_over_processes(losses), self.sum_over_processes(sums)
        unscaled = int((scales == 1).nonzero()[0, 0])
        best = least_harmful(losses[:, losses[0] > 0]) if sums[0, 2] > 0 else unscaled
        self.latent_scale.copy_(scales[best])
        right, right_shuffled, total = sums[best].tolist()
        return (right / total, right_shuffled / total) if total else (-1.0, -1.0)

    def report(self) -> dict[str, float]:
        """Whether the latent is used; posterior collapse shows in every one of these numbers.

        ``kl``: nats between posterior and prior, mean over seen users. ``active_units``: latent dimensions whose
        posterior means vary over users. ``val_accuracy``, ``val_other_accuracy``: of validation pairs with their users'
        latents and with those of others. ``variance@n``: of the posterior after n pairs, mean over users.
        """
        report = {
            "kl": float(kl_to_prior(self.mean, self.log_var).sum(-1).mean()),
            "active_units": float((self.mean.var(0, unbiased=False) > ACTIVE_VARIANCE).sum()),
        }
        names = ("val_accuracy", "val_other_accuracy", *(f"variance@{shots}" for shots in SHOTS))
        for name, value in zip(names, torch.cat([self.val_accuracies, self.variance]).tolist(), strict=True):
            report[name] = value if value >= 0 else math.nan
        return report

    def on_train_end(self) -> None:
        """Warn when the latent ended unused, where there are users to tell apart."""
        super().on_train_end()
        report = self.report()
        if self.num_users > 1 and is_collapsed(report) and self.trainer.is_global_zero:
            control = (
                f", and another user's latent changes validation accuracy from {100 * report['val_accuracy']:.1f} % to "
                f"{100 * report['val_other_accuracy']:.1f} %"
            )
            what = "posterior collapse" if report["active_units"] < 1 else "a latent without use"
            warnings.warn(
                f"{what}: {report['active_units']:.0f} of {self.latent_dim} latent dimensions are "
                f"active, the KL is {report['kl']:.3f} nats, use multiplies the latent by "
                f"{float(self.latent_scale):.2f}{'' if math.isnan(report['val_accuracy']) else control}. Either users "
                "do not differ in these data, "
                "or try a lower model.kl_weight, more model.free_bits, or another model.decoder",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Reward at the posterior mean: ``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        return self._reward(self.decoder.prepare(self._scaled(responses)), users.tensors["mean"])

    def user_states(self, user_index: Tensor) -> UserState:
        """Posteriors of seen users, as last refreshed."""
        tensors = {"mean": self.mean[user_index], "log_var": self.log_var[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The standard normal prior."""
        zeros = self.mean.new_zeros(num_users, self.latent_dim)
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        return UserState({"mean": zeros, "log_var": zeros.clone()}, num_pairs)

    def _adapt(self, context: Context) -> UserState:
        """One forward pass of the encoder over the context."""
        pairs = context.pairs
        user = pairs.user_index
        with torch.no_grad():
            rows = self._read_pairs(pairs.difference, pairs.weight, user)
            tokens = self._tokens(pairs, rows)
            mean, log_var = self._posterior(tokens, pairs.weight[rows], user[rows], context.num_users)
        return UserState({"mean": mean, "log_var": log_var}, context.mask.sum(-1))
