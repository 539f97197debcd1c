"""A causal language model as the backbone of token methods: texts to token ids, and the network itself."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import torch

from plm.backbones.backbone import Key, chat_messages, chat_text, choose, plain_text
from plm.backbones.huggingface import HFBackbone
from plm.backbones.tokens import Completion, TokenBackbone, TooLong
from plm.messages import to_text

_PROBE = "Yes"
"""A reply in which the chat template is asked how it closes one."""
_SET_HERE = {"add_generation_prompt", "chat_template", "conversation", "tokenize"}
"""Arguments of ``apply_chat_template`` that are no option of a template."""


class CausalLM(HFBackbone, TokenBackbone):
    """A Hugging Face causal language model that token methods train, steer and generate with.

    With it the data hand out tokens instead of features. A response is what follows its prompt, closed by the end token
    where the text has none. Of a prompt longer than ``max_prompt_length`` the end is kept, of a response that does not
    fit the beginning; a pair whose prompt leaves no room is left out and counted.

    Args:
        model: Folder of a model, or its id on the Hugging Face hub.
        revision: Branch, tag or commit of a model on the hub.
        template: ``chat`` renders prompt and response with the tokenizer's chat template, whose closing token then ends
            writing, too; ``plain`` joins them as they stand, so that a response of running text begins with its own
            space.
        max_length: Most tokens of prompt and response together; default: what the model can read.
        max_prompt_length: Most tokens of a prompt; default: as many as leave room for one token of a response.
        append_eos: Whether a response is closed by the end token; not for responses cut out of a longer text. A chat
            template closes replies itself.
        dtype: Precision of a network whose weights are frozen; one that is trained is kept in float32.
        quantization: ``4bit`` loads the frozen weights with bitsandbytes (NF4), on a GPU.
        attention: Attention kernel; ``auto`` is what transformers picks.
        chat_template_kwargs: What the chat template is told besides the messages, such as ``enable_thinking: false``.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        template: Literal["chat", "plain"] = "plain",
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        append_eos: bool = True,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Literal["4bit"] | None = None,
        attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        choose("template", template, ("chat", "plain"))
        choose("attention", attention, ("auto", "eager", "sdpa", "flash_attention_2"))
        if quantization not in (None, "4bit"):
            raise ValueError(f"expected quantization to be 4bit or null, got {quantization!r}")
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ValueError(f"expected max_prompt_length to be at least 1, got {max_prompt_length!r}")
        if template == "chat" and not append_eos:
            raise ValueError("expected append_eos to be true with template 'chat', which closes replies, got false")
        if template != "chat" and chat_template_kwargs:
            raise ValueError(f"expected no chat_template_kwargs with template {template!r}, got {chat_template_kwargs}")
        if reserved := sorted(_SET_HERE & (chat_template_kwargs or {}).keys()):
            raise ValueError(f"expected chat_template_kwargs of the template's own, got {reserved}, which are set here")
        super().__init__(model, revision, kind="causal_lm", template=template, max_length=max_length, dtype=dtype)
        self.max_prompt_length = max_prompt_length
        self.append_eos = append_eos
        self.quantization = quantization
        self.attention = attention
        self.chat_template_kwargs = chat_template_kwargs

    def key(self) -> Key:
        """Identity of what is cached with it: the model and everything that decides the tokens of a text."""
        cut: Key = {"max_prompt_length": self.max_prompt_length, "append_eos": self.append_eos}
        if self.chat_template_kwargs:
            cut["chat_template_kwargs"] = json.dumps(self.chat_template_kwargs, sort_keys=True)
        return {**super().key(), **cut, "quantization": self.quantization}

    # ------------------------------------------------------------------ texts
    def prompt_tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt alone, its end kept: what generation starts from.

        Raises:
            ValueError: If it leaves no room for a response, or has no token to start from.
        """
        ids = self._prompt_ids(prompt)
        limit = self.max_prompt_length
        if limit is not None and len(ids) > limit:
            begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id and limit > 1 else []  # attention leans on it
            ids = begin + ids[len(ids) - limit + len(begin) :]
        if len(ids) >= self.max_tokens:
            raise TooLong(
                prompt,
                f"expected a prompt that leaves room for a response, got {len(ids)} tokens of at most "
                f"{self.max_tokens}: {prompt[:60]!r}; shorten it, raise max_length or set max_prompt_length",
            )
        return self._in_range(ids)

    def cut_completion(self, prompt: str, response: str) -> tuple[Completion, int]:
        """Token ids of a prompt and of the response to it, which is cut where the model can read no more.

        A response is tokenised together with its prompt, unless a token would span the border between the two.

        Returns:
            The ids, and how many tokens of the response were cut off.

        Raises:
            ValueError: If the prompt leaves no room, the response has no tokens, or the chat template begins a reply
                with what a finished reply does not hold.
        """
        before, whole = self._text(prompt, None), self._text(prompt, response)
        if not whole.startswith(before):
            raise ValueError(
                f"expected a chat template whose finished replies begin as it asks for them, got {before[-60:]!r} "
                f"before a reply that is to be written, and {whole[-60:]!r} once it is; give {self.model!r} a template "
                "that keeps the beginning (chat_template.jinja in its folder), or set template: plain"
            )
        tokenizer, plain = self.tokenizer, self.template == "plain"
        prompt_ids, ids = self._prompt_ids(prompt), self._ids(whole, plain)
        if before and ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids = self._ids(whole.removeprefix(before), False)
        if not ids:
            raise ValueError(f"expected a response of at least one token, got {response!r} for {self.model!r}")
        end = tokenizer.eos_token_id
        if self.append_eos and plain and end is not None and ids[-1] != end:
            ids.append(end)
        read = self.prompt_tokens(prompt)
        room = self.max_tokens - len(read)
        return Completion(read, self._in_range(ids[:room])), max(0, len(ids) - room)

    def response_text(self, completion: Completion) -> str:
        """The text of a response's tokens, as it stands after its prompt; special tokens are left out."""
        decode = self.tokenizer.decode
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = decode(completion.prompt, **options)
        whole = decode([*completion.prompt, *completion.response], **options)
        if whole.startswith(before):  # decoded alone, some tokenizers drop the space a response begins with
            return str(whole[len(before) :])
        return str(decode(completion.response, **options))

    def _ids(self, text: str, special: bool) -> list[int]:
        """Token ids of a text of any length, with the tokens that open and close a text or without."""
        return list(self.tokenizer(to_text(text), add_special_tokens=special, verbose=False)["input_ids"])

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a whole prompt, at least one."""
        tokenizer = self.tokenizer
        ids = self._ids(self._text(prompt, None), self.template == "plain")
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and self.template == "plain":
            ids = ids[:-1]  # some tokenizers close every text
        if not ids:  # an empty prompt: begin where a text begins
            start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            if start is None:
                raise ValueError(f"expected a prompt, got {prompt!r}, and {self.model!r} has no token to start from")
            ids = [start]
        return ids

    def _text(self, prompt: str, response: str | None) -> str:
        """What the model reads; without a response up to where it begins."""
        if self.template == "chat":
            return self._chat(prompt, response)
        begin = prompt if chat_messages(prompt) is None else plain_text(prompt, "")
        return begin + (response or "")

    def _chat(self, prompt: str, response: str | None) -> str:
        """A conversation in the model's chat template; without a response up to where the reply begins."""
        messages = chat_messages(prompt)
        if messages is None:
            messages = [{"role": "user", "content": prompt}]
        if response is not None:
            messages = [*messages, {"role": "assistant", "content": response}]
        options = {**(self.chat_template_kwargs or {}), "add_generation_prompt": response is None}
        return chat_text(self.model, self.tokenizer, messages, **options)

    @cached_property
    def closing_token(self) -> int | None:
        """Id of the token that closes a reply in the chat template; None where it is ordinary text, or plain.

        It is the first special token after the content of a reply.
        """
        if self.template != "chat":
            return None
        whole = self._chat("A question?", _PROBE)
        tail = self._ids(whole[whole.rfind(_PROBE) + len(_PROBE) :], False) if _PROBE in whole else []
        special = set(self.tokenizer.all_special_ids)
        added = [token for token, entry in self.tokenizer.added_tokens_decoder.items() if entry.content.strip()]
        return next((token for ids in (special, added) for token in tail if token in ids), None)

    def _in_range(self, ids: list[int]) -> list[int]:
        size = int(self._config.get_text_config().vocab_size)
        if max(ids) >= size:
            raise ValueError(
                f"expected token ids below {size}, the vocabulary of {self.model!r}, got {max(ids)}; its tokenizer has "
                f"{len(self.tokenizer)} tokens: take the tokenizer the model was trained with"
            )
        return ids

    def prepare(self, texts: Iterable[str]) -> None:
        """Get ready for the texts to train on, before any is tokenised; a model that exists does not need them.

        Raises:
            ValueError: If there is no such model, or no chat template where one is needed.
        """
        if self.tokenizer.chat_template is not None and self.template == "plain":
            warnings.warn(
                f"{self.model!r} has a chat template, and template='plain' joins prompts and responses as they stand; "
                "set template='chat' (data.backbone.init_args.template) unless the texts are no conversations",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ the network
    def load(self) -> torch.nn.Module:
        """The language model on the CPU (4-bit: on the GPU), frozen, without dropout.

        Raises:
            ValueError: If it cannot be read, or 4-bit weights are asked for where they cannot be had.
        """
        import transformers

        config = self._config
        for name, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(config, name, 0.0)  # a policy and its reference must see the same network
        options: dict[str, Any] = {"config": config, "dtype": getattr(torch, self.dtype)}
        if self.attention != "auto":
            options["attn_implementation"] = self.attention
        if self.quantization is not None:
            options["quantization_config"] = _four_bit(self.dtype)
        network = self.read(transformers.AutoModelForCausalLM.from_pretrained, **options)
        network.config.use_cache = False
        return network.eval().requires_grad_(False)  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Short hash of weights and tokenizer, but not of the folder's name; adapters keep it to know their network."""
        identity = self._content or f"{self.model} at {self._commit}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _four_bit(dtype: str) -> Any:
    """Settings of 4-bit weights (Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        ValueError: Without bitsandbytes or without a GPU.
    """
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise ValueError(
            "quantization='4bit' needs a CUDA device and bitsandbytes, got "
            f"{'no bitsandbytes' if find_spec('bitsandbytes') is None else 'no CUDA device'}; "
            "pip install 'plm[quantization]' on a machine with a GPU, or set quantization to null"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
