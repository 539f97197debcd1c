from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from plm.backbones import Backbone, CausalLM, FreshCausalLM, Policy

TEXTS = ["A film about a dog. I liked the dog!", "The plot is thin, but the café scene is “fun”.\n\n10/10 😀"] * 5
SMALL = {"vocab_size": 300, "width": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}


def fresh(folder: Path, **changes: object) -> FreshCausalLM:
    return FreshCausalLM(str(folder), **{**SMALL, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_first_prepare_writes_an_ordinary_model(architecture: str, tmp_path: Path) -> None:
    model = fresh(tmp_path / "deep" / "model", architecture=architecture, append_eos=False)
    assert model.feature_dim == 16 and not (tmp_path / "deep").exists()
    model.prepare(iter(TEXTS))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    ordinary = Backbone.from_spec(model.spec())
    assert type(ordinary) is CausalLM and ordinary.feature_dim == 16
    assert ordinary.key() == model.key()
    for text in TEXTS[:2]:  # byte-level: whatever is written is read back, letters it has never seen, too
        for readable in (text, text.upper() + "жэ"):
            assert model.tokenizer.decode(ordinary.prompt_tokens(readable[:12])) == readable[:12]
    prompt, response = model.completion("A film", " about a dog")
    assert model.tokenizer.decode(prompt + response) == "A film about a dog"
    assert ordinary.completion("A film", " about a dog") == (prompt, response)
    policy = Policy(ordinary)
    tokens = ordinary.represent(["A film"], [" about a dog"])
    logits = policy.logits(policy.hidden(tokens))
    assert logits.shape[-1] == len(model.tokenizer) <= 300
    expected = policy.network(input_ids=tokens.input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    network = policy.network
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight


def test_number_of_weights_of_the_default(tmp_path: Path) -> None:
    """Counted by hand: V D + T D + L (12 D^2 + 13 D) + 2 D, the output embedding being the input's."""
    model = FreshCausalLM(str(tmp_path / "model"), vocab_size=300, max_positions=32, width=64, num_layers=3)
    model.prepare(TEXTS)
    count = sum(parameter.numel() for parameter in model.load().parameters())
    vocabulary, width = len(model.tokenizer), 64
    assert count == vocabulary * width + 32 * width + 3 * (12 * width**2 + 13 * width) + 2 * width


def test_same_texts_and_seed_give_the_same_files(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name in ("one", "two"):
        fresh(tmp_path / name).prepare(TEXTS)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers are used up
    fresh(tmp_path / "other", seed=1).prepare(TEXTS)
    files = {file.name for file in (tmp_path / "one").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "fresh.json"} <= files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] != weights[1]


def test_an_existing_model_is_used_as_it_is(tmp_path: Path) -> None:
    fresh(tmp_path / "model").prepare(TEXTS)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "model").iterdir()}
    fresh(tmp_path / "model", max_length=16).prepare(["quite other texts"])  # the length is not the model's
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "model").iterdir()} == before
    with pytest.raises(ValueError, match=r"was written with width=16, not 32, seed=0, not 3; correct the arguments"):
        fresh(tmp_path / "model", width=32, seed=3).prepare(TEXTS)


def test_of_two_processes_the_faster_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, write = fresh(tmp_path / "model"), FreshCausalLM._write

    def write_late(folder: Path, texts: Iterable[str]) -> None:
        fresh(tmp_path / "model").prepare(TEXTS)
        write(slow, folder, texts)

    monkeypatch.setattr(slow, "_write", write_late)
    slow.prepare(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert slow.tokenizer.decode(slow.prompt_tokens("A film")) == "A film"


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the model .* to exist.*first run on its data"):
        fresh(tmp_path / "none").tokenizer.decode([0])
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match=r"expected a new folder for a fresh model.*no fresh\.json"):
        fresh(tmp_path / "taken").prepare(TEXTS)
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 257, got 200\n.*num_layers: .* got 0"):
        fresh(tmp_path / "bad", vocab_size=200, num_layers=0)
    with pytest.raises(ValueError, match=r"width: expected a multiple of twice num_heads=3, got 16"):
        fresh(tmp_path / "bad", num_heads=3)
    with pytest.raises(ValueError, match="expected architecture to be one of"):
        fresh(tmp_path / "bad", architecture="mamba")
