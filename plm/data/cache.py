"""What lies in a folder of cached features, and how it is cleared beside processes that read and write there.

Every backbone has a folder, named by the hash of its manifest, with shards named by the hash of their texts: see
`plm.data.features`. A reader encodes anew what is gone, and a writer makes a shard in one step, so that shards may go
at any time; the manifest, a few bytes, stays, as another process may just look for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from plm.messages import nearest, plain

MANIFEST = "manifest.json"
"""File that says whose features a folder holds; its time is that of the last use."""
PARITY = "parity.json"
"""File beside it that says what servers have made features here, and how near theirs are to those of the backbone."""
PARITY_LOCK = ".parity.lock"
"""File that a process holds while it changes the former."""
_SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")


class CachedFeatures(NamedTuple):
    """The features of one backbone."""

    folder: Path
    model: str
    """Model, engine or name of the backbone."""
    name: str
    """The same and its pooling, where it has one."""
    num_texts: int
    feature_dim: int
    num_bytes: int
    last_use: float
    """Seconds since 1970."""


def folder_name(manifest: dict[str, Any]) -> str:
    """Name of the folder of a manifest: 16 digits of its hash."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def cached_features(directory: str | Path) -> list[CachedFeatures]:
    """What is cached below a folder, the largest first; what plm has not written is left out.

    Raises:
        ValueError: If there is no such folder.
    """
    place = Path(directory).expanduser()
    if not place.is_dir():
        raise ValueError(f"expected a folder of cached features, got {str(directory)!r}, which is none")
    found = [entry for folder in sorted(place.iterdir()) if (entry := _entry(folder)) is not None]
    return sorted(found, key=lambda entry: -entry.num_bytes)


def chosen(entries: Iterable[CachedFeatures], backbone: str | None, before: float) -> list[CachedFeatures]:
    """Those of a backbone, by its name or that of its folder, that were last used before a time.

    Raises:
        ValueError: If there is no such backbone.
    """
    entries = list(entries)
    if backbone is not None:
        names = [(entry.name, entry.model, entry.folder.name) for entry in entries]
        if not any(backbone in called for called in names):
            advice = nearest(backbone, {name for called in names for name in called})
            raise ValueError(f"no features of {backbone!r} are cached{advice} (plm cache lists them)")
        entries = [entry for entry, called in zip(entries, names, strict=True) if backbone in called]
    return [entry for entry in entries if entry.last_use < before]


def clear(entries: Iterable[CachedFeatures]) -> int:
    """Remove the shards of entries, and which servers have made some; returns the bytes that were freed."""
    num_bytes = 0
    for entry in entries:
        for note in (PARITY, PARITY_LOCK):
            with suppress(PermissionError):  # a process is about to write it
                (entry.folder / note).unlink(missing_ok=True)
        for shard in _shards(entry.folder):
            size = _size(shard)
            with suppress(PermissionError):  # Windows keeps files that are mapped
                shard.unlink(missing_ok=True)
                num_bytes += size
    return num_bytes


def _entry(folder: Path) -> CachedFeatures | None:
    """The features in a folder; None where it is not ours or holds none."""
    manifest = folder / MANIFEST
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        if folder.is_symlink() or not isinstance(stored, dict) or folder.name != folder_name(stored):
            return None
        key, feature_dim, last_use = stored["key"], int(stored["feature_dim"]), manifest.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    shards = _shards(folder)
    num_texts, num_bytes = sum(map(_num_texts, shards)), sum(map(_size, shards))
    return CachedFeatures(folder, *_names(key), num_texts, feature_dim, num_bytes, last_use) if shards else None


def _shards(folder: Path) -> list[Path]:
    """Files that `plm.data.features` has written; no links, no parts of files."""
    files = folder.iterdir()
    return sorted(file for file in files if _SHARD.fullmatch(file.name) and file.is_file() and not file.is_symlink())


def _size(shard: Path) -> int:
    """Bytes of a shard; 0 where another process has just removed it."""
    try:
        return shard.stat().st_size
    except FileNotFoundError:
        return 0


def _num_texts(shard: Path) -> int:
    """Texts of a shard, by its head alone; 0 where it is damaged."""
    try:
        with safe_open(shard, framework="numpy") as file:
            return int(file.get_slice("digests").get_shape()[0])
    except (OSError, SafetensorError):
        return 0


def _names(key: Any) -> tuple[str, str]:
    """What a backbone is called, without its pooling and with it."""
    parts = key if isinstance(key, dict) else {"name": key}
    model = plain(str(next((parts[name] for name in ("model", "name", "engine") if parts.get(name)), "?")))
    return model, plain(f"{model} {parts['pooling']}") if parts.get("pooling") else model
