"""A reward model of one user, or of all, that plm has exported: a Hugging Face sequence-classification model.

This file is saved beside the weights and needs torch and transformers alone.

Axes: B texts, T tokens, D feature width, E preference dims, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

SMALL, FLOOR = 1e-12, 0.05


class RewardConfig(PreTrainedConfig):  # type: ignore[misc]
    """What the model is made of.

    Args:
        base: Config of the backbone as a dict.
        pooling: ``last`` real token, ``mean`` over real tokens, or ``cls``, the first.
        layer: Hidden state that is read; -1 = the last.
        normalize: Whether features are scaled to length 1.
        skip_token_id: A token that ``last`` steps over; None = none.
        head: How closeness to the ideal point is measured, see `closeness`.
        width: Width E of the preference space.
        projector: Layers between features and preference space, see `mlp`.
        prompt_projector: The same for each prototype, where they are functions of the prompt; None = a fixed point.
        num_prototypes: Number K of prototypes that are functions of the prompt.
        unit_prototypes: Whether these are scaled to length 1.
        factor_dims: What features are multiplied by: 0 = a number, 1 = one for each of theirs, 2 = a matrix.
        **common: See transformers.
    """

    model_type = "plm_reward"
    has_no_defaults_at_init = True

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        pooling: str = "last",
        layer: int = -1,
        normalize: bool = False,
        skip_token_id: int | None = None,
        head: str = "dist_squared",
        width: int = 0,
        projector: dict[str, Any] | None = None,
        prompt_projector: dict[str, Any] | None = None,
        num_prototypes: int = 0,
        unit_prototypes: bool = False,
        factor_dims: int = 0,
        **common: Any,
    ) -> None:
        self.base, self.pooling, self.layer, self.normalize = base or {}, pooling, layer, normalize
        self.skip_token_id, self.head, self.width, self.projector = skip_token_id, head, width, projector
        self.prompt_projector, self.num_prototypes = prompt_projector, num_prototypes
        self.unit_prototypes, self.factor_dims = unit_prototypes, factor_dims
        super().__init__(num_labels=1, **{k: v for k, v in common.items() if k != "num_labels"})


class Mlp(nn.Module):
    """Linear layers with batch normalisation and activation between them.

    Args:
        spec: ``widths`` of all layers, the input's first, ``activation`` relu, gelu or linear, ``batchnorm``, ``bias``
            and ``residual``; None = nothing is done.
    """

    def __init__(self, spec: dict[str, Any] | None) -> None:
        super().__init__()
        self.residual = spec is not None and bool(spec["residual"])
        self.layers = nn.Sequential()
        for index, width in enumerate([] if spec is None else spec["widths"][1:]):
            assert spec is not None
            if index:
                if spec["batchnorm"]:
                    self.layers.append(nn.BatchNorm1d(spec["widths"][index]))
                self.layers.append({"relu": nn.ReLU, "gelu": nn.GELU, "linear": nn.Identity}[spec["activation"]]())
            self.layers.append(nn.Linear(spec["widths"][index], width, bias=spec["bias"]))

    def forward(self, rows: Tensor) -> Tensor:
        """``(B, D)`` -> ``(B, E)``."""
        out: Tensor = self.layers(rows)
        return out + rows if self.residual else out


def closeness(head: str, item: Tensor, point: Tensor, size: Tensor, scale: Tensor) -> Tensor:
    """Reward ``(B,)`` of items ``(B, E)`` for ideal points ``(B, E)`` or ``(E,)``.

    Args:
        head: dot = twice the product; dist = minus the distance; dist_squared = minus its square, up to a constant;
            dist_normalization = minus the distance of both scaled to length 1; dist_logistic = dist times ``scale``;
            angle and angle_hinge = ``scale`` times the cosine.
        item: The responses.
        point: The ideal points.
        size: Mean squared length of the prototypes; the angle to a much shorter point fades out.
        scale: The logit scale.
    """
    dot, item_square, point_square = (item * point).sum(-1), item.square().sum(-1), point.square().sum(-1)
    if head in ("dot", "dist_squared"):
        return 2 * dot - (item_square if head == "dist_squared" else 0)
    if head in ("dist", "dist_logistic"):
        distance = (item_square - 2 * dot + point_square).clamp_min(SMALL).sqrt()
        return -scale * distance if head == "dist_logistic" else -distance
    cosine = dot / ((point_square + FLOOR**2 * size + SMALL).sqrt() * (item_square + SMALL).sqrt())
    return -(2 - 2 * cosine).clamp_min(SMALL).sqrt() if head == "dist_normalization" else scale * cosine


class RewardHead(nn.Module):
    """Reward of features: a direction that is the same for everybody, plus closeness to the ideal point.

    Args:
        config: See `RewardConfig`.
        feature_dim: Width D.
    """

    direction: Tensor
    feature_scale: Tensor
    mean: Tensor
    prompt_mean: Tensor
    factor: Tensor
    scale: Tensor
    point: Tensor
    size: Tensor
    weights: Tensor

    def __init__(self, config: RewardConfig, feature_dim: int) -> None:
        super().__init__()
        self.kind, self.unit_prototypes = config.head, config.unit_prototypes
        self.projector = Mlp(config.projector)
        self.prompt_projectors = nn.ModuleList(Mlp(config.prompt_projector) for _ in range(config.num_prototypes))
        shapes = {
            "direction": (feature_dim,),
            "feature_scale": (),
            "mean": (feature_dim,),
            "prompt_mean": (feature_dim,),
            "factor": (feature_dim,) * config.factor_dims,
            "scale": (),
            "point": (config.width,),
            "size": (),
            "weights": (config.num_prototypes,),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, response: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Features ``(B, D)`` of responses, and of prompts where prototypes depend on them -> ``(B,)``."""
        response = response - self.mean
        response = response @ self.factor if self.factor.dim() == 2 else response * self.factor
        item, point, size = self.projector(response / self.feature_scale), self.point, self.size
        if len(self.prompt_projectors):
            if prompt is None:
                raise ValueError(
                    "this reward depends on the prompt: give prompt_input_ids and prompt_attention_mask too"
                )
            prompt = (prompt - self.prompt_mean) / self.feature_scale
            points = torch.stack([net(prompt) for net in self.prompt_projectors], 1)  # (B, K, E)
            points = F.normalize(points, dim=-1) if self.unit_prototypes else points
            point, size = (self.weights[:, None] * points).sum(1), points.square().sum(-1).mean(-1)
        return response @ self.direction + closeness(self.kind, item, point, size, self.scale)


class RewardModel(PreTrainedModel):  # type: ignore[misc]
    """Backbone, pooling and `RewardHead`.

    Args:
        config: See `RewardConfig`.
    """

    config_class = RewardConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = {"head"}  # noqa: RUF012 - a set in transformers

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        base = AutoConfig.for_model(**config.base)
        self.model = AutoModel.from_config(base)
        self.head = RewardHead(config, base.get_text_config().hidden_size)
        self.post_init()

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pooled hidden states ``(B, D)`` of texts ``(B, T)``, padded on either side."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        network = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model
        out = network(input_ids=input_ids, attention_mask=mask, output_hidden_states=self.config.layer != -1)
        hidden = out.last_hidden_state if self.config.layer == -1 else out.hidden_states[self.config.layer]
        hidden = hidden.to(self.head.direction.dtype)
        if self.config.pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            place = torch.arange(input_ids.shape[1], device=input_ids.device)
            if self.config.pooling == "cls":
                row = mask.argmax(-1)
            else:
                read = mask if self.config.skip_token_id is None else mask * (input_ids != self.config.skip_token_id)
                row = (place * read).argmax(-1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), row]
        return F.normalize(pooled, dim=-1) if self.config.normalize else pooled

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_input_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutput:
        """Token ids and masks ``(B, T)``, and those of the prompts alone where the reward asks for them.

        Returns:
            ``logits`` ``(B, 1)``: rewards, comparable with each other for one user only.
        """
        prompt = None if prompt_input_ids is None else self.features(prompt_input_ids, prompt_attention_mask)
        reward = self.head(self.features(input_ids, attention_mask), prompt)
        return SequenceClassifierOutput(logits=reward[:, None])


RewardConfig.register_for_auto_class()
RewardModel.register_for_auto_class("AutoModelForSequenceClassification")
