"""Rewards given by a trained model: by a user of a method, or by a classifier of Hugging Face.

Like those of `plm.data.rewards` they serve in ``data.source`` of a recipe, in ``plm label`` and in ``plm judge``;
`reward_func` serves in the trainers of TRL.

Axes: N responses, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from plm.arrays import Float64Array
from plm.backbones import device
from plm.backbones.classifier import Classifier
from plm.checkpoint import load_method
from plm.data.rewards import Reward
from plm.data.values import parsed, short, to_id, to_prompt
from plm.method import PersonalizationMethod
from plm.scoring import ResponseRow, score_responses

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


Text = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages."""


def reward_func(checkpoint: str | Path, users: str | Path | None = None) -> Callable[..., list[float | None]]:
    """Make a reward function for TRL's GRPOTrainer and RLOOTrainer, which rewards each completion for its row's user.

    The data set has a column ``user_id`` beside ``prompt``. Texts and chat messages are scored as ``plm score`` scores
    them; of a reply in messages the content, without its reasoning. Rewards come raw: they compare completions of one
    user, as those trainers do within the completions of a row. An empty completion, of blanks at most, has no reward:
    None, which those trainers leave out of the mean that others are compared with and learn nothing from. A number
    would be a guess, and 0 a prize among negative rewards. An unknown user, None or "" gets the population's reward;
    the trainer logs the share of rewarded completions with a known user as ``user_known``, and rewards under the
    function's name, ``plm_RUN_CHECKPOINT``.

    Args:
        checkpoint: Checkpoint written by plm fit, of any method; it is moved to the GPU where there is one.
        users: Where the users are, see `plm.load_method`; None = beside the checkpoint.

    Raises:
        ValueError: If they cannot be read. The function raises it for rows without ``user_id``, for what is neither
            text nor messages of ``role`` and ``content`` that end with a reply, and for a reward that is not finite.

    Example:
        ```
        GRPOTrainer(model, reward_funcs=plm.reward_func("runs/mine/checkpoints/best.ckpt"), train_dataset=prompts)
        ```
    """
    method = load_method(checkpoint, users=users)

    def plm_reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        user_id: Sequence[str | int | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Rewards of B completions, see `plm.reward_func`; other columns and arguments are not read."""
        if user_id is None:
            raise ValueError(
                "expected a column user_id in the data set, None for the population, got none; keep it by "
                "remove_unused_columns=False"
            )
        rows = [_completion_row(*row) for row in zip(prompts, completions, user_id, strict=True)]
        written = [place for place, row in enumerate(rows) if row.text.strip()]
        rewards: list[float | None] = [None] * len(rows)
        if written:  # on the GPU that the trainer has chosen for this process
            scores = score_responses(method.to(device()), [rows[place] for place in written])
            for place, reward in zip(written, scores.rewards.tolist(), strict=True):
                rewards[place] = reward
            if log_metric is not None:
                log_metric("user_known", float(scores.is_known.float().mean()))
        return rewards

    path = Path(checkpoint).absolute()
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    plm_reward.__name__ = f"plm_{run.name}_{path.stem}"
    return plm_reward


def _completion_row(prompt: Text, completion: Text, user_id: str | int | None) -> ResponseRow:
    """A row to score: prompt and completion as texts, or both as chat messages, of which the last is the reply."""
    text: Any = completion
    if not isinstance(completion, str):
        messages: list[Any] = list(completion) if isinstance(completion, Sequence) else []
        reply = messages.pop() if messages else None
        text = reply.get("content") if isinstance(reply, Mapping) and reply.get("role") == "assistant" else None
        if not isinstance(text, str):
            raise ValueError(f"expected a completion that ends with the assistant's text, got {short(completion)}")
        prompt = [*prompt, *messages]
    user = None if user_id in (None, "") else parsed("user_id", user_id, to_id)
    return ResponseRow(parsed("prompt", prompt, to_prompt), text, user, {})
