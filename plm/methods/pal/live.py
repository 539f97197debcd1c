"""PAL on a live backbone: the language model is trained along, and every token of a response is supervised.

Axes: B pairs in a batch, T tokens, D feature width, K prototypes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from plm.distributed import clip_gradients
from plm.functional import targets
from plm.method.live import LiveMethod
from plm.methods.pal.geometry import Distinct
from plm.methods.pal.model import PAL
from plm.methods.pal.options import Users
from plm.methods.pal.tokens import Weighting, last_tokens, token_losses, token_window
from plm.optimizer import clip_rows
from plm.types import PreferenceBatch, Tokens


class LivePAL(LiveMethod, PAL):
    """PAL as published as "large": the backbone is trained along, as far as ``train_backbone`` says.

    In training every token of a response from where the pair differs is compared; in use a response is scored at its
    last token, and unseen users are solved for on such features.

    Args:
        weighting: Weight of the tokens of a response: cumulative = rising linearly; mean; last.
        alignment: What variant B reads of the prompt (data.prompt_features: true): pooled = its last token; token = its
            token at the place of the response's token, as published.
        users: table: users are trained together with the prototypes, as published.
        lr: Learning rate of groups without one of their own.
        **options: See `LiveMethod` and `PAL`.
    """

    search_space: ClassVar[dict[str, list[Any]]] = {}  # that of PAL is made for solved users

    def __init__(
        self,
        weighting: Weighting = "cumulative",
        alignment: Literal["pooled", "token"] = "pooled",
        users: Users = "table",
        lr: float = 0.005,
        **options: Any,
    ) -> None:
        if users != "table":
            raise ValueError(
                f"model.users: LivePAL takes table, got {users!r}: a posterior needs all pairs of a user at every step"
            )
        super().__init__(users=users, lr=lr, **options)
        self.weighting, self.alignment = weighting, alignment

    def _members(self) -> dict[str, list[torch.nn.Parameter]]:
        """Add the trained part of the backbone."""
        return {**super()._members(), "backbone": self.backbone_parameters()}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group per kind of parameter; the backbone at ``backbone_lr``."""
        self.group_options["backbone"] = {"lr": self.backbone_lr}
        return super().param_groups()

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Weighted mean over pairs of the weighted mean over tokens."""
        both = Tokens.cat(batch.tokens)
        num_pairs, length = batch.num_pairs, both.input_ids.shape[1]
        # a row that has ended repeats its last state
        hidden = self.hidden(both)  # (2B, T, D)
        hidden = self.conditioning(hidden.gather(1, last_tokens(both)[..., None].expand_as(hidden)))
        rows = torch.arange(num_pairs * length, device=hidden.device)
        prompts, prompt = self._token_prompts(batch.prompt, num_pairs, length)
        cache = self._cache(Distinct(hidden.flatten(0, 1), rows, rows + len(rows), prompts, prompt))
        weights = self._drawn(torch.nn.functional.embedding(batch.user_index, self.logits, sparse=True))
        weights = weights.repeat_interleave(length, 0)
        margin = self.geometry.margins(cache, weights).view(num_pairs, length)
        pair = torch.arange(num_pairs, device=hidden.device)
        window = token_window(both.take(pair), both.take(pair + num_pairs))
        target = targets(batch.tie).to(margin)
        losses = token_losses(margin, target, window, self.weighting, self.loss_kind, self.gamma)
        return self._total((batch.weight * losses).mean(), cache, weights)

    def _token_prompts(
        self, prompt: Tensor | Tokens | None, num_pairs: int, length: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Distinct prompt features and the row of each of the 2 B T tokens among them."""
        if self.variant == "A":
            return None, None
        if not isinstance(prompt, Tokens) or self.alignment == "pooled":
            read = None if prompt is None else self.conditioning.prompts(self.features(prompt))
            pooled = self._prompts(read, num_pairs)
            row = torch.arange(num_pairs, device=self.device).repeat_interleave(length).repeat(2)
            return pooled, row
        hidden = self.conditioning.prompts(self.hidden(prompt))
        place = torch.arange(length, device=self.device).expand(num_pairs, -1)
        place = torch.minimum(place, prompt.attention_mask.sum(-1, keepdim=True) - 1)
        aligned = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)  # (B * T, D)
        return aligned, torch.arange(len(aligned), device=self.device).repeat(2)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of every user's row by itself, that of all else together."""
        if gradient_clip_val:
            algorithm = gradient_clip_algorithm or "norm"
            clip_gradients([p for p in self.parameters() if p is not self.logits], gradient_clip_val, algorithm)
            if isinstance(self.logits, torch.nn.Parameter):
                clip_rows(self.logits, gradient_clip_val, algorithm)
