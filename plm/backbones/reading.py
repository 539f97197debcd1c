"""Reading texts in parts, with virtual tokens between the parts on request.

Axes: B texts, T tokens read now, S tokens read before, L layers, H key heads, p virtual tokens, d key width, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from plm.types import Tokens

if TYPE_CHECKING:
    from plm.backbones.attention import Prefix
    from plm.backbones.policy import Policy


class Reading:
    """The state of a network that has read the beginnings of B texts: keys and values that later tokens attend to.

    Every part is read after the parts before it as if all were one text, however each is padded; gradients flow through
    all of them.

    Args:
        policy: The network that reads.
        num_rows: Number of texts B, of which nothing is read yet.
    """

    def __init__(self, policy: Policy, num_rows: int) -> None:
        from transformers import DynamicCache

        self.policy = policy
        self._cache: Any = DynamicCache()  # keeps all keys, for masks of our own
        self._mask = torch.zeros(num_rows, 0, dtype=torch.bool, device=policy.device)
        self._bias: Tensor | None = None  # (S,) added to the attention scores of what was read
        self.position = torch.zeros(num_rows, dtype=torch.long, device=policy.device)
        """``(B,)`` position of the next token."""

    def insert(self, prefix: Prefix, log_gate: Tensor | None = None) -> None:
        """Append virtual tokens.

        Args:
            prefix: Their keys and values ``(B, H, p, d)`` of every layer, turned to their positions already; they are
                brought to the precision of the network.
            log_gate: ``()`` logarithm of what the attention to them is multiplied by; with it they take no positions,
                so that behind a closed gate nothing has moved. None = 0, and they take the next p positions.
        """
        num_rows, size = len(self._mask), prefix[0][0].shape[2]
        for layer, (key, value) in enumerate(prefix):
            self._cache.update(key.to(self.policy.dtype), value.to(self.policy.dtype), layer)
        self._extend_bias(size, log_gate)
        self._mask = torch.cat([self._mask, self._mask.new_ones(num_rows, size)], 1)
        if log_gate is None:
            self.position = self.position + size

    def read(self, ids: Tensor, attended: Tensor) -> Tensor:
        """Read more token ids ``(B, T)``, those ``attended`` being no padding -> last hidden states ``(B, T, D)``."""
        if not ids.shape[1]:
            return torch.zeros(*ids.shape, self.policy.width, device=ids.device)
        num_before = self._mask.shape[1]
        count = attended.long().cumsum(-1)
        position = (self.position[:, None] + count - 1).clamp(min=0)
        self.position = self.position + count[:, -1]
        self._check_room(num_before + ids.shape[1])
        self._extend_bias(ids.shape[1], None)
        self._mask = torch.cat([self._mask, attended], 1)
        mask = self.policy.mask(self._mask, ids.shape[1], self._bias)
        return self.policy.decoder(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=mask, position_ids=position, cache=self._cache, use_cache=False
        ).last_hidden_state

    def take(self, rows: Tensor) -> Reading:
        """A new reading of the texts at rows ``(n,)`` int64, which may repeat; this one is left unchanged."""
        taken = Reading(self.policy, 0)
        for layer, cached in enumerate(self._cache.layers):
            if cached.get_seq_length():
                taken._cache.update(cached.keys[rows], cached.values[rows], layer)
        taken._mask, taken._bias, taken.position = self._mask[rows], self._bias, self.position[rows]
        return taken

    def _check_room(self, width: int) -> None:
        """Raise if the text is longer than the model's learned positions."""
        limit = int(self.policy.decoder.config.max_position_embeddings)
        learned = hasattr(self.policy.decoder, "wpe")
        if learned and width > limit and (longest := int(self.position.max())) > limit:
            raise ValueError(
                f"expected texts that are at most {limit} tokens long together with virtual tokens, got {longest}; "
                "set data.backbone.init_args.max_length lower"
            )

    def _extend_bias(self, size: int, log_gate: Tensor | None) -> None:
        if log_gate is None and self._bias is None:
            return
        before = torch.zeros(self._mask.shape[1], device=self._mask.device) if self._bias is None else self._bias
        more = before.new_zeros(size) if log_gate is None else log_gate.expand(size)
        self._bias = torch.cat([before, more])


class SplitTexts(NamedTuple):
    """Texts cut before the last token of their prompts, the first place at which a response token is predicted."""

    before: Tensor
    """``(B, S)`` token ids of prompts without their last token, padded on the left; S may be 0."""
    before_mask: Tensor
    """``(B, S)`` bool, True = a token."""
    after: Tensor
    """``(B, T)`` the last token of the prompt and the response, padded on the right."""
    after_mask: Tensor
    """``(B, T)`` bool, True = a token."""


def split_texts(tokens: Tokens) -> SplitTexts:
    """Cut texts, padded on either side, before the last token of their prompts."""
    prompt = tokens.attention_mask & ~tokens.completion_mask
    num_before = prompt.sum(-1) - 1
    after = tokens.attention_mask & (prompt.long().cumsum(-1) > num_before[:, None])
    parts = []
    for in_part, left in ((tokens.attention_mask & ~after, True), (after, False)):
        count = in_part.sum(-1, keepdim=True)
        width = int(count.max()) if len(count) else 0
        column = torch.arange(width, device=in_part.device)[None, :]
        mask = column >= width - count if left else column < count
        ids = torch.zeros(mask.shape, dtype=torch.long, device=in_part.device)
        ids[mask] = tokens.input_ids[in_part]
        parts += [ids, mask]
    return SplitTexts(*parts)
