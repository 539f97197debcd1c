"""RewardFeatures: rewards of a response as its features, so that methods on features can learn users from them.

Axes: N responses, R objectives.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plm.arrays import Float64Array
from plm.backbones import Backbone, Key
from plm.data.rewards import Reward, scores_of


class Calibration(NamedTuple):
    """How raw objectives become rewards: ``(raw - shift) / scale``."""

    shift: list[float]
    """Of each objective."""
    scale: list[float]
    """Of each objective."""

    def clipped(self, raw: Float64Array) -> Float64Array:
        """Rewards in [0, 1] of raw objectives ``(..., R)``."""
        return np.clip((raw - self.shift) / self.scale, 0, 1)


class RewardFeatures(Backbone):
    """Calibrated rewards of a response: ``clip((sign * raw - shift) / scale, 0, 1)`` of each objective.

    Args:
        rewards: Name -> ``{class_path, init_args}`` of what responses are scored by.
        objectives: Name -> reward, ``-reward`` where less is better.
        shift: Of each objective.
        scale: Of each objective.
    """

    def __init__(
        self, rewards: dict[str, Any], objectives: dict[str, str], shift: list[float], scale: list[float]
    ) -> None:
        unknown = [name for name in objectives.values() if name.removeprefix("-") not in rewards]
        if unknown or not objectives:
            raise ValueError(f"expected objectives among the rewards {sorted(rewards)}, got {unknown or objectives!r}")
        if not len(objectives) == len(shift) == len(scale) or min(scale) <= 0:
            raise ValueError(f"expected a shift and a scale > 0 of each objective, got {shift!r} and {scale!r}")
        self.rewards, self.objectives, self.shift, self.scale = rewards, objectives, shift, scale

    @property
    def feature_dim(self) -> int:
        """Number of objectives R."""
        return len(self.objectives)

    def key(self) -> Key:
        """Identity of the cache."""
        content = json.dumps([self.rewards, self.objectives, self.shift, self.scale], sort_keys=True)
        return {"engine": "plm.RewardFeatures", "content": hashlib.sha256(content.encode()).hexdigest()[:16]}

    def render(self, prompt: str, response: str) -> str:
        """Join prompt and response so that `encode` can take them apart again."""
        return json.dumps([prompt, response])

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Calibrated rewards ``(N, R)`` of rendered texts."""
        pairs = [json.loads(text) for text in texts]
        raw = raw_objectives(self._rewards, self.objectives, [p for p, _ in pairs], [r for _, r in pairs])
        return torch.from_numpy(Calibration(self.shift, self.scale).clipped(raw).astype(np.float32))

    @cached_property
    def _rewards(self) -> dict[str, Reward]:
        return {name: _built(spec) for name, spec in self.rewards.items()}


def raw_objectives(
    rewards: Mapping[str, Reward], objectives: Mapping[str, str], prompts: Sequence[str], responses: Sequence[str]
) -> Float64Array:
    """Objectives ``(N, R)`` of N responses before calibration; a reward that two objectives use is called once.

    Raises:
        ValueError: If a score is no finite number.
    """
    used = list(dict.fromkeys(signed.removeprefix("-") for signed in objectives.values()))
    scores = scores_of({name: rewards[name] for name in used}, prompts, responses)
    places = [used.index(signed.removeprefix("-")) for signed in objectives.values()]
    signs = [-1 if signed.startswith("-") else 1 for signed in objectives.values()]
    columns: Float64Array = scores[:, places] * signs
    return columns


def reward_spec(reward: Reward) -> dict[str, Any]:
    """Describe a reward as ``{class_path, init_args}``; a reward keeps each constructor argument under its own name.

    >>> from plm.data.rewards import Length
    >>> reward_spec(Length(target=9))
    {'class_path': 'plm.data.rewards.style.Length', 'init_args': {'target': 9}}
    """
    cls = type(reward)
    arguments = {name: getattr(reward, name) for name in inspect.signature(cls).parameters}
    arguments = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in arguments.items()}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def _built(spec: Mapping[str, Any]) -> Reward:
    """Make the reward that a `reward_spec` describes.

    Raises:
        ValueError: If its class cannot be imported or is no reward.
    """
    module, _, name = str(spec["class_path"]).rpartition(".")
    try:
        reward_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected the class of a reward, got {spec['class_path']!r}: {error}; install the package that holds it"
        ) from error
    if not (inspect.isclass(reward_class) and issubclass(reward_class, Reward)):
        raise ValueError(f"expected the class of a reward, got {spec['class_path']!r}, which is no Reward")
    reward: Reward = reward_class(**spec.get("init_args", {}))
    return reward
