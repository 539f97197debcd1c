"""A file of cached features: what its bytes are as hashes of texts and as rows of features.

Axes: N texts, D feature width.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from plm.data.keys import DIGEST_BYTES, Digests

FeatureDtype = Literal["float32", "float16"]
"""Precisions in which features are kept."""
FeatureArray: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float16]


def as_digests(codes: npt.NDArray[np.uint8]) -> Digests:
    """Stored bytes ``(N, 16)`` as hashes ``(N,)``."""
    return np.ascontiguousarray(codes).view(f"S{DIGEST_BYTES}").reshape(-1)


def mapped_features(shard: Path) -> FeatureArray:
    """The features ``(n, D)`` of a shard, mapped into memory, not read; no file stays open, as with `numpy.memmap`."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))["features"]
    dtype = {"F32": torch.float32, "F16": torch.float16}[entry["dtype"]]
    start, end = ((8 + length + offset) // dtype.itemsize for offset in entry["data_offsets"])  # aligned to 8 bytes
    try:
        values: FeatureArray = torch.from_file(str(shard), shared=False, size=end, dtype=dtype).numpy()
    except RuntimeError as error:
        if f"({errno.ENOENT})" in str(error):  # another process has just removed it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(shard)) from error
        raise
    return values[start:].reshape(entry["shape"])


def checksum(codes: npt.NDArray[np.uint8], features: FeatureArray) -> str:
    """Checksum of a shard, against silent damage of the disk."""
    return str(zlib.crc32(np.ascontiguousarray(features).data.cast("B"), zlib.crc32(codes.tobytes())))
