"""FeatureCache: each distinct text is encoded once per backbone, ever.

Axes: I pairs of (prompt, response), N distinct texts, D feature width.

A backbone's features live in a folder named by the hash of its key: ``manifest.json`` and shards, each a safetensors
file of text hashes and feature rows under a checksum. A shard is written to a temporary name and renamed, so it is
whole or absent: a killed run goes on after its last one, and processes that share the folder cannot harm each other.
A shard is never written again, so that features may be read from where it is mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from plm.arrays import Float32Array, IntArray
from plm.atomic import only_writer, whole_file, write_json, write_text
from plm.backbones import Backbone, RemoteEncoder
from plm.data.cache import MANIFEST, PARITY, PARITY_LOCK, folder_name
from plm.data.keys import (
    DIGEST_BYTES,
    Digests,
    found_digests,
    in_share,
    leading_keys,
    position_in_run,
    text_digests,
)
from plm.data.shards import FeatureArray, FeatureDtype, as_digests, checksum, mapped_features

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Take: TypeAlias = Callable[[IntArray, FeatureArray, IntArray], None]
    """Is given rows ``(n,)``, the features ``(m, D)`` of their shard, and their rows there ``(n,)``."""
    Engine: TypeAlias = Callable[["FeatureCache", list[str]], Iterator[int]]
    """Has rendered texts encoded, and gives how many are done, time and again."""

FORMAT = 1
SHARD_SECONDS = 10.0
"""How long encoding a shard should take: what a killed run loses."""
SHARD_TEXTS = (64, 8192)
"""Fewest and most texts of a shard; enough of them to sort into batches of similar length."""
READ_AT_ONCE = 8
"""Shards that are read and checked side by side."""
HALF_LOSS = 1e-3
"""Share of their length that features may lose to half precision; its 11 digits lose about 3e-4."""
QUIET_TEXTS = 256
"""Up to this many texts are encoded without a progress bar."""
PARITY_WAIT = 60.0
"""Seconds that a process waits for another to note how near a server's features are."""
LINE_SECONDS = 30.0
"""How often a line tells the progress where no terminal shows a bar."""


class MappedFeatures(NamedTuple):
    """Features of I pairs in files that are mapped into memory."""

    shards: list[FeatureArray]
    """``(n, D)`` each."""
    place: NDArray[np.int32]
    """``(I, 2)`` the shard of each pair and its row there."""


class Filled(NamedTuple):
    """What `FeatureCache.fill` found and did."""

    folder: Path
    num_texts: int
    """Distinct texts of all pairs."""
    num_of_share: int
    """Those of them that belong to the share."""
    num_encoded: int
    """Those of the share that were not cached."""


class FeatureCache:
    """Features of (prompt, response) pairs, encoded where no run has encoded them before and read from disk elsewhere.

    Args:
        backbone: What turns texts into features.
        directory: Folder that may hold the caches of many backbones.
        server: What encodes instead, once it has shown that its features are those of the backbone; the cache keeps
            beside its manifest how near they are.
        dtype: Precision in which features are kept; each has a folder of its own.

    Raises:
        ValueError: If the folder cannot be written, or holds the features of another backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        directory: str | Path,
        server: RemoteEncoder | None = None,
        dtype: FeatureDtype = "float32",
    ) -> None:
        self.backbone, self.server, self.dtype = backbone, server, dtype
        identity = {"format": FORMAT, "key": backbone.key(), "feature_dim": backbone.feature_dim}
        identity |= {} if dtype == "float32" else {"dtype": dtype}
        self.folder = Path(directory).expanduser() / folder_name(identity)
        _claim(self.folder, identity)
        self._shards: dict[Path, Digests] = {}

    def features(self, pairs: Sequence[tuple[str, str]], progress: bool = True) -> Tensor:
        """Features of pairs, in their order; a text that repeats, here or in an earlier call, is not encoded again.

        Args:
            pairs: I times (prompt, response); the prompt may be a JSON list of chat messages.
            progress: Whether to show a progress bar, if many texts have to be encoded; a line now and then where no
                terminal shows a bar.

        Returns:
            ``(I, D)`` float32, held in memory.

        Raises:
            ValueError: If the backbone gives features of another shape or values that are not finite, or a server fails
                or gives other features than the backbone.
        """
        texts, row = self._distinct(pairs)
        digests = text_digests(texts)
        out = np.empty((len(texts), self.backbone.feature_dim), dtype=np.float32)

        def take(rows: IntArray, features: FeatureArray, at: IntArray) -> None:
            out[rows] = features[at]

        missing = self._read(digests, take)
        if len(missing):
            self._encode(texts, digests, missing, out, progress)
        return torch.from_numpy(out if len(texts) == len(row) else out[row])

    def mapped(self, pairs: Sequence[tuple[str, str]]) -> MappedFeatures:
        """Features of pairs as `features` gives them, which stay on the disk: nothing is held but where they are.

        Args:
            pairs: As of `features`.

        Raises:
            ValueError: As `features`.
        """
        texts, row = self._distinct(pairs)
        digests = text_digests(texts)
        shards: list[FeatureArray] = []
        place = np.zeros((len(texts), 2), dtype=np.int32)
        missing = np.arange(len(texts))

        def take(rows: IntArray, features: FeatureArray, at: IntArray) -> None:
            place[missing[rows]] = np.stack([np.full(len(at), len(shards)), at], 1)
            shards.append(features)

        while len(missing := missing[self._read(digests[missing], take)]):
            self._encode(texts, digests, missing, None, progress=True)
        return MappedFeatures(shards, place if len(texts) == len(row) else place[row])

    def fill(
        self, pairs: Sequence[tuple[str, str]], share: tuple[int, int] = (1, 1), engine: Engine | None = None
    ) -> Filled:
        """Encode the texts of pairs that are not cached; no features are held in memory.

        Args:
            pairs: As of `features`.
            share: ``(i, n)``, only the texts whose hash falls into the i-th of n equal ranges: whatever other texts
                there are, a text belongs to the same share.
            engine: What has other processes encode texts into this cache; None = they are encoded here.

        Raises:
            ValueError: As `features`, or if the other processes have not filled this cache, or there is a server, too.
        """
        if engine is not None and self.server is not None:
            raise ValueError("expected a server or other processes that encode, got both")
        texts, _ = self._distinct(pairs)
        digests = text_digests(texts)
        rows = np.flatnonzero(in_share(leading_keys(digests), share))
        missing = rows[self._read(digests[rows], lambda *_: None)]
        if len(missing):
            self._encode(texts, digests, missing, None, True, engine)
        if engine is not None and (num_left := len(self._read(digests[missing], lambda *_: None))):
            raise ValueError(
                f"expected {len(missing)} texts to be in {str(self.folder)!r} by now, {num_left} are not: who encodes "
                "must see that folder and read the same model"
            )
        return Filled(self.folder, len(texts), len(rows), len(missing))

    def count(self, pairs: Sequence[tuple[str, str]]) -> tuple[int, int]:
        """How many distinct texts pairs have, and how many of them are not cached."""
        texts, _ = self._distinct(pairs)
        return len(texts), len(self._read(text_digests(texts), lambda *_: None))

    def _distinct(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[str], IntArray]:
        """The distinct rendered texts of pairs, and the one of each pair."""
        rendered = list(starmap(self.backbone.render, pairs))
        if len(set(rendered)) == len(rendered):  # most often: a set is three times as fast as a dictionary
            return rendered, np.arange(len(rendered))
        number = {text: row for row, text in enumerate(dict.fromkeys(rendered))}
        return list(number), np.array([number[text] for text in rendered], dtype=np.int64)

    def _read(self, digests: Digests, take: _Take) -> IntArray:
        """Hand rows of ``digests`` that are cached and whole to ``take``, a shard at a time; return others ``(M,)``."""
        self._refresh()
        missing = np.ones(len(digests), dtype=bool)
        if self._shards and len(digests):
            shards = list(self._shards)
            stored = np.concatenate(list(self._shards.values()))
            shard_of = np.repeat(np.arange(len(shards)), [len(self._shards[shard]) for shard in shards])
            row_of = position_in_run(shard_of)
            found = found_digests(stored, digests)
            hits = np.flatnonzero(stored[found] == digests)
            hits = hits[np.argsort(shard_of[found[hits]], kind="stable")]
            bounds = np.flatnonzero(np.diff(shard_of[found[hits]])) + 1
            parts = [rows for rows in np.split(hits, bounds) if len(rows)]
            with ThreadPoolExecutor(READ_AT_ONCE) as threads:  # checksums are taken side by side
                for start in range(0, len(parts), READ_AT_ONCE):
                    some = parts[start : start + READ_AT_ONCE]
                    loaded = threads.map(self._load, [shards[shard_of[found[rows[0]]]] for rows in some])
                    for rows, features in zip(some, loaded, strict=True):
                        if features is not None:
                            missing[rows] = False
                            take(rows, features, row_of[found[rows]])
        return np.flatnonzero(missing)

    def _refresh(self) -> None:
        """Read the text hashes of the shards that came since the last call, from whatever process."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self._shards:
                try:
                    with safe_open(shard, framework="numpy") as file:
                        self._shards[shard] = as_digests(file.get_tensor("digests"))
                except FileNotFoundError:
                    continue  # another process found it damaged
                except (SafetensorError, ValueError) as error:
                    self._drop(shard, error)

    def _load(self, shard: Path) -> FeatureArray | None:
        """Features of a shard ``(n, D)``, mapped into memory; None if it is gone or damaged."""
        try:
            with safe_open(shard, framework="numpy") as file:  # it checks what stands where
                features = mapped_features(shard)
                if checksum(file.get_tensor("digests"), features) != (file.metadata() or {}).get("checksum"):
                    raise ValueError("its checksum differs")
        except FileNotFoundError:
            self._shards.pop(shard)
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            self._drop(shard, error)
            return None
        return features

    def _drop(self, shard: Path, error: Exception) -> None:
        """Forget a damaged shard."""
        warnings.warn(f"{str(shard)!r} is damaged ({error}): removed, its texts are encoded again", stacklevel=2)
        self._shards.pop(shard, None)
        with suppress(PermissionError):  # Windows keeps files that are mapped
            shard.unlink(missing_ok=True)

    def encode(self, texts: list[str]) -> int:
        """Encode those of rendered texts that are not cached; returns how many.

        Raises:
            ValueError: As `features`.
        """
        digests = text_digests(texts)
        missing = self._read(digests, lambda *_: None)
        if len(missing):
            self._encode(texts, digests, missing, None, progress=False)
        return len(missing)

    def __reduce__(self) -> tuple[Callable[..., FeatureCache], tuple[object, ...]]:
        """Another process makes the backbone anew, and its key from the files that are there."""
        return _rebuilt, (self.backbone.spec(), str(self.folder.parent.absolute()), self.dtype)

    def _encode(
        self,
        texts: list[str],
        digests: Digests,
        missing: IntArray,
        out: Float32Array | None,
        progress: bool,
        engine: Engine | None = None,
    ) -> None:
        """Encode the missing texts, into ``out`` if there is one, and tell the progress."""
        console = Console(stderr=True)
        watched = console.is_terminal or console.is_jupyter
        hidden = not (progress and watched and len(missing) > QUIET_TEXTS)
        lines = _Lines(console, len(missing)) if progress and not watched else None
        columns = (TextColumn("Encoding texts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        missing = np.array(sorted(missing, key=lambda row: -len(texts[row])))  # what is in a shard is of similar length
        steps = (
            self._by_shards(texts, digests, missing, out)
            if engine is None
            else engine(self, [texts[row] for row in missing])
        )
        with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
            task = bar.add_task("", total=len(missing))
            num_done = 0
            for count in steps:
                num_done += count
                bar.advance(task, count)
                if lines is not None:
                    lines.show(num_done)

    def _by_shards(
        self, texts: list[str], digests: Digests, missing: IntArray, out: Float32Array | None
    ) -> Iterator[int]:
        """Encode shard by shard, each of about ``SHARD_SECONDS``; gives how many texts it holds."""
        encoder = self.backbone if self.server is None else self._agreeing(self.server)
        start, size = 0, SHARD_TEXTS[0]
        while start < len(missing):
            rows = missing[start : start + size]
            began = time.monotonic()
            features = encoder.encode([texts[row] for row in rows]).detach().to("cpu", torch.float32).numpy()
            rate = len(rows) / max(time.monotonic() - began, 1e-9)
            self._check(features, [texts[row] for row in rows])
            kept = self._rounded(features)
            self._write(digests[rows], kept)
            if out is not None:
                out[rows] = kept
            start, size = start + len(rows), int(np.clip(rate * SHARD_SECONDS, *SHARD_TEXTS))
            yield len(rows)

    def _agreeing(self, server: RemoteEncoder) -> RemoteEncoder:
        """The server, after its features and the backbone's have been compared and the comparison is written down."""
        found = server.agreement
        measured = {"checked": False} if found is None else {"checked": True, **found._asdict()}
        path, name = self.folder / PARITY, f"{server.model} at {server.url}"
        busy = f"{str(path)!r} has been written by another process for {PARITY_WAIT:g} s; try again"
        with only_writer(self.folder / PARITY_LOCK, busy, PARITY_WAIT):  # what others measure meanwhile stays, too
            before = json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
            if before is None or before["checked"]:  # features that nobody has compared stay in the cache
                write_json(path, {name: measured}, merge=True)
        return server

    def _check(self, features: Float32Array, texts: list[str]) -> None:
        """Refuse features of a wrong shape or that are not finite."""
        expected = (len(texts), self.backbone.feature_dim)
        name = type(self.backbone).__name__
        if features.shape != expected:
            raise ValueError(f"expected features of shape {expected} from {name}.encode, got {features.shape}")
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise ValueError(
                f"expected finite features from {name}, got nan or inf for {len(bad)} of {len(texts)} texts, the first "
                f"{texts[bad[0]]!r:.80}; float16 overflows in some models: set dtype to 'bfloat16' or 'float32'"
            )

    def _rounded(self, features: Float32Array) -> FeatureArray:
        """Features as they are kept; refuses what half precision loses, by its range rather than its digits."""
        if self.dtype == "float32":
            return np.ascontiguousarray(features)
        with np.errstate(over="ignore"):
            kept = np.ascontiguousarray(features, dtype=self.dtype)
        lost = float(np.linalg.norm((kept - features).ravel()))
        if not lost <= HALF_LOSS * float(np.linalg.norm(features.ravel())):
            least, most = (float(bound) for bound in np.quantile(np.abs(features), (0.5, 1)))
            raise ValueError(
                f"data.feature_dtype: expected features between 6e-5 and 65504 for float16, got {least:.1e} in the "
                f"middle and {most:.1e} at most; set it to float32"
            )
        return kept

    def _write(self, digests: Digests, features: FeatureArray) -> None:
        """Write a shard in one step; its name is the hash of its texts."""
        codes = digests.view(np.uint8).reshape(-1, DIGEST_BYTES)
        shard = self.folder / f"{hashlib.blake2b(codes.tobytes(), digest_size=16).hexdigest()}.safetensors"
        tensors: dict[str, NDArray[Any]] = {"digests": codes, "features": features}
        with whole_file(shard) as file:
            file.write(save(tensors, metadata={"checksum": checksum(codes, features)}))
        self._shards[shard] = digests


def _rebuilt(spec: dict[str, Any], directory: str, dtype: FeatureDtype) -> FeatureCache:
    """A cache in another process than the one it came from."""
    return FeatureCache(Backbone.from_spec(spec), directory, dtype=dtype)


class _Lines:
    """Tells in a line at most every `LINE_SECONDS` how many of the texts are encoded, and how long the others take."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._start = self._last = time.monotonic()

    def show(self, done: int) -> None:
        """Print a line, unless the last one is recent or nothing is left."""
        now = time.monotonic()
        if now - self._last < LINE_SECONDS or done == self._total:
            return
        self._last = now
        left = (now - self._start) * (self._total - done) / done
        text = f"encoding texts: {done:,} of {self._total:,}, about {max(1, round(left / 60)):,} min left"
        self._console.print(text, highlight=False, soft_wrap=True)


def _claim(folder: Path, identity: dict[str, object]) -> None:
    """Create the folder of a backbone's features, or check that it is the backbone's."""
    manifest = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            write_text(manifest, json.dumps(identity, indent=2, sort_keys=True))
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        with suppress(OSError):  # it is another user's, who shares the cache
            os.utime(manifest)  # the last use
    except OSError as error:
        raise ValueError(f"expected a folder for features that can be written, got {str(folder)!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"expected {str(manifest)!r} to be JSON, got {error}; delete {str(folder)!r}") from error
    if stored != json.loads(json.dumps(identity)):
        old, new = _flat(stored), _flat(identity)
        differences = [
            f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        raise ValueError(
            f"expected the features of this backbone in {str(folder)!r}, got those of another "
            f"({'; '.join(differences)}); delete that folder or choose another directory"
        )


def _flat(identity: object) -> dict[str, object]:
    """The entries of a manifest and of its key side by side."""
    entries = dict(identity) if isinstance(identity, dict) else {"manifest": identity}
    key = entries.pop("key", None)
    return {**entries, **key} if isinstance(key, dict) else {**entries, "key": key}
