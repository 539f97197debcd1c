"""PAL on a live backbone: the language model is trained along, and every token of a response is supervised.

Axes: B pairs in a batch, T tokens, D feature width, K prototypes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from plm.functional import targets
from plm.methods.pal.export import last_state
from plm.methods.pal.geometry import Distinct
from plm.methods.pal.model import PAL
from plm.methods.pal.tokens import Weighting, last_tokens, token_losses, token_window
from plm.methods.pal.users import Solvable
from plm.types import PreferenceBatch, Tokens, UserState


class LivePAL(PAL):
    """PAL as published as "large": token batches, and a backbone that is trained as far as its parameters ask for it.

    Give it the backbone by `attach` before the fit: all parameters trainable (full), adapters only (LoRA, wrapped by
    peft), or none. It keeps users in a table; a response is scored at its last token, and unseen users are adapted on
    such features.

    Args:
        weighting: Weight of the tokens of a response: cumulative = rising linearly; mean; last.
        alignment: What variant B reads of the prompt: pooled = its last token; token = its token at the place of the
            response's token, as published.
        network_lr: Learning rate of the backbone.
        **options: See `PAL`; ``users`` must be table.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "tokens"

    def __init__(
        self,
        weighting: Weighting = "cumulative",
        alignment: Literal["pooled", "token"] = "pooled",
        network_lr: float = 1e-5,
        **options: Any,
    ) -> None:
        """See the class."""
        super().__init__(**options)
        if self.users != "table":
            raise ValueError(f"LivePAL keeps users in a table, got model.users: {self.users!r}; set table")
        self.weighting, self.alignment, self.network_lr = weighting, alignment, network_lr
        self.network: torch.nn.Module | None = None
        self.strict_loading = False  # frozen weights of the backbone are not in checkpoints

    def attach(self, network: torch.nn.Module) -> None:
        """Take a backbone: called with ``input_ids`` and ``attention_mask`` it gives ``last_hidden_state``."""
        self.network = network

    def features(self, tokens: Tensor | Tokens) -> Tensor:
        """Hidden state of the last real token: ``(B, T)`` -> ``(B, D)``; features pass."""
        return (
            last_state(self._net(), tokens.input_ids, tokens.attention_mask) if isinstance(tokens, Tokens) else tokens
        )

    def _net(self) -> torch.nn.Module:
        """The backbone.

        Raises:
            ValueError: If none is attached.
        """
        if self.network is None:
            raise ValueError("LivePAL got tokens, but has no backbone; call attach(network) first")
        return self.network

    def _members(self) -> dict[str, list[torch.nn.Parameter]]:
        """Also the trainable parameters of the backbone."""
        network: torch.nn.Module | None = self._modules.get("network")
        trained = [] if network is None else [p for p in network.parameters() if p.requires_grad]
        return {**super()._members(), "network": trained}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group per kind of parameter; the backbone at ``network_lr``."""
        self.group_options["network"] = {"lr": self.network_lr}
        return super().param_groups()

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Weighted mean over pairs of the weighted mean over tokens."""
        if not isinstance(batch.chosen, Tokens):
            return super().loss(batch)
        rejected = cast("Tokens", batch.rejected)
        hidden = self._hidden(batch.chosen, rejected)  # (2B, T, D)
        num_pairs, length = hidden.shape[0] // 2, hidden.shape[1]
        rows = torch.arange(num_pairs * length, device=hidden.device)
        prompts, prompt = self._token_prompts(batch.prompt, num_pairs, length)
        cache = self._cache(Distinct(hidden.flatten(0, 1), rows, rows + len(rows), prompts, prompt))
        table = torch.nn.functional.embedding(batch.user_index, self.logits, sparse=True)
        weights = self._drawn(table).repeat_interleave(length, 0)
        margin = self.geometry.margins(cache, weights).view(num_pairs, length)
        window = token_window(batch.chosen, rejected)
        target = targets(batch.tie).to(margin)
        losses = token_losses(margin, target, window, self.weighting, self.loss_kind, self.gamma)
        return self._total((batch.weight * losses).mean(), cache, weights)

    def _hidden(self, chosen: Tokens, rejected: Tokens) -> Tensor:
        """Hidden states of both responses, ``(2B, T, D)``, in one call; a row that has ended repeats its last one."""
        both = Tokens(*(torch.cat(pair) for pair in zip(chosen, rejected, strict=True)))
        hidden = self._net()(input_ids=both.input_ids, attention_mask=both.attention_mask.long()).last_hidden_state
        index = last_tokens(both)[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)  # type: ignore[no-any-return]

    def _token_prompts(
        self, prompt: Tensor | Tokens | None, num_pairs: int, length: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Distinct prompt features and the row of each of the 2 B T tokens among them."""
        if self.variant == "A":
            return None, None
        if not isinstance(prompt, Tokens) or self.alignment == "pooled":
            pooled = self._prompts(None if prompt is None else self.features(prompt), num_pairs)
            row = torch.arange(num_pairs, device=self.device).repeat_interleave(length).repeat(2)
            return pooled, row
        hidden = self._net()(input_ids=prompt.input_ids, attention_mask=prompt.attention_mask.long()).last_hidden_state
        place = torch.arange(length, device=self.device).expand(num_pairs, -1)
        place = torch.minimum(place, prompt.attention_mask.sum(-1, keepdim=True) - 1)
        aligned = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)  # (B * T, D)
        return aligned, torch.arange(len(aligned), device=self.device).repeat(2)

    def _solvable(self, batch: PreferenceBatch) -> Solvable:
        """On features of the last token."""
        return super()._solvable(self._with_features(batch))

    def _with_features(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch as features of last tokens."""
        prompt = None if batch.prompt is None or self.variant == "A" else self.features(batch.prompt)
        return batch._replace(chosen=self.features(batch.chosen), rejected=self.features(batch.rejected), prompt=prompt)

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState, prompt: Tensor | Tokens | None = None) -> Tensor:
        """Reward of each response at its last token."""
        return super()._score(self.features(responses), users, None if prompt is None else self.features(prompt))

    def margin(self, batch: PreferenceBatch, users: UserState | None = None) -> Tensor:
        """Reward of chosen minus reward of rejected at the last tokens: ``(B,)``."""
        return super().margin(self._with_features(batch), users)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights of the backbone out."""
        super().on_save_checkpoint(checkpoint)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("network.") or k in trained}
