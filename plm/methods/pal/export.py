"""One reward for one mixture of prototypes, as a Hugging Face sequence-classification reward model.

Axes: B texts, T tokens, D feature width, K prototypes.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.methods.pal.geometry import Distinct, Geometry, distinct_rows


class RewardHead(torch.nn.Module):
    """Reward of hidden states for fixed weights; stands in for the ``score`` layer of a reward model.

    Args:
        geometry: Shared part of PAL; copied.
        weights: ``(K,)`` on the simplex: a user, a prototype, or the population.
        feature_scale: ``()`` unit of the features.
        direction: ``(D,)`` the reward that is the same for everybody.
        normalize: Whether features are hidden states scaled to length one.

    Raises:
        ValueError: If the weights are no point of the simplex.
    """

    def __init__(
        self, geometry: Geometry, weights: Tensor, feature_scale: Tensor, direction: Tensor, normalize: bool
    ) -> None:
        """See the class."""
        super().__init__()
        weights, num_prototypes = weights.detach(), geometry.num_prototypes
        on_simplex = weights.shape == (num_prototypes,) and bool((weights >= 0).all())
        if not on_simplex or abs(float(weights.sum()) - 1) > 1e-4:
            raise ValueError(
                f"expected weights of {num_prototypes} prototypes, none negative, of sum one, got {weights!r}"
            )
        self.geometry = copy.deepcopy(geometry).eval().requires_grad_(False)
        self.normalize = normalize
        for name, value in (("weights", weights), ("feature_scale", feature_scale), ("direction", direction)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, hidden: Tensor, prompt: Tensor | None = None) -> Tensor:
        """``(..., D)``, for variant B with prompts ``(..., D)`` -> ``(..., 1)``."""
        rows = hidden.flatten(0, -2).to(self.get_buffer("direction").dtype)
        rows = F.normalize(rows, dim=-1) if self.normalize else rows
        scale, index = self.get_buffer("feature_scale"), torch.arange(len(rows), device=rows.device)
        prompts, prompt_index = None, None
        if prompt is not None:
            prompts = prompt.flatten(0, -2).to(rows.dtype)
            prompts, prompt_index = distinct_rows(F.normalize(prompts, dim=-1) if self.normalize else prompts)
            prompts = prompts / scale
        base = rows @ self.get_buffer("direction")
        cache = self.geometry.cache(Distinct(rows / scale, index, index, prompts, prompt_index), base)
        reward = base + self.geometry.rewards(cache, self.get_buffer("weights").expand(len(rows), -1))[0]
        return reward.view(*hidden.shape[:-1], 1)


class RewardOutput(NamedTuple):
    """As of a Hugging Face sequence-classification model."""

    logits: Tensor
    """``(B, 1)``."""


class PromptedRewardModel(torch.nn.Module):
    """PAL-B reads prompt and response apart, so its texts come as two sequences.

    Args:
        network: Backbone with ``last_hidden_state``.
        head: Reward of response and prompt features.
    """

    def __init__(self, network: torch.nn.Module, head: RewardHead) -> None:
        """See the class."""
        super().__init__()
        self.network, self.head = network, head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_input_ids: Tensor, prompt_attention_mask: Tensor
    ) -> RewardOutput:
        """Token ids and masks ``(B, T)`` of responses and of prompts -> logits ``(B, 1)``."""
        response = last_state(self.network, input_ids, attention_mask)
        prompt = last_state(self.network, prompt_input_ids, prompt_attention_mask)
        return RewardOutput(self.head(response, prompt))


def last_state(network: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden state ``(B, D)`` of the last real token of right- or left-padded rows."""
    hidden = network(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
    place = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask.bool() * place).argmax(-1)
    out: Tensor = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return out


def check_pooling(spec: dict[str, Any] | None) -> bool:
    """Whether the features of a backbone spec are normalised, after checking that they are last hidden states.

    Raises:
        ValueError: If a sequence-classification model cannot compute these features.
    """
    options = (spec or {}).get("init_args", {})
    pooling, layer = options.get("pooling", "last"), options.get("layer", -1)
    if pooling not in ("last", "auto") or layer != -1:
        raise ValueError(
            "a sequence-classification model scores the last token of the last layer, got features with "
            f"pooling={pooling!r}, layer={layer!r}; train on a backbone with pooling last"
        )
    return bool(options.get("normalize", False))


def with_head(model: torch.nn.Module, head: RewardHead) -> torch.nn.Module:
    """Replace the ``score`` layer of a sequence-classification model.

    Raises:
        ValueError: If the model has none.
    """
    if not isinstance(getattr(model, "score", None), torch.nn.Module):
        raise ValueError(
            f"expected a sequence-classification model with a `score` layer, got {type(model).__name__}; "
            "load the backbone by AutoModelForSequenceClassification with num_labels=1"
        )
    model.score = head
    return model
