"""States of users as bytes, one safetensors file per user: written and read many at a time.

All users of a method have the same names, types and shapes, so the header is the same for all and made once.

Axes: U users, N bytes of one user's tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import safetensors.torch
import torch
from torch import Tensor


def header_of(tensors: dict[str, Tensor]) -> bytes:
    """The header that every user's bytes begin with: names, types and shapes of tensors ``(U, ...)``."""
    example = safetensors.torch.save({name: value.new_zeros(value.shape[1:]) for name, value in tensors.items()})
    return example[: _header_length(example)]


def to_rows(tensors: dict[str, Tensor], num_users: int) -> list[bytes]:
    """Tensors ``(U, ...)`` on the CPU -> the bytes of each user."""
    header = header_of(tensors)
    places = {name: entry["data_offsets"][0] for name, entry in json.loads(header[8:]).items() if tensors}
    parts = [
        tensors[name].detach().contiguous().reshape(num_users, tensors[name][0:1].numel()).view(torch.uint8)
        for name in sorted(places, key=places.__getitem__)
        if num_users and tensors[name].numel()
    ]
    if not parts:
        return [header] * num_users
    return [header + row.tobytes() for row in torch.cat(parts, dim=1).numpy()]


def from_rows(rows: Sequence[bytes]) -> dict[str, Tensor]:
    """The bytes of U users, at least one -> tensors ``(U, ...)``.

    Raises:
        ValueError: If the bytes are damaged, or of states of different layouts.
    """
    try:
        example = safetensors.torch.load(rows[0])
    except safetensors.SafetensorError as error:
        raise ValueError(f"expected the state of a user as safetensors, got {error}; adapt the user anew") from error
    start = _header_length(rows[0])
    if any(len(row) != len(rows[0]) or row[:start] != rows[0][:start] for row in rows):
        raise ValueError("expected the states of one method, got rows of different layouts")
    entries = {name: entry["data_offsets"] for name, entry in json.loads(rows[0][8:start]).items() if example}
    data = torch.frombuffer(bytearray(b"".join(row[start:] for row in rows)) or bytearray(1), dtype=torch.uint8)
    table = data[: len(rows) * (len(rows[0]) - start)].reshape(len(rows), len(rows[0]) - start)
    return {
        name: table[:, first:last].reshape(-1).view(example[name].dtype).reshape(len(rows), *example[name].shape)
        for name, (first, last) in entries.items()
    }


def _header_length(row: bytes) -> int:
    """Bytes before the first tensor."""
    return 8 + int.from_bytes(row[:8], "little")
