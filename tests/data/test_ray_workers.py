"""Other processes fill the cache: those of Ray, if it is installed."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plm.backbones import HashingBackbone
from plm.cli import main
from plm.data import features as module
from plm.data import ray_workers as module_of_workers
from plm.data.features import FeatureCache
from plm.data.ray_workers import encode_by_ray

ROOT = Path(__file__).parents[2]
PAIRS = [("", f"text {number}") for number in range(400)] + [("", "half of a character \ud800")]
TRUTH = HashingBackbone(64).encode([text for _, text in PAIRS])


class Dying(HashingBackbone):
    """Kills the process that encodes a text, if there is no file yet, and takes its time."""

    def __init__(self, dim: int, flag: str) -> None:
        super().__init__(dim=dim)
        self.flag = flag

    def encode(self, texts: Sequence[str]) -> Tensor:
        time.sleep(0.2)
        Path(self.flag).parent.joinpath(f"process-{os.getpid()}").touch()
        if "text 77" in texts and not Path(self.flag).exists():
            Path(self.flag).touch()
            os._exit(9)
        return super().encode(texts)


@pytest.mark.slow
def test_workers_of_ray_fill_the_cache_and_one_that_is_killed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'plm[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a file to the home
    cache = FeatureCache(Dying(64, str(tmp_path / "flag")), tmp_path / "cache")
    assert cache.fill(PAIRS, engine=partial(encode_by_ray, workers=2)).num_encoded == len(PAIRS)
    assert (tmp_path / "flag").exists() and len(list(tmp_path.glob("process-*"))) in (2, 3)
    again = FeatureCache(Dying(64, str(tmp_path / "flag")), tmp_path / "cache")
    monkeypatch.setattr(Dying, "encode", None)
    assert torch.equal(again.features(PAIRS), TRUTH)
    with pytest.raises(ValueError, match=r"--workers: expected at most \d+ where Ray has .* CPUs, .* got 99"):
        cache.fill([("", "another")], engine=partial(encode_by_ray, workers=99))


def dying(command: Sequence[str], folder: str) -> module_of_workers.Ended:
    """Kills the process of the second share once; says which share of what this is, and where."""
    flag = Path(command[0])
    if command[-1] == "2/2" and not flag.exists():
        flag.touch()
        os._exit(9)
    return module_of_workers.Ended(0, f"{command[1:]} in {folder}", "")


@pytest.mark.slow
def test_workers_of_ray_run_a_command_by_shares_and_again_where_one_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'plm[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    shown = list(module_of_workers.run_shares(["--version"], 2))  # of a verb that takes no shares
    assert [(ended.status, ended.output.split()[0]) for ended in shown] == [(0, "plm"), (0, "plm")]
    monkeypatch.setattr(module_of_workers, "_run", dying)
    flag = str(tmp_path / "flag")
    shown = list(module_of_workers.run_shares([flag, "adapt"], 2))
    assert [ended.output for ended in shown] == [f"['adapt', '--shard', '{i}/2'] in {tmp_path}" for i in (1, 2)]
    assert Path(flag).exists()


def test_what_another_process_encodes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given a copy, makes the backbone anew, and encodes only what is not there."""
    monkeypatch.setattr(module, "SHARD_TEXTS", (64, 64))
    cache = FeatureCache(HashingBackbone(64), tmp_path)
    cache.features(PAIRS[:100])
    seen: list[str] = []

    def engine(filled: FeatureCache, texts: list[str]) -> Iterator[int]:
        copy = pickle.loads(pickle.dumps(filled))
        assert copy.folder == filled.folder and copy.backbone is not filled.backbone
        seen.extend(texts)
        for part in (texts[:200], texts):  # again, as for a worker that was killed
            copy.encode(part)
        yield len(texts)

    assert cache.fill(PAIRS, (1, 1), engine)[1:] == (401, 401, 301)
    assert sorted(seen) == sorted(text for _, text in PAIRS[100:])
    assert len(list(cache.folder.glob("*.safetensors"))) == 2 + 4 + 2
    monkeypatch.setattr(HashingBackbone, "encode", None)
    assert torch.equal(cache.features(PAIRS), TRUTH)
    with pytest.raises(ValueError, match=r"expected 1 texts to be in .* by now, 1 are not: who encodes must see that"):
        cache.fill([("", "another")], engine=lambda *_: iter([1]))


def test_the_engine_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["features", "--config", "recipe.yaml"]
    assert main([*command, "--workers", "2"]) == 2
    assert "--workers goes with --engine ray" in capsys.readouterr().err
    server = ["--encoder_url", "http://localhost:1/v1", "--encoder_model", "words"]
    assert main([*command, "--engine", "ray", *server]) == 2
    assert "two ways to encode" in capsys.readouterr().err
    monkeypatch.setattr("plm.cli.options.find_spec", lambda name: None)
    assert main([*command, "--engine", "ray"]) == 1
    assert "needs ray; pip install 'plm[ray]'" in capsys.readouterr().err
