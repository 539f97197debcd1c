"""Reads a trained CLaP model as a backbone: latents for Latent DPO, features of prompts, and texts from latents.

Axes: N texts, B texts of one batch, D width, Z latent width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from plm.backbones import (
    Backbone,
    CausalLM,
    Completion,
    Key,
    LatentBackbone,
    Policy,
    TextWriter,
    batches_by_length,
    completion_tokens,
    device,
)
from plm.checkpoint import find_class, load_method, read_checkpoint
from plm.method import CHECKPOINT_KEY
from plm.methods.clap import CLaP
from plm.methods.clap.encoder import PosteriorEncoder
from plm.types import Tokens, UserState
from plm.users import shared_hash

BATCH_TOKENS = 8192
DECISIVE = (
    "latent_dim",
    "num_queries",
    "prompt_in_posterior",
    "fix_entropy",
    "num_virtual_tokens",
    "placement",
    "gated",
)
"""Options of `CLaP` that decide, beside the weights, which latents a text has and which texts a latent."""
_LOADED: WeakValueDictionary[str, CLaP] = WeakValueDictionary()
"""Models by their content, while they are in use. The encoder of texts and the method that writes each build a
`ClapLatents` from a spec of their own; without this the language model would be in memory twice."""


class _Facts(NamedTuple):
    """What a checkpoint says about a CLaP model."""

    content: str
    """Hash of all that decides latents and texts."""
    feature_dim: int
    """Width 2Z of posteriors."""
    prompt_dim: int
    """Width of prompt features."""
    policy: dict[str, Any]
    """Spec of the language model."""


class ClapLatents(LatentBackbone):
    """Posteriors of responses under a CLaP checkpoint: mean and log-variance side by side, ``(N, 2Z)``.

    They are computed once per response and cached under the content of the checkpoint.

    Args:
        checkpoint: A checkpoint of `CLaP`, kept as an absolute path.
        prompts: Features of prompts: ``hidden`` states that its encoder makes of prompts alone, or their ``tokens``,
            for users who have an encoder of their own (``model.family: full``).
        content: Hash that the checkpoint must have, as ``spec`` writes it down: users belong to one CLaP model. With
            it, as when users are loaded, the environment variable PLM_CLAP names the checkpoint wherever it is now.
    """

    def __init__(
        self, checkpoint: str, prompts: Literal["hidden", "tokens"] = "hidden", content: str | None = None
    ) -> None:
        if prompts not in ("hidden", "tokens"):
            raise ValueError(f"ClapLatents.prompts: expected hidden or tokens, got {prompts!r}")
        moved = os.environ.get("PLM_CLAP") if content is not None else None
        self.checkpoint, self.prompts = str(Path(moved or checkpoint).absolute()), prompts
        self._expected = content
        self._method: CLaP | None = None

    @cached_property
    def _facts(self) -> _Facts:
        """What is read from the checkpoint, once."""
        if not Path(self.checkpoint).is_file():
            raise ValueError(
                f"expected the CLaP checkpoint that makes the latents, got {self.checkpoint!r}, which does not "
                "exist; set data.backbone.init_args.checkpoint, or, for people already learned, name it in the "
                "environment as PLM_CLAP or put it under that name beside their checkpoint"
            )
        saved = read_checkpoint(self.checkpoint)
        metadata, hparams = saved[CHECKPOINT_KEY], saved["hyper_parameters"]
        if not issubclass(find_class(metadata["class_path"]), CLaP):
            raise ValueError(
                f"expected a checkpoint of CLaP, got one of {metadata['class_path']} in {self.checkpoint!r}"
            )
        weights, options = shared_hash(saved["state_dict"]), [hparams[name] for name in DECISIVE]
        content = hashlib.sha256(f"{weights} {metadata['base_model']} {options!r}".encode()).hexdigest()[:16]
        if self._expected not in (None, content):
            raise ValueError(
                f"expected the CLaP model {self._expected}, got {content} in {self.checkpoint!r}: latents of one model "
                "mean nothing to another, nor do people who were learned on them; give the checkpoint they were "
                "learned on, or learn them again"
            )
        return _Facts(content, 2 * int(hparams["latent_dim"]), int(hparams["feature_dim"]), hparams["backbone"])

    @property
    def content(self) -> str:
        """Hash of the checkpoint's weights, its options and its language model.

        Raises:
            ValueError: If the checkpoint is not one of CLaP, or has another hash than was asked for.
        """
        return self._facts.content

    @property
    def feature_dim(self) -> int:
        """Width 2Z of the features."""
        return self._facts.feature_dim

    def key(self) -> Key:
        """The content of the checkpoint, wherever it lies."""
        return {"engine": "plm.methods.clap", "content": self.content, "features": "posterior"}

    def render(self, prompt: str, response: str) -> str:
        """Prompt and response as two entries of a JSON list."""
        return json.dumps([prompt, response], ensure_ascii=False)

    @cached_property
    def causal_lm(self) -> CausalLM:
        """The language model's tokenizer and limits; no weights are read."""
        return cast(CausalLM, Backbone.from_spec(self._facts.policy))

    @property
    def prompt_backbone(self) -> ClapPrompts | CausalLM:
        """The same encoder, of prompts alone; or the language model, whose tokens it would read."""
        return self.causal_lm if self.prompts == "tokens" else ClapPrompts(self)

    def prompt_encoder(self) -> PromptEncoder:
        """The encoder with a head of zeros."""
        return PromptEncoder(self.method.encoder, self.method.train_embeddings)

    @property
    def method(self) -> CLaP:
        """The model itself, loaded when first needed."""
        if self._method is None:
            method = _LOADED.get(self.content)
            if method is None:
                loaded = load_method(self.checkpoint, device())
                assert isinstance(loaded, CLaP)
                method = _LOADED[self.content] = loaded
            self._method = method
        return self._method

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Posteriors ``(N, 2Z)``.

        Raises:
            ValueError: For a prompt that leaves no room for a response.
        """
        rows = [self.causal_lm.completion(*json.loads(text)) for text in texts]
        return self._encoded(rows, self.feature_dim, lambda read: torch.cat([read.mean, read.log_var], 1))

    def _encoded(self, rows: Sequence[Completion], width: int, values: Any) -> Tensor:
        """Posteriors or hidden states of texts, ``(N, width)``, read in batches of similar length."""
        out = torch.empty(len(rows), width)
        method = self.method
        for batch in batches_by_length([sum(map(len, row)) + method.num_queries for row in rows], BATCH_TOKENS):
            tokens = completion_tokens([rows[place] for place in batch]).to(method.device)
            with torch.no_grad():
                out[batch] = values(method.encoder(tokens)).cpu()
        return out

    def release(self) -> None:
        """Free the weights."""
        self._method = None

    # ------------------------------------------------------------------ text
    @property
    def policy(self) -> Policy:
        """The language model that writes."""
        return self.method.policy

    def writing(self, latents: Tensor) -> TextWriter:
        """A batch of texts to be written, one for each of the latents ``(B, Z)``."""
        num_pairs = torch.zeros(len(latents), dtype=torch.long)
        return self.method.writing(UserState({"latent": latents}, num_pairs), [])

    @torch.no_grad()
    def log_ratios(self, tokens: Tokens, latents: Tensor) -> Tensor:
        """How much likelier B responses are from latents ``(B, Z)`` than from the language model, ``(B,)`` nats."""
        method, tokens = self.method, tokens.to(self.method.device)
        state = UserState({"latent": latents}, torch.zeros(tokens.num_rows, dtype=torch.long))
        return method.score(tokens, state) - method.total_logps(tokens)


class ClapPrompts(Backbone):
    """Features ``(N, D)`` of prompts: mean last hidden state of the queries of a CLaP encoder.

    Args:
        latents: The model.
    """

    def __init__(self, latents: ClapLatents) -> None:
        self.latents = latents

    @property
    def feature_dim(self) -> int:
        """Width D of the encoder."""
        return self.latents._facts.prompt_dim

    def key(self) -> Key:
        """The content of the checkpoint."""
        return {**self.latents.key(), "features": "prompt"}

    def render(self, prompt: str, response: str) -> str:
        """The prompt, which stands where a response would: there is none before it."""
        return response

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)``.

        Raises:
            ValueError: For a prompt that leaves no room for a response.
        """
        rows = [Completion([], self.latents.causal_lm.prompt_tokens(text)) for text in texts]
        return self.latents._encoded(rows, self.feature_dim, lambda read: read.hidden)


class PromptEncoder(nn.Module):
    """A posterior encoder that reads prompts alone: p(z|x) of one user, N(0, I) before training.

    Args:
        encoder: What is copied, all but its head, which starts at zero.
        train_embeddings: Whether the copy of the token embeddings is trained.
    """

    def __init__(self, encoder: PosteriorEncoder, train_embeddings: bool) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(True)
        self.encoder.network.get_input_embeddings().requires_grad_(train_embeddings)
        nn.init.zeros_(self.encoder.head.weight)
        nn.init.zeros_(self.encoder.head.bias)

    def forward(self, prompts: Tokens) -> Tensor:
        """Prompts ``(B, T)`` -> ``(B, 2Z)``."""
        prompts = prompts.trimmed()
        encoded = self.encoder(prompts._replace(completion_mask=prompts.attention_mask))  # read like a response
        return torch.cat([encoded.mean, encoded.log_var], -1)
