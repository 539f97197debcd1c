"""Features from a server: what is sent and compared, and what clients are told while the server fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from plm.backbones import Backbone, HashingBackbone, HFBackbone, remote
from plm.backbones.remote_encoder import MOST_TEXTS
from plm.checkpoint import load_method
from plm.cli import main
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lora_dpo import LoRADPO
from plm.serving import bodies, embeddings
from plm.serving.app import make_app
from plm.serving.embeddings import EncoderServer
from plm.serving.server import Settings, running
from plm.serving.service import RewardService
from plm.testing import saved, tiny_causal_lm
from tests.http_servers import EmbeddingsServer

TEXTS = [f"strong tea number {number}" for number in range(70)]


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingsServer]:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.005)
    monkeypatch.setattr(embeddings, "PATIENCE", embeddings.PATIENCE._replace(longest_wait=0.005))
    server = EmbeddingsServer(HashingBackbone(dim=64))
    with server.running():
        yield server


def test_rewards_are_those_of_the_encoder_here(
    path: Path, encoder: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order of the answer, 32 texts a request, with the key of the environment; learning reads it, too."""
    monkeypatch.setenv("PLM_ENCODER_KEY", "secret")
    service = RewardService(path, encoder=EncoderServer(encoder.url, "words"))
    assert {body["model"] for body in encoder.bodies} == {"words"} and set(encoder.keys) == {"Bearer secret"}
    assert {body["encoding_format"] for body in encoder.bodies} == {"float"}
    encoder.bodies.clear()
    monkeypatch.setattr(HashingBackbone, "encode", refused(HashingBackbone.encode, encoder.backbone))
    found = service.score(bodies.ScoreRequest(queries="p", documents=TEXTS, user="ben"))
    assert [len(body["input"]) for body in encoder.bodies] == [MOST_TEXTS, MOST_TEXTS, len(TEXTS) - 2 * MOST_TEXTS]
    monkeypatch.undo()
    expected = load_method(path).score(TEXTS, user_id="ben", prompts="p")
    assert [entry.score for entry in found.data] == pytest.approx(expected.tolist(), abs=1e-6)
    pair = bodies.PairsRequest(pairs=[{"prompt": "p", "chosen": "tea", "rejected": "coffee"}])
    assert service.learn("anna", pair).num_pairs == 1


def refused(encode: Any, server_side: Backbone) -> Any:
    """Only the server encodes."""

    def check(self: Backbone, texts: Any) -> Any:
        assert self is server_side
        return encode(self, texts)

    return check


@pytest.mark.parametrize(
    ("warp", "message"),
    [
        (
            lambda features: features + 0.02 * torch.ones(64).cumsum(0).sin(),
            r"cosines down to 0\.99[0-8]\d+, the least for '",
        ),
        (lambda features: 3 * features, "and 3 to 3 times the length"),
        (lambda features: features[:, :32], "expected embeddings of 64 numbers, as here, got 32"),
        (lambda features: -features, r"cosines down to -1\.0"),
        (lambda features: features * torch.nan, "cannot|not finite"),
    ],
)
def test_features_that_differ_are_refused(
    path: Path, encoder: EmbeddingsServer, warp: Any, message: str, capsys: Any
) -> None:
    encoder.warp = warp
    command = ["serve", "--ckpt_path", str(path), "--encoder_url", encoder.url, "--encoder_model", "words"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "--encoder_url: " in error
    with pytest.raises(ValueError, match=message):
        RewardService(path, encoder=EncoderServer(encoder.url, "words"))


def test_features_of_lower_precision_are_the_same(path: Path, encoder: EmbeddingsServer) -> None:
    encoder.warp = lambda features: features.bfloat16().float()
    RewardService(path, encoder=EncoderServer(encoder.url, "words"))


def test_an_encoder_that_is_not_here_cannot_be_compared(
    encoder: EmbeddingsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = HFBackbone(str(tmp_path / "gone")).spec()
    with saved(BradleyTerry(1, 64, backbone=spec)) as path:
        with pytest.raises(
            ValueError, match=r"encoder cannot be loaded here .*gone.* go on here with --encoder_uncheck"
        ):
            RewardService(path, encoder=EncoderServer(encoder.url, "words"))
        assert encoder.bodies == []
        service = RewardService(path, encoder=EncoderServer(encoder.url, "words", is_unchecked=True))
        assert "nobody has compared words" in caplog.text
        service.classify(bodies.ClassifyRequest(input=["tea"]))
        encoder.warp = lambda features: features[:, :32]
        with pytest.raises(ValueError, match="got 32"):
            RewardService(path, encoder=EncoderServer(encoder.url, "words", is_unchecked=True))


def test_long_texts_are_cut_as_the_encoder_here_cuts_them(
    causal_lm: Callable[[str], Path], encoder: EmbeddingsServer
) -> None:
    """The server reads 64 characters and the checkpoint's encoder the last 40; one that is sent more is found out."""
    encoder.backbone = HFBackbone(str(causal_lm("llama")), pooling="mean")
    local = HFBackbone(str(causal_lm("llama")), pooling="mean", template="response", max_length=40)
    with saved(BradleyTerry(1, 16, backbone=local.spec())) as path, pytest.MonkeyPatch.context() as patch:
        service = RewardService(path, encoder=EncoderServer(encoder.url, "llama"))
        long = "".join(chr(97 + place % 26) for place in range(90))
        assert service.method.text_encoder.backbone.encode([long]).shape == (1, 16)
        assert encoder.bodies[-1]["input"] == [long[-40:]]
        patch.setattr(embeddings.RemoteEncoder, "_cut", lambda self, texts: list(texts))
        with pytest.raises(ValueError, match="the least for one that is longer than the encoder reads here"):
            RewardService(path, encoder=EncoderServer(encoder.url, "llama"))


def test_a_method_with_a_language_model_of_its_own_is_refused(encoder: EmbeddingsServer) -> None:
    method = LoRADPO(num_users=1, feature_dim=16, backbone=tiny_causal_lm().spec(), rank=2)
    method.configure_model()
    with saved(method) as path, pytest.raises(ValueError, match="reads the tokens of a language model of its own"):
        RewardService(path, encoder=EncoderServer(encoder.url, "words"))


def test_clients_are_told_when_the_encoder_fails(path: Path, encoder: EmbeddingsServer) -> None:
    """What fails in passing is asked again; then 503 while it is gone, 502 for useless answers, 422 for refusals."""
    service = RewardService(path, encoder=EncoderServer(encoder.url, "words"))
    body = {"queries": "p", "documents": ["secret words"]}
    pairs = {"pairs": [{"prompt": "p", "chosen": "tea", "rejected": "coffee"}]}
    with running(make_app(service)) as url, httpx.Client(base_url=url, timeout=60) as client:

        def status(*failures: int) -> int:
            encoder.failures = list(failures)
            response = client.post("/score", json=body)
            assert response.status_code == 200 or "secret" not in response.text
            assert (response.headers.get("retry-after") == "1") == (response.status_code == 503)
            return response.status_code

        assert status() == 200 and status(503, 429) == 200
        assert status(*[503] * 9) == 503 and len(encoder.failures) == 9 - 1 - embeddings.PATIENCE.retries
        assert status(429, 429, 429) == 503
        assert status(401) == 502 and status(404) == 502
        assert status(400, 400) == 422  # asked again by itself
        for change in (
            lambda answer: {"data": answer["data"] * 2},
            lambda answer: {"data": [{"index": 0, "embedding": "AAAA"}]},
            lambda answer: {"data": [{"index": 0, "embedding": [1.0]}]},
            lambda answer: {"data": None},
            lambda answer: {"data": [{"index": 1, "embedding": [0.0] * 64}]},
            lambda answer: [1],
        ):
            encoder.change = change
            assert status() == 502
        encoder.change = lambda answer: answer
        encoder.failures = [503] * 3
        assert client.post("/v1/users/anna/pairs", json=pairs).status_code == 503
        pool = {"pool": [{"responses": ["tea", "coffee"]}]}
        encoder.failures = [503] * 3
        assert client.post("/v1/users/ben/next-question", json=pool).status_code == 503
        encoder.shutdown()
        encoder.server_close()
        assert status() == 503 and client.get("/health").status_code == 200


def test_the_command_hands_them_on(path: Path, encoder: EmbeddingsServer, capsys: Any) -> None:
    settings = Settings(str(path), encoder_url=encoder.url, encoder_model="words")
    with running(settings.app()) as url:
        assert httpx.post(f"{url}/classify", json={"input": "tea"}).status_code == 200
    count = len(encoder.bodies)
    assert count >= 3  # compared, tried, asked
    command = ["serve", "--ckpt_path", str(path)]
    for more, message in (
        (["--encoder_url", encoder.url], "go together"),
        (["--encoder_unchecked"], "is of --encoder_url"),
        (["--encoder_url", encoder.url, "--encoder_model", "words", "--check"], "to the last bit"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--encoder_url", "localhost:1", "--encoder_model", "words"]) == 1
    assert "an address such as http://localhost:8000/v1" in capsys.readouterr().err
    assert main([*command, "--encoder_url", "http://127.0.0.1:9/v1", "--encoder_model", "words"]) == 1
    assert "--encoder_url: the encoder does not answer now" in capsys.readouterr().err
