"""Rewards given by a trained model: by a user of a method, or by a classifier of Hugging Face.

Like those of `plm.data.rewards` they serve in ``data.source`` of a recipe, in ``plm label`` and in ``plm judge``.

Axes: N responses, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from plm.arrays import Float64Array
from plm.backbones import device
from plm.backbones.classifier import Classifier
from plm.checkpoint import load_method
from plm.data.rewards import Reward
from plm.method import PersonalizationMethod

_SCORED = 1024  # responses that are in memory at once


@lru_cache(maxsize=1)
def _loaded(ckpt_path: str, users: str | None, modified: int) -> PersonalizationMethod:
    """The last method asked for stays loaded, so that rewards of several of its users share one copy of the weights.

    ``modified``, the time in nanoseconds at which the file was written, makes a file written anew another method.
    """
    return load_method(ckpt_path, device(), users=users)


class MethodReward(Reward):
    """The reward of a response for a user of a trained method.

    Args:
        ckpt_path: Checkpoint written by plm fit.
        user: Id of the user; null = the population.
        users: Where the users are, see `plm.load_method`; null = beside the checkpoint.
    """

    def __init__(self, ckpt_path: str, user: str | None = None, users: str | None = None) -> None:
        self.ckpt_path, self.user, self.users = ckpt_path, user, users

    @cached_property
    def method(self) -> PersonalizationMethod:
        """The method, loaded on first use.

        Raises:
            ValueError: If it cannot be read, or does not know the user.
        """
        path = Path(self.ckpt_path)
        method = _loaded(self.ckpt_path, self.users, path.stat().st_mtime_ns if path.exists() else 0)
        if self.user is not None and self.user not in method.known_users.store:
            raise ValueError(f"no user {self.user!r} beside {self.ckpt_path!r}; run plm adapt first")
        return method

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Rewards ``(N,)``."""
        parts = []
        for start in range(0, len(responses), _SCORED):
            rows = slice(start, start + _SCORED)
            with torch.no_grad():
                rewards = self.method.score(list(responses[rows]), user_id=self.user, prompts=list(prompts[rows]))
            parts.append(rewards.double().cpu().numpy())
        return np.concatenate([np.zeros(0), *parts])


class ClassifierReward(Reward):
    """Log-odds of a class under a sequence-classification model; the logit of a reward model.

    Args:
        model: Folder of the model, or its id on the Hugging Face hub.
        label: The class that is liked, by name or number; null for a model with one output.
        template: ``response`` leaves the prompt out, ``plain`` joins both as they stand, ``chat`` renders them with the
            tokenizer's chat template.
    """

    def __init__(
        self,
        model: str,
        label: str | int | None = None,
        template: Literal["chat", "plain", "response"] = "response",
    ) -> None:
        self.model, self.label, self.template = model, label, template

    @cached_property
    def _classifier(self) -> Classifier:
        return Classifier(self.model, template=self.template)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Logit of the class less log-sum-exp of the others ``(N,)``."""
        row = self._classifier.class_row(self.label)
        logits = self._classifier.represent(prompts, responses)
        assert isinstance(logits, torch.Tensor)
        logit = logits[:, row].double()
        others = logits.double().index_select(1, torch.tensor([c for c in range(logits.shape[1]) if c != row]).long())
        odds: Float64Array = (logit - others.logsumexp(1) if others.shape[1] else logit).numpy()
        return odds
