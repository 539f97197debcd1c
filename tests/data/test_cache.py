"""What is cached is listed and cleared, and nothing else is touched, also while others read and write."""

from __future__ import annotations

import inspect
import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from plm.backbones import HashingBackbone
from plm.cli import main
from plm.data import features as module
from plm.data.cache import cached_features, chosen, clear, folder_name
from plm.data.datamodule import PreferenceDataModule
from plm.data.features import FeatureCache

TEXTS = [("", f"text {number}") for number in range(40)]


def filled(directory: Path, dim: int, num_texts: int = 40) -> FeatureCache:
    """Features of some texts."""
    cache = FeatureCache(HashingBackbone(dim=dim), directory)
    cache.features(TEXTS[:num_texts])
    return cache


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_is_cached_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TEXTS", (16, 16))
    large, _ = filled(tmp_path, 64), filled(tmp_path, 8, 3)
    os.utime(large.folder / "manifest.json", (1000, 1000))
    first, second = cached_features(tmp_path)
    assert (first.folder, first.name, first.num_texts, first.feature_dim) == (
        large.folder, "sklearn.HashingVectorizer", 40, 64
    )  # fmt: skip
    sizes = [shard.stat().st_size for shard in large.folder.glob("*.safetensors")]
    assert len(sizes) == 3 and first.num_bytes == sum(sizes) > 40 * 64 * 4
    assert (second.num_texts, second.feature_dim) == (3, 8) and time.time() - second.last_use < 60
    assert first.last_use == 1000
    FeatureCache(HashingBackbone(dim=64), tmp_path)  # a run that reads it
    assert time.time() - cached_features(tmp_path)[0].last_use < 60


def test_what_is_cleared_is_chosen_by_name_folder_and_age(tmp_path: Path) -> None:
    old, new = filled(tmp_path, 8), filled(tmp_path, 16)
    os.utime(old.folder / "manifest.json", (1000, 1000))
    entries = cached_features(tmp_path)
    assert chosen(entries, None, float("inf")) == chosen(entries, "sklearn.HashingVectorizer", float("inf")) == entries
    assert [entry.folder for entry in chosen(entries, new.folder.name, float("inf"))] == [new.folder]
    assert [entry.folder for entry in chosen(entries, None, 1001)] == [old.folder]
    with pytest.raises(ValueError, match=r"no features of 'gpt' are cached \(plm cache lists them\)"):
        chosen(entries, "gpt", float("inf"))
    assert clear(chosen(entries, None, 1001)) == entries[1].num_bytes
    assert [entry.folder for entry in cached_features(tmp_path)] == [new.folder]
    assert torch.equal(filled(tmp_path, 8).features(TEXTS), HashingBackbone(dim=8).encode([text for _, text in TEXTS]))


def test_a_model_is_found_by_its_name_with_its_pooling_and_without(tmp_path: Path) -> None:
    for pooling in ("last", "mean"):
        identity = {"key": {"model": "my encoder", "pooling": pooling}, "feature_dim": 8}
        folder = tmp_path / folder_name(identity)
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(identity))
        (folder / f"{'1' * 32}.safetensors").write_bytes(b"damaged")
    entries = cached_features(tmp_path)
    assert sorted(entry.name for entry in entries) == ["my encoder last", "my encoder mean"]
    assert chosen(entries, "my encoder", float("inf")) == entries
    assert [entry.name for entry in chosen(entries, "my encoder mean", float("inf"))] == ["my encoder mean"]
    with pytest.raises(ValueError, match="did you mean 'my encoder'"):
        chosen(entries, "my encode", float("inf"))


def test_what_plm_has_not_written_stays(tmp_path: Path) -> None:
    cache = filled(tmp_path, 8)
    mine = cache.folder / "notes.txt"
    foreign = tmp_path / "0123456789abcdef"
    linked = tmp_path / "linked"
    outside = tmp_path.parent / "outside.safetensors"
    for path in (mine, cache.folder / "model.safetensors", cache.folder / ".part.safetensors.1a2b3c4d", outside):
        path.write_text("mine")
    (cache.folder / f"{'0' * 32}.safetensors").symlink_to(outside)
    for folder in (foreign, tmp_path / "rewards"):  # a manifest of another name proves nothing
        folder.mkdir()
        (folder / "manifest.json").write_bytes((cache.folder / "manifest.json").read_bytes())
        (folder / f"{'1' * 32}.safetensors").write_text("mine")
    linked.symlink_to(cache.folder)
    (shard,) = [file for file in cache.folder.glob("*.safetensors") if len(file.stem) == 32 and not file.is_symlink()]
    before = files_below(tmp_path)
    (entry,) = cached_features(tmp_path)
    clear([entry])
    assert before - files_below(tmp_path) == {str(shard.relative_to(tmp_path))}
    assert cached_features(tmp_path) == [] and outside.read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]", "7", "{}", json.dumps({"key": "a"})])
def test_a_folder_with_a_damaged_manifest_is_left_alone(content: str, tmp_path: Path) -> None:
    (filled(tmp_path, 8).folder / "manifest.json").write_text(content)
    assert cached_features(tmp_path) == []


def test_readers_and_writers_go_on_while_it_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TEXTS", (4, 4))
    expected = HashingBackbone(dim=8).encode([text for _, text in TEXTS])
    stopped = threading.Event()
    problems: list[BaseException] = []
    freed = []

    def clear_on() -> None:
        try:
            while not stopped.is_set():
                freed.append(clear(cached_features(tmp_path)))
        except BaseException as error:
            problems.append(error)

    filled(tmp_path, 8)
    thread = threading.Thread(target=clear_on)
    thread.start()
    try:
        kept = FeatureCache(HashingBackbone(dim=8), tmp_path)
        for _ in range(15):
            assert torch.equal(kept.features(TEXTS), expected)
            assert torch.equal(filled(tmp_path, 8).features(TEXTS), expected)
    finally:
        stopped.set()
        thread.join()
    assert not problems and sum(map(bool, freed)) > 1


def test_the_command_asks_or_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = filled(tmp_path, 8)
    place = ["--cache_dir", str(tmp_path)]
    assert main(["cache", *place]) == 0
    shown = capsys.readouterr().out
    row = next(line.split() for line in shown.splitlines() if cache.folder.name in line)
    assert row[:4] == ["sklearn.HashingVectorizer", cache.folder.name, "40", "8"] and "kB in" in shown
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["cache", "clear", *place]) == 1 and "expected --yes, as no terminal" in capsys.readouterr().err
    for answer, left in (("", 1), ("n", 1), ("y", 0)):
        terminal = io.StringIO(f"{answer}\n")
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", terminal)
        assert main(["cache", "clear", *place]) == 0 and len(cached_features(tmp_path)) == left
    assert "freed" in capsys.readouterr().out
    filled(tmp_path, 8)
    assert main(["cache", "clear", "--older_than", "1", "--yes", *place]) == 0
    assert "nothing to clear" in capsys.readouterr().out and len(cached_features(tmp_path)) == 1
    assert main(["cache", "clear", cache.folder.name, "--older_than", "0", "--yes", *place]) == 0
    assert not cached_features(tmp_path)
    assert main(["cache", *place]) == 0 and "no features in" in capsys.readouterr().out
    assert main(["cache", "--cache_dir", "nowhere"]) == 1


def test_the_command_looks_where_fits_write(capsys: pytest.CaptureFixture[str]) -> None:
    default = inspect.signature(PreferenceDataModule).parameters["cache_dir"].default
    assert main(["cache", "--help"]) == 0
    assert f"(default: {default})" in capsys.readouterr().out
