"""Features of any Hugging Face model; transformers is imported when a model is first needed.

Axes: N texts, B texts of one batch, T tokens of the longest of them, D feature width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from plm.backbones.backbone import (
    Backbone,
    Key,
    chat_messages,
    chat_text,
    choose,
    device,
    plain_text,
    readable_positions,
)
from plm.backbones.weights import content_hash, score_weight
from plm.hub import WAYS_OUT, offline_options
from plm.messages import to_text

CPU_BATCH_TOKENS = 1024
"""What fits the processor's cache: larger batches were slower on CPU."""
GPU_BATCH_TOKENS = 16384
PROBES = ("Yes.", "I would start with the smaller of the two, because a mistake there costs less.")
"""Responses on which a reward head is checked against the model's own logits."""


class HFBackbone(Backbone):
    """Pooled hidden states of a Hugging Face encoder, causal language model or reward model.

    Texts are tokenised once, sorted by length and run in batches of equal token counts. Padding is always on the right
    and masked, so the features of a text do not depend on its neighbours. The end of a long text is kept.

    Args:
        model: Folder of a model, or its id on the Hugging Face hub.
        revision: Branch, tag or commit of a model on the hub.
        kind: What the model is; ``auto`` reads it from the model's config. ``sequence_classification`` is a
            reward model whose linear ``score`` head becomes ``reference_head``.
        pooling: ``last`` real token, ``mean`` over real tokens or ``cls``, the first token; ``auto`` is ``mean`` for an
            encoder, else ``last``. With a reward model ``last`` is the token that its head reads.
        layer: Hidden state to read: -1 the last, 0 the embeddings.
        template: ``chat`` renders prompt and response with the tokenizer's chat template, ``plain`` joins them by an
            empty line, ``response`` leaves the prompt out.
        max_length: Most tokens of a text, special tokens included; default: what the model can read.
        dtype: Precision of weights and activations; features are always stored in float32.
        normalize: Whether features are scaled to length 1.
        batch_tokens: Most tokens of a batch, padding included; default: 1,024 on a CPU and 16,384 on a GPU.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        kind: Literal["auto", "encoder", "causal_lm", "sequence_classification"] = "auto",
        pooling: Literal["auto", "last", "mean", "cls"] = "auto",
        layer: int = -1,
        template: Literal["chat", "plain", "response"] = "plain",
        max_length: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        normalize: bool = False,
        batch_tokens: int | None = None,
    ) -> None:
        choose("kind", kind, ("auto", "encoder", "causal_lm", "sequence_classification"))
        choose("pooling", pooling, ("auto", "last", "mean", "cls"))
        choose("template", template, ("chat", "plain", "response"))
        choose("dtype", dtype, ("float32", "bfloat16", "float16"))
        self.model = str(model)
        self.revision = revision
        self.kind = kind
        self.pooling = pooling
        self.layer = layer
        self.template = template
        self.max_length = max_length
        self.dtype = dtype
        self.normalize = normalize
        self.batch_tokens = batch_tokens
        self._network: Any = None
        self._head: Tensor | None = None

    # ------------------------------------------------------------------ what it is, without weights
    @property
    def feature_dim(self) -> int:
        """Width D of the hidden states."""
        return int(self._config.get_text_config().hidden_size)

    def key(self) -> Key:
        """Identity of the cache: the content of a local model, or the commit of one on the hub, and all settings."""
        folder = self._folder
        chat = self.tokenizer.chat_template if self.template == "chat" else None
        return {
            "engine": "transformers",
            "model": self.model if folder is None else folder.resolve().name,
            "revision": self._commit if folder is None else None,
            "content": self._content,
            "kind": self.actual_kind,
            "pooling": self.actual_pooling,
            "layer": self.layer_number,
            "template": self.template,
            "template_hash": hashlib.sha256(chat.encode()).hexdigest() if chat else None,
            "max_length": self.max_length,
            "truncation_side": "left",
            "dtype": self.dtype,
            "normalize": self.normalize,
        }

    @property
    def reference_head(self) -> Tensor | None:
        """``(D,)`` the reward model's own ``score.weight[0]``, for features its head can read; else None."""
        if not self._scores:
            return None
        if self._head is None and (weight := score_weight(self.find_file)) is not None:
            self._head = weight.to(getattr(torch, self.dtype)).float()
        if self._head is None:
            self._load()
        return self._head

    @cached_property
    def _folder(self) -> Path | None:
        """Folder of a local model; None for one on the hub."""
        path = Path(self.model).expanduser()
        is_path = self.model.startswith(("/", ".", "~")) or self.model.count("/") > 1
        if not (path.exists() or is_path):
            return None
        if not (path / "config.json").is_file():
            state = "which holds no config.json" if path.exists() else f"which does not exist{self._seen_from}"
            raise ValueError(
                f"expected `model` to be the folder of a Hugging Face model or a hub id, got {self.model!r}, {state}; "
                "correct the path (data.backbone.init_args.model); a checkpoint also finds the folder beside itself"
            )
        if self.revision is not None:
            warnings.warn(f"revision={self.revision!r} has no effect on the local model {self.model!r}", stacklevel=2)
        return path

    @property
    def _seen_from(self) -> str:
        """The folder a relative path was looked for in, as part of an error message."""
        return "" if Path(self.model).expanduser().is_absolute() else f" in {str(Path.cwd())!r}"

    def spec(self) -> dict[str, Any]:
        """As in the base class, with a local folder as an absolute path, so that a checkpoint works from anywhere."""
        spec, folder = super().spec(), Path(self.model).expanduser()
        if folder.is_dir():
            spec["init_args"]["model"] = str(folder.absolute())
        return spec

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        config = self.read(AutoConfig.from_pretrained)
        layers = config.get_text_config().num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"{self.model!r} has {layers} layers, got layer={self.layer}; choose -1 for the last one")
        return config

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, which cuts texts at their beginning."""
        from transformers import AutoTokenizer

        tokenizer = self.read(AutoTokenizer.from_pretrained)
        tokenizer.truncation_side = "left"
        if self.template == "chat" and not isinstance(tokenizer.chat_template, str):
            templates = "none" if tokenizer.chat_template is None else f"several: {', '.join(tokenizer.chat_template)}"
            raise ValueError(
                f"template='chat' needs one chat template, and the tokenizer of {self.model!r} has {templates}; take a "
                "model tuned to chat, save a template with the tokenizer (tokenizer.chat_template), or set "
                "template='plain' (data.backbone.init_args.template)"
            )
        return tokenizer

    @cached_property
    def actual_kind(self) -> str:
        """What the model is: ``kind``, or what its config says."""
        if self.kind != "auto":
            return self.kind
        architecture = (self._config.architectures or [""])[0]
        if architecture.endswith("ForSequenceClassification"):
            return "sequence_classification"
        return "causal_lm" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"

    @cached_property
    def actual_pooling(self) -> str:
        """How hidden states become features: ``pooling``, or what suits the kind."""
        if self.pooling == "cls" and self.actual_kind != "encoder":
            raise ValueError(
                f"pooling='cls' reads the first token, which sees no other in {self.model!r} ({self.actual_kind}); "
                "choose 'last' or 'mean'"
            )
        if self.pooling != "auto":
            return self.pooling
        return "mean" if self.actual_kind == "encoder" else "last"

    @cached_property
    def layer_number(self) -> int:
        """The hidden state as a number from 0, the embeddings, to the number of layers."""
        return self.layer % (int(self._config.get_text_config().num_hidden_layers) + 1)

    @property
    def reads_last_layer(self) -> bool:
        """Whether features are pooled from the last hidden state."""
        return self.layer_number == int(self._config.get_text_config().num_hidden_layers)

    @cached_property
    def _scores(self) -> bool:
        """Whether the model's own head scores these features."""
        read_by_head = self.reads_last_layer and self.actual_pooling == "last" and not self.normalize
        return self.actual_kind == "sequence_classification" and read_by_head

    @cached_property
    def max_tokens(self) -> int:
        """Most tokens of a text, prompt and response together."""
        positions = readable_positions(self._config)
        if self.max_length is None:
            return int(min(positions, self.tokenizer.model_max_length, 10**9))
        lowest = 1 + (self.tokenizer.num_special_tokens_to_add() if self.template != "chat" else 0)
        if not lowest <= self.max_length <= positions:
            raise ValueError(
                f"expected max_length between {lowest} and {positions}, what {self.model!r} can read, "
                f"got {self.max_length}"
            )
        return self.max_length

    @cached_property
    def _content(self) -> str | None:
        """Hash of the files of a local model."""
        return None if self._folder is None else content_hash(self._folder)

    @cached_property
    def _commit(self) -> str | None:
        """Commit of a model on the hub."""
        file = self.find_file("config.json")
        return Path(file).parent.name if file else self.revision

    def find_file(self, name: str) -> str | None:
        """Path of a file of the model, downloaded if need be; None if it has none of that name."""
        from transformers.utils.hub import cached_file

        try:
            return str(self.read(lambda model, **options: cached_file(model, name, **options)))
        except ValueError:
            return None

    def read(self, load: Callable[..., Any], **options: Any) -> Any:
        """Call a loader of transformers on the model; its errors become a message about ``model``."""
        name = self.model if self._folder is None else str(self._folder)
        offline = offline_options() if self._folder is None else {}
        try:
            return load(name, revision=self.revision if self._folder is None else None, **offline, **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            folder = (
                f"there is no such folder{self._seen_from}: give an absolute path (data.backbone.init_args.model), or "
            )
            elsewhere = folder + (WAYS_OUT if offline else "check the id, the network and your access")
            raise ValueError(
                f"expected `model` to be the folder of a Hugging Face model or a hub id, got {self.model!r}, which "
                f"cannot be read ({reason}); {'check that its files are whole' if self._folder else elsewhere}"
            ) from error

    # ------------------------------------------------------------------ texts
    def render(self, prompt: str, response: str) -> str:
        """The text the model reads, by ``template``."""
        if self.template == "response":
            return response
        if self.template == "plain":
            return plain_text(prompt, response)
        messages = chat_messages(prompt)
        if messages is None:
            messages = [{"role": "user", "content": prompt}] if prompt else []
        return chat_text(self.model, self.tokenizer, [*messages, {"role": "assistant", "content": response}])

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, of which at most the last ``max_tokens`` stay."""
        tokenizer, chat = self.tokenizer, self.template == "chat"
        rows: list[list[int]] = tokenizer(
            [to_text(text) for text in texts],
            add_special_tokens=not chat,  # a chat template has written its own
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"expected a text with at least one token, got {text[:60]!r} for {self.model!r}")
            if chat and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
                row[0] = tokenizer.bos_token_id  # attention leans on it: it stays where truncation took the beginning
        return rows

    # ------------------------------------------------------------------ features
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)`` float32 on the CPU of N rendered texts.

        Raises:
            ValueError: If the model cannot be read, a text has no tokens, or the reward head does not give the logits.
        """
        features = torch.empty(len(texts), self.feature_dim)
        if not texts:
            return features
        rows = self._tokenize(texts)  # before the weights: what is wrong with a text or max_length shows at once
        if self._network is None:
            self._load()
        batches = list(self._batches(rows))
        for batch, part in zip(batches, self._forward_all(rows, batches), strict=True):
            features[batch] = part.cpu()
        return features

    def _forward_all(self, rows: list[list[int]], batches: list[list[int]]) -> Iterator[Tensor]:
        """Pooled features of every batch; on a CPU each core has a batch of its own, so that none waits for another."""
        parts = ([rows[index] for index in batch] for batch in batches)
        threads = torch.get_num_threads()
        if self._network.device.type != "cpu" or threads == 1 or len(batches) < threads:
            yield from map(self._forward, parts)
            return
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from pool.map(self._forward, parts)
        finally:
            torch.set_num_threads(threads)  # some math libraries have one setting for all threads

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Indices of rows of similar length, the longest first, at most ``batch_tokens`` of them with padding."""
        budget = self.batch_tokens or (CPU_BATCH_TOKENS if self._network.device.type == "cpu" else GPU_BATCH_TOKENS)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        start = 0
        while start < len(order):
            longest = len(rows[order[start]])
            end = min(start + max(1, budget // longest), len(order))
            enough = start + max(1, budget // (4 * longest))
            while end > enough and len(rows[order[end - 1]]) < 0.75 * longest:
                end -= 1  # a batch of a quarter of the budget is cheaper than much padding
            yield order[start:end]
            start = end

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Pooled features ``(B, D)`` float32 of B rows of token ids, on the model's device."""
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
        ids = torch.full(mask.shape, self.pad_id)
        ids[mask] = torch.tensor(list(chain.from_iterable(rows)))
        last = lengths - 1
        if self.actual_kind == "sequence_classification":  # its head reads the rightmost token that is no padding token
            real = mask & (ids != self.head_pad_id)
            last = (torch.arange(ids.shape[1]) * real).argmax(1)
        ids, mask, last = (tensor.to(self._network.device) for tensor in (ids, mask, last))
        last_layer = self.reads_last_layer
        output = self._network(input_ids=ids, attention_mask=mask.long(), output_hidden_states=not last_layer)
        hidden = output.last_hidden_state if last_layer else output.hidden_states[self.layer_number]  # (B, T, D)
        if self.actual_pooling == "mean":
            pooled = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        elif self.actual_pooling == "cls":
            pooled = hidden[:, 0].float()
        else:
            pooled = hidden[torch.arange(len(rows), device=last.device), last].float()
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    # ------------------------------------------------------------------ weights
    def release(self) -> None:
        """Free the weights; the next ``encode`` loads them again."""
        self._network = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> None:
        """Load the weights; a reward model's head is checked against its logits."""
        import transformers

        rewards = self.actual_kind == "sequence_classification"
        auto = transformers.AutoModelForSequenceClassification if rewards else transformers.AutoModel
        model, info = self.read(auto.from_pretrained, dtype=getattr(torch, self.dtype), output_loading_info=True)
        absent = sorted(key for key in info["missing_keys"] if "pooler" not in key)
        if absent:
            raise ValueError(
                f"{self.model!r} lacks the weights {absent[:3]} of a {type(model).__name__}; "
                f"set another kind than {self.actual_kind!r}"
            )
        model = model.eval().requires_grad_(False).to(device())
        model.config.use_cache = False
        network = getattr(model, model.base_model_prefix) if rewards else model
        self._network = network.get_encoder() if model.config.is_encoder_decoder else network
        if rewards:
            try:
                self._check_head(model)
            except ValueError:
                self._network = None
                raise

    @cached_property
    def pad_id(self) -> int:
        """Token id of masked positions; any will do where the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @cached_property
    def head_pad_id(self) -> int:
        """Token id that a reward model's head steps over; -1 for none."""
        pad = self._config.get_text_config().pad_token_id
        return -1 if pad is None else int(pad)

    def _check_head(self, model: Any) -> None:
        """Keep ``score.weight[0]`` of a reward model after checking that it gives the model's logits."""
        head = getattr(model, "score", None)
        if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
            raise ValueError(
                f"expected a reward model with a linear `score` head of one output, got {type(model).__name__} with "
                f"score={head!r} in {self.model!r}; set kind='encoder' to use its hidden states without a head"
            )
        if self.template != "chat" and isinstance(self.tokenizer.chat_template, str):
            warnings.warn(
                f"the reward model {self.model!r} has a chat template and template={self.template!r} does not use it; "
                "set template='chat' to score what it was trained on",
                stacklevel=2,
            )
        if not self._scores:
            return
        weight = head.weight[0].detach().float()
        for probe in PROBES:
            row = self._tokenize([self.render("Which of them first?", probe)])[0]
            feature = self._forward([row])[0]
            with torch.inference_mode():
                logit = model(input_ids=torch.tensor([row], device=model.device)).logits[0, 0].float()
            score = feature @ weight
            scale = float(feature.norm() * weight.norm())
            if not abs(float(score - logit)) <= scale * (1e-5 if self.dtype == "float32" else 1e-2):
                raise ValueError(
                    f"expected score.weight @ feature to be the logit of {self.model!r}, got {float(score):.6g} "
                    f"and {float(logit):.6g}; its head is not linear in this feature: set kind='causal_lm'"
                )
        self._head = weight.cpu()
