"""What every backbone is, and how a prompt and a response become one text.

Axes: N texts, D feature width.
"""

from __future__ import annotations

import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from plm.types import Tokens

Key: TypeAlias = dict[str, str | int | bool | None]
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Set before a chat template: some write today's date into the text, so features would change from day to day."""


def chat_messages(prompt: str) -> list[dict[str, str]] | None:
    """The messages of a prompt that is a JSON list of ``{role, content}``; None for plain text."""
    if not prompt.startswith("[{"):
        return None
    try:
        messages = json.loads(prompt)
    except (ValueError, RecursionError):  # brackets may be too deep to read
        return None
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return None
    return list(messages)


def plain_text(prompt: str, response: str) -> str:
    r"""Prompt and response as one text, messages of a chat headed by their roles.

    Example:
        >>> plain_text("Tea or coffee?", "Tea.")
        'Tea or coffee?\n\nTea.'
        >>> plain_text('[{"role":"user","content":"Tea?"}]', "Yes.")
        'user: Tea?\n\nassistant: Yes.'
    """
    messages = chat_messages(prompt)
    if messages is None:
        return f"{prompt}\n\n{response}" if prompt else response
    turns = [*messages, {"role": "assistant", "content": response}]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def chat_text(model: str, tokenizer: Any, messages: Sequence[Mapping[str, str]], /, **options: Any) -> str:
    """A conversation in the chat template of a tokenizer.

    Args:
        model: Whose it is, for messages.
        tokenizer: What has the template.
        messages: The conversation.
        **options: What the template is told besides.

    Raises:
        ValueError: If the template refuses the messages, with their roles.
    """
    from jinja2 import TemplateError

    template = _FIXED_DATE + tokenizer.chat_template
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options))
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"the chat template of {model!r} refuses messages of roles {roles}: {error}; set template='plain'"
        ) from error


class Backbone(ABC):
    """A frozen model that turns a (prompt, response) pair into a feature vector.

    A subclass keeps each constructor argument under its own name, so that ``spec`` can write them down. Constructing
    one is cheap: weights are loaded when the first text is encoded.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "features"
    """What batches made with it hold: features, or the tokens that a method runs its own model on."""

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Width D of the features, known without loading weights."""

    @abstractmethod
    def key(self) -> Key:
        """Everything that decides the features of a rendered text; the cache is named by it."""

    @abstractmethod
    def render(self, prompt: str, response: str) -> str:
        """The text that is encoded; ``prompt`` is plain text or a JSON list of chat messages."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)`` float32 on the CPU of N rendered texts, each independent of the others."""

    def represent(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor | Tokens:
        """Inputs of methods for B responses to B prompts: features ``(B, D)``; a repeated text is encoded once."""
        rendered = [self.render(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        row_of = {text: row for row, text in enumerate(dict.fromkeys(rendered))}
        return self.encode(list(row_of))[[row_of[text] for text in rendered]]

    @property
    def prompt_backbone(self) -> Backbone:
        """The backbone that makes features of prompts alone, where responses need another one."""
        return self

    @property
    def reference_head(self) -> Tensor | None:
        """``(D,)`` direction in which a reward model itself scores a feature; None for any other model."""
        return None

    def release(self) -> None:  # noqa: B027 - a backbone without weights has nothing to free
        """Free the weights; the next ``encode`` loads them again."""

    def spec(self) -> dict[str, Any]:
        """The backbone as ``{class_path, init_args}``, plain values that ``from_spec`` rebuilds it from."""
        cls = type(self)
        arguments = [name for name in inspect.signature(cls).parameters]
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {name: getattr(self, name) for name in arguments},
        }

    @staticmethod
    def from_spec(spec: Mapping[str, Any]) -> Backbone:
        """Rebuild a backbone from its ``spec``.

        Raises:
            ValueError: If the class cannot be imported, is no backbone or takes other arguments.
        """
        class_path = spec["class_path"]
        module, _, name = class_path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"expected the class of a backbone, got {class_path!r}: {error}; install the package that holds it"
            ) from error
        if not (inspect.isclass(cls) and issubclass(cls, Backbone)):
            raise ValueError(
                f"expected the class of a backbone, got {class_path!r}, which is no plm.backbones.Backbone"
            )
        arguments = spec.get("init_args", {})
        try:
            inspect.signature(cls).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"{class_path}: {error}; expected the init_args of the installed class") from error
        return cls(**arguments)


def choose(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {list(choices)}, got {value!r}")


def device() -> str:
    """The device that models run on: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def readable_positions(config: Any) -> int:
    """How many tokens a network of this configuration has positions for.

    RoBERTa and its like number positions from behind the padding token: the first rows of ``max_position_embeddings``
    stand for no token. Such networks have a table of positions with a padding row.
    """
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        return 10**9
    import transformers

    with torch.device("meta"):
        network = transformers.AutoModel.from_config(config)
    tables = [table for table in network.modules() if isinstance(table, torch.nn.Embedding)]
    padding = [
        table.padding_idx
        for table in tables
        if table.num_embeddings == positions and table is not network.get_input_embeddings()
    ]
    return int(positions) - max((row + 1 for row in padding if row is not None), default=0)
