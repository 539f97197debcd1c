"""PAL: every user's ideal point is a mixture of a few prototypes shared by all users.

Paper: Chen, Chen, Rege, Wang, Korlakai Vinayak, "PAL: Sample-Efficient Personalized Reward Modeling for Pluralistic
    Alignment" (ICLR 2025, arXiv 2406.08469).
Reference code: RamyaLab/pluralistic-alignment (MIT; nothing is taken from it).
Deviations: ``users: table`` is the paper's training, with repaired heads and losses. ``users: posterior``, the default,
    is our estimator: weights are solved under a normal prior on their logits, whose spread is learned and then set by
    validation pairs, and whose centre is where seen users are. Unseen users are solved for in both. PAL-B reads one
    vector per prompt. The logit scale is bounded smoothly, the mixture angle fades out where prototypes cancel.

Axes: B pairs in a batch, N pairs of several users, D feature width, E preference dims, K prototypes, U users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.backbones.export import reward_backbone, reward_model, save_reward_model
from plm.functional import expected_losses, targets
from plm.method.abilities import Explainable, Exporter
from plm.methods.pal.export import head_parts
from plm.methods.pal.geometry import Cache, Distinct, Geometry, UserLearner, distinct_pairs, distinct_rows
from plm.methods.pal.heads import Head, Loss, bound_penalty, pair_losses
from plm.methods.pal.measures import mean_kl, prototype_usage
from plm.methods.pal.options import Mixing, Residual, Users, Variant, check_options, configure_groups
from plm.methods.pal.seen import SolvedUsers
from plm.methods.pal.solver import linearised
from plm.methods.pal.users import Prior, Solvable, doubted_logits, gumbel_weights, solve_logits
from plm.optimizer import RowAdam, with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

if TYPE_CHECKING:
    from plm.backbones.modeling_reward import RewardModel


class PAL(SolvedUsers, Exporter, Explainable):
    """Ideal points mixed from K prototypes; a reward is closeness to the user's own point.

    Args:
        num_prototypes: Number of prototypes K; 1 = the same ideal point for everybody.
        variant: A = prototypes are points. B = prototypes are functions of the prompt (data.prompt_features: true).
        user_learner: How weights w and prototypes P make the ideal point, with f the projector of the items: Pw = mix,
            f(Pw) = mix, then project; f(P)w = project, then mix; |f(P)|w = project, scale to length one, mix. With
            variant B f(P) are the functions of the prompt, so only f(P)w and |f(P)|w exist.
        head: Reward of an item for an ideal point: dot = twice their product, which is minus the squared distance where
            all responses are equally long, and which nothing that both share can change; dist = minus the distance;
            dist_squared = minus its square, linear in the weights; dist_normalization = minus the distance of both
            scaled to length one; dist_logistic = minus a learned multiple of the distance; angle = a learned multiple
            of the cosine; angle_hinge = a fixed multiple of the cosine.
        loss: logistic, cross_entropy (the same number from two classes), hinge or smooth_hinge.
        gamma: Width of the curved part of the smooth hinge.
        users: posterior = solve the weights of users under a learned prior while prototypes are trained. table =
            train a table of weight logits together with the prototypes, as published.
        projector: Map f of the features: identity or
            ``mlp{n}-{relu|gelu|linear}-dropout{digits}[-residual][-batchnorm][-nobias]``.
        user_projector: Map of the prompt for each prototype (only with variant B); null = as ``projector``.
        dim: Width E of the preference space; null = D.
        mixing: softmax, or Gumbel softmax while training, gumbel with soft and gumbel_hard with one-hot samples (only
            with users table).
        partition: Give every user the one prototype with the largest weight, outside training.
        temperature: What logits are divided by before the softmax, at the start: low = users near one prototype, high =
            weights nearly linear in the logits; null = 5 with users posterior, 1 with table.
        learn_temperature: Train the temperature.
        residual: Add a reward that is the same for everybody: bradley_terry = a linear one, trained along, on cached
            features from the ridge-tuned Bradley-Terry model on; reference = the backbone's own reward head times a
            learned number.
        ridge: Precision of the normal prior on what everybody shares: Bradley-Terry direction and mean prototype.
        prototype_ridge: Precision of the normal prior on how prototypes differ (with users posterior).
        bound: Length of an ideal point beyond which it is penalised; null = no bound.
        groups: Changes to parameter groups, e.g. {projector: {lr: 1e-4, weight_decay: 0.0}}; groups are projector,
            user_projectors, prototypes, base, weights, logit_scale and temperature.
        freeze: Groups that are not trained.
        lr: Learning rate of groups without one of their own.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("logits", "precision", "num_pairs")
    word_for_basis = "prototype"
    search_space: ClassVar[dict[str, list[Any]]] = {
        "num_prototypes": [4, 8, 16, 32],
        "residual": ["none", "bradley_terry"],
        "ridge": [0.02, 0.06, 0.2],
        "prototype_ridge": [0.3, 1.0, 3.0],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        num_prototypes: int = 8,
        variant: Variant = "A",
        user_learner: UserLearner = "f(P)w",
        head: Head = "dot",
        loss: Loss = "logistic",
        gamma: float = 1.0,
        users: Users = "posterior",
        projector: str = "identity",
        user_projector: str | None = None,
        dim: int | None = None,
        mixing: Mixing = "softmax",
        partition: bool = False,
        temperature: float | None = None,
        learn_temperature: bool = False,
        residual: Residual = "none",
        ridge: float = 0.06,
        prototype_ridge: float = 1.0,
        bound: float | None = None,
        groups: dict[str, dict[str, float]] | None = None,
        freeze: list[str] | None = None,
        lr: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.num_prototypes, self.variant, self.kept_as, self.partition = num_prototypes, variant, users, partition
        self.loss_kind, self.gamma, self.mixing, self.residual = loss, gamma, mixing, residual
        self.ridge, self.prototype_ridge, self.bound = ridge, prototype_ridge, bound
        check_options(self.hparams)
        posterior = users == "posterior"
        temperature = temperature or (5.0 if posterior else 1.0)
        # Near the uniform mixture a logit over the temperature moves the ideal point by a K-th of a prototype, and the
        # margin by twice the product: in these units learning rate and ridge mean the same for every K and temperature.
        unit = num_prototypes * temperature / 2 if posterior else 1.0
        self.geometry = Geometry(
            feature_dim, num_prototypes, variant, user_learner, head, projector, user_projector, dim, unit
        )
        if posterior and self.geometry.prototypes is not None:
            start = self.geometry.prototypes.data * 0.3 * self.geometry.prototypes.shape[1] ** 0.5
            self.geometry.prototypes.data = start - start.mean(0)
        self.base = torch.nn.Parameter(torch.zeros(feature_dim), requires_grad=residual == "bradley_terry")
        self.reference_scale = torch.nn.Parameter(torch.ones(()), requires_grad=residual == "reference")
        self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(temperature)), learn_temperature)
        logits = torch.zeros(num_users, num_prototypes)
        self.logits: Tensor
        if posterior:
            self.register_buffer("logits", logits)
        else:
            self.logits = torch.nn.Parameter(logits)
        self.precision: Tensor
        self.num_pairs: Tensor
        self.prior_centre: Tensor
        self.prior_scale: Tensor
        self.trained_on_prompts: Tensor
        self.register_buffer("precision", torch.eye(num_prototypes).repeat(num_users, 1, 1))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("prior_centre", torch.zeros(num_prototypes))
        self.register_buffer("prior_scale", torch.ones(()))
        self.register_buffer("trained_on_prompts", torch.tensor(False))
        self._train_pairs: tuple[Tensor, Distinct] | None = None
        self.group_options = configure_groups(self._members(), lr, groups or {}, freeze or [])

    # ------------------------------------------------------------------ parameter groups
    def param_groups(self) -> list[dict[str, Any]]:
        """One group per kind of parameter that has something to train, with a learning rate and decay of its own."""
        members = self._members()
        groups = [{"params": value, "name": key, **self.group_options[key]} for key, value in members.items() if value]
        assert sum(len(group) for group in members.values()) == sum(p.requires_grad for p in self.parameters())
        return groups

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """`RowAdam`, lazy on the table of users, whose learning rates fall linearly to zero over the fit."""
        groups = self.param_groups()
        if not groups:
            return None
        return with_decay(RowAdam(groups, lr=self.lr), self.trainer.estimated_stepping_batches)

    def _members(self) -> dict[str, list[torch.nn.Parameter]]:
        """Trainable parameters of every group."""
        members = {
            **self.geometry.groups(),
            "base": [self.base, self.reference_scale],
            "weights": [self.logits] if isinstance(self.logits, torch.nn.Parameter) else [],
            "temperature": [self.log_temperature],
        }
        return {name: [p for p in group if p.requires_grad] for name, group in members.items()}

    # ------------------------------------------------------------------ shared by training and use
    def setup(self, stage: str) -> None:
        """Check that there is a reference head where one is needed."""
        super().setup(stage)
        if self.residual == "reference" and not self.reference.any():
            raise ValueError(
                "model.residual reference needs a backbone with a reward head, and that of these data has none; "
                "use a reward model as data.backbone, or residual bradley_terry"
            )

    def on_train_start(self) -> None:
        """Note whether training has prompts, too."""
        if self.variant == "B":
            self.trained_on_prompts.fill_(any(b.prompt is not None for b in self.trainer.train_dataloader or []))
            if not self.reads_prompts:
                rank_zero_warn("PAL-B without prompts has the same prototypes at all; set data.prompt_features: true")
        super().on_train_start()

    def before_first_step(self) -> None:
        """Cross-fit how strangers are served; then start from the Bradley-Terry model of all, where it is trained."""
        super().before_first_step()
        if self.base.requires_grad and not self.base.any():  # else an earlier fit goes on
            with torch.no_grad():
                self.base.copy_(self.bradley_terry * self.feature_scale)

    def _base_direction(self) -> Tensor:
        """``(D,)`` the reward that is the same for everybody."""
        if self.residual == "reference":
            return self.reference_direction * self.reference_scale
        return self.base / self.feature_scale

    @property
    def reads_prompts(self) -> bool:
        """Whether this is variant B, trained with prompts."""
        return bool(self.trained_on_prompts)

    def _prompts(self, prompt: Tensor | Tokens | None, num_rows: int) -> Tensor | None:
        """Prompts ``(B, D)`` for variant B, as in training: where it had none, ones of their scale, the same for all.

        Raises:
            ValueError: If training had prompts and these pairs have none, or none that fit.
        """
        if self.variant == "A":
            return None
        if not self.reads_prompts:
            return (torch.ones_like(self.reference) * self.feature_scale).expand(num_rows, -1)
        if not isinstance(prompt, Tensor) or prompt.shape != (num_rows, self.feature_dim):
            got = "none" if prompt is None else f"shape {tuple(getattr(prompt, 'shape', ()))}"
            raise ValueError(
                f"PAL-B was trained with prompts: expected prompt_features of shape {(num_rows, self.feature_dim)}, "
                f"got {got}; set data.prompt_features: true, or give score the prompts"
            )
        return prompt

    def _cache(self, pairs: Distinct) -> Cache:
        """Compute what margins need of pairs, from features in their own units and precision."""
        scale, responses = self.feature_scale, pairs.responses.to(self.feature_scale.dtype)
        prompts = None if pairs.prompts is None else pairs.prompts.to(scale.dtype) / scale
        scaled = pairs._replace(responses=responses / scale, prompts=prompts)
        return self.geometry.cache(scaled, responses @ self._base_direction())

    def _weights(self, logits: Tensor) -> Tensor:
        """Logits ``(..., K)`` -> weights on the simplex."""
        return torch.softmax(logits / self.log_temperature.exp(), -1)

    def _logit_margins(self, cache: Cache, logits: Tensor) -> Tensor:
        """Margins ``(N,)`` for the logits of each pair's user ``(N, K)``."""
        return self.geometry.margins(cache, self._weights(logits))

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the loss of the table's margins with ``users: table``, else the expected loss under the posterior."""
        chosen, rejected = batch.features
        if self._train_pairs is None or self._train_pairs[0] is not chosen:
            prompt = self._prompts(batch.prompt, batch.num_pairs)
            self._train_pairs = chosen, distinct_pairs(chosen, rejected, prompt)
        cache, target = self._cache(self._train_pairs[1]), targets(batch.tie).to(chosen)
        if isinstance(self.logits, torch.nn.Parameter):
            weights = self._drawn(F.embedding(batch.user_index, self.logits, sparse=True))
            losses = pair_losses(self.loss_kind, self.geometry.margins(cache, weights), target, self.gamma)
        else:
            weights, losses = self._posterior_losses(batch, cache, target)
        return self._total((batch.weight * losses).mean(), cache, weights)

    def _total(self, nll: Tensor, cache: Cache, weights: Tensor) -> dict[str, Tensor]:
        """The mean loss with the priors of what is shared and the bound of the ideal points."""
        out = {"loss": nll + self._penalty(), "nll": nll}
        if self.bound is not None:
            out["bound"] = bound_penalty(self.geometry.lengths(cache, weights)[0], self.bound).mean()
            out["loss"] = out["loss"] + out["bound"]
        return out

    def _drawn(self, logits: Tensor) -> Tensor:
        """Weights of the table's logits, as samples where asked for."""
        return self._weights(logits) if self.mixing == "softmax" else gumbel_weights(self._weights, logits, self.mixing)

    def _posterior_losses(self, batch: PreferenceBatch, cache: Cache, target: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(B, K)`` and `expected_losses` ``(B,)`` after one Gauss-Newton step of the users in the batch."""
        users, user = torch.unique(batch.user_index, return_inverse=True)
        prior = Prior(torch.zeros_like(self.prior_centre), torch.ones_like(self.prior_scale))
        with torch.no_grad():
            pairs = Solvable(cache, target, batch.weight, user)
            self.logits[users], precision = solve_logits(self._logit_margins, pairs, prior, self.logits[users], 1)
        margin, design = linearised(lambda rows: self._logit_margins(cache, rows), self.logits[batch.user_index])
        weights = self._weights(self.logits[batch.user_index])
        return weights, expected_losses(margin, design, target, precision, user)

    def _penalty(self) -> Tensor:
        """The normal priors of prototypes and base, divided by the number of pairs."""
        squares = self.ridge * self.base.square().sum()
        if self.kept_as == "posterior":
            mean, spread = self.geometry.prototype_squares()
            squares = squares + self.ridge * mean + self.prototype_ridge * spread
        return 0.5 * squares / self.num_train_pairs

    # ------------------------------------------------------------------ use
    @property
    def has_weights(self) -> bool:
        """Whether margins are linear in the weights: of a mixture, by its scalar product or squared distance."""
        return self.partition or (self.geometry.is_mixture and self.geometry.head in ("dot", "dist_squared"))

    @property
    def mixes(self) -> bool:
        """Yes: weights are a point of the simplex."""
        return True

    def basis_weights(self, users: UserState) -> Tensor:
        """The weights that users are served with, ``(U, K)``."""
        return self._served(users.tensors["weights"], users.num_pairs)

    def _state(self, logits: Tensor, precision: Tensor, num_pairs: Tensor) -> UserState:
        """What is kept of users: weights on the simplex, and the precision of their logarithms."""
        precision = precision * self.log_temperature.exp().square()
        return UserState({"weights": self._weights(logits), "log_precision": precision}, num_pairs)

    def user_states(self, user_index: Tensor) -> UserState:
        """Weights of seen users, and the precision of their logarithms as last refreshed."""
        return self._state(self.logits[user_index], self.precision[user_index], self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The prior: weights at its centre."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        precision = torch.eye(self.num_prototypes, device=self.device) / self.prior_scale.square()
        logits = self.prior_centre.expand(num_users, -1)
        return self._state(logits, precision.expand(num_users, -1, -1).clone(), num_pairs)

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The prior of the checkpoint."""
        if name == "logits":
            return state_dict["prior_centre"]
        eye = torch.eye(self.num_prototypes)
        return eye / state_dict["prior_scale"].cpu().square() if name == "precision" else None

    def report(self) -> dict[str, float]:
        """Measure the use of the prototypes, see `prototype_usage`, and ``kl``, what the pairs of users say in nats."""
        users = (self.num_pairs > 0).nonzero()[:, 0]
        logits = self.logits[users].detach()
        weights = self._served(self._weights(logits), self.num_pairs[users]).detach()
        kl = mean_kl(logits - self.prior_centre, self.precision[users], self.prior_scale)
        return {"kl": kl, **prototype_usage(weights)}

    def _score(
        self, responses: Tensor | Tokens, users: UserState, prompt_features: Tensor | Tokens | None = None
    ) -> Tensor:
        """Reward of each response: ``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        row = torch.arange(len(responses), device=responses.device)
        prompts, prompt_row = self._prompts(prompt_features, len(responses)), None
        if prompts is not None:
            prompts, prompt_row = distinct_rows(prompts)
        cache = self._cache(Distinct(responses, row, row, prompts, prompt_row))
        weights = self._served(users.tensors["weights"], users.num_pairs)
        base = responses.to(self.feature_scale.dtype) @ self._base_direction()
        return base + self.geometry.rewards(cache, weights)[0]

    def _margin(self, batch: PreferenceBatch, users: UserState) -> Tensor:
        """Reward of chosen minus reward of rejected, given the prompt: ``(B,)``."""
        prompt = self._prompts(batch.prompt, batch.num_pairs)
        cache = self._cache(distinct_pairs(*batch.features, prompt))
        return self.geometry.margins(cache, self._served(users.tensors["weights"], users.num_pairs))

    def _adapt(self, context: Context) -> UserState:
        """Logits under the prior of unseen users; prototypes stay fixed.

        With ``users: table`` they are the posterior mode; else its mean where a user may also be as the population is.
        """
        with torch.no_grad():
            start, pairs = self.prior_centre.expand(context.num_users, -1), self._solvable(context.pairs)
            logits, precision = solve_logits(self._logit_margins, pairs, self._prior, start)
            if self.kept_as == "posterior":
                logits = doubted_logits(self._logit_margins, pairs, self._prior, logits, precision, self.partition)
            return self._state(logits, precision, context.mask.sum(-1))

    # ------------------------------------------------------------------ export
    def export_reward_model(self, weights: Tensor | None = None) -> RewardModel:
        """One mixture of prototypes over its backbone as a Hugging Face sequence-classification model, without users.

        Args:
            weights: ``(K,)`` a user's ``state.tensors["weights"][row]``, a one-hot row for a prototype, or None for
                the population.

        Returns:
            A model whose ``logits`` ``(B, 1)`` are rewards. Where they depend on the prompt (variant B) it has two more
            inputs, ``prompt_input_ids`` and ``prompt_attention_mask``.

        Raises:
            ValueError: If the weights are no point of the simplex, or the backbone is no Hugging Face model.
        """
        weights = self.population_state(1).tensors["weights"][0] if weights is None else weights
        prompt = None if self.reads_prompts else self._prompts(None, 1)
        units = self.conditioning, self.feature_scale
        parts = head_parts(self.geometry, weights, *units, self._base_direction(), prompt)
        return reward_model(reward_backbone(self.hparams.get("backbone")), parts)

    def export(self, folder: str | Path, user: UserState) -> None:
        """Write the reward model of one user into a folder; it loads without plm."""
        model = self.export_reward_model(self._served(user.tensors["weights"], user.num_pairs)[0])
        save_reward_model(model, reward_backbone(self.hparams.get("backbone")), Path(folder))
