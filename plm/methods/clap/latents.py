"""What a trained CLaP model makes of texts: latents for Latent DPO, features of prompts, and texts from latents.

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
    completion_tokens,
    device,
)
from plm.checkpoint import find_class, load_method, read_checkpoint
from plm.method import CHECKPOINT_KEY
from plm.methods.clap import CLaP
from plm.methods.clap.encoder import PosteriorEncoder
from plm.methods.clap.options import Options, resolved
from plm.types import Tokens, UserState
from plm.users import shared_hash

BATCH_TOKENS = 8192
_LOADED: WeakValueDictionary[str, CLaP] = WeakValueDictionary()
"""Models by their content, while anybody holds them: who scores and who writes hold the same one."""


class _About(NamedTuple):
    """What a checkpoint says of a CLaP model."""

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
            for people who have an encoder of their own (``model.family: full``).
        content: Hash that the checkpoint must have, as ``spec`` writes it down: people belong to one CLaP model. With
            it, as when people are loaded, the environment variable PLM_CLAP names the checkpoint wherever it is now.
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
    def _about(self) -> _About:
        """What is read from the checkpoint, once."""
        if not Path(self.checkpoint).is_file():
            raise ValueError(
                f"expected the CLaP checkpoint that makes the latents, got {self.checkpoint!r}, which does not "
                "exist; set data.backbone.init_args.checkpoint, or, for people already learned, name it in the "
                "environment as PLM_CLAP or put it under that name beside their checkpoint"
            )
        held = read_checkpoint(self.checkpoint)
        about, hparams = held[CHECKPOINT_KEY], held["hyper_parameters"]
        if not issubclass(find_class(about["class_path"]), CLaP):
            raise ValueError(f"expected a checkpoint of CLaP, got one of {about['class_path']} in {self.checkpoint!r}")
        given = {name: hparams[name] for name in Options.__dataclass_fields__}
        options = resolved(hparams["preset"], hparams["unfreeze"], given)
        weights = shared_hash(held["state_dict"])
        content = hashlib.sha256(f"{weights} {about['base_model']} {options!r}".encode()).hexdigest()[:16]
        if self._expected not in (None, content):
            raise ValueError(
                f"expected the CLaP model {self._expected}, got {content} in {self.checkpoint!r}: latents of one model "
                "mean nothing to another, nor do people who were learned on them; give the checkpoint they were "
                "learned on, or learn them again"
            )
        return _About(content, 2 * options.latent_dim, int(hparams["feature_dim"]), hparams["backbone"])

    @property
    def content(self) -> str:
        """Hash of the checkpoint's weights, its options and its language model.

        Raises:
            ValueError: If the checkpoint is not one of CLaP, or has another hash than was asked for.
        """
        return self._about.content

    @property
    def feature_dim(self) -> int:
        """Width 2Z of the features."""
        return self._about.feature_dim

    def key(self) -> Key:
        """The content of the checkpoint, wherever it lies."""
        return {"engine": "plm.methods.clap", "content": self.content, "features": "posterior"}

    def render(self, prompt: str, response: str) -> str:
        """Both texts, apart."""
        return json.dumps([prompt, response], ensure_ascii=False)

    @cached_property
    def causal_lm(self) -> CausalLM:
        """What cuts texts into tokens; no weights are read."""
        return cast(CausalLM, Backbone.from_spec(self._about.policy))

    @property
    def prompt_backbone(self) -> ClapPrompts | ClapTokens:
        """The same encoder, of prompts alone; or what it would read."""
        return ClapTokens(self) if self.prompts_as_tokens else ClapPrompts(self)

    @property
    def prompts_as_tokens(self) -> bool:
        """Whether the features of prompts are their token ids."""
        return self.prompts == "tokens"

    def prompt_encoder(self) -> PromptEncoder:
        """The encoder with a head of zeros."""
        return PromptEncoder(self.method.encoder, self.method.options.train_embeddings)

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
        """What the encoder says of texts, ``(N, width)``, in batches of similar length."""
        out = torch.empty(len(rows), width)
        order = sorted(enumerate(rows), key=lambda item: sum(map(len, item[1])), reverse=True)
        start, method = 0, self.method
        while start < len(order):
            longest = sum(map(len, order[start][1])) + method.options.num_queries
            part = order[start : start + max(1, BATCH_TOKENS // longest)]
            tokens = completion_tokens([row for _, row in part]).to(method.device)
            with torch.inference_mode():
                out[[index for index, _ in part]] = values(method.encoder(tokens)).cpu()
            start += len(part)
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
        nobody = torch.zeros(len(latents), dtype=torch.long)
        return self.method.writing(UserState({"latent": latents}, nobody), [])

    @torch.no_grad()
    def log_ratios(self, tokens: Tokens, latents: Tensor) -> Tensor:
        """How much likelier B responses are from latents ``(B, Z)`` than from the language model, ``(B,)`` nats."""
        method, tokens = self.method, tokens.to(self.method.device)
        state = UserState({"latent": latents}, torch.zeros(tokens.num_rows, dtype=torch.long))
        reference = torch.zeros(tokens.num_rows, device=method.device)
        for rows in method.chunks(tokens):
            reference[rows] = method.logps(tokens.take(rows).trimmed()).total
        return method.score(tokens, state) - reference


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
        return self.latents._about.prompt_dim

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


class ClapTokens(Backbone):
    """Token ids ``(N, T)`` of prompts, padded by -1 to the longest that the language model takes.

    Args:
        latents: The model.
    """

    def __init__(self, latents: ClapLatents) -> None:
        self.latents = latents

    @property
    def feature_dim(self) -> int:
        """Tokens T of the longest prompt."""
        return self.latents.causal_lm.max_prompt_length or self.latents.causal_lm.max_tokens - 1

    def key(self) -> Key:
        """The content of the checkpoint."""
        return {**self.latents.key(), "features": "prompt_tokens"}

    def render(self, prompt: str, response: str) -> str:
        """The prompt, which stands where a response would: there is none before it."""
        return response

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids ``(N, T)``.

        Raises:
            ValueError: For a prompt that leaves no room for a response.
        """
        out = torch.full((len(texts), self.feature_dim), -1.0)
        for row, text in zip(out, texts, strict=True):
            ids = self.latents.causal_lm.prompt_tokens(text)
            row[: len(ids)] = torch.tensor(ids, dtype=torch.float32)
        return out


class PromptEncoder(nn.Module):
    """A posterior encoder that reads prompts alone: p(z|x) of one person, N(0, I) before training.

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

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, T)`` token ids padded by -1 -> ``(B, 2Z)``."""
        known = ids >= 0
        kept = known.any(0)
        known = known[:, kept]
        read = self.encoder(Tokens(ids[:, kept].clamp_min(0).long(), known, known))
        return torch.cat([read.mean, read.log_var], -1)
