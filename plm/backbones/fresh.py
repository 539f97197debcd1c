"""A small language model and its tokenizer, made from the texts of a data set alone, without a download.

Papers: Radford et al. 2019 (GPT-2: the layout and the byte-level tokenizer); Touvron et al. 2023, arXiv 2302.13971
(Llama).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from plm.atomic import replace, write_text
from plm.backbones.backbone import choose
from plm.backbones.causal_lm import CausalLM
from plm.messages import Problems

END = "<|endoftext|>"
NUM_BYTES = 256
SETTINGS_FILE = "fresh.json"
"""Beside the model: the arguments it was made with."""


class FreshCausalLM(CausalLM):
    """A language model that does not exist yet: the first run writes it, untrained, with a tokenizer of its texts.

    The texts are those of the data, whatever their split; they decide the tokenizer and nothing else. From then on the
    folder is a model like any other, and this is a `CausalLM` of it: checkpoints and later stages know no difference.
    The same texts and seed give the same files.

    Args:
        model: Folder that the model is written to; where it holds one of the same arguments, that one is used.
        architecture: ``gpt2`` learns a vector for each position, ``llama`` turns queries and keys by them.
        vocab_size: Most tokens of the byte-level vocabulary.
        width: Of the hidden states.
        num_layers: Transformer blocks.
        num_heads: Attention heads of a block.
        max_positions: Most tokens of a text.
        seed: Of the untrained weights.
        max_length: Most tokens of prompt and response together; default: ``max_positions``.
        max_prompt_length: Most tokens of a prompt; default: as many as leave room for one token of a response.
        append_eos: Whether a response is closed by the end token; not for responses cut out of a longer text.
    """

    def __init__(
        self,
        model: str,
        architecture: Literal["gpt2", "llama"] = "gpt2",
        vocab_size: int = 4096,
        width: int = 192,
        num_layers: int = 4,
        num_heads: int = 4,
        max_positions: int = 256,
        seed: int = 0,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        append_eos: bool = True,
    ) -> None:
        choose("architecture", architecture, ("gpt2", "llama"))
        super().__init__(model, max_length=max_length, max_prompt_length=max_prompt_length, append_eos=append_eos)
        self.architecture = architecture
        self.vocab_size, self.width, self.num_layers, self.num_heads = vocab_size, width, num_layers, num_heads
        self.max_positions, self.seed = max_positions, seed
        problems = Problems("FreshCausalLM.")
        problems.at_least(NUM_BYTES + 1, vocab_size=vocab_size)
        problems.at_least(1, width=width, num_layers=num_layers, num_heads=num_heads)
        problems.at_least(2, max_positions=max_positions)
        if not problems.found and width % (2 * num_heads):
            problems.add("width", f"a multiple of twice num_heads={num_heads}", width)
        problems.check()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the files depend on, besides the texts."""
        sizes = ("architecture", "vocab_size", "width", "num_layers", "num_heads", "max_positions", "seed")
        return {name: getattr(self, name) for name in sizes}

    @property
    def feature_dim(self) -> int:
        """Width D of the hidden states, known before the model exists."""
        return self.width

    def spec(self) -> dict[str, Any]:
        """The model as an ordinary `CausalLM` of its folder, which need not exist yet."""
        return CausalLM(
            str(Path(self.model).expanduser().absolute()),
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            append_eos=self.append_eos,
        ).spec()

    @cached_property
    def _folder(self) -> Path:
        """Folder of the model, which must exist by now."""
        folder = Path(self.model).expanduser()
        if not (folder / SETTINGS_FILE).is_file():
            raise ValueError(
                f"expected the model {self.model!r} to exist, got no {SETTINGS_FILE} there; it is written by the first "
                "run on its data, or by prepare(texts)"
            )
        return folder

    def prepare(self, texts: Iterable[str]) -> None:
        """Write the untrained model, with a tokenizer learned from the texts, unless it exists.

        Raises:
            ValueError: If the folder holds a model of other arguments, or something else.
        """
        folder = Path(self.model).expanduser()
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
            self._write(part, texts)
            try:
                replace(part, folder)
            except OSError:  # another process was faster, and wrote the same
                shutil.rmtree(part)
        file = folder / SETTINGS_FILE
        if not file.is_file():
            raise ValueError(
                f"expected a new folder for a fresh model, or one written by it, got {self.model!r}, which has no "
                f"{SETTINGS_FILE}; give data.backbone.init_args.model another name"
            )
        written = json.loads(file.read_text(encoding="utf-8"))
        differing = [
            f"{name}={written.get(name)!r}, not {value!r}"
            for name, value in self.settings.items()
            if written.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the model {self.model!r} was written with {', '.join(differing)}; correct the arguments of "
                "data.backbone, or give its model another folder"
            )

    def _write(self, folder: Path, texts: Iterable[str]) -> None:
        """Learn the tokenizer, draw the weights, save both."""
        from transformers import AutoModelForCausalLM

        tokenizer = self._learn_tokenizer(texts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            config = self._fresh_config(len(tokenizer), tokenizer.eos_token_id)
            network = AutoModelForCausalLM.from_config(config)
        network.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        write_text(folder / SETTINGS_FILE, json.dumps(self.settings, indent=1))

    def _learn_tokenizer(self, texts: Iterable[str]) -> Any:
        """Learn a byte-level BPE: it can write every text, and read it back."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END,
            eos_token=END,
            pad_token=END,
            model_max_length=self.max_positions,
            clean_up_tokenization_spaces=False,
        )

    def _fresh_config(self, vocab_size: int, end: int) -> Any:
        """Config of the network, whose output and input embeddings are one matrix."""
        from transformers import GPT2Config, LlamaConfig

        ends: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end}
        if self.architecture == "gpt2":
            return GPT2Config(
                vocab_size=vocab_size,
                n_embd=self.width,
                n_layer=self.num_layers,
                n_head=self.num_heads,
                n_positions=self.max_positions,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ends,
            )
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=True,
            **ends,
        )
