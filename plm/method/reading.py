"""FeatureReader: how features enter a method: checked, conditioned, and counted in units of their own.

Axes: B pairs in a batch, D feature width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from plm.messages import Problems
from plm.method.conditioning import CONDITIONINGS, Conditioning, FeatureConditioning
from plm.types import Context, PreferenceBatch


class FeatureReader(L.LightningModule):
    """A module that reads batches of features, conditioned on the way in; tokens and latents pass as they are."""

    view: ClassVar[Literal["features", "tokens", "latents"]] = "features"
    """What batches hold; checked against the data."""
    has_features: ClassVar[bool] = False
    """Whether a method whose view is not ``features`` turns what it reads into some."""
    reference: Tensor
    feature_scale: Tensor
    bradley_terry: Tensor
    bradley_terry_ridge: Tensor
    stranger_scale: Tensor
    least_pairs: Tensor

    def _condition(self, kind: Conditioning, feature_dim: int) -> None:
        """Add what features are read by; called once, by the constructor of a method."""
        problems, on_features = Problems("model."), self.view == "features" or self.has_features
        problems.choices(conditioning=(kind, CONDITIONINGS))
        problems.say(
            f"model.conditioning: acts on features, and {type(self).__name__} reads {self.view}; remove it",
            when=kind != "centre" and not on_features,
        )
        problems.check()
        self.feature_dim = feature_dim
        self.conditioning = FeatureConditioning(kind if on_features else "none", feature_dim)
        self._conditioned: tuple[PreferenceBatch, PreferenceBatch] | None = None  # the last training batch, as read
        self.register_buffer("reference", torch.zeros(feature_dim))
        self.register_buffer("feature_scale", torch.ones(()))
        # of the ridge-tuned model of all users on the same pairs, which a method is compared with
        self.register_buffer("bradley_terry", torch.zeros(feature_dim), persistent=on_features)
        self.register_buffer("bradley_terry_ridge", torch.ones(()), persistent=on_features)
        # how users are served whom training does not see, see `plm.method.strangers`; -1 = as seen users are
        self.register_buffer("stranger_scale", -torch.ones(()), persistent=on_features)
        self.register_buffer("least_pairs", torch.zeros((), dtype=torch.long), persistent=on_features)

    @property
    def reference_direction(self) -> Tensor:
        """``(D,)`` the backbone's own reward head as a direction of conditioned features."""
        return self.conditioning.direction(self.reference)

    def _check_width(self, features: Tensor) -> None:
        if features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"{type(self).__name__} expects features of width {self.feature_dim}, got {features.shape[-1]}; "
                "encode with the backbone it was trained with"
            )

    def conditioned(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with conditioned features; tokens, and the context, which ``adapt`` takes raw, stay as they are."""
        if self.conditioning.kind == "none" or not isinstance(batch.chosen, Tensor):
            return batch
        if self._conditioned is not None and any(batch is known for known in self._conditioned):
            return self._conditioned[1]
        chosen, rejected = map(self.conditioning, batch.features)
        prompt = self.conditioning.prompts(batch.prompt) if isinstance(batch.prompt, Tensor) else batch.prompt
        return batch._replace(chosen=chosen, rejected=rejected, prompt=prompt)

    def featured_context(self, context: Context) -> Context:
        """Support pairs as the method reads them; a method that owns a language model turns tokens into features."""
        return context

    def _conditioned_context(self, context: Context) -> Context:
        """A copy of support pairs with conditioned features; padding stays zero."""
        context = self.featured_context(context.map(torch.clone))
        if self.conditioning.kind == "none" or not isinstance(context.chosen, Tensor):
            return context
        chosen, rejected = (self.conditioning(side) * context.mask[..., None] for side in context.features)
        prompt = context.prompt
        if isinstance(prompt, Tensor):
            prompt = self.conditioning.prompts(prompt) * context.mask[..., None]
        return context._replace(chosen=chosen, rejected=rejected, prompt=prompt)

    def training_batch(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The conditioned batch, the same object while the same batch comes again."""
        read = self.conditioned(batch)
        self._conditioned = (batch, read)
        return read


def without_pairs(context: Context, rows: Tensor) -> Context:
    """The context with the pairs at ``rows`` ``(U, S)`` bool as padding."""

    def hidden(value: Tensor) -> Tensor:
        return value.masked_fill(rows.view(*rows.shape, *[1] * (value.dim() - 2)), 0)

    return context.map(hidden)
