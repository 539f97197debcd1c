"""The latent adapter: a latent as keys and values of virtual tokens in every layer, and texts read or written with it.

Axes: R texts, Z latent width, L layers, p virtual tokens, D width, M pairs of a text and a latent, n response tokens,
V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from plm.backbones import KeyValueMaker, Policy, Prefix, Reading, split_texts
from plm.types import Tokens

Placement = Literal["prefix", "suffix"]
WIDE = 1024
"""Networks wider than this get a narrow hidden layer, floor(sqrt(D)), as published for Llama."""
LEAST_GATE = 1e-6
"""What a closed gate lets through: nothing that shows, but gradients flow."""


class LatentAdapter(nn.Module):
    """p(y|x,z): turns a latent into virtual tokens that the network attends to.

    Per layer: Linear, GELU, Linear to p vectors, a copy of the layer's input norm, then copies of its W_K and W_V.

    Args:
        policy: The network that is steered.
        latent_dim: Latent width Z.
        num_virtual_tokens: Virtual tokens p of every layer.
        placement: ``prefix`` before the prompt, as published; ``suffix`` before the prompt's last token, so that what
            comes before is read once for all latents.
        gated: Whether attention to the virtual tokens is multiplied by a learned gate that starts closed, so that an
            untrained adapter changes nothing.
        train_maps: Whether the copies of W_K and W_V are trained.
    """

    def __init__(
        self,
        policy: Policy,
        latent_dim: int,
        num_virtual_tokens: int,
        placement: Placement,
        *,
        gated: bool,
        train_maps: bool,
    ) -> None:
        super().__init__()
        policy.check_room(num_virtual_tokens)
        self.maker = KeyValueMaker(policy, train_maps)
        width = policy.width
        hidden = width if width <= WIDE else math.isqrt(width)
        self.num_virtual_tokens, self.placement = num_virtual_tokens, placement
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), nn.Linear(hidden, num_virtual_tokens * width))
            for _ in range(self.maker.num_layers)
        )
        self.gate = nn.Parameter(torch.zeros(())) if gated else None

    @property
    def log_gate(self) -> Tensor | None:
        """``()`` logarithm of the gate's absolute value; None without a gate."""
        if self.gate is None:
            return None
        size = torch.where(self.gate >= 0, self.gate, -self.gate)  # unlike abs, with a gradient at zero
        return (size + LEAST_GATE).log()

    def forward(self, latent: Tensor, position: Tensor) -> Prefix:
        """Keys and values of every layer.

        Args:
            latent: ``(R, Z)``.
            position: ``(R,)`` int64 position of the token that follows what was read: the virtual tokens stand there,
                or, behind a gate, just before, beside what was read.

        Returns:
            ``(R, H, p, d)`` each.
        """
        start = position if self.gate is None else position - self.num_virtual_tokens
        hidden = torch.stack([mapping(latent) for mapping in self.maps], 1)  # (R, L, p D)
        return self.maker(hidden.view(*hidden.shape[:2], self.num_virtual_tokens, -1), start)  # type: ignore[no-any-return]


class Predictions(NamedTuple):
    """The n response tokens of M texts and the hidden states that predict them."""

    hidden: Tensor
    """``(n, D)``."""
    token: Tensor
    """``(n,)`` int64."""
    row: Tensor
    """``(n,)`` int64, which of the M."""


class SteeredTexts:
    """R texts whose prompts have been read, each with its own latent, ready for their responses.

    Args:
        policy: The network.
        adapter: Of the latents.
        tokens: The texts.
        prompt: ``(R,)`` int64, texts of one number have one prompt.
        latent: ``(R, Z)``; None = the network as it is.
    """

    def __init__(
        self, policy: Policy, adapter: LatentAdapter, tokens: Tokens, prompt: Tensor, latent: Tensor | None
    ) -> None:
        self.policy, self.adapter = policy, adapter
        self.texts = split_texts(tokens)
        self._prefix: Prefix | None = None
        first = torch.arange(tokens.num_rows, device=prompt.device)
        if latent is None or adapter.placement == "suffix":  # one reading of every prompt
            count = int(prompt.max()) + 1 if len(prompt) else 0
            place = torch.full((count,), len(prompt), device=prompt.device).scatter_reduce(0, prompt, first, "amin")
            self._reading_of = prompt
        else:
            place, self._reading_of = first, first
        self.reading = Reading(policy, len(place))
        if latent is not None and adapter.placement == "prefix":
            self.reading.insert(adapter(latent, self.reading.position), adapter.log_gate)
        self.reading.read(self.texts.before[place], self.texts.before_mask[place])
        if latent is not None and adapter.placement == "suffix":
            self._prefix = adapter(latent, self.reading.position[prompt])

    def predictions(self, text: Tensor, latent: Tensor) -> Predictions:
        """Read texts ``(M,)`` int64, each under the latent of the text at ``latent`` ``(M,)``, of the same prompt."""
        reading = self.reading.take(self._reading_of[latent])
        if self._prefix is not None:
            reading.insert([(key[latent], value[latent]) for key, value in self._prefix], self.adapter.log_gate)
        ids, mask = self.texts.after[text], self.texts.after_mask[text]
        kept = mask.any(0)
        ids, mask = ids[:, kept], mask[:, kept]
        hidden = reading.read(ids, mask)
        row, column = mask[:, 1:].nonzero(as_tuple=True)
        return Predictions(hidden[row, column], ids[row, column + 1], row)


class SteeredWriting:
    """One batch of texts being written, each under its own latent.

    Args:
        policy: Who writes.
        adapter: Of the latents.
        latent: ``(R, Z)``.
    """

    def __init__(self, policy: Policy, adapter: LatentAdapter, latent: Tensor) -> None:
        self.policy, self.adapter, self.latent = policy, adapter, latent
        self._reading = Reading(policy, len(latent))

    @torch.no_grad()
    def start(self, prompts: Tokens) -> Tensor:
        """Read the prompts, padded on the left; logits ``(R, V)`` of the first token."""
        texts, reading, adapter = split_texts(prompts), self._reading, self.adapter
        if adapter.placement == "prefix":
            reading.insert(adapter(self.latent, reading.position), adapter.log_gate)
        reading.read(texts.before, texts.before_mask)
        if adapter.placement == "suffix":
            reading.insert(adapter(self.latent, reading.position), adapter.log_gate)
        return self._next(texts.after, texts.after_mask)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Write one token ``(R,)`` to every text; logits ``(R, V)`` of the next."""
        return self._next(token[:, None], torch.ones_like(token, dtype=torch.bool)[:, None])

    def take(self, rows: Tensor) -> None:
        """Go on with ``(n,)`` int64 rows of the R texts: without finished ones, or with one repeated."""
        self._reading = self._reading.take(rows)

    def _next(self, ids: Tensor, attended: Tensor) -> Tensor:
        return self.policy.logits(self._reading.read(ids, attended)[:, -1]).float()
