"""The posterior encoder q(z|x,y): a few layers of the language model that end in learned queries.

Axes: B texts, T tokens, Q queries, D width, Z latent width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from plm.backbones import Policy, first_layers, word_moments
from plm.functional import LOG_VAR_BOUNDS
from plm.types import Tokens


class Encoded(NamedTuple):
    """Posteriors and hidden states of B texts."""

    mean: Tensor
    """``(B, Z)``."""
    log_var: Tensor
    """``(B, Z)``, clamped."""
    hidden: Tensor
    """``(B, D)`` mean over the queries of the last hidden states."""


class PosteriorEncoder(nn.Module):
    """Reads a text and says which latents it may have come from: N(0, I) for every text before training.

    Queries follow the text, so that each sees all of it, and each gives its share of the dimensions. Positions and
    masks are explicit: padding, on either side, changes nothing, and an end token is read like any other.

    Args:
        policy: Whose embeddings, first layers and final norm are copied.
        latent_dim: Latent width Z, a multiple of ``num_queries``.
        num_queries: Learned queries Q.
        num_layers: How many layers.
        reads_prompt: Whether the prompt is read too; without, q(z|y).
        fix_entropy: Whether the entropy is held at that of the prior, so that only the mean and the shape are learned.
        train_embeddings: Whether the copy of the token embeddings is trained.
        seed: Of the queries.
    """

    def __init__(
        self,
        policy: Policy,
        latent_dim: int,
        num_queries: int,
        num_layers: int,
        *,
        reads_prompt: bool,
        fix_entropy: bool,
        train_embeddings: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.reads_prompt, self.fix_entropy = reads_prompt, fix_entropy
        policy.check_room(num_queries)
        self.network = first_layers(policy, num_layers)
        embeddings = self.network.get_input_embeddings().requires_grad_(train_embeddings)
        if not train_embeddings:
            embeddings.to(policy.dtype)
        width = embeddings.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_queries, width, generator=generator, device=generator.device)
        spread, centre = word_moments(embeddings)
        self.queries = nn.Parameter(centre + spread * noise)
        self.head = nn.Linear(width, 2 * latent_dim // num_queries)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tokens) -> Encoded:
        """Posteriors of B texts."""
        read = tokens.attention_mask if self.reads_prompt else tokens.completion_mask
        queries = self.queries.expand(len(read), -1, -1)
        words = self.network.get_input_embeddings()(tokens.input_ids).to(queries.dtype)
        mask = torch.cat([read, read.new_ones(queries.shape[:2])], 1)
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if hasattr(self.network, "wpe"):  # learned positions have a last one
            position = position.clamp(max=self.network.config.max_position_embeddings - 1)
        hidden = self.network(
            inputs_embeds=torch.cat([words, queries], 1),
            attention_mask=mask.long(),
            position_ids=position,
            use_cache=False,
        ).last_hidden_state[:, -queries.shape[1] :]
        mean, log_var = (part.flatten(1) for part in self.head(hidden).float().chunk(2, -1))
        if self.fix_entropy:
            log_var = log_var - log_var.mean(-1, keepdim=True)
        return Encoded(mean, log_var.clamp(*LOG_VAR_BOUNDS), hidden.float().mean(1))
