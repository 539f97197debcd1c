"""``plm portfolio``: both recipes on small stand-in data, what they leave behind, and messages for mistakes."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from plm.checkpoint import KnownUsers, load_method
from plm.cli import main
from plm.portfolio.objectives import RewardTable, read_weights
from plm.portfolio.study import estimate
from plm.recipe.defaults import read_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("palm_*.yaml"))
FEW = ["--seeds", "2", "--sizes", "[1, 3]", "--size", "3", "--num_users", "50"]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reward table with the columns of the recipe: 40 prompts, 6 responses, two of which lack a number."""
    rng = np.random.default_rng(0)
    columns = read_config(ROOT / "recipes/palm_alpaca_eval.yaml")["rewards"]["init_args"]["objectives"].values()
    data = {name.removeprefix("-"): rng.normal(50, 20, 240) for name in columns}
    data["n_words"][:2] = np.nan
    folder = tmp_path / "data" / "alpaca_eval"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"prompt_id": np.repeat(np.arange(40), 6), **data}), folder / "responses.parquet")
    monkeypatch.setenv("PLM_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return folder / "responses.parquet"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_has_command_hardware_and_numbers(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert re.fullmatch(rf"# plm portfolio --config recipes/{path.name}( --size 5)?", header[0])
    text = " ".join(header)
    assert "cores" in text and ("seconds" in text or "minutes" in text) and "[" in text
    assert "policies:" in path.read_text() or ("random" in text and "lattice" in text)
    assert len(path.read_text().splitlines()) <= 25


def test_alpaca_recipe(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = tmp_path / "users.jsonl"
    users.write_text('{"user_id": "anna", "weights": [2, 1, 1]}\n{"user_id": "ben", "weights": [0, 0, 1]}\n')
    recipe = str(ROOT / "recipes/palm_alpaca_eval.yaml")
    assert main(["portfolio", "--config", recipe, *FEW, "--num_objectives", "[3]", "--weights", str(users)]) == 0
    folder = tmp_path / "runs/portfolio/version_0"
    shown = capsys.readouterr().out
    assert "size 3: worst-case regret is" in shown and "certificate" in shown
    for name in ("regret.png", "simplex.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((folder / "portfolio.json").read_text())
    assert saved["objectives"] == ["judge", "brief", "lists"] and len(saved["members"]) <= 3
    assert sum(member["share"] for member in saved["members"]) == pytest.approx(1)
    study = json.loads((folder / "study.json").read_text())
    one, three = study["sizes"]
    assert three["held_out"]["PALM"]["worst"]["mean"] < one["held_out"]["PALM"]["worst"]["mean"]
    assert {row["search"]: row["calls"] for row in study["searches"]}["grid"] == 127
    # shares are of the two who are known, though too few for the study's sizes
    shown = " ".join(shown.split())
    assert "known are 2, fewer than the largest size 3" in shown and "over 2 users, those who are known" in shown
    assert saved["shares_of"] == "2 users, those who are known" and {
        member["share"] for member in saved["members"]
    } <= {0, 0.5, 1}
    assert "any way of picking among the candidates" in saved["certificate_says"]
    method = load_method(folder / "portfolio.ckpt")
    assert method.find_users is not None
    state = method.find_users(["ben", "anna"]).tensors
    assert state["weights"].tolist() == [[0, 0, 1], [0.5, 0.25, 0.25]]
    users_of = ["--ckpt_path", str(folder / "portfolio.ckpt")]
    capsys.readouterr()
    assert main(["users", "list", *users_of]) == 0
    assert capsys.readouterr().out == "anna\t0\nben\t0\n"
    assert main(["users", "export", *users_of, "--output", "out.jsonl"]) == 0
    exported = [json.loads(line)["state"]["weights"] for line in Path("out.jsonl").open()]
    assert exported == [[0.5, 0.25, 0.25], [0, 0, 1]]
    with (folder / "users.csv").open() as file:
        rows = {row["user_id"]: row for row in csv.DictReader(file)}
    assert [int(rows[name]["member"]) for name in ("ben", "anna")] == state["member"].tolist()
    assert max(float(row["certified_regret"]) for row in rows.values()) <= saved["certificate"] + 1e-5
    assert main(["users", "delete", *users_of, "--user", "ben"]) == 0
    kept = load_method(folder / "portfolio.ckpt").find_users
    assert isinstance(kept, KnownUsers) and kept.store.ids == ["anna"]
    assert "ben" not in (folder / "users.csv").read_text()
    with (folder / "sweep.csv").open() as file:
        sweep = list(csv.DictReader(file))
    rewards = np.array([member["rewards"] for member in saved["members"]])
    assert len(sweep) == 66  # 12 over 2
    for row in sweep:
        weights = np.array([float(row[f"{name} weight"]) for name in saved["objectives"]])
        assert int(row["member"]) == (rewards @ weights).argmax()
        assert float(row["judge reward"]) == pytest.approx(rewards[int(row["member"]), 0], abs=1e-5)


def test_an_accuracy_gets_its_cell_cover_and_guarantee(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Closed forms without KL: eps' = eps / 2, delta' = delta / (2 R_max), and the loss of a cell."""
    recipe = str(ROOT / "recipes/palm_alpaca_eval.yaml")
    assert (
        main(["portfolio", "--config", recipe, *FEW, "--num_objectives", "[3]", "--eps", "0.4", "--delta", "0.3"]) == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    saved = json.loads((tmp_path / "runs/portfolio/version_0/portfolio.json").read_text())
    guarantee, shift = saved["guarantee"], saved["calibration"]
    raw = RewardTable(str(tables), read_config(Path(recipe))["rewards"]["init_args"]["objectives"])._raw[..., :3]
    rewards = np.clip((raw - shift["shift"]) / shift["scale"], 0, 1)
    most = float(np.nanmax(rewards.sum(2), axis=1).mean())
    eps, delta = 0.2, math.floor(0.3 / (2 * most) * 1e4) / 1e4  # four digits, as it is between 0.1 and 1 or below
    assert guarantee["max_reward"] == pytest.approx(most) and guarantee["max_cost"] == guarantee["oracle_error"] == 0
    assert guarantee["cell"]["eps"] == eps and guarantee["cell"]["delta"] == pytest.approx(delta, abs=1e-4)
    levels = 2 + math.ceil(math.log(1 / guarantee["cell"]["delta"]) / math.log(1 + eps))
    assert guarantee["grid_size"] == levels**3 - (levels - 1) ** 3 > guarantee["cover"]["size"] >= 3
    loss = {"eps": 1 - 0.8 / 1.2, "delta": 2 * guarantee["cell"]["delta"] * most / 1.2}
    assert guarantee["loss"] == pytest.approx(loss) and loss["delta"] <= 0.3
    assert guarantee["within_accuracy"] == (guarantee["beyond"] <= 0.3) and guarantee["members"] == len(
        saved["members"]
    )
    assert f"Cell: eps' 0.2, delta' {guarantee['cell']['delta']:g}" in shown
    assert f"Certified cover: {guarantee['cover']['size']} weights, each checked exactly" in shown
    assert f"nobody loses more than 33.33% of the best value and {loss['delta']:.4g} besides" in shown
    assert "Searches to a loss of 0.3 besides 40.00% of the best value" in shown


def test_two_numbers_of_objectives_and_no_users(tables: Path, tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes/palm_alpaca_eval.yaml")
    assert main(["portfolio", "--config", recipe, *FEW, "--num_objectives", "[2, 4]", "--search", "lazy",
                 "--cell", "[0.8, 0.4]", "--solver", "milp", "--beta", "0.1"]) == 0  # fmt: skip
    for num in (2, 4):
        folder = tmp_path / f"runs/portfolio/version_0/d{num}"
        method = load_method(folder / "portfolio.ckpt")
        assert main(["users", "list", "--ckpt_path", str(folder / "portfolio.ckpt")]) == 0
        assert method.num_users == 0 and not (folder / "users.csv").exists()
        members = json.loads((folder / "portfolio.json").read_text())["members"]
        assert all(len(member["weights"]) == num and member["cost"] > 0 for member in members)
        assert method.population_state(1).tensors["member"].item() < len(members)
        saved = json.loads((folder / "portfolio.json").read_text())
        assert saved["shares_of"] == "50 users, drawn from the simplex"
        assert saved["certificate_says"].endswith("a nat of KL costs 0.1")


@pytest.mark.filterwarnings("ignore")
def test_lore_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer is trained first; the saved portfolio scores text for its users."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLM_FIT__DATA__CACHE_DIR", str(tmp_path / "cache"))
    source = {"class_path": "plm.data.sources.synthetic.SyntheticPairs",
              "init_args": {"num_users": 24, "pairs_per_user": 20}}  # fmt: skip
    Path("lore.yaml").write_text(
        json.dumps(
            {
                "defaults": [{"backbone": "hashing"}, {"trainer": "cpu"}],
                "model": {"class_path": "plm.methods.lore.PublishedLoRe", "init_args": {"num_bases": 3}},
                "data": {"source": source, "backbone": {"init_args": {"dim": 32}}},
                "trainer": {"max_epochs": 2, "logger": False},
            }
        )
    )
    over = {"rewards": {"init_args": {"recipe": "lore.yaml", "source": source, "candidates": 2, "slates": 40}}}
    Path("over.yaml").write_text(json.dumps(over))
    recipe = str(ROOT / "recipes/palm_lore_polis.yaml")
    assert main(["portfolio", "--config", recipe, "--config", "over.yaml", *FEW]) == 0
    folder = tmp_path / "runs/portfolio/version_0"
    scorer, method = load_method(folder / "scorer/scorer.ckpt"), load_method(folder / "portfolio.ckpt")
    assert method.user_ids == scorer.user_ids
    weights = scorer.user_states(torch.arange(5)).tensors["weights"]
    assert torch.allclose(method.user_states(torch.arange(5)).tensors["weights"], weights, atol=1e-5)
    members = torch.tensor([m["weights"] for m in json.loads((folder / "portfolio.json").read_text())["members"]])
    text = ["Be careful, perhaps.", "For example, a joke."]
    state = method.user_states(torch.zeros(2, dtype=torch.long))
    mix = scorer.user_states(torch.zeros(2, dtype=torch.long))
    mix.tensors["weights"] = members[state.tensors["member"]].float()
    assert scorer.encode is not None
    expected = scorer.score(scorer.encode(["", ""], text), mix)
    rewards = method.score(text, user_id=method.user_ids[0])  # bases are centred, and the portfolio's mixes are not
    assert torch.allclose(rewards.diff(), expected.diff(), atol=1e-4)


def test_calibration_uses_the_choosing_half(tables: Path) -> None:
    source = RewardTable(str(tables), {"long": "n_words", "brief": "-n_words"})
    split = source.split(2, np.random.default_rng(0))
    assert split.train.shape == split.test.shape == (20, 6, 2)
    flat = split.train[np.isfinite(split.train).all(2)]
    assert flat.min() == 0 and flat.max() == 1 and flat.sum(1) == pytest.approx(np.ones(len(flat)))
    everything = source.split(2, None).train
    assert np.isnan(everything).any(2).sum() == 2


def test_responses_without_all_numbers_are_counted(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RewardTable(str(tables), {"long": "n_words", "plain": "flesch"}).split(2, None)
    assert "2 of 240 responses are left out" in capsys.readouterr().out
    RewardTable(str(tables), {"plain": "flesch", "hard": "-flesch"}).split(2, None)
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompts", "values", "message"),
    [
        ([0, 0, 1, 2], [1.0, 2.0, 3.0, 4.0], "expected at least 2 prompts with 2 or more complete responses, got 1; "),
        (
            [0, 0, 1, 1],
            [1.0, 2.0, 3.0, np.nan],
            "expected at least 2 prompts with 2 or more complete responses, got 1; ",
        ),
        ([], [], "expected at least 2 prompts with 2 or more complete responses, got 0; "),
        ([0, 0, 1, 1], ["a", "b", "c", "d"], "expected numbers in the column 'x', got 'a'"),
        ([0, 0, 1, 1], [None, "1", "2", "3"], "expected numbers in the column 'x', got '1'"),
        ([0, 0, 1, 1], [[1.0], [2.0], [3.0], [4.0]], r"expected numbers in the column 'x', got \[1.0\]"),
        ([0, 0, 1, 1], [None, None, None, None], "expected numbers in the column 'x', got None"),
        ([0, 0, 1, 1], [np.nan, np.inf, np.nan, -np.inf], "expected numbers in the column 'x', got nan"),
    ],
)
def test_tables_that_nothing_can_be_chosen_from(tmp_path: Path, prompts: list[int], values: Any, message: str) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"p": prompts, "x": values, "y": np.arange(len(prompts), dtype=np.float64)}), path)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        RewardTable(str(path), {"x": "-x", "y": "y"}, prompt="p").split(2, None)


def test_intervals_over_seeds() -> None:
    """Student's t with two degrees of freedom: 4.303."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.high - 2) == pytest.approx((2.0, 4.3027 / 3**0.5), abs=1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "0"], "numbers >= 1"),
        (["--num_objectives", "[9]"], "from 2 to 6"),
        (["--rewards.objectives", "{a: n_word, b: flesch, c: list_items}"], "did you mean 'n_words'"),
        (["--search", "grid", "--num_objectives", "[5]"], "9,031 weights"),
        (["--weights", "bad.jsonl"], 'bad.jsonl:1: expected {"user_id": non-empty text'),
        (["--weights", "bad.jsonl", "--num_objectives", "[3, 5]"], "num_objectives: expected one number with weights"),
        (["--rewards.objectives", "{a: -n_word, b: flesch, c: list_items}"], "did you mean '-n_words'"),
        (["--cell", "[0, 0.2]"], "cell: expected two slacks > 0"),
        (["--max_calls", "0"], "max_calls: expected at least 1, got 0"),
        (["--eps", "1"], "eps: expected a share in [0, 1), got 1"),
        (["--sise", "3"], "no option '--sise'; did you mean '--size'"),
    ],
)
def test_mistakes_get_one_message(
    tables: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    Path("bad.jsonl").write_text('{"user_id": "x", "weights": [1, -1, 1]}\n')
    recipe = str(ROOT / "recipes/palm_alpaca_eval.yaml")
    assert main(["portfolio", "--config", recipe, "--seeds", "1", "--num_objectives", "[3]", *args]) != 0
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("version_*"))


def test_too_many_objectives_and_users_who_weigh_others(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes/palm_alpaca_eval.yaml")
    names = ["n_words", "-n_words", "flesch", "-flesch", "list_items", "-list_items", "judge_logit"]
    objectives = "{" + ", ".join(f"o{place}: {name}" for place, name in enumerate(names)) + "}"
    asked = ["portfolio", "--config", recipe, "--num_objectives", "null", "--rewards.objectives"]
    assert main([*asked, objectives]) == 1
    message = "7 objectives, at most 6 are possible: leave 1 out of rewards.objectives, or give --num_objectives [6]"
    assert message in capsys.readouterr().err
    Path("two.jsonl").write_text('{"user_id": "x", "weights": [1, 1]}\n')
    assert main([*asked, "{a: n_words, b: flesch, c: list_items}", "--weights", "two.jsonl"]) == 1
    assert "--weights: expected 3 weights of each user, of a, b, c, got 2" in capsys.readouterr().err
    assert not list(Path().rglob("version_*"))


def test_given_users_all_bad_lines_at_once(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    bad = [
        '{"user_id": "b"}',
        '{"user": "b", "weights": [1, 1]}',
        '{"user_id": null, "weights": [1, 1]}',
        '{"user_id": " ", "weights": [1, 1]}',
        '{"user_id": "b", "weights": "1, 1"}',
        '{"user_id": "b", "weights": ["1", 1]}',
        '{"user_id": "b", "weights": [true, 1]}',
        '{"user_id": "b", "weights": [1, 1, 1]}',
        '{"user_id": "b", "weights": [1, -1]}',
        '{"user_id": "b", "weights": [0, 0]}',
        '{"user_id": "b", "weights": [Infinity, 0]}',
        '{"user_id": "b", "weights": [NaN, 1]}',
        '{"user_id": "b", "weights": [1e308, 1e308]}',
        '{"user_id": "b", "weights": [1' + "0" * 400 + ", 1]}",
    ]
    others = ["[1, 2]", "not JSON", '{"user_id": "a", "weights": [1, 0]}']
    path.write_text("\n".join(['{"user_id": "a", "weights": [3, 1]}', *bad, *others]) + "\n")
    for num in (2, None):  # without a number all must weigh as many as the first
        with pytest.raises(ValueError) as caught:
            read_weights(str(path), num)
        first, *lines = str(caught.value).splitlines()
        assert first == f"--weights: {len(bad) + 3} malformed rows"
        expected = '{"user_id": non-empty text, "weights": [2 finite numbers >= 0, not all 0]}'
        for number, line in enumerate(lines[: len(bad)], start=2):
            is_json = not any(name in bad[number - 2] for name in ("Infinity", "NaN"))
            wrong = f"expected {expected}, got {{'user" if is_json else "malformed JSON ("
            assert line.startswith(f"{path}:{number}: {wrong}"), line
        assert "expected a JSON object, got [1, 2]" in lines[-3] and "malformed JSON" in lines[-2]
        assert lines[-1].endswith("expected each user once, got 'a' again")
    path.write_text('{"user_id": "a", "weights": [3, 1]}\n\n{"user_id": 7, "weights": [0, 0.5]}\n')
    ids, weights = read_weights(str(path), 2)
    assert ids == ["a", "7"] and weights.tolist() == [[0.75, 0.25], [0, 1]]


@pytest.mark.parametrize("name", ["gone.jsonl", "folder.jsonl", "empty.jsonl", "text.txt"])
def test_files_of_users_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for file in ("empty.jsonl", "text.txt"):
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"^--weights: .*{name}"):
        read_weights(str(tmp_path / name), 2)


def test_given_users_are_read_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes/palm_lore_polis.yaml")
    assert main(["portfolio", "--config", recipe, "--rewards.init_args.recipe", "x.yaml", "--weights", "a.jsonl"]) == 1
    assert "--weights: expected a file, got 'a.jsonl', which does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.real
@pytest.mark.slow
def test_alpaca_recipe_reaches_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(os.environ.get("PLM_DATA", ROOT / "../shared/data")).resolve()
    if not (data / "alpaca_eval").is_dir():
        pytest.skip(f"no alpaca_eval in {data}; set PLM_DATA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLM_DATA", str(data))
    assert main(["portfolio", "--config", str(ROOT / "recipes/palm_alpaca_eval.yaml"), "--sizes", "[5]"]) == 0
    for num, most in ((3, 0.04), (5, 0.07)):
        study = json.loads((tmp_path / f"runs/portfolio/version_0/d{num}/study.json").read_text())
        (row,) = study["sizes"]
        assert row["held_out"]["PALM"]["worst"]["mean"] < most
        assert min(row["baseline_minus_palm"][way]["low"] for way in ("random", "lattice")) > 0
