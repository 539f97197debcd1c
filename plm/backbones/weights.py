"""Facts read from the files of a model without loading it: a hash of their content, their size, a reward head."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
SAMPLED_ABOVE = 256 * 2**20
"""Safetensors files above this many bytes are hashed by a sample of every tensor."""
SAMPLE_BYTES = 4096
MODEL_FILES = ("config.json", "*token*", "vocab*", "merges.txt", "*.model", "chat_template*", "*.safetensors")


def content_hash(folder: Path) -> str:
    """Hash over the config, the tokenizer and the weights of a model's folder.

    Small files are read whole. Of a large safetensors file the header and the beginning of every tensor are: a model
    trained further differs there, and reading tens of gigabytes at every start would take longer than the run.
    """
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    if not any(file.suffix == ".safetensors" for file in files):
        files += sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        for block in _content_blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _content_blocks(file: Path) -> Iterator[bytes]:
    """The bytes of a file; of a large safetensors file its header and the beginning of every tensor."""
    with file.open("rb") as handle:
        if file.suffix != ".safetensors" or file.stat().st_size <= SAMPLED_ABOVE:
            while block := handle.read(2**20):
                yield block
            return
        size = int.from_bytes(handle.read(8), "little")
        header = handle.read(size)
        yield header
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                handle.seek(8 + size + entry["data_offsets"][0])
                yield handle.read(min(SAMPLE_BYTES, entry["data_offsets"][1] - entry["data_offsets"][0]))


def num_weights(find: Callable[[str], str | None]) -> int | None:
    """How many numbers the safetensors files of a model hold, by their headers; None where one is missing.

    Args:
        find: As of `score_weight`.
    """
    total = 0
    for name in sorted({*_files_of_tensors(find).values()} or {WEIGHTS}):
        file = find(name)
        if file is None:
            return None
        with Path(file).open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
        total += sum(math.prod(entry["shape"]) for tensor, entry in header.items() if tensor != "__metadata__")
    return total


def _files_of_tensors(find: Callable[[str], str | None]) -> dict[str, str]:
    """Tensor -> name of its file; empty where all are in one."""
    index = find(f"{WEIGHTS}.index.json")
    return dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]) if index else {}


def score_weight(find: Callable[[str], str | None]) -> Tensor | None:
    """``(D,)`` the only row of ``score.weight``, read without the other weights.

    Args:
        find: File name -> path of that file of the model, None if the model has no such file.

    Returns:
        The row, or None if no safetensors file holds it or it is not the only one.
    """
    file = find(_files_of_tensors(find).get("score.weight", WEIGHTS))
    if file is None:
        return None
    with safe_open(file, framework="pt") as tensors:
        if "score.weight" not in tensors.keys():
            return None
        weight: Tensor = tensors.get_tensor("score.weight")
    return weight[0] if weight.shape[0] == 1 else None
