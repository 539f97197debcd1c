"""LoRA-DPO: personal policies. A language model learns from pairs directly, through adapters that belong to users.

Paper: Rafailov et al. 2023, arXiv 2305.18290 (DPO); Hu et al. 2021, arXiv 2106.09685 (LoRA). Peer: TRL's DPOTrainer.
Deviations: the reference is the network without adapters; many users' adapters are trained at once as rows of a table;
both responses of a pair share one reading of the prompt; a policy basis carries LoRe (arXiv 2504.14439, section 3) to
generation: shared adapters, mixed per user by simplex weights.

Each level adds one thing: `NetworkMethod` loads, shards and checkpoints a language model; `PolicyMethod` writes with it
and trains it, with AdamW and a schedule; `AdaptedPolicy` keeps the adapters of users, writes with them and exports
them; `LoRADPO` learns them from pairs.

Axes: U users, B pairs, G groups of B / G pairs, P numbers of one adapter, K bases, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plm.backbones import Policy, PrefixShape, TokenFacts
from plm.distributed import pair_weights, summed, world_size
from plm.messages import Problems
from plm.method.abilities import Explainable
from plm.methods.lora_dpo.adapters import Owned
from plm.methods.lora_dpo.adapting import Support, fit_weights, train_rows, user_shares
from plm.methods.lora_dpo.losses import labelled_losses
from plm.methods.lora_dpo.metrics import reward_metrics, token_metrics
from plm.methods.lora_dpo.options import Divergence, LossOptions, LossType
from plm.methods.lora_dpo.pairs import PairLogps
from plm.methods.lora_dpo.reading import PairReader
from plm.methods.lora_dpo.tables import AdaptedPolicy
from plm.types import Context, PreferenceBatch, Tokens, UserState


class LoRADPO(AdaptedPolicy, Explainable):
    """Direct preference optimisation of low-rank adapters, shared or one per user.

    Args:
        loss_type: One or several of TRL's losses, added.
        loss_weights: Weight of each loss; null = 1.
        beta: Strength of the pull to the reference; for ipo the paper's tau.
        label_smoothing: Assumed share of flipped labels, read by conservative, robust, exo_pair, aot and aot_unpaired.
        f_divergence_type: What ties the policy to the reference, f-DPO (arXiv 2309.16240).
        f_alpha_divergence_coef: ``a`` of alpha_divergence: 1 is reverse_kl, 0 is forward_kl.
        discopop_tau: Temperature of discopop's blend.
        ld_alpha: LD-DPO's weight of tokens past the shorter response; null = 1.
        use_weighting: WPO: weigh pairs by how likely the policy would write them.
        share_prompts: Whether both responses of a pair share one reading of the prompt in training.
        adapt_steps: Full-batch steps in which an unseen user's adapter is trained.
        adapt_lr: Learning rate of these steps; null = ``lr``.
        **options: Arguments of `AdaptedPolicy`.
    """

    def __init__(
        self,
        *,
        loss_type: Sequence[LossType] = LossOptions.loss_type,
        loss_weights: Sequence[float] | None = LossOptions.loss_weights,
        beta: float = LossOptions.beta,
        label_smoothing: float = LossOptions.label_smoothing,
        f_divergence_type: Divergence = LossOptions.f_divergence_type,
        f_alpha_divergence_coef: float = LossOptions.f_alpha_divergence_coef,
        discopop_tau: float = LossOptions.discopop_tau,
        ld_alpha: float | None = LossOptions.ld_alpha,
        use_weighting: bool = LossOptions.use_weighting,
        share_prompts: bool = True,
        adapt_steps: int = 40,
        adapt_lr: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.options = LossOptions(
            tuple(loss_type),
            None if loss_weights is None else tuple(loss_weights),
            beta,
            label_smoothing,
            f_divergence_type,
            f_alpha_divergence_coef,
            discopop_tau,
            ld_alpha,
            use_weighting,
        )
        self.share_prompts, self.adapt_steps = share_prompts, adapt_steps
        self.adapt_lr = self.lr if adapt_lr is None else adapt_lr
        problems = Problems("model.")
        problems.found += self.options.problems()
        problems.at_least(0, adapt_steps=adapt_steps)
        if self.mode == "basis" and use_weighting:
            problems.add("use_weighting", "false with model.mode 'basis', whose policies are several", use_weighting)
        problems.say(
            "model.ref_model_sync_steps: expected null with model.loss_type sft alone, which reads no reference, got "
            f"{self.sync_steps!r}",
            when={*loss_type} == {"sft"} and self.sync_steps is not None,
        )
        problems.check()

    def build(self, policy: Policy) -> None:
        """Add what reads pairs."""
        super().build(policy)
        self._reader = PairReader(
            policy,
            self.reference_policy,
            self.loss_reference,
            self.options,
            self.shape if self.adapter == "prefix" and isinstance(self.shape, PrefixShape) else None,
            share_prompts=self.share_prompts,
            in_chunks=self.in_chunks,
        )

    # ------------------------------------------------------------------ training
    def setup(self, stage: str) -> None:
        """Also refuse to spread over batches what looks at all pairs of a step.

        Raises:
            ValueError: For such a loss, with accumulated gradients.
        """
        super().setup(stage)
        names, accumulated = self.options.loss_type, self.trainer.accumulate_grad_batches
        by_tokens = "sft" in names and (len(names) > 1 or self.mode == "basis")
        if stage == "fit" and accumulated > 1 and (by_tokens or {"aot", "aot_unpaired"} & {*names}):
            raise ValueError(
                f"trainer.accumulate_grad_batches: expected 1 with model.loss_type {[*names]} in mode {self.mode!r}, "
                f"got {accumulated}: aot and aot_unpaired sort all pairs of a step, and sft beside other losses or in "
                "mode basis averages over other tokens than they do; set data.batch_size to the pairs of a step, and "
                "model.gradient_checkpointing to true if they do not fit"
            )

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Take the mean over pairs or, where users have adapters of their own, the sum over users of their means."""
        (chosen, rejected), user = batch.tokens, batch.user_index
        facts: list[TokenFacts] = []
        if self.mode == "basis":
            pairs = self._reader.mixed_pairs(self.bases, self.weights_of(user), chosen, rejected, user)
        else:
            owned, group = (self.owned(self.adapters, user), user) if self.personal else (self.owned(None, user), None)
            pairs, facts = self._reader.pairs(owned, chosen, rejected, group, with_facts=True)
        count = batch.weight.new_zeros(2)
        if pairs.group is None and "sft" in self.options.loss_type:
            length = torch.where(batch.tie, (pairs.chosen_length + pairs.rejected_length) / 2, pairs.chosen_length)
            count = summed(torch.stack([length.sum(), torch.ones_like(length).sum()]))  # of tokens, of pairs
            pairs = pairs._replace(mean_length=count[0] / count[1])
        losses = labelled_losses(pairs, batch.tie, self.options)
        if self.personal:
            shares = user_shares(pair_weights(batch.weight), user, self.num_users, everywhere=True)
            loss = (shares * losses).sum() * world_size()
        else:
            loss = (batch.weight * losses).mean()
        out = {"loss": loss, **reward_metrics(pairs, self.options.beta)}
        if self.options.loss_type == ("sft",) and pairs.mean_length is not None:
            out["count"] = count[0]
        if facts:
            out |= token_metrics(facts[0], facts[1], self.count_tokens(chosen, rejected))
        return out

    # ------------------------------------------------------------------ users
    def _adapt(self, context: Context) -> UserState:
        """Train a fresh adapter for each user, all at once; in mode basis, fit weights to the bases' log-ratios.

        A user without pairs gets the population state.
        """
        counts = context.mask.sum(-1)
        if self.mode == "shared":
            return self.population_state(context.num_users)._replace(num_pairs=counts)
        if self.mode == "basis":
            centre = self.population_state(1).tensors["weights"][0]
            with torch.no_grad():
                return UserState({"weights": fit_weights(context, self._base_margins, centre)}, counts)
        places = context.tokens[0].input_ids[0].numel()
        size = max(1, self.batch_tokens // max(1, 2 * places))
        users = torch.split(torch.arange(context.num_users, device=self.device), size)
        trained = torch.cat([self._train(context, part) for part in users])
        return UserState({"adapter": torch.where(counts[:, None] > 0, trained, self.population)}, counts)

    def _train(self, context: Context, users: Tensor) -> Tensor:
        support = Support.of(context, users)
        if len(support.user):
            parts = [
                self._reader.reference_totals(part.chosen, part.rejected) for part in support.chunks(self.batch_tokens)
            ]
            chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
            support = support._replace(
                chosen=support.chosen._replace(ref_logps=chosen), rejected=support.rejected._replace(ref_logps=rejected)
            )
        return train_rows(
            self.fresh,
            support,
            len(users),
            self._read,
            lambda pairs, tie: labelled_losses(pairs, tie, self.options),
            max_tokens=self.batch_tokens,
            num_steps=self.adapt_steps,
            lr=self.adapt_lr,
            weight_decay=self.weight_decay,
        )

    def _read(self, adapters: Owned, support: Support) -> PairLogps:
        """Pairs of unseen users, read with their adapters."""
        owned = self.owned(adapters.table, support.user)
        return self._reader.pairs(owned, support.chosen, support.rejected, support.user, with_facts=False)[0]

    # ------------------------------------------------------------------ rewards
    @property
    def has_weights(self) -> bool:
        """Whether users mix adapters (``mode: basis``)."""
        return self.mode == "basis"

    @property
    def mixes(self) -> bool:
        """Yes: weights are a point of the simplex."""
        return True

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Reward of each response: ``beta`` times the log-ratio of the user's policy to the reference."""
        assert isinstance(responses, Tokens)
        if self.mode == "basis":
            rewards = self._reader.base_rewards(self.bases, responses)
            return (rewards * users.tensors["weights"].to(rewards)).sum(-1)
        row = torch.arange(users.num_users, device=responses.input_ids.device)
        return self._reader.rewards(self.owned(users.tensors.get("adapter"), row), responses)

    def _margins(self, table: Tensor | None, row: Tensor, chosen: Tokens, rejected: Tokens) -> Tensor:
        """Margins ``(B,)`` of texts read with adapters of users ``(U, P)`` at ``(B,)``."""
        owned = self.owned(table, row)
        return self._reader.rewards(owned, chosen) - self._reader.rewards(owned, rejected)

    def _base_margins(self, chosen: Tokens, rejected: Tokens) -> Tensor:
        """Margins ``(B, K)`` under each basis."""
        return self._reader.base_rewards(self.bases, chosen) - self._reader.base_rewards(self.bases, rejected)

    @torch.no_grad()
    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Compute margins as every method does, but read the reference once and copy no adapter for every pair."""
        sides = [self._reader.with_reference(side) for side in batch.tokens]
        if batch.context is not None and batch.context_row is not None:
            users, rows, other_rows = self.adapt(batch.context), batch.context_row, batch.other_row
        else:
            users, rows, other_rows = self.seen(), batch.user_index, batch.other_index
        common: Tensor | None = None  # the same for all users: (B, K) under each basis, or (B,)
        if self.mode == "basis":
            common = self._base_margins(*sides)
        elif self.mode == "shared":
            common = self._margins(None, rows, *sides)

        def margin(users: UserState, row: Tensor) -> Tensor:
            if common is None:
                return self._margins(users.tensors["adapter"], row, *sides)
            return (common * users.tensors["weights"][row].to(common)).sum(-1) if self.mode == "basis" else common

        facts = {"margin": margin(users, rows)}
        if not users.tensors:
            return facts
        if batch.num_shots is None:
            facts["population_margin"] = margin(self.population_state(1), torch.zeros_like(rows))
        if other_rows is not None:
            facts["other_margin"] = margin(users, other_rows)
        return facts
