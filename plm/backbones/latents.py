"""Backbones whose features are posteriors over the latents that a language model writes from.

Axes: B texts, T tokens of a prompt, Z latent width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn

from plm.backbones.backbone import Backbone
from plm.backbones.causal_lm import CausalLM
from plm.backbones.policy import Policy, TextWriter
from plm.types import Tokens


class LatentBackbone(Backbone):
    """Responses as mean and log-variance of q(z|x,y), side by side, and p(y|x,z) to write with.

    A method that learns whom a latent pleases needs nothing else: features to learn from, which are cached, and
    ``writing`` for what it has learned. Where ``prompt_backbone`` is a `CausalLM`, prompts come as tokens, for
    ``prompt_encoder`` to read. ``spec()["init_args"]["content"]`` says which latents are meant; those of
    another model mean something else.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "latents"

    @property
    def latent_dim(self) -> int:
        """Latent width Z, half that of the features."""
        return self.feature_dim // 2

    @property
    @abstractmethod
    def causal_lm(self) -> CausalLM:
        """What cuts texts into the tokens that are read, and says which do not fit; no weights are read for it."""

    @abstractmethod
    def prompt_encoder(self) -> nn.Module:
        """A copy, to be trained, of what makes latents: it reads the tokens of prompts alone and gives N(0, I) for all.

        Tokens ``(B, T)`` -> ``(B, 2Z)`` means and log-variances side by side.
        """

    @property
    @abstractmethod
    def policy(self) -> Policy:
        """The language model that writes."""

    @abstractmethod
    def writing(self, latents: Tensor) -> TextWriter:
        """A batch of texts to be written, one for each of the latents ``(B, Z)``."""

    @abstractmethod
    def log_ratios(self, tokens: Tokens, latents: Tensor) -> Tensor:
        """How much likelier B responses are from latents ``(B, Z)`` than from ``policy`` as it is, ``(B,)`` nats."""
