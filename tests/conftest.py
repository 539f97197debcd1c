from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plm.methods.clap import CLaP
from plm.testing import tiny_causal_lm

# The tests are made of tiny problems: a second thread only waits, and on a busy machine it makes them ten times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random language model of one kind, gpt2 or llama, whose tokens are printable characters."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            write_causal_lm(kind, folders[kind])
        return folders[kind]

    return folder


def write_causal_lm(kind: str, folder: Path) -> None:
    import tokenizers
    import transformers

    characters = ["<pad>", "<s>", "</s>", *map(chr, range(32, 127))]
    vocabulary = {character: row for row, character in enumerate(characters)}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    words.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    size = {"vocab_size": len(characters), "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **size)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        return
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **size,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def steered() -> Callable[[int], CLaP]:
    """A CLaP model of a latent width, whose latents vary with the prompt and change what is written."""

    def make(width: int) -> CLaP:
        method = CLaP(1, 16, tiny_causal_lm().spec(), latent_dim=width, num_queries=2, encoder_layers=1)
        method.configure_model()
        torch.manual_seed(0)
        torch.nn.init.normal_(method.encoder.head.weight, std=0.5)
        for norm in method.adapter.maker.norms:
            torch.nn.init.normal_(norm.weight, std=3000.0)  # type: ignore[arg-type]
        return method

    return make
