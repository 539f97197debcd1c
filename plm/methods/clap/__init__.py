"""CLaP learns a latent that says how a text is written, for a language model that is left alone.

Paper: Zhang, Bai, Li, Wang, Li, Lin, Rong, "Disentangling Preference Representation and Text Generation for Efficient
    Individual Preference Alignment" (arXiv 2412.20834), contrastive language-latent pretraining.
Reference code: zhangjf-nlp/LatentDPO, zhangjf-nlp/LLM-based-CVAE (no licence; nothing is taken from them).
Deviations: log-densities are exact and log-variances clamped; masks and positions are explicit, so that padding changes
    nothing; the contrast is in float32. GPT-2's encoder reads positions too. Of attention only W_K and W_V are copied,
    behind a copy of the layer's own input norm. ``conf/method/clap_paper.yaml`` and ``clap_paper_stage2.yaml`` are
    otherwise the released method. The default puts latents behind the prompt, so that a prompt is read once for all
    latents, contrasts each response with 3 others from the first stage on, weighs the KL by 0.1, keeps the short way of
    gradients, and leaves the token embeddings of the encoder as they are.

Axes: B pairs, R distinct texts, G prompts, N responses of a prompt, Z latent width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from plm.backbones import Policy
from plm.checkpoint import read_checkpoint
from plm.distributed import summed, world_size
from plm.functional import response_logps
from plm.method.policy import PolicyMethod
from plm.method.shared import SharedMethod
from plm.methods.clap.adapter import LatentAdapter, Placement, SteeredTexts, SteeredWriting
from plm.methods.clap.encoder import PosteriorEncoder
from plm.methods.clap.groups import PromptGroups, group_by_prompt
from plm.methods.clap.health import Health
from plm.methods.clap.losses import (
    Contrast,
    Posteriors,
    candidates,
    density_gap,
    gradient_only,
    likelihood_contrast,
    mean_kl,
    mutual_information,
)
from plm.methods.clap.options import KL, check_options
from plm.optimizer import Schedule
from plm.types import PreferenceBatch, Tokens, UserState


class Terms(NamedTuple):
    """Terms of the loss of G prompts with R responses in all."""

    reconstruction: Tensor
    """``(G,)`` mean over responses of their NLL under their own latent, in nats."""
    kl: Tensor
    """``(G,)`` nats."""
    contrast: Contrast | None
    """Of R responses; None without a contrast."""
    posteriors: Posteriors
    mean: Tensor
    """``(R, Z)`` posterior means."""


class CLaP(SharedMethod, PolicyMethod):
    """Learns an encoder q(z|x,y) of responses into latents and an adapter that writes from latents, p(y|x,z).

    A training example is a prompt with all its responses, sampled from the language model: give
    ``data.prompts_per_batch``. It knows no user; a user state is a latent, and everybody has the prior's mean. The
    reward of a response is its log-probability under that latent.

    Args:
        num_users: Number of seen users; linked from the data in recipes.
        feature_dim: Width of the hidden states; linked from the data in recipes.
        backbone: The `CausalLM`, as ``{class_path, init_args}``; linked from the data.
        unfreeze: Whether the language model and the adapter's copies of its maps are trained too: the second stage.
        init_from: Checkpoint of a first stage to start from; null = start anew.
        latent_dim: Latent width Z.
        num_queries: Query tokens of the encoder.
        num_virtual_tokens: Virtual tokens of every layer.
        encoder_layers: Layers of the encoder, copies of the first ones of the language model.
        prompt_in_posterior: Whether the encoder reads the prompt too, q(z|x,y) instead of q(z|y).
        fix_entropy: Whether the posterior has the entropy of the prior.
        deterministic: Whether latents are posterior means instead of draws.
        train_embeddings: Whether the encoder's copy of the token embeddings is trained.
        placement: prefix = virtual tokens before the prompt; suffix = before its last token, so that what comes before
            is read once for all latents.
        gated: Whether the adapter starts as if it were not there, behind a learned gate.
        kl: marginal = KL of the mean posterior of a prompt's responses to the prior, by dimension; joint = of the whole
            latent; ordinary = mean KL of the posteriors, which also penalises information.
        kl_weight: Weight of the KL; the published 1 leaves latents of a few minutes' training little to say.
        kl_draws: Draws per posterior behind it.
        contrast_weight: Weight of telling a response's own latent from those of others to the prompt, by the
            likelihood it gives.
        num_negatives: How many others, drawn anew in each step; null = all.
        skip: Whether latents also get the gradient of the last hidden states by a short way that no value passes.
        seed: Seed of what is drawn at the start and in evaluation.
        lr: Learning rate; null = 1e-3, and 1e-5 where the language model is trained, too.
        schedule: How the learning rate goes on after its warm-up: constant or falling to zero along a line or a cosine.
        **options: See `plm.method.policy.PolicyMethod`.
    """

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None = None,
        unfreeze: bool = False,
        init_from: str | None = None,
        latent_dim: int = 32,
        num_queries: int = 4,
        num_virtual_tokens: int = 4,
        encoder_layers: int = 2,
        prompt_in_posterior: bool = True,
        fix_entropy: bool = False,
        deterministic: bool = False,
        train_embeddings: bool = False,
        placement: Placement = "suffix",
        gated: bool = False,
        kl: KL = "marginal",
        kl_weight: float = 0.1,
        kl_draws: int = 16,
        contrast_weight: float = 1.0,
        num_negatives: int | None = 3,
        skip: bool = True,
        seed: int = 0,
        lr: float | None = None,
        schedule: Schedule = "constant",
        **options: Any,
    ) -> None:
        super().__init__(
            num_users=num_users,
            feature_dim=feature_dim,
            backbone=backbone,
            lr=(1e-5 if unfreeze else 1e-3) if lr is None else lr,
            schedule=schedule,
            **options,
        )
        check_options(self.hparams)
        self.trains_policy, self.init_from, self.seed = unfreeze, init_from, seed
        self.latent_dim, self.num_queries, self.encoder_layers = latent_dim, num_queries, encoder_layers
        self.prompt_in_posterior, self.fix_entropy, self.deterministic = prompt_in_posterior, fix_entropy, deterministic
        self.train_embeddings, self.num_virtual_tokens = train_embeddings, num_virtual_tokens
        self.placement, self.gated, self.has_skip = placement, gated, skip
        self.kl, self.kl_weight, self.kl_draws = kl, kl_weight, kl_draws
        self.contrast_weight, self.num_negatives = contrast_weight, num_negatives
        self._health = Health(latent_dim)

    # ------------------------------------------------------------------ parameters
    encoder: PosteriorEncoder
    adapter: LatentAdapter

    def build(self, policy: Policy) -> None:
        """Add encoder, adapter and skip; free the language model in the second stage."""
        with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            self.encoder = PosteriorEncoder(
                policy,
                self.latent_dim,
                self.num_queries,
                self.encoder_layers,
                reads_prompt=self.prompt_in_posterior,
                fix_entropy=self.fix_entropy,
                train_embeddings=self.train_embeddings,
                seed=self.seed,
            )
            self.adapter = LatentAdapter(
                policy,
                self.latent_dim,
                self.num_virtual_tokens,
                self.placement,
                gated=self.gated,
                train_maps=self.trains_policy,
            )
            width = policy.width
            skip = (nn.Linear(self.latent_dim, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
            self.skip = nn.Sequential(*skip) if self.has_skip else None
        policy.network.requires_grad_(self.trains_policy)

    def setup(self, stage: str) -> None:
        """Also start a fit from the checkpoint of an earlier stage, where one is named."""
        super().setup(stage)
        if stage == "fit" and self.init_from is not None:
            self.configure_model()
            self.start_from(self.init_from)

    def start_from(self, path: str) -> None:
        """Take encoder, adapter and, where it was trained, the language model from a checkpoint.

        Raises:
            ValueError: If it does not hold a CLaP model of the same shape over the same language model.
        """
        checkpoint = read_checkpoint(path)
        self.on_load_checkpoint(checkpoint)
        saved, current = checkpoint["state_dict"], super().state_dict()
        parts = ("encoder.", "adapter.", "policy.")
        wanted = {name: value for name, value in saved.items() if name.startswith(parts)}
        missing = [name for name in self.state_dict() if name.startswith(parts[:2]) and name not in saved]
        if not self.trains_policy:
            missing += [name for name in wanted if name not in current]
        else:
            missing = [name for name in missing if not name.startswith("adapter.maker.")]
        strange = [name for name, value in wanted.items() if name not in current or current[name].shape != value.shape]
        if missing or strange or not wanted:
            shown = ", ".join([*missing, *strange][:3]) or "no encoder and adapter"
            raise ValueError(
                f"model.init_from: {path!r} does not fit ({shown}); give the checkpoint of a CLaP model with the same "
                "latent_dim, num_queries, num_virtual_tokens, encoder_layers and gated"
            )
        self.load_state_dict(wanted, strict=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the published decay rates."""
        return self.with_schedule(
            torch.optim.AdamW(self.param_groups(), lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay)
        )

    # ------------------------------------------------------------------ training
    def on_train_start(self) -> None:
        """Check that batches are of whole prompts: otherwise hardly any text meets others to the same prompt.

        Raises:
            ValueError: If ``data.prompts_per_batch`` is not set.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and data.prompts_per_batch is None:
            raise ValueError(
                "CLaP learns from a prompt with all its responses: expected data.prompts_per_batch, got null, which "
                "deals pairs out without regard to their prompts; set data.prompts_per_batch: 4"
            )
        super().on_train_start()

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Mean over prompts of reconstruction, KL and contrast."""
        groups = group_by_prompt(Tokens.cat(batch.tokens))
        negatives = self.num_negatives if self.contrast_weight else 0
        terms = self._terms(groups, None, negatives, self.skip)
        loss = terms.reconstruction.mean() + self.kl_weight * terms.kl.mean()
        out = {"reconstruction": terms.reconstruction.mean(), "kl": terms.kl.mean()}
        if terms.contrast is not None:
            contrast = groups.padded(terms.contrast.loss).sum(-1) / groups.mask.sum(-1)
            loss = loss + self.contrast_weight * contrast.mean()
            out |= {"contrast": contrast.mean(), "contrastive_accuracy": terms.contrast.correct.float().mean()}
        count = summed(loss.new_tensor(float(len(groups.mask))))
        share = len(groups.mask) * world_size() / count  # so that the mean over processes is the mean over all prompts
        return {"loss": loss * share, **{key: value * share for key, value in out.items()}, "count": count}

    def _terms(
        self, groups: PromptGroups, generator: torch.Generator | None, num_negatives: int | None, skip: nn.Module | None
    ) -> Terms:
        """Terms of some prompts; random numbers come from ``generator``, on the CPU, or by default from the device."""
        count, device = len(groups.group), self.device
        encoded = self.encoder(groups.tokens)
        posteriors = Posteriors(groups.padded(encoded.mean), groups.padded(encoded.log_var), groups.mask)
        latent = encoded.mean
        if not self.deterministic:
            latent = latent + (0.5 * encoded.log_var).exp() * _normal(latent.shape, generator, device)
        if self.kl == "ordinary":
            kl = mean_kl(posteriors)
        else:
            shape = (*groups.mask.shape, self.kl_draws, self.latent_dim)
            kl = density_gap(posteriors, _normal(shape, generator, device), joint=self.kl == "joint")
        if num_negatives == 0:
            place = groups.place[:, None]
        else:
            size = (count, groups.mask.shape[1])
            order = torch.rand(size, generator=generator, device=device if generator is None else "cpu").to(device)
            place = candidates(groups.mask, groups.group, groups.place, num_negatives, order)
        present = place >= 0
        text, column = present.nonzero(as_tuple=True)
        other = groups.row[groups.group[text], place[text, column]]
        steered = SteeredTexts(self.policy, self.adapter, groups.tokens, groups.group, latent)
        hidden, token, row = steered.predictions(text, other)
        nll = latent.new_zeros(place.shape).masked_scatter(present, -self._totals(hidden, token, row, len(text)))
        own_nll = nll[:, 0]
        if skip is not None:
            is_own = (text == other)[row]
            source = text[row[is_own]]
            skipped = gradient_only(hidden[is_own], skip(latent)[source])
            own_nll = -self._totals(skipped, token[is_own], source, count)
        reconstruction = groups.padded(own_nll).sum(-1) / groups.mask.sum(-1)
        contrast = None if num_negatives == 0 else likelihood_contrast(nll, present)
        return Terms(reconstruction, kl, contrast, posteriors, encoded.mean)

    def _totals(self, hidden: Tensor, token: Tensor, row: Tensor, num_rows: int) -> Tensor:
        """Log-probabilities ``(M,)`` of responses, in float32 at least."""
        return response_logps(self.policy.token_logps(hidden, token)[0], row, num_rows).total

    # ------------------------------------------------------------------ evaluation
    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Margins ``(B,)``, computed once as they are the same for every user; keeps the sums behind ``report``."""
        chosen, rejected = batch.tokens
        population = self.population_state(batch.num_pairs)
        margin = self._score(chosen, population) - self._score(rejected, population)
        facts = {"margin": margin}
        if batch.num_shots is None:
            facts["population_margin"] = margin
            generator = torch.Generator().manual_seed(self.seed)
            for groups in group_by_prompt(Tokens.cat([chosen, rejected])).parts(self.batch_tokens):
                self._examine(groups, generator)
        if batch.other_index is not None or batch.other_row is not None:
            facts["other_margin"] = margin
        return facts

    @torch.no_grad()
    def _examine(self, groups: PromptGroups, generator: torch.Generator) -> None:
        """Add some prompts to the health of the model; every response is contrasted with all others."""
        terms = self._terms(groups, generator, None, None)
        assert terms.contrast is not None
        size = groups.mask.sum(-1)
        contrast = groups.padded(terms.contrast.loss).sum(-1) / size
        loss = terms.reconstruction + self.kl_weight * terms.kl + self.contrast_weight * contrast
        noise = _normal((*groups.mask.shape, self.kl_draws, self.latent_dim), generator, self.device)
        several = (size > 1)[groups.group]
        prior = _normal(terms.mean.shape, generator, self.device)
        self._health.add(
            terms.mean,
            prompts=torch.tensor(len(size)),
            responses=size.sum(),
            tokens=groups.tokens.completion_mask.sum(),
            contrasted=several.sum(),
            loss=loss.sum(),
            reconstruction=terms.reconstruction.sum(),
            kl=terms.kl.sum(),
            contrast=contrast.sum(),
            mutual_information=mutual_information(terms.posteriors, noise).sum(),
            log_num_responses=size.log().sum(),
            correct=terms.contrast.correct.sum(),
            chance=(1.0 / size)[groups.group][several].sum(),
            gap=terms.contrast.gap[several].sum(),
            tax=(self._likelihoods(groups, None) - self._likelihoods(groups, prior)).sum(),
        )

    def _likelihoods(self, groups: PromptGroups, latent: Tensor | None) -> Tensor:
        """Log-probabilities ``(R,)`` under latents ``(R, Z)``, or under the language model as it is."""
        steered = SteeredTexts(self.policy, self.adapter, groups.tokens, groups.group, latent)
        rows = torch.arange(len(groups.group), device=self.device)
        return self._totals(*steered.predictions(rows, rows), len(rows))

    def on_validation_epoch_start(self) -> None:
        """Forget what was evaluated before."""
        super().on_validation_epoch_start()
        self._health.clear()

    def on_test_epoch_start(self) -> None:
        """Forget what was evaluated before."""
        self._health.clear()

    def report(self) -> dict[str, float]:
        """Means over the prompts or responses that were last evaluated, in nats unless otherwise stated.

        ``loss`` and its parts ``reconstruction``, ``kl`` and ``contrast``; ``mutual_information`` of latent and
        response, at most ``log_num_responses``; ``active_units``, how many dimensions are used;
        ``contrastive_accuracy``, how often a response is more likely under its own latent than under that of any other
        to the prompt, against ``contrastive_chance``; ``likelihood_gap``, by how much; ``fluency_tax``, what a latent
        of the prior costs per token against the language model without the adapter.
        """
        return self._health.numbers(lambda sums: self.sum_over_processes(sums.to(self.device)))

    # ------------------------------------------------------------------ use
    @torch.no_grad()
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Log-probability of each response under its user's latent."""
        assert isinstance(responses, Tokens)
        latent = users.tensors["latent"].to(self.device)

        def read(tokens: Tokens, rows: Tensor) -> Tensor:
            place = torch.arange(len(rows), device=self.device)
            steered = SteeredTexts(self.policy, self.adapter, tokens, place, latent[rows])
            return self._totals(*steered.predictions(place, place), len(rows))

        return self.in_chunks(responses, read)

    def population_state(self, num_users: int) -> UserState:
        """The prior's mean."""
        latent = torch.zeros(num_users, self.latent_dim, device=self.device)
        return UserState({"latent": latent}, torch.zeros(num_users, dtype=torch.long, device=self.device))

    def writing(self, users: UserState, prompts: Sequence[str]) -> SteeredWriting:
        """A batch of texts, each under its user's latent."""
        return SteeredWriting(self.policy, self.adapter, users.tensors["latent"].to(self.device))


def _normal(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard normal numbers, drawn on the CPU where there is a generator."""
    return torch.randn(*shape, generator=generator, device=device if generator is None else "cpu").to(device)
