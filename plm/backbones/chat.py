"""A language model that is asked questions: one behind an OpenAI-compatible server, or one in this process."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from plm.backbones.backbone import device
from plm.backbones.causal_lm import CausalLM
from plm.backbones.remote import KEY_VARIABLE, Patience, RemoteError, RemotePolicy, ask

NUM_LOGPROBS = 20
"""How many likely tokens are asked for at each place; the most that OpenAI's interface gives."""
Messages = Sequence[Mapping[str, str]]


class Answer(NamedTuple):
    """What a model says."""

    text: str
    tokens: list[tuple[str, dict[str, float]]]
    """Each token written, with log-probabilities of the likely ones at its place; empty where none were given."""
    num_prompt_tokens: int = 0
    num_tokens: int = 0


class Chat(ABC):
    """Answers conversations; called by several threads at once."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The model, wherever it is: what decides answers besides the arguments."""

    @abstractmethod
    def __call__(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float,
        seed: int,
        begin: str = "",
        with_logprobs: bool = True,
    ) -> Answer:
        """One answer.

        Args:
            messages: ``{role, content}`` each.
            max_tokens: Most tokens of the answer.
            temperature: 0 = the likeliest token each time.
            seed: Of what is random in it.
            begin: How the answer begins, for a model that can be told; it is no part of the answer.
            with_logprobs: Whether log-probabilities are wanted; not every server gives them.
        """


class RemoteChat(Chat):
    """A model behind an OpenAI-compatible server; its key is the environment variable ``PLM_POLICY_KEY``.

    Args:
        url: Where the server's paths begin, such as ``http://localhost:8000/v1``.
        model: Name of the model there; None = the only one.
        patience: How long an answer is waited for.

    Raises:
        ValueError: If the server cannot be asked, or does not serve the model.
    """

    def __init__(self, url: str, model: str | None, patience: Patience) -> None:
        try:
            served = RemotePolicy(url, model, "chat")
        except ValueError as error:
            said = str(error).replace("--policy", "model.policy").removesuffix("; what was written is kept")
            if isinstance(cause := error.__cause__, RemoteError):
                raise RemoteError(said, cause.status, cause.is_passing) from error
            raise ValueError(said) from error
        self.url, self.patience, self._model = served.url, patience, served.model
        self._gives_logprobs = True

    @property
    def name(self) -> str:
        """Name of the model, wherever it is served."""
        return self._model

    def __call__(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float,
        seed: int,
        begin: str = "",
        with_logprobs: bool = True,
    ) -> Answer:
        """One answer, empty where the server gives none; how it begins is left to the model.

        Raises:
            ValueError: If the server refuses the request, keeps failing, or answers in other words than OpenAI's.
        """
        request: dict[str, Any] = {"model": self.name, "messages": list(messages), "max_tokens": max_tokens}
        request |= {"temperature": temperature, "seed": seed}
        if with_logprobs and self._gives_logprobs:
            try:
                return self._read(self._ask({**request, "logprobs": True, "top_logprobs": NUM_LOGPROBS}))
            except RemoteError as error:
                if error.status not in (400, 422) or "logprobs" not in str(error):
                    raise
                self._gives_logprobs = False
        return self._read(self._ask(request))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return ask(f"{self.url}/chat/completions", request, KEY_VARIABLE, self.patience)

    def _read(self, answer: dict[str, Any]) -> Answer:
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            tokens = [
                (str(entry["token"]), _likely(entry.get("top_logprobs") or []))
                for entry in (choice.get("logprobs") or {}).get("content") or []
            ]
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            return Answer(str(choice["message"].get("content") or ""), tokens, *counts)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected an answer in OpenAI's words from {self.url}, got {str(answer)[:200]!r}"
            ) from error


def _likely(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Log-probabilities by token, those that are there."""
    found = [(str(entry["token"]), entry.get("logprob")) for entry in entries]
    return {token: float(logprob) for token, logprob in found if logprob is not None}


class LocalChat(Chat):
    """A model of this process, which answers one conversation at a time.

    A model without a chat template reads messages headed by their roles, and goes on.

    Args:
        model: Folder of a causal language model, or its id on the Hugging Face hub.

    Raises:
        ValueError: If it cannot be read.
    """

    def __init__(self, model: str) -> None:
        plain = CausalLM(model)
        self.lm = plain if plain.tokenizer.chat_template is None else CausalLM(model, template="chat")
        self._lock, self._fingerprint = threading.Lock(), self.lm.fingerprint()

    @property
    def name(self) -> str:
        """Hash of weights and tokenizer."""
        return self._fingerprint

    @cached_property
    def network(self) -> Any:
        """The language model on its device."""
        return self.lm.load().to(device())

    def __call__(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float,
        seed: int,
        begin: str = "",
        with_logprobs: bool = True,
    ) -> Answer:
        """One answer, which follows ``begin``.

        Raises:
            ValueError: If the conversation leaves no room for it.
        """
        tokenizer = self.lm.tokenizer
        ids = self.lm.prompt_tokens(json.dumps(list(messages)))
        ids += tokenizer(begin, add_special_tokens=False)["input_ids"]
        ends = [end for end in (self.lm.closing_token, tokenizer.eos_token_id) if end is not None]
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        with self._lock, torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            given = torch.tensor([ids], device=self.network.device)
            written = self.network.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=max(1, min(max_tokens, self.lm.max_tokens - len(ids))),
                use_cache=True,
                output_logits=with_logprobs,
                return_dict_in_generate=True,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                **sampling,
            )
        new = written.sequences[0, len(ids) :].tolist()
        likely = [torch.log_softmax(logits[0].float(), -1).topk(NUM_LOGPROBS) for logits in written.logits or ()]
        tokens = [
            (tokenizer.decode([token]), self._by_text(top.indices.tolist(), top.values.tolist()))
            for token, top in zip(new, likely, strict=with_logprobs)
        ]
        return Answer(tokenizer.decode(new, skip_special_tokens=True), tokens, len(ids), len(new))

    def _by_text(self, ids: list[int], logprobs: list[float]) -> dict[str, float]:
        """Log-probabilities of tokens by their texts; of two with one text the likelier."""
        found: dict[str, float] = {}
        for token, logprob in zip(ids, logprobs, strict=True):
            found.setdefault(self.lm.tokenizer.decode([token]), logprob)
        return found
