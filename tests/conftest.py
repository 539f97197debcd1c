from __future__ import annotations

import os

# The tests are made of tiny problems: a second thread only waits, and on a busy machine it makes them ten times slower.
# Libraries read this when they are loaded, and so do the processes that tests start.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plm.methods.clap import CLaP
from plm.testing import tiny_causal_lm


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Fits of several processes leave their group behind, which the next test that makes one would find."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random language model of one of ``KINDS``, whose tokens are printable characters."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            write_causal_lm(kind, folders[kind])
        return folders[kind]

    return folder


WINDOW = 16
"""What layers of some ``KINDS`` look at, in tokens."""
_HEADS = {"head_dim": 8}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_HEADS, **_MIXED, "query_pre_attn_scalar": 8}
_EXPERTS = {**_HEADS, "num_experts_per_tok": 2}
_VISION = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_IMAGES = {"mm_tokens_per_image": 4, "boi_token_index": 95, "eoi_token_index": 96, "image_token_index": 97}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", _HEADS),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "gpt_oss": ("GptOssConfig", {**_EXPERTS, **_MIXED, "num_local_experts": 4, "rope_parameters": None}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "final_logit_softcapping": None}),
    "gemma3_text": ("Gemma3TextConfig", _GEMMA),
    "gemma3": ("Gemma3Config", _GEMMA),
    "llama4": (
        "Llama4TextConfig",
        {
            **_HEADS,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
}
"""Config class and what differs from `write_causal_lm`'s sizes; ``gpt2`` is another one."""


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
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    name, more = KINDS[kind]
    text = {**size, **layers, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, **more}
    if kind == "gemma3":
        vision = {"hidden_size": 16, "intermediate_size": 32, **_VISION}
        text = {"text_config": text, "vision_config": vision, "initializer_range": 0.2, **_IMAGES}
    config = getattr(transformers, name)(**text)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


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


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own, reached by a socket: its URL, with ``{}`` where the name of a database stands."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'plm[postgres]'")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb") or next((str(folder / "initdb") for folder in binaries[::-1]), None)
    if found is None:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    as_user = []
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # not below tmp_path: a socket's path is short
    if os.getuid() == 0:  # the server refuses to run as root
        if shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("a PostgreSQL server does not run as root, and there is no account postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    bin_folder, data = Path(found).parent, folder / "data"

    def call(*command: str | Path) -> None:
        subprocess.run([*as_user, *map(str, command)], check=True, capture_output=True, cwd="/")

    call(bin_folder / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
    options = f"-k {folder} -c listen_addresses= -c max_connections=200"
    call(bin_folder / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
    yield f"postgresql+psycopg://postgres@/{{}}?host={folder}"
    call(bin_folder / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """The URL of a new database of that server."""
    import sqlalchemy as sa

    name = f"users_{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres.format("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield postgres.format(name)
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()
