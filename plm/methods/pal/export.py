"""One mixture of prototypes as the head of a Hugging Face reward model, without users.

Axes: D feature width, E preference dims, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plm.backbones.export import HeadParts
from plm.method.conditioning import FeatureConditioning
from plm.methods.pal.geometry import Geometry
from plm.methods.pal.heads import logit_scale
from plm.methods.pal.projectors import Projectors


@torch.no_grad()
def head_parts(
    geometry: Geometry,
    weights: Tensor,
    conditioning: FeatureConditioning,
    feature_scale: Tensor,
    direction: Tensor,
    prompt: Tensor | None,
) -> HeadParts:
    """The reward of fixed weights.

    Args:
        geometry: Shared part of PAL.
        weights: ``(K,)`` on the simplex: a user, a prototype, or the population.
        conditioning: What is done to features first.
        feature_scale: ``()`` unit of the features.
        direction: ``(D,)`` the reward that is the same for everybody.
        prompt: ``(1, D)`` the prompt that stands for all, for variant B that was trained without prompts.

    Raises:
        ValueError: If the weights are no point of the simplex.
    """
    number = geometry.num_prototypes
    on_simplex = weights.shape == (number,) and bool((weights >= 0).all())
    if not on_simplex or abs(float(weights.sum()) - 1) > 1e-4:
        raise ValueError(f"expected weights of {number} prototypes, none negative, of sum one, got {weights!r}")
    layers, spec = mlp_parts(geometry.projector, 0)
    options: dict[str, Any] = {"head": geometry.head, "projector": spec, "factor_dims": conditioning.factor.dim()}
    tensors = {
        "feature_scale": feature_scale,
        "mean": conditioning.mean,
        "prompt_mean": conditioning.prompt_mean,
        "factor": conditioning.factor,
        "direction": direction,
        "scale": logit_scale(geometry.logit_scale),
        **{f"projector.layers.{name}": value for name, value in layers.items()},
    }
    if geometry.user_projectors is None or prompt is not None:
        point, size = _fixed_point(geometry, weights, None if prompt is None else prompt / feature_scale)
        options["width"], fixed = len(point), {"point": point, "size": size, "weights": weights[:0]}
    else:
        options["num_prototypes"] = geometry.num_prototypes
        options["unit_prototypes"] = geometry.user_learner == "|f(P)|w"
        fixed = {"point": weights[:0], "size": weights.new_zeros(()), "weights": weights}
        for copy in range(geometry.num_prototypes):
            layers, options["prompt_projector"] = mlp_parts(geometry.user_projectors, copy)
            fixed |= {f"prompt_projectors.{copy}.layers.{name}": value for name, value in layers.items()}
    return HeadParts(options, {name: value.detach().cpu().clone() for name, value in (tensors | fixed).items()})


def _fixed_point(geometry: Geometry, weights: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ideal point ``(E,)`` and mean squared length ``()`` of the prototypes."""
    if not geometry.is_mixture:
        point = geometry.mixed_points(weights[None])[0]
        return point, point.square().sum()
    points = geometry.points() if prompt is None else geometry.points_at(prompt)[0]  # (K, E)
    return weights @ points, points.square().sum(-1).mean()


def mlp_parts(net: Projectors, copy: int) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """One copy of a projector as layers of ``torch.nn``: their state and what builds them; no layers for identity."""
    spec = net.spec
    if not len(net.weights):
        return {}, None
    state: dict[str, Tensor] = {}
    place = 0
    for layer, weight in enumerate(net.weights):
        state[f"{place}.weight"] = weight[copy].T
        if spec.bias:
            state[f"{place}.bias"] = net.biases[layer][copy, 0]
        place += 1
        if layer < spec.num_hidden and spec.batchnorm:
            width = weight.shape[-1]
            norm = net.norms[layer].state_dict()
            rows = slice(copy * width, (copy + 1) * width)
            state |= {f"{place}.{name}": value[rows] if value.dim() else value for name, value in norm.items()}
            place += 1
        place += layer < spec.num_hidden  # the activation has no state
    widths = [net.weights[0].shape[1], *(weight.shape[2] for weight in net.weights)]
    arguments = {
        "widths": widths,
        **{name: getattr(spec, name) for name in ("activation", "batchnorm", "bias", "residual")},
    }
    return state, arguments
