"""Adapters of users over one frozen language model: how they are kept, trained, written with and exported.

Axes: U users, B texts, P numbers of one adapter, K bases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.backbones import LoRA, MixedWriting, Policy, PrefixShape, TargetModules, Writing
from plm.distributed import summed
from plm.messages import Problems
from plm.method import CHECKPOINT_KEY
from plm.method.abilities import Exporter
from plm.method.policy import PolicyMethod
from plm.methods.lora_dpo.adapters import Owned
from plm.optimizer import RowAdam, clip_rows, rate_factor
from plm.types import UserState

Mode = Literal["shared", "per_user", "shared_and_user", "basis"]
Adapter = Literal["lora", "prefix", "full"]
Decoding = Literal["logits", "merged"]
MODES: dict[Adapter, tuple[Mode, ...]] = {"lora": get_args(Mode), "prefix": ("shared", "per_user"), "full": ("shared",)}
"""Modes that an adapter can be had in."""
MIXUP_ALPHA = 0.6
"""Share of the policy in a reference that moves, by default TR-DPO's."""
RATES: dict[Adapter, float] = {"lora": 1e-4, "prefix": 1e-3, "full": 1e-6}
"""Learning rates for a pretrained network."""


class AdaptedPolicy(PolicyMethod, Exporter):
    """A policy method whose users write with adapters over one frozen network.

    Args:
        mode: ``shared``, one adapter for everybody; ``per_user``, one for each; ``shared_and_user``, the sum of both;
            ``basis``, ``num_bases`` shared adapters and simplex weights for each user. The population, as a control and
            for unknown users, is the mean of users' own adapters (for LoRA the nearest of the rank), or of weights.
        adapter: ``lora``; ``prefix``, learned keys and values before every text (P-Tuning v2); ``full``, all weights of
            the network, in mode shared only.
        rank: Rank of an adapter.
        alpha: An adapter's term is scaled by ``alpha / rank``.
        use_rslora: It is scaled by ``alpha / sqrt(rank)`` instead (rsLoRA, arXiv 2312.03732).
        dropout: Share of an adapter's inputs that are set to zero in training, not where unseen users are adapted.
        target_modules: Linear maps that are adapted; ``all-linear``; null = what PEFT adapts in this architecture, else
            the maps of queries and values.
        num_virtual_tokens: Virtual tokens of a prefix.
        num_bases: Shared adapters of mode basis.
        decoding: How a basis writes: ``logits``, the mixture of the policies' next-token distributions; ``merged``, one
            policy with the mixture of their weight changes, exact as a matrix and K times cheaper.
        seed: Seed of fresh adapters; all users start from the same.
        lr: Learning rate; null = 1e-4 for lora, 1e-3 for prefix, 1e-6 for all weights.
        ref_model_sync_steps: Steps after which, with adapter full, the reference of the loss moves to the policy
            (TR-DPO, arXiv 2404.09656); null = it stays. Rewards and evaluation keep to the untrained network.
        ref_model_mixup_alpha: Share of the policy's weights in it then.
        **options: Arguments of `PolicyMethod`.

    Raises:
        ValueError: If a number is out of range, or mode and adapter do not go together.
    """

    def __init__(
        self,
        *,
        mode: Mode = "shared",
        adapter: Adapter = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        use_rslora: bool = False,
        dropout: float = 0.0,
        target_modules: TargetModules = None,
        num_virtual_tokens: int = 4,
        num_bases: int = 4,
        decoding: Decoding = "logits",
        seed: int = 0,
        lr: float | None = None,
        ref_model_sync_steps: int | None = None,
        ref_model_mixup_alpha: float = MIXUP_ALPHA,
        **options: Any,
    ) -> None:
        super().__init__(lr=RATES.get(adapter, 0.0) if lr is None else lr, **options)
        self.mode, self.adapter, self.decoding, self.seed = mode, adapter, decoding, seed
        self.rank, self.alpha, self.target_modules = rank, alpha, target_modules
        self.use_rslora, self.dropout = use_rslora, dropout
        self.num_virtual_tokens, self.num_bases = num_virtual_tokens, num_bases
        self.sync_steps, self.mixup_alpha = ref_model_sync_steps, ref_model_mixup_alpha
        self._untrained: list[Policy] = []  # lists, so that they are no submodules
        self._moving: list[Policy] = []
        self._saved_reference: dict[str, Any] | None = None
        if mode != "shared":
            self.user_tables = ("weight_logits" if mode == "basis" else "adapters", "num_pairs")
            self.register_buffer("num_pairs", torch.zeros(self.num_users, dtype=torch.long))
        problems = Problems("model.")
        problems.at_least(1, rank=rank, num_virtual_tokens=num_virtual_tokens, num_bases=num_bases)
        problems.shares(dropout=dropout)
        if not 0 < ref_model_mixup_alpha <= 1:
            problems.add("ref_model_mixup_alpha", "above 0 and at most 1", ref_model_mixup_alpha)
        problems.integers(1, ref_model_sync_steps=ref_model_sync_steps)
        problems.say(
            f"model.ref_model_sync_steps: expected null with model.adapter {adapter!r}, whose reference is the network "
            f"itself, got {ref_model_sync_steps!r}",
            when=adapter != "full" and ref_model_sync_steps is not None,
        )
        problems.say(
            "model.ref_model_mixup_alpha acts only with model.ref_model_sync_steps, without which the reference stays, "
            f"got {ref_model_mixup_alpha!r}",
            when=ref_model_mixup_alpha != MIXUP_ALPHA and ref_model_sync_steps is None,
        )
        problems.choices(adapter=(adapter, tuple(MODES)))
        if mode not in (modes := MODES.get(adapter, (mode,))):
            problems.add("mode", f"{' or '.join(modes)} with model.adapter {adapter!r}", mode)
        problems.check()

    # ------------------------------------------------------------------ parameters
    shape: LoRA | PrefixShape
    fresh: Tensor
    population: Tensor
    num_pairs: Tensor

    def build(self, policy: Policy) -> None:
        """Add the adapters: that of everybody, one for each seen user, or the bases."""
        if self.adapter == "full":
            policy.network.requires_grad_(True)
            return
        if self.adapter == "prefix":
            self.shape = PrefixShape(policy, self.num_virtual_tokens)
        else:
            self.shape = policy.add_lora(
                self.rank, self.alpha, self.target_modules, use_rslora=self.use_rslora, dropout=self.dropout
            )
        fresh = self.shape.start(self.seed)
        self.register_buffer("fresh", fresh, persistent=False)
        if self.mode in ("shared", "shared_and_user"):
            self.shared = torch.nn.Parameter(fresh[None].clone())
        if self.personal:
            self.adapters = torch.nn.Parameter(fresh.repeat(self.num_users, 1))
            self.register_buffer("population", fresh.clone())
        if self.mode == "basis":
            draws = [self.shape.start(self.seed + 1 + base) for base in range(self.num_bases)]
            self.bases = torch.nn.Parameter(torch.stack(draws))
            self.weight_logits = torch.nn.Parameter(torch.zeros(self.num_users, self.num_bases))

    @property
    def personal(self) -> bool:
        """Whether users have adapters of their own."""
        return self.mode in ("per_user", "shared_and_user")

    def owned(self, table: Tensor | None, row: Tensor) -> list[Owned]:
        """Adapters that B texts are read with: the shared one, that of the user at ``(B,)`` of ``(U, P)``, or both."""
        everybody = [Owned(self.shared)] if self.mode != "per_user" and self.adapter != "full" else []
        return everybody if table is None else [*everybody, Owned(table.to(self.device), row)]

    def weights_of(self, user_index: Tensor) -> Tensor:
        """Simplex weights ``(B, K)`` of seen users on the bases; their gradient touches these users alone."""
        return F.embedding(user_index, self.weight_logits, sparse=True).softmax(-1)

    def reference_policy(self) -> Policy:
        """The network without adapters; for full fine-tuning, an untrained copy of it."""
        return self.policy if self.adapter != "full" else self._copied(self._untrained, None)

    def loss_reference(self) -> Policy:
        """The reference of the loss: the same, or one that moves."""
        if self.sync_steps is None:
            return self.reference_policy()
        moving = self._copied(self._moving, self._saved_reference)
        self._saved_reference = None
        return moving

    def _copied(self, copies: list[Policy], state: dict[str, Any] | None) -> Policy:
        """The copy of the network that is kept in a list, loaded on first use and shared out as the network is."""
        if not copies:
            copy = Policy(self.causal_lm).to(self.policy.device, self.policy.dtype)
            if state is not None:
                copy.network.load_state_dict(state)
            copies.append(copy)
            if self.device_mesh is not None:
                copy.shard(self.device_mesh.device_type)
                if not self.trainer.training:
                    copy.gather()
        return copies[0] if self.device_mesh is not None else copies[0].to(self.policy.device, self.policy.dtype)

    def networks(self) -> list[Policy]:
        """Also the untrained copy, and the one that moves."""
        return [*super().networks(), *self._untrained, *self._moving]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Also move the reference of the loss, where it does."""
        super().optimizer_step(*args, **kwargs)
        if self._moving and (self.trainer.global_step + 1) % (self.sync_steps or 1) == 0:
            weights = zip(self._moving[0].network.parameters(), self.policy.network.parameters(), strict=True)
            with torch.no_grad():
                for value, trained in weights:
                    value.mul_(1 - self.mixup_alpha).add_(trained, alpha=self.mixup_alpha)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep a reference that moves."""
        super().on_save_checkpoint(checkpoint)
        if self._moving:
            checkpoint[CHECKPOINT_KEY]["reference"] = self._moving[0].whole_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also let a fit go on with the reference that it had; nothing else reads it."""
        super().on_load_checkpoint(checkpoint)
        self._moving.clear()
        self._saved_reference = None
        if self._trainer is not None and self._trainer.training:
            self._saved_reference = checkpoint.get(CHECKPOINT_KEY, {}).get("reference")

    # ------------------------------------------------------------------ training
    def setup(self, stage: str) -> None:
        """Check that no step is spread over batches, which hold different users, and how the reference was read.

        Raises:
            ValueError: If one is, or if policy and reference would be in different precision.
        """
        super().setup(stage)
        dtype = self._spec.get("init_args", {}).get("dtype", "float32")
        is_cached = getattr(getattr(self.trainer, "datamodule", None), "reference_logps", False)
        if self.adapter == "full" and dtype != "float32" and is_cached:
            raise ValueError(
                f"data.reference_logps: expected false with model.adapter 'full' and data.backbone.init_args.dtype "
                f"{dtype!r}, got true: they are cached in that precision, and trained weights are kept in float32, so "
                "that policy and reference would differ before the first step; leave it out"
            )
        if self.sync_steps is not None and is_cached:
            raise ValueError(
                "data.reference_logps: expected false with model.ref_model_sync_steps, whose reference moves, got true"
            )
        if self.personal and stage == "fit" and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches: expected 1 with model.mode {self.mode!r}, whose users take steps of "
                f"their own, got {self.trainer.accumulate_grad_batches}; set data.pairs_per_user to the pairs of a "
                "step, and data.batch_size to what fits"
            )

    def on_train_start(self) -> None:
        """Also count the pairs of every user."""
        if self.user_tables:
            self.num_pairs.zero_()
            for batch in self.train_pass():
                self.num_pairs += torch.bincount(batch.user_index, minlength=self.num_users)
            self.num_pairs.copy_(summed(self.num_pairs))
        super().on_train_start()

    def param_groups(self) -> list[dict[str, Any]]:
        """Give users' tables a group of their own; weights of a basis move a hundred times as fast as adapters."""
        tables = [getattr(self, name) for name in self.user_tables[:1]]
        rest = [p for p in self.parameters() if p.requires_grad and not any(p is table for table in tables)]
        options = {"lr": 100 * self.lr, "weight_decay": 0.0} if self.mode == "basis" else {"lr": self.lr}
        groups: list[dict[str, Any]] = [{"params": rest, "lr": self.lr}, {"params": tables, **options}]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Use AdamW; users' tables take its lazy form, and users' own adapters a schedule each."""
        if not self.user_tables:
            return super().configure_optimizers()
        groups = [{"weight_decay": self.weight_decay, **group} for group in self.param_groups()]
        if not self.personal:
            return self.with_schedule(RowAdam(groups, lr=self.lr))
        has_schedule = [group["params"][0] is self.adapters for group in groups]
        return self.with_schedule(RowAdam(groups, lr=self.lr, row_rate=self._row_rate()), has_schedule)

    def _row_rate(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The schedule over each user's own steps, as many as batches of an epoch hold pairs of the user."""
        if self.schedule == "constant" and not self.warmup:
            return None
        count, num_batches, num_steps = torch.zeros(self.num_users, device=self.device), 0, self.num_steps
        for batch in self.trainer.train_dataloader or []:
            is_here = torch.zeros_like(count)
            is_here[batch.user_index] = 1
            count += summed(is_here) > 0
            num_batches += 1
        total = (count * num_steps / max(num_batches, 1)).round()

        def rate(rows: Tensor, taken: Tensor) -> Tensor:
            return rate_factor(self.schedule, self.warmup, taken, total.to(rows.device)[rows])

        return rate

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of every user's row by itself."""
        if not self.user_tables or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                clip_rows(parameter, gradient_clip_val, gradient_clip_algorithm or "norm")

    # ------------------------------------------------------------------ users
    @torch.no_grad()
    def refresh_users(self) -> None:
        """Set the population to the mean adapter of all users with pairs, each counting the same, on every process.

        It is what users have in common: where all want the same, it is what each of them has, and nothing is gained by
        an adapter of one's own. The untrained network, in comparison, would make a gain of all that anybody learns.
        """
        if self.personal and self.num_pairs.any():
            share = (self.num_pairs > 0).to(self.adapters)
            self.population.copy_(self.shape.mean(self.adapters, share / share.sum()))

    def seen(self) -> UserState:
        """All seen users, without a copy."""
        tensors = {}
        if self.personal:
            tensors["adapter"] = self.adapters.detach()
        elif self.mode == "basis":
            tensors["weights"] = self.weight_logits.detach().softmax(-1)
        counts = self.num_pairs if self.user_tables else torch.zeros(self.num_users, dtype=torch.long)
        return UserState(tensors, counts.to(self.device))

    def user_states(self, user_index: Tensor) -> UserState:
        """Adapters or weights of seen users; nothing of a policy that is the same for all."""
        return self.seen().take(user_index)

    def population_state(self, num_users: int) -> UserState:
        """The mean adapter of the seen users, see `refresh_users`, or their mean weights."""
        tensors = {}
        if self.personal:
            tensors["adapter"] = self.population.expand(num_users, -1)
        elif self.mode == "basis":
            tensors["weights"] = self.weight_logits.detach().softmax(-1).mean(0).expand(num_users, -1)
        return UserState(tensors, torch.zeros(num_users, dtype=torch.long, device=self.device))

    def prior_row(self, name: str, state_dict: Any) -> Tensor | None:
        """The mean adapter; in mode basis, equal weights."""
        return cast(Tensor, state_dict["population"]) if name == "adapters" else None

    # ------------------------------------------------------------------ text
    @torch.no_grad()
    def writing(self, users: UserState, prompts: Sequence[str]) -> Writing | MixedWriting:
        """A batch of texts to be written, one for each row of ``users``."""
        if self.adapter == "full":
            return self.policy.write()
        if self.mode == "basis" and self.decoding == "logits":
            weights = users.tensors["weights"].to(self.device)
            return MixedWriting([self.policy.write(base) for base in torch.split(self.bases.detach(), 1)], weights)
        terms = self._terms(users)
        if isinstance(self.shape, PrefixShape):
            return self.policy.write(prefix=self.shape.prefix(terms[0], users.num_users))
        return self.policy.write(*terms)

    def _terms(self, users: UserState) -> list[Tensor]:
        """Adapters ``(1, P)`` or ``(B, P)`` that together steer the policy of B users."""
        if self.mode != "basis":
            row = torch.arange(users.num_users, device=self.device)
            return [adapters.table.detach() for adapters in self.owned(users.tensors.get("adapter"), row)]
        assert isinstance(self.shape, LoRA)
        weights = users.tensors["weights"].to(self.device)
        bases = self.bases.detach()
        return [
            self.shape.weighed(base.expand(len(weights), -1), weight)
            for base, weight in zip(bases, weights.unbind(1), strict=True)
        ]

    def export(self, folder: str | Path, user: UserState) -> None:
        """Write the policy of one user as a PEFT folder; of full fine-tuning, as a model folder.

        A sum of adapters is one adapter of their ranks together, so is a mixture of bases, by their weight changes.

        Raises:
            ValueError: If ``user`` is not one.
        """
        if self.adapter == "full":
            self.policy.save(folder)
            return
        if user.num_users != 1:
            raise ValueError(f"expected one user to export, got {user.num_users}; name one with --user")
        self.shape.save([term[0] for term in self._terms(user)], folder, self.causal_lm.model)
