"""A paper's number beside a run's: verdicts, what is told of both, what a recipe needs, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from plm.backbones import HFBackbone
from plm.backbones.weights import num_weights
from plm.cli import main
from plm.fitting import Run
from plm.recipe.paper import Paper, check_paper
from plm.verifying import changed_keys, comparison, needs, verdict

NUMBERS = {"accuracy": 0.70, "accuracy_low": 0.68, "accuracy_high": 0.72}
PAPER = {"source": "a paper", "table": "Table 3", "numbers": {"seen": {"accuracy": 71.0}}}


# ---------------------------------------------------------------------- verdicts
@pytest.mark.parametrize(
    ("value", "artefact", "expected"),
    [
        (0.68, "", "within"),  # the ends belong to the interval
        (0.72, "", "within"),
        (0.6799, "", "above"),
        (0.7201, "", "below"),
        (0.7201, "a leak", "below, known artefact"),
        (0.72, "a leak", "within"),
        (0.6799, "a leak", "above"),
    ],
)
def test_the_verdict_goes_by_the_interval_of_the_run(value: float, artefact: str, expected: str) -> None:
    assert verdict(NUMBERS, "accuracy", value, artefact) == expected


def test_what_was_not_measured_gets_no_verdict() -> None:
    assert verdict({}, "accuracy", 0.7) == "not measured"
    without = {**NUMBERS, "accuracy_low": math.nan, "accuracy_high": math.nan}
    assert verdict(without, "accuracy", 0.7) == "too few users for an interval"


def test_numbers_of_the_paper_stand_beside_those_of_the_run() -> None:
    named = {"unseen": {"accuracy": 0.755, "personal_minus_global": 0.022}, "seen": {"accuracy": 0.5}}
    gain = {"personal_minus_global": 0.015, "personal_minus_global_low": 0.001, "personal_minus_global_high": 0.03}
    metrics = {"unseen": {**NUMBERS, **gain, "num_users": 9}, "seen": {**NUMBERS, "accuracy_low": None}}
    section = comparison(Paper("s", "t", named, "otherwise", "a leak"), metrics, ["trainer.max_epochs: 2 instead of 9"])
    assert [list(row.cells) for row in section.rows] == [
        ["unseen: accuracy %", "75.5", "70.0 [68.0, 72.0]", "below, known artefact"],
        ["unseen: personal − global", "+2.2", "+1.5 [0.1, 3.0]", "within"],
        ["seen: accuracy %", "50.0", "70.0", "too few users for an interval"],  # JSON has null for nan
    ]
    told = "\n".join(section.lines)
    assert "explains a part at most: a leak" in told and "the paper differs: otherwise" in told
    assert "this run differs from the recipe: trainer.max_epochs: 2 instead of 9" in told
    nothing = comparison(Paper("s", "t", {}), metrics)
    assert not nothing.rows and nothing.lines == ["no number of t is known, so there is nothing to compare with"]


def test_what_differs_from_the_recipe_is_named_with_what_the_recipe_leaves_to_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = Path(__file__).parents[1] / "recipes" / "quickstart.yaml", tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/best.ckpt").touch()
    assert main(["fit", "--config", str(file), "--print_config"]) == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    whole["name"], whole["trainer"]["default_root_dir"] = "mine", "elsewhere"
    (run / "recipe.yaml").write_text(yaml.safe_dump(whole))
    assert changed_keys(str(file), Run(run)) == []
    whole["data"]["shuffle_users"], whole["model"]["init_args"]["num_bases"] = True, 5
    (run / "recipe.yaml").write_text(yaml.safe_dump(whole))
    assert sorted(changed_keys(str(file), Run(run))) == [
        "data.shuffle_users: True instead of False",
        "model.init_args.num_bases: 5 instead of 6",
    ]


# ---------------------------------------------------------------------- the key of a recipe
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", r"paper: expected a mapping of source, table, .* got 'text'"),
        ({"sourc": "x"}, r"paper: no key 'sourc'; did you mean 'source'"),
        ({"source": None}, r"paper\.source: expected a text, got None"),
        ({"table": " "}, r"paper\.table: expected a text, got ' '"),
        ({"numbers": 71.0}, r"paper\.numbers: expected a mapping of seen, unseen, got 71\.0"),
        ({"numbers": {"senn": {}}}, r"paper\.numbers: no 'senn'; did you mean 'seen'"),
        ({"numbers": {"seen": {"acuracy": 71.0}}}, r"paper\.numbers\.seen: no 'acuracy'; did you mean 'accuracy'"),
        ({"numbers": {"seen": {"accuracy": 0.71}}}, r"seen\.accuracy: expected per cent, such as 71\.0, got 0\.71"),
        ({"numbers": {"seen": {"accuracy": True}}}, r"expected per cent, .* got True"),
        ({"numbers": {"seen": {"accuracy": math.nan}}}, r"expected per cent, .* got nan"),
        ({"numbers": {"seen": {"personal_minus_global": "2"}}}, r"expected points, such as 2\.2, got '2'"),
    ],
)
def test_a_wrong_key_is_named(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_paper(change if isinstance(change, str) else {**PAPER, **change})


@pytest.mark.parametrize("key", ["source", "table"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"paper: missing '{key}', such as"):
        check_paper({name: value for name, value in PAPER.items() if name != key})


def test_a_fit_checks_the_key_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    recipe = {"defaults": [{"data": "pets"}, {"backbone": "hashing"}, {"trainer": "cpu"}], "model": "BradleyTerry"}
    file.write_text(yaml.safe_dump({**recipe, "paper": {"source": "x"}}))
    for verb in (["fit", "--config"], ["verify"]):
        assert main([*verb, str(file)]) == 1
        assert "paper: missing 'table'" in capsys.readouterr().err
    wordy = {"source": "x: y", "table": "[1], a row: the second", "differs": "12", "artefact": "it leaks: always"}
    file.write_text(yaml.safe_dump({**recipe, "paper": wordy}))
    assert main(["fit", "--config", str(file), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["paper"] == wordy
    file.write_text(yaml.safe_dump(recipe))
    assert main(["verify", str(file)]) == 1
    assert "expected a key paper" in (told := capsys.readouterr().err) and "recipes/papers/lore_prism.yaml" in told


def test_a_run_is_taken_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for other in (["--dry"], ["--data.val_rows", "0.1"], ["--config", "x.yaml"]):
        assert main(["verify", "recipes/papers/lore_polis_k2.yaml", "--results", "run", *other]) == 2
        assert "--results takes a run as it is" in capsys.readouterr().err
    assert main(["verify", "recipes/papers/lore_polis_k2.yaml", "--results", "no_run"]) == 1
    assert "got 'runs/no_run', which does not exist" in capsys.readouterr().err


# ---------------------------------------------------------------------- what is needed
@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny language model of 8 * 300 embeddings and one layer, in two files."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    folder = tmp_path / "tiny-3m"
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_weights_are_counted_in_the_files(llama: Path, tmp_path: Path) -> None:
    backbone = HFBackbone(str(llama))
    assert num_weights(backbone.find_file) == 300 * 8 + 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8
    next(llama.glob("*.safetensors")).unlink()
    assert num_weights(HFBackbone(str(llama)).find_file) is None
    single = tmp_path / "single"
    single.mkdir()
    (single / "config.json").write_text((llama / "config.json").read_text())
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, single / "model.safetensors", metadata={"format": "pt"})
    assert num_weights(HFBackbone(str(single)).find_file) == 17


def test_hours_and_memory_follow_from_weights_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 texts of 400 characters are 10,000 tokens; 8 billion weights read them in 1.6e14 operations."""
    rows = [
        {"user_id": f"u{number}", "prompt": "p" * 200, "chosen": f"{number:0200}", "rejected": f"{50 + number:0200}"}
        for number in range(50)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = {"class_path": "plm.backbones.HFBackbone", "init_args": {"model": "some/reward-8B", "dtype": "bfloat16"}}
    source = {"class_path": "plm.data.sources.pairs.PairFiles", "init_args": {"path": str(tmp_path / "pairs.jsonl")}}
    file = tmp_path / "r.yaml"
    select = {"model.init_args.num_bases": [2, 5], "model.init_args.lr": [0.1, 0.2, 0.5]}
    recipe = {"data": {"source": source, "backbone": backbone}, "trainer": {"max_epochs": 7}, "select": select}
    file.write_text(yaml.safe_dump(recipe))
    told = dict(needs(str(file)))
    assert told["data"].endswith("50 pairs of 50 users")
    assert told["encoder"].startswith("some/reward-8B, not here")
    assert told["memory"].startswith("16.0 GB for the 8.0 billion weights (by its name)")
    assert told["texts"].startswith("100 distinct")
    assert "encoding: 1.6 s on a GPU of 100 TFLOP/s or 26.7 min on CPU cores" in told["hours"]
    assert "10.0 thousand tokens" in told["hours"] and told["fit"].startswith("6 fits of at most 7 passes")
    (tmp_path / "pairs.jsonl").unlink()
    told = dict(needs(str(file), ["data.backbone.init_args.model=some/model"]))
    assert "not here: expected data at" in told["data"] and told["memory, hours"].startswith("not known")
