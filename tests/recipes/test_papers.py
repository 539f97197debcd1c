"""Recipes of papers: each says what it needs, runs on small files of the real schema, and is put beside its paper."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification

from plm.cli import main
from plm.recipe.paper import read_paper
from plm.recipe.read import merged_recipe
from plm.testing import tiny_causal_lm
from tests.corpora import WRITERS

ROOT = Path(__file__).parents[2]
PAPERS = sorted((ROOT / "recipes/papers").glob("*.yaml"))
QUICK = ("clap_imdb", "lore_polis_k2", "lore_prism_code", "lore_tldr100", "vpl_ufp2")
"""The others differ from these in numbers, or tests of their sources and methods read and fit what they do."""
RUNS = [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow]) for path in PAPERS]
SMALL: dict[str, dict[str, Any]] = {
    "TldrPairs": {"min_pairs": 10, "seen_pairs": 12, "unseen_pairs": 6},
    "TldrLengthPairs": {"min_pairs": 8, "unseen_pairs": 4},
    "PersonalLlmPairs": {"num_seen": 10, "num_unseen": 10},
    "UltraFeedbackPPairs": {"survey_size": 12, "num_seen": 5, "num_unseen": 5},
    "PetsPairs": {"num_seen": 5, "num_unseen": 5, "pool_size": 100},
    "HHPairs": {"num_seen": 5, "num_unseen": 5},
}
"""Class of a source -> arguments for little data."""


def keys_of(mapping: dict[str, Any], prefix: str = "") -> set[str]:
    """Keys of a nested mapping, with dots."""
    found = set()
    for key, value in mapping.items():
        found |= keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return found


def source_of(path: Path) -> str:
    """Short name of the class that reads the corpus."""
    return str(merged_recipe(str(path), [])["data"]["source"]["class_path"]).rpartition(".")[2]


def tiny_reward_model(folder: Path) -> str:
    """A random reward model of a few thousand weights, with a head to which bases can be pulled."""
    copy = shutil.copytree(tiny_causal_lm("llama").model, folder / "reward")
    config = LlamaConfig.from_pretrained(copy, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(copy)
    return str(copy)


def stand_in(path: Path, folder: Path) -> Path:
    """A recipe that goes over one of a paper: few people, two passes, and words or an untrained model as a backbone."""
    data: dict[str, Any] = {"cache_dir": str(folder / "cache"), "repeats": 1}
    data["backbone"] = {"class_path": "plm.backbones.HashingBackbone", "init_args": {"dim": 256}}
    recipe = merged_recipe(str(path), [])
    if recipe["model"]["init_args"].get("anchor", "none") != "none":
        arguments = {"model": tiny_reward_model(folder), "template": "plain"}
        data["backbone"] = {"class_path": "plm.backbones.HFBackbone", "init_args": arguments}
    if recipe["data"]["backbone"]["class_path"].endswith("CausalLM"):
        sizes = {"vocab_size": 300, "width": 16, "num_layers": 2, "num_heads": 2, "max_positions": 128}
        sizes |= {"max_prompt_length": 64, "max_length": 112}
        arguments = {"model": str(folder / "lm"), **sizes, "append_eos": False}
        data["backbone"] = {"class_path": "plm.backbones.FreshCausalLM", "init_args": arguments}
        data["prompts_per_batch"] = 2
    data["shots"] = recipe["data"].get("shots", [0, 2])[:2]
    if source_of(path) in SMALL:
        data["source"] = {"init_args": SMALL[source_of(path)]}
    over: dict[str, Any] = {"data": data, "trainer": {"max_epochs": 2, "check_val_every_n_epoch": 2}}
    over["trainer"]["enable_progress_bar"] = False
    over["metrics"] = over["few_shot"] = {"num_resamples": 50}
    if "select" in recipe:
        over["select"] = {name: values[:2] for name, values in recipe["select"].items()}
    file = folder / "over.yaml"
    file.write_text(yaml.safe_dump(over))
    return file


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_header_says_what_it_is_what_it_needs_and_whether_it_ran(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert header[0] == f"# plm verify recipes/papers/{path.name}"
    told = " ".join(header)
    paper = read_paper(path)
    assert "# Data: " in told and "PLM_DATA" in told and ("Backbone: " in told or "PLM_POLICY" in told)
    assert re.search(r"Not run here: needs |Measured \d{4}-\d\d-\d\d", told)
    assert bool(paper.numbers) != ("No number in the specification" in told)
    assert len(text.splitlines()) <= 25 and max(map(len, text.splitlines())) <= 120


@pytest.mark.filterwarnings("ignore:posterior collapse|a latent without use")  # after two passes
@pytest.mark.parametrize("path", RUNS)
def test_recipe_is_verified_on_small_files_of_the_real_schema(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but what stands in for size differs from the recipe, and every number of the paper gets its verdict."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PLM_RESPONSES", str(tmp_path / "data/responses.jsonl"))
    recipe = f"recipes/papers/{path.name}"  # by the name of a shipped one
    assert main(["verify", recipe, "--dry"]) == 0
    asked = capsys.readouterr().out
    assert "pairs of" in asked if source_of(path) == "PetsPairs" else "data: not here" in asked and "PLM_DATA" in asked
    WRITERS[source_of(path)](tmp_path / "data")
    over = stand_in(path, tmp_path)
    assert main(["verify", recipe, "--dry", "--config", str(over)]) == 0
    assert re.search(r"data: .*: [\d,]+ pairs of \d+ users", capsys.readouterr().out)
    assert main(["verify", recipe, "--config", str(over)]) == 0
    shown = capsys.readouterr().out
    paper = read_paper(path)
    numbers = [name for named in paper.numbers.values() for name in named]
    verdicts = re.findall(
        r"(?:within|above|below, known artefact|below|too few users for an interval) *$", shown, re.MULTILINE
    )
    if path.stem == "lore_prism_code":
        assert verdicts[0].strip() == "below, known artefact"
    assert len(verdicts) == len(numbers) and ("nothing to compare with" in shown) == (not numbers)
    assert paper.artefact in shown and paper.differs in shown
    (run,) = tmp_path.glob("runs/*")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["verdicts"]
    if path.stem.startswith("lore_prism"):
        assert metrics["few_shot"]["shot_unit"] == "dialogue" and metrics["few_shot"]["shots"] == [0, 1]
    changed = re.findall(r"([\w.]+): [^:]*? instead of ", shown.split("this run differs from the recipe: ")[1])
    known = keys_of(yaml.safe_load(over.read_text()))
    assert changed and all(key in known or key.startswith("data.backbone.") for key in changed), changed
    assert main(["verify", recipe, "--results", run.name]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [
        line for line in shown[shown.index(paper.source) :].splitlines() if line
    ]
