from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from plm.arrays import Float32Array, IntArray
from plm.backbones import Backbone, HashingBackbone
from plm.data import features as module
from plm.data.features import FeatureCache, MappedFeatures
from plm.data.keys import found_digests
from plm.data.rows import MappedRows

FAKE = '''
import hashlib, time, torch
from plm.backbones import Backbone

class Fake(Backbone):
    """Features are the bytes of the text's hash, so any process can derive them."""
    def __init__(self, seconds=0.0, name="fake"):
        self.seconds, self.name, self.encoded = seconds, name, []
    feature_dim = 16
    def key(self): return {"name": self.name, "layer": -1}
    def render(self, prompt, response): return prompt + "|" + response
    def encode(self, texts):
        time.sleep(self.seconds * len(texts))
        self.encoded += texts
        return torch.stack([self.truth(text) for text in texts])
    @staticmethod
    def truth(text): return torch.tensor(list(hashlib.md5(text.encode()).digest()), dtype=torch.float32)
'''
space: dict[str, type] = {}
exec(FAKE, space)  # the same source runs in the processes below
Fake = space["Fake"]

PAIRS = [(f"prompt {index % 3}", f"response {index}") for index in range(200)]
TEXTS = ["|".join(pair) for pair in PAIRS]
TRUTH = torch.stack([Fake.truth(text) for text in TEXTS])


def shards(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


def texts_in(shard: Path) -> int:
    with safe_open(shard, framework="pt") as file:
        return len(file.get_tensor("digests"))


def test_features_come_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    features = FeatureCache(Fake(), tmp_path).features(PAIRS)
    assert features.dtype == torch.float32
    assert torch.equal(features, TRUTH)


def test_a_repeated_text_costs_nothing(tmp_path: Path) -> None:
    backbone = Fake()
    cache = FeatureCache(backbone, tmp_path)
    twice = cache.features(PAIRS[:5] + PAIRS[:5])
    assert torch.equal(twice, torch.cat([TRUTH[:5], TRUTH[:5]]))
    assert sorted(backbone.encoded) == sorted(TEXTS[:5])
    assert torch.equal(cache.features(PAIRS[3:8]), TRUTH[3:8])
    assert sorted(backbone.encoded) == sorted(TEXTS[:8])
    again = Fake()
    assert torch.equal(FeatureCache(again, tmp_path).features(PAIRS[7::-1]), TRUTH[:8].flip(0))
    assert again.encoded == []


def test_the_prompt_counts_only_where_it_is_rendered(tmp_path: Path) -> None:
    backbone = HashingBackbone(dim=32)
    features = FeatureCache(backbone, tmp_path).features([("a", "tea"), ("b", "tea"), ("b", "milk")])
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[[0, 2]], backbone.encode(["tea", "milk"]))


def test_no_pairs(tmp_path: Path) -> None:
    cache = FeatureCache(Fake(), tmp_path)
    assert cache.features([]).shape == (0, 16)
    cache.features(PAIRS[:2])
    assert cache.features([]).shape == (0, 16)


def test_shards_take_about_the_time_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TEXTS", (5, 1000))
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.2)
    cache = FeatureCache(Fake(seconds=0.004), tmp_path)
    cache.features(PAIRS)
    sizes = sorted(texts_in(shard) for shard in shards(cache))
    assert sum(sizes) == 200 and sizes[0] <= 5
    assert 5 < sizes[-1] <= 50
    monkeypatch.setattr(module, "SHARD_SECONDS", 100.0)
    cache = FeatureCache(Fake(name="fast"), tmp_path)
    cache.features(PAIRS)
    assert sorted(texts_in(shard) for shard in shards(cache)) == [5, 195]


def test_every_backbone_has_its_own_folder(tmp_path: Path) -> None:
    one, two = FeatureCache(Fake(), tmp_path), FeatureCache(Fake(name="other"), tmp_path)
    one.features(PAIRS[:3])
    assert one.folder != two.folder
    two.features(PAIRS[:3])
    assert len(two.backbone.encoded) == 3  # type: ignore[attr-defined]
    manifest = json.loads((one.folder / "manifest.json").read_text())
    assert manifest == {"format": 1, "key": {"name": "fake", "layer": -1}, "feature_dim": 16}


def test_the_cache_of_another_encoder_is_refused(tmp_path: Path) -> None:
    one, two = FeatureCache(Fake(), tmp_path), FeatureCache(Fake(name="other"), tmp_path)
    (one.folder / "manifest.json").replace(two.folder / "manifest.json")
    with pytest.raises(ValueError, match=r"got those of another \(name: 'fake' there, 'other' here\); delete"):
        FeatureCache(Fake(name="other"), tmp_path)
    (two.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json' to be JSON"):
        FeatureCache(Fake(name="other"), tmp_path)
    (two.folder / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="got those of another"):
        FeatureCache(Fake(name="other"), tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder for features that can be written"):
        FeatureCache(Fake(), tmp_path / "file")


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_a_damaged_shard_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(module, "SHARD_TEXTS", (50, 50))
    FeatureCache(Fake(), tmp_path).features(PAIRS)
    backbone = Fake()
    cache = FeatureCache(backbone, tmp_path)
    victim = shards(cache)[1]
    content = bytearray(victim.read_bytes())
    content[-5] ^= 64
    damaged = {
        "empty": b"",
        "truncated": bytes(content[:-100]),
        "flipped": bytes(content),
        "foreign": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    }
    victim.write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match="is damaged .*its texts are encoded again"):
        assert torch.equal(cache.features(PAIRS), TRUTH)
    assert len(backbone.encoded) == 50
    assert len(shards(cache)) == 4
    assert torch.equal(FeatureCache(Fake(), tmp_path).features(PAIRS), TRUTH)


def test_a_shard_that_another_process_removed(tmp_path: Path) -> None:
    cache = FeatureCache(Fake(), tmp_path)
    cache.features(PAIRS)
    for shard in shards(cache):
        shard.unlink()
    assert torch.equal(cache.features(PAIRS), TRUTH)


def test_a_shard_that_another_process_removes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its head is read, after it, before its features are mapped, and after."""
    opened, mapped = module.safe_open, torch.from_file
    monkeypatch.setattr(module, "SHARD_TEXTS", (100, 100))
    FeatureCache(Fake(), tmp_path).features(PAIRS)

    def removed(call: Any, after: bool) -> Any:
        def wrapper(path: str | Path, *args: Any, **options: Any) -> Any:
            found = call(path, *args, **options) if after else None
            Path(path).unlink(missing_ok=True)
            return found if after else call(path, *args, **options)

        return wrapper

    moments = [("safe_open", opened, False), ("safe_open", opened, True)]
    moments += [("from_file", mapped, False), ("from_file", mapped, True)]
    for name, call, after in moments:
        cache = FeatureCache(backbone := Fake(), tmp_path)
        assert cache.fill(PAIRS).num_encoded in (0, 200)
        backbone.encoded.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch if name == "from_file" else module, name, removed(call, after))
            assert torch.equal(cache.features(PAIRS), TRUTH)
        assert len(backbone.encoded) == (0 if (name, after) == ("from_file", True) else 200)


def test_text_hashes_that_end_in_zero_are_kept_apart(tmp_path: Path) -> None:
    cache = FeatureCache(Fake(), tmp_path)
    codes = [b"\1" + bytes(15), b"\1\0\1" + bytes(13), bytes(16), bytes(15) + b"\1"]
    digests = np.frombuffer(b"".join(codes), dtype="S16")
    cache._write(digests, TRUTH[:4].numpy())
    asked = np.frombuffer(b"".join([bytes(14) + b"\1\0", *codes[::-1]]), dtype="S16")
    out = np.zeros((5, 16), dtype=np.float32)
    for reader in (cache, FeatureCache(Fake(), tmp_path)):

        def take(rows: IntArray, features: Float32Array, at: IntArray) -> None:
            out[rows] = features[at]

        assert reader._read(asked, take).tolist() == [0]
        assert torch.equal(torch.from_numpy(out[1:]), TRUTH[:4].flip(0))


@pytest.mark.parametrize("num_ways", [1, 2, 5])
def test_text_hashes_that_begin_alike_are_kept_apart(num_ways: int) -> None:
    """Against a dictionary; all orders, hashes twice, and some that are nowhere before, among and after the others."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        codes = draw.integers(1, 4, (12, 16), dtype=np.uint8)
        codes[:, :8] = draw.integers(0, num_ways, (12, 1))
        every = np.unique(codes, axis=0)
        every = np.ascontiguousarray(every[draw.permutation(len(every))]).view("S16").reshape(-1)
        stored = every[: draw.integers(1, len(every) + 1)]
        stored = stored[draw.integers(len(stored), size=20)]
        place = {code: row for row, code in reversed(list(enumerate(stored.tolist())))}  # the first of equals
        found = found_digests(stored, every)
        for code, row in zip(every.tolist(), found.tolist(), strict=True):
            assert row == place[code] if code in place else stored[row] != code


class Bad(HashingBackbone):
    def __init__(self, value: float, width: int) -> None:
        super().__init__(dim=4)
        self.value, self.width = value, width

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.full((len(texts), self.width), self.value)


def test_features_that_must_not_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nan or inf for 2 of 2 texts, the first 'milk'.*'bfloat16'"):
        FeatureCache(Bad(float("nan"), 4), tmp_path).features([("", "tea"), ("", "milk")])
    with pytest.raises(ValueError, match=r"shape \(1, 4\) from Bad.encode, got \(1, 3\)"):
        FeatureCache(Bad(1.0, 3), tmp_path).features([("", "tea")])
    assert not list(tmp_path.rglob("*.safetensors"))


class Scaled(Fake):
    """Features times a number, and not exactly one in any precision."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def encode(self, texts: Sequence[str]) -> Tensor:
        return super().encode(texts) * self.scale


def test_half_precision_takes_half_of_the_disk_and_rounds_once(tmp_path: Path) -> None:
    """The same numbers from the call that encodes, from files and from mapped ones: numpy's nearest half."""
    whole, half = (FeatureCache(Scaled(1 / 3), tmp_path, dtype=dtype) for dtype in ("float32", "float16"))
    assert whole.folder != half.folder
    truth = whole.features(PAIRS)
    rounded = torch.from_numpy(truth.numpy().astype(np.float16).astype(np.float32))
    assert not torch.equal(rounded, truth) and torch.equal(half.features(PAIRS), rounded)
    again = FeatureCache(backbone := Scaled(1 / 3), tmp_path, dtype="float16")
    assert torch.equal(again.features(PAIRS), rounded) and not backbone.encoded
    mapped = again.mapped(PAIRS)
    assert torch.equal(MappedRows(*mapped).gather(np.arange(200)), rounded)
    assert {shard.dtype for shard in mapped.shards} == {np.dtype(np.float16)}
    saved = sum(path.stat().st_size for path in shards(whole)) - sum(path.stat().st_size for path in shards(half))
    assert saved >= 200 * 16 * 2
    sent = FeatureCache(HashingBackbone(dim=8), tmp_path, dtype="float16")
    copy = pickle.loads(pickle.dumps(sent))
    assert copy.dtype == "float16" and copy.folder == sent.folder


@pytest.mark.parametrize("scale", [1e4, 1e-9])
def test_features_that_half_precision_cannot_hold_are_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(ValueError, match=r"data.feature_dtype: expected features between 6e-5 and 65504 .* float32"):
        FeatureCache(Scaled(scale), tmp_path, dtype="float16").features(PAIRS)
    assert not list(tmp_path.rglob("*.safetensors"))
    FeatureCache(Scaled(scale), tmp_path).features(PAIRS)


def test_a_cached_row_equals_the_recomputed_row(tmp_path: Path) -> None:
    backbone = HashingBackbone(dim=64, ngrams=2)
    FeatureCache(backbone, tmp_path).features(PAIRS)
    cached = FeatureCache(backbone, tmp_path).features(PAIRS)
    assert torch.equal(cached, backbone.encode([response for _, response in PAIRS]))


@pytest.mark.parametrize("progress", [True, False])
def test_without_a_terminal_a_line_comes_every_thirty_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: bool
) -> None:
    """200 texts of 0.7 s each in shards of 10: a shard takes 7 s, so that lines come after 5, 10 and 15 of them."""
    now, screen = [0.0], io.StringIO()

    class Slow(Fake):  # type: ignore[misc, valid-type]
        def encode(self, texts: list[str]) -> Tensor:
            now[0] += 0.7 * len(texts)
            found: Tensor = super().encode(texts)
            return found

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(module, "SHARD_TEXTS", (10, 10))
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=screen, force_terminal=False))
    FeatureCache(Slow(), tmp_path).features(PAIRS, progress=progress)
    assert (
        screen.getvalue().splitlines()
        == [
            "encoding texts: 50 of 200, about 2 min left",  # 150 texts of 0.7 s
            "encoding texts: 100 of 200, about 1 min left",
            "encoding texts: 150 of 200, about 1 min left",
        ]
        * progress
    )


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_progress_is_for_terminals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, progress: bool, shown: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=screen, force_terminal=terminal))
    monkeypatch.setattr(module, "QUIET_TEXTS", 150)
    cache = FeatureCache(Fake(), tmp_path)
    cache.features(PAIRS[:150], progress=progress)
    assert screen.getvalue() == ""
    cache.features([("again", response) for _, response in PAIRS], progress=progress)
    assert ("Encoding texts" in screen.getvalue()) is shown


# ---------------------------------------------------------------------- on the disk
def gathered(found: MappedFeatures) -> Tensor:
    return torch.from_numpy(np.stack([found.shards[shard][row] for shard, row in found.place]))


def test_mapped_features_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pairs, repeated ones too; what is not cached is encoded, once, and damaged shards again."""
    monkeypatch.setattr(module, "SHARD_TEXTS", (30, 30))
    FeatureCache(Fake(), tmp_path).features(PAIRS[40:120])
    backbone = Fake()
    cache = FeatureCache(backbone, tmp_path)
    content = bytearray(shards(cache)[0].read_bytes())
    content[-5] ^= 64
    num_lost = texts_in(shards(cache)[0])
    shards(cache)[0].write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        found = cache.mapped([*PAIRS[::-1], *PAIRS[:7]])
    assert torch.equal(gathered(found), torch.cat([TRUTH.flip(0), TRUTH[:7]]))
    assert len(backbone.encoded) == len(set(backbone.encoded)) == 200 - 80 + num_lost
    assert torch.equal(gathered(FeatureCache(Fake(), tmp_path).mapped(PAIRS)), TRUTH)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not show what is mapped")
def test_mapped_features_hold_no_files_and_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard is a map of its own, no file stays open, and one that is cleared meanwhile can be read on."""
    monkeypatch.setattr(module, "SHARD_TEXTS", (4, 4))
    cache = FeatureCache(Fake(), tmp_path)
    cache.fill(PAIRS)
    num_open = len(os.listdir("/proc/self/fd"))
    found = cache.mapped(PAIRS)
    assert len(found.shards) == 50 and len(os.listdir("/proc/self/fd")) == num_open
    maps = Path("/proc/self/maps").read_text()
    assert all(maps.count(str(shard)) == 1 for shard in shards(cache))
    for shard in shards(cache):
        shard.unlink()
    assert torch.equal(gathered(found), TRUTH)


# ---------------------------------------------------------------------- shares of the texts
def share_of(text: str, count: int) -> int:
    """Which of equal ranges of 128 bits the hash of a text falls into, from 1."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big") * count // 2**128 + 1


@pytest.mark.parametrize("order", [(3, 1, 4, 2), (1, 2, 3, 4)])
def test_shares_in_any_order_are_the_whole(tmp_path: Path, order: tuple[int, ...]) -> None:
    for index in order:
        backbone = Fake()
        own = {text for text in TEXTS if share_of(text, 4) == index}
        cached = {text for text in TEXTS[:50] if share_of(text, 4) == index}
        FeatureCache(backbone, tmp_path).fill(PAIRS[:50], (index, 4))
        assert set(backbone.encoded) == cached and len(cached) > 3
        filled = FeatureCache(backbone, tmp_path).fill([*PAIRS, *PAIRS[:9]], (index, 4))
        assert filled[1:] == (200, len(own), len(own) - len(cached))
        assert len(backbone.encoded) == len(own) and set(backbone.encoded) == own
    last = Fake()
    cache = FeatureCache(last, tmp_path)
    assert torch.equal(cache.features(PAIRS), TRUTH)
    assert cache.fill(PAIRS) == (cache.folder, 200, 200, 0) and last.encoded == []


def test_filling_repairs_what_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TEXTS", (50, 50))
    cache = FeatureCache(Fake(), tmp_path)
    assert cache.fill(PAIRS).num_encoded == 200
    content = bytearray(shards(cache)[2].read_bytes())
    content[-5] ^= 64
    shards(cache)[2].write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert FeatureCache(Fake(), tmp_path).fill(PAIRS).num_encoded == 50
    assert torch.equal(FeatureCache(Fake(), tmp_path).features(PAIRS), TRUTH)


# ---------------------------------------------------------------------- several processes
def start(folder: Path, body: str) -> subprocess.Popen[str]:
    code = f"""
from plm.data import features as module
from plm.data.features import FeatureCache
module.SHARD_TEXTS = (4, 4)
PAIRS = [(f"prompt {{index % 3}}", f"response {{index}}") for index in range(200)]
print("ready", flush=True)
{body}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FOLDER": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", FAKE + "\nimport os, sys; folder = os.environ['FOLDER']\n" + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    process = start(tmp_path, "FeatureCache(Fake(seconds=0.005), folder).features(PAIRS)")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    backbone = Fake()
    cache = FeatureCache(backbone, tmp_path)
    finished = sum(texts_in(shard) for shard in shards(cache))
    assert 12 <= finished < 200
    before = {shard: shard.stat().st_mtime_ns for shard in shards(cache)}
    assert torch.equal(cache.features(PAIRS), TRUTH)
    assert len(backbone.encoded) == 200 - finished, "a finished shard was encoded again"
    assert {shard: shard.stat().st_mtime_ns for shard in before} == before


def test_processes_share_a_folder(tmp_path: Path) -> None:
    body = """
sys.stdin.readline()
for _ in range(2):
    rows = FeatureCache(Fake(seconds=0.001), folder).features(ORDER)
truth = torch.stack([Fake.truth("|".join(pair)) for pair in ORDER])
print(torch.equal(rows, truth), flush=True)
"""
    processes = [start(tmp_path, body.replace("ORDER", order)) for order in ("PAIRS", "PAIRS", "PAIRS[::-1]")]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["True\n"] * 3
    backbone: Backbone = Fake()
    assert torch.equal(FeatureCache(backbone, tmp_path).features(PAIRS), TRUTH)
    assert backbone.encoded == []  # type: ignore[attr-defined]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
