"""The cache is filled by a server: what is compared, kept, tried again and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.backbones import EncoderError, HashingBackbone, HFBackbone, Patience, RemoteEncoder, remote
from plm.cli import main
from plm.data import features as module
from plm.data.cache import cached_features, clear
from plm.data.datamodule import PreferenceDataModule
from plm.data.features import FeatureCache
from plm.data.sources.synthetic import SyntheticPairs
from plm.testing import tiny_causal_lm
from tests.http_servers import EmbeddingsServer

PAIRS = [("", f"strong tea number {number}") for number in range(150)]
LOCAL = HashingBackbone(dim=64)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingsServer]:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.005)
    monkeypatch.setattr(module, "SHARD_TEXTS", (64, 64))
    server = EmbeddingsServer(LOCAL)
    with server.running():
        yield server


def encoder(server: EmbeddingsServer, local: Any = LOCAL, **options: Any) -> RemoteEncoder:
    patience = Patience(retries=2, longest_wait=0.005)
    return RemoteEncoder(local, 64, server.url, "words", patience=patience, concurrency=4, quotes=True, **options)


def test_a_server_fills_the_cache_with_the_features_of_the_backbone(server: EmbeddingsServer, tmp_path: Path) -> None:
    """150 texts in shards of 64 are 5 requests of 32 texts at most, after one of golden texts; answers are reversed."""
    server.failures = [429, 503]
    cache = FeatureCache(LOCAL, tmp_path, encoder(server))
    assert cache.fill(PAIRS).num_encoded == 150
    sizes = [len(body["input"]) for body in server.bodies]
    assert sizes[:3] == [6] * 3 and sorted(sizes[3:]) == [22, 32, 32, 32, 32]
    assert FeatureCache(LOCAL, tmp_path, encoder(server)).fill(PAIRS).num_encoded == 0
    assert len(server.bodies) == len(sizes), "nothing is compared where nothing is encoded"
    assert torch.equal(FeatureCache(LOCAL, tmp_path).features(PAIRS), LOCAL.encode([text for _, text in PAIRS]))
    stamp = json.loads((cache.folder / "parity.json").read_text())
    assert stamp.keys() == {f"words at {server.url}"}
    kept = stamp[f"words at {server.url}"]
    assert kept.pop("checked") is True and kept.pop("num_texts") == 6
    assert kept == pytest.approx({"cosine": 1.0, "shortest": 1.0, "longest": 1.0})
    clear(cached_features(tmp_path))
    assert [path.name for path in cache.folder.iterdir()] == ["manifest.json"]


def test_a_server_of_other_features_is_refused_with_the_text_and_how_far(
    server: EmbeddingsServer, tmp_path: Path
) -> None:
    """The third golden text is turned by an angle whose cosine is 0.9998; the least that is taken is 0.9999."""

    def turned(features: Tensor, cosine: float) -> Tensor:
        third = features[2].double()
        across = torch.nn.functional.one_hot((third == 0).int().argmax(), 64).double() * third.norm()
        features[2] = cosine * third + (1 - cosine**2) ** 0.5 * across
        return features

    cache = FeatureCache(LOCAL, tmp_path, encoder(server))
    server.warp = lambda features: turned(features, 0.9998)
    with pytest.raises(
        ValueError, match=r"cosines down to 0\.999800, the least for 'Water – 水 – is enough\.', and 1 to"
    ):
        cache.fill(PAIRS)
    server.warp = lambda features: torch.cat([features[:1] * 1.02, features[1:]])
    with pytest.raises(ValueError, match=r"cosines down to 1\.000000, .* and 1 to 1\.02 times the length"):
        cache.fill(PAIRS)
    assert [path.name for path in cache.folder.iterdir()] == ["manifest.json"]
    server.warp = lambda features: turned(features, 0.99991) if len(features) == 6 else features
    cache.fill(PAIRS)
    (kept,) = json.loads((cache.folder / "parity.json").read_text()).values()
    assert kept["cosine"] == pytest.approx(0.99991, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda answer: {"data": [{**entry, "embedding": [1.0] * 32} for entry in answer["data"]]}, "of 64 .* got 32"),
        (lambda answer: {"data": [{**entry, "embedding": [1e999] * 64} for entry in answer["data"]]}, "not finite"),
        (lambda answer: {"data": answer["data"][1:]}, "expected 32 embeddings .* each once, got 31"),
        (lambda answer: {"data": [*answer["data"][:-1], answer["data"][0]]}, "expected 32 embeddings .* got 31"),
        (lambda answer: {"data": [{**entry, "embedding": "AAAA"} for entry in answer["data"]]}, "lists of numbers"),
        (lambda answer: [], "expected a JSON object, got list"),
    ],
)
def test_answers_of_no_use_are_named(server: EmbeddingsServer, tmp_path: Path, answer: Any, message: str) -> None:
    server.change = lambda found: answer(found) if len(found["data"]) == 32 else found
    source = SyntheticPairs(num_users=20, pairs_per_user=10)
    with pytest.raises(ValueError, match=rf"--encoder_url: .*{message}.*; what was encoded is kept"):
        PreferenceDataModule(source, LOCAL, str(tmp_path)).fill_cache(server=encoder(server))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_encoded_before_a_failure_is_kept(server: EmbeddingsServer, tmp_path: Path) -> None:
    """151 texts, the longest first, in shards of 64: the third shard holds the one that is refused."""
    pairs = [*PAIRS, ("", "tea")]
    server.refused = "tea"
    with pytest.raises(
        ValueError, match=r"refuses a text with status 400; .*the longest of 23: 'strong tea number \d+'"
    ):
        FeatureCache(LOCAL, tmp_path, encoder(server)).fill(pairs)
    server.refused, server.failures = None, [500] * 3
    with pytest.raises(EncoderError, match=r"does not answer now; try again \(.*status 500: .*not \['Strong tea"):
        FeatureCache(LOCAL, tmp_path, encoder(server)).fill(pairs)
    server.bodies.clear()
    assert FeatureCache(LOCAL, tmp_path, encoder(server)).fill(pairs).num_encoded == 151 - 2 * 64
    assert sum(len(body["input"]) for body in server.bodies) == 6 + 23


def test_a_later_comparison_says_nothing_of_what_nobody_compared(server: EmbeddingsServer, tmp_path: Path) -> None:
    FeatureCache(LOCAL, tmp_path, encoder(server, is_unchecked=True)).fill(PAIRS[:5])
    cache = FeatureCache(LOCAL, tmp_path, encoder(server))
    assert cache.fill(PAIRS).num_encoded > 0
    assert list(json.loads((cache.folder / "parity.json").read_text()).values()) == [{"checked": False}]


def test_two_processes_that_write_what_they_compared_wait_for_each_other(
    server: EmbeddingsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has looked for notes and is about to write when the other comes, who compares nothing."""
    unchecked = FeatureCache(LOCAL, tmp_path, encoder(server, is_unchecked=True))
    other = Thread(target=unchecked.fill, args=(PAIRS[5:10],))
    write = module.write_json

    def late(path: Path, entries: Any, **options: Any) -> None:
        if not other.ident:
            other.start()
            other.join(0.5)
        write(path, entries, **options)

    monkeypatch.setattr(module, "write_json", late)
    FeatureCache(LOCAL, tmp_path, encoder(server)).fill(PAIRS[:5])
    other.join()
    assert list(json.loads((unchecked.folder / "parity.json").read_text()).values()) == [{"checked": False}]


def test_a_backbone_that_is_not_here_cannot_be_compared(server: EmbeddingsServer, tmp_path: Path) -> None:
    """Features that nobody compares are marked as such; texts are sent as they are rendered."""

    class Elsewhere(HFBackbone):
        feature_dim = 64

        def key(self) -> Any:
            return {"model": "elsewhere"}

    local = Elsewhere(str(tmp_path / "gone"), template="response")
    with pytest.raises(ValueError, match=r"cannot be loaded here .*gone.*, go on here with --encoder_unchecked"):
        FeatureCache(local, tmp_path, encoder(server, local)).fill(PAIRS)
    assert server.bodies == []
    cache = FeatureCache(local, tmp_path, encoder(server, local, is_unchecked=True))
    assert cache.fill(PAIRS).num_encoded == 150
    (kept,) = json.loads((cache.folder / "parity.json").read_text()).values()
    assert kept == {"checked": False}
    assert torch.equal(FeatureCache(local, tmp_path).features(PAIRS), LOCAL.encode([text for _, text in PAIRS]))


def test_prompts_are_encoded_by_the_server_and_tokens_are_not(server: EmbeddingsServer, tmp_path: Path) -> None:
    source = SyntheticPairs(num_users=3, pairs_per_user=4)
    data = PreferenceDataModule(source, LOCAL, str(tmp_path), prompt_features=True)
    filled = data.fill_cache(server=encoder(server))
    sent = sum(len(body["input"]) for body in server.bodies)
    assert sent == 6 + sum(part.num_encoded for part in filled.values()) and filled.keys() == {"responses", "prompts"}
    data = PreferenceDataModule(source, tiny_causal_lm(), str(tmp_path), reference_logps=True)
    with pytest.raises(ValueError, match="got FreshCausalLM, whose tokens no server of embeddings gives"):
        data.fill_cache(server=encoder(server))


def test_the_command(server: EmbeddingsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
defaults: [{{backbone: hashing}}, {{trainer: cpu}}]
model: BradleyTerry
data:
  source: {{class_path: SyntheticPairs, init_args: {{num_users: 20, pairs_per_user: 10}}}}
  backbone: {{init_args: {{dim: 64}}}}
  cache_dir: {tmp_path / "cache"}
""")
    command = ["features", "--config", str(recipe), "--encoder_url", server.url]
    assert main(command) == 2
    assert "--encoder_url and --encoder_model go together" in capsys.readouterr().err
    assert main([*command, "--encoder_model", "words"]) == 0
    (cached,) = cached_features(tmp_path / "cache")
    assert f"0 were cached, {cached.num_texts} encoded" in capsys.readouterr().out
    assert sum(len(body["input"]) for body in server.bodies) == 6 + cached.num_texts
    assert {body["model"] for body in server.bodies} == {"words"}
