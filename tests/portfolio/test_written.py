"""Portfolios of policies from the recipe to a text for a user, on a language model of ten thousand weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from plm.checkpoint import load_method
from plm.cli import main
from plm.data.rewards import Length, Style
from plm.evaluation import cluster_bootstrap
from plm.generation import sample
from plm.methods.clap import CLaP
from plm.portfolio.latents import LatentPortfolio
from plm.portfolio.policies import PolicyPortfolio
from plm.portfolio.sampled import SampledRewards
from plm.portfolio.training import LoRADPOFit
from plm.portfolio.written import WrittenMembers, own_mix_lines, own_mixes, simplex_covariance, undecided
from plm.recipe.defaults import read_config
from plm.testing import saved, tiny_causal_lm
from plm.types import UserState
from plm.users import UserStore

ROOT = Path(__file__).parents[2]
OBJECTIVES = {"small": "case", "tall": "-case", "brief": "-words"}
MODEL = ["--policies.backbone.class_path", "plm.backbones.CausalLM", "--policies.backbone.init_args.model"]


def samples(folder: Path, prompts: int = 30) -> Path:
    """Six responses to each prompt, of other lengths and with other shares of capitals; every third is of the test."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        texts = [
            " ".join(
                word.upper() if rng.random() < 0.5 else word for word in ["so", "it", "is", "so"][: rng.integers(1, 5)]
            )
            for _ in range(60)
        ]
        row = {"prompt": f"p{number}", "responses": list(dict.fromkeys(texts))[:6]}
        rows.append({**row, "split": "test" if number % 3 == 0 else "train"})
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(folder: Path, **options: object) -> SampledRewards:
    rewards = {"case": Style("lower_case"), "words": Length()}
    return SampledRewards(str(samples(folder)), rewards, OBJECTIVES, **{"value_prompts": 6, **options})  # type: ignore[arg-type]


def recipe(folder: Path, name: str = "palm_imdb", **policies: object) -> Path:
    """A recipe of the film reviews with other texts, rewards and people, and far less of everything."""
    config = read_config(ROOT / f"recipes/{name}.yaml")
    config["rewards"]["init_args"] |= {
        "path": str(samples(folder)),
        "rewards": {
            "case": {"class_path": "plm.data.rewards.Style", "init_args": {"rule": "lower_case"}},
            "words": {"class_path": "plm.data.rewards.Length"},
        },
        "objectives": OBJECTIVES,
        "people": {"anna": {"small": 1}, "ben": {"tall": 2}, "cem": {"brief": 1}},
        "value_prompts": 6,
    }
    config["policies"] |= {
        "backbone": {"class_path": "plm.backbones.CausalLM", "init_args": {"model": tiny_causal_lm().model}},
        "fit": {"epochs": 3, "rank": 4, "alpha": 8, "lr": 0.03, "beta": 0.1},
        "num_samples": 2,
        "max_new_tokens": 8,
        "cache_dir": str(folder / "cache"),
        **policies,
    }
    config |= {"seeds": 2, "sizes": [1, 3], "num_users": 20}
    path = folder / "recipe.json.yaml"
    path.write_text(json.dumps(config))
    return path


def test_from_the_recipe_to_a_text_for_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["portfolio", "--config", str(recipe(tmp_path))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Value of each policy" in shown and "Users: weights given, and learned from 6 pairs" in shown
    folder = tmp_path / "runs/portfolio/version_0"
    saved = json.loads((folder / "portfolio.json").read_text())
    num = len(saved["members"])
    assert saved["policies"]["oracle"] == "lora_dpo" and 1 <= num <= 3
    solved = saved["policies"]["solved"]
    assert 3 <= len(solved) <= 7 and {tuple(one["weights"]) for one in solved} >= {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    method = load_method(folder / "portfolio.ckpt")
    assert isinstance(method, PolicyPortfolio) and method.mixture.shape == (num, num)
    with (folder / "users.csv").open() as file:
        rows = {row["user_id"]: row for row in csv.DictReader(file)}
    values = np.eye(3) @ method.net.numpy().T
    assert [int(rows[name]["member"]) for name in ("anna", "ben", "cem")] == values.argmax(1).tolist()
    assert max(float(row["regret_within_oracle"]) for row in rows.values()) <= saved["certificate"] + 1e-5
    assert "no bound on the loss to others" in saved["certificate_says"] and "KL is free" in saved["certificate_says"]
    assert saved["certificate_says"] in shown and saved["shares_of"] == "3 users, those who are known"
    lost = saved["policies"]["held_out"]
    assert lost["num_prompts"] == 10 and list(lost["users"]) == ["anna", "ben", "cem"]
    for who, row in lost["users"].items():
        assert row["member"] == int(rows[who]["member"]) and row["to_policies"]["mean"] >= 0
        assert row["to_policies"]["mean"] <= lost["worst"]["to_policies"]["mean"] + 1e-9
    judged = json.loads((folder / "judge.json").read_text())
    assert judged["num_prompts"] == 10 and len(judged["own_mix"]) == num
    stranger = judged["texts"]["population"]
    assert stranger == list(judged["texts"].values())[2 + saved["cold_start"]]
    # texts of users are those of their members
    (tmp_path / "p.txt").write_text("p0\np3\n")
    asked = ["generate", "--ckpt_path", str(folder / "portfolio.ckpt"), "--prompts", "p.txt"]
    assert main([*asked, "--user", "anna", "cem", "--max_new_tokens", "12", "--output", "out.jsonl"]) == 0
    texts = {(row["prompt"], row["user_id"]): row["responses"][0] for row in map(json.loads, Path("out.jsonl").open())}
    for user in ("anna", "cem"):
        state = UserState({"member": torch.tensor([int(rows[user]["member"])] * 2)}, torch.zeros(2, dtype=torch.long))
        own = sample(method, ["p0", "p3"], state, max_new_tokens=12)
        assert [texts[prompt, user] for prompt in ("p0", "p3")] == [row[0].text for row in own]
    capsys.readouterr()
    assert main(["users", "list", "--ckpt_path", str(folder / "portfolio.ckpt")]) == 0
    assert capsys.readouterr().out == "anna\t0\nben\t0\ncem\t0\n"
    # a new user is learned from pairs, routed and stored
    pairs = [{"user_id": "new", "prompt": f"p{n}", "chosen": "so", "rejected": "SO IT IS SO"} for n in range(9)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert main(["adapt", "--ckpt_path", str(folder / "portfolio.ckpt"), "--pairs", "pairs.jsonl"]) == 0
    again = load_method(folder / "portfolio.ckpt")
    assert again.find_users is not None
    state = again.find_users(["new"])
    assert state.num_pairs.item() == 9 and state.tensors["weights"][0].argmin() == 1
    assert state.tensors["member"].item() == again.route(state.tensors["weights"])[0].item()  # type: ignore[operator]
    assert main(["export", "--ckpt_path", str(folder / "portfolio.ckpt"), "--user", "new", "--output", "peft"]) == 0
    assert Path("peft/adapter_model.safetensors").is_file()


def test_latents_are_members_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kilobytes of members of a CLaP model, routed; another language model is refused."""
    monkeypatch.chdir(tmp_path)
    clap = CLaP(1, 16, tiny_causal_lm().spec(), latent_dim=4, num_queries=2, encoder_layers=1)
    clap.configure_model()
    torch.nn.init.normal_(clap.encoder.head.weight, std=0.5)
    with saved(clap) as path:
        asked = ["portfolio", "--config", str(recipe(tmp_path, "palm_latent_imdb", clap=str(path)))]
        assert main([*asked, "--policies.clap", "null"]) != 0
        assert "policies.clap: expected the checkpoint of a CLaP model" in capsys.readouterr().err
        assert main([*asked, "--policies.clap", "gone.ckpt"]) != 0
        assert "got 'gone.ckpt', which does not exist" in capsys.readouterr().err
        assert main([*asked, "--policies.latent_fit.kl_coef", "0.01"]) == 0
        folder = tmp_path / "runs/portfolio/version_0"
        method = load_method(folder / "portfolio.ckpt")
        assert isinstance(method, LatentPortfolio) and method.points.shape[1] == 4
        assert (folder / "portfolio.ckpt").stat().st_size < 30_000
        assert UserStore(folder / "portfolio.users.db").ids == ["anna", "ben", "cem"]
        known = json.loads((folder / "portfolio.json").read_text())
        assert known["policies"]["oracle"] == "latent_dpo" and "(latent_dpo)" in known["certificate_says"]
        (tmp_path / "p.txt").write_text("p0\np3\n")
        command = ["generate", "--ckpt_path", str(folder / "portfolio.ckpt"), "--prompts", "p.txt", "--max_new_tokens"]
        assert main([*command, "8", "--user", "anna", "--output", "out.jsonl"]) == 0
        texts = [row["responses"] for row in map(json.loads, Path("out.jsonl").open())]
        member = method.user_states(torch.tensor([0, 0])).tensors["member"]
        assert method.find_users is not None and method.find_users(["anna"]).tensors["member"] == member[:1]
        latents = method.points[member]
        own = sample(load_method(path), ["p0", "p3"], UserState({"latent": latents}, member * 0), max_new_tokens=8)
        assert texts == [[one.text] for [one] in own]
        pairs = [{"user_id": "new", "prompt": f"p{n}", "chosen": "so", "rejected": "SO IT IS SO"} for n in range(9)]
        Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        assert main(["adapt", "--ckpt_path", str(folder / "portfolio.ckpt"), "--pairs", "pairs.jsonl"]) == 0
        again = load_method(folder / "portfolio.ckpt")
        assert again.find_users is not None
        assert again.find_users(["new"]).tensors["weights"][0].argmin() == 1
        other = tiny_causal_lm("llama").model
        capsys.readouterr()
        assert main([*asked, "--policies.backbone.init_args.model", other]) != 0
        assert "expected a CLaP model over policies.backbone" in capsys.readouterr().err


def test_prompts_of_the_three_parts_are_disjoint(tmp_path: Path) -> None:
    made = source(tmp_path)
    parts = [set(made.candidates(3).prompts), set(made.prompts_to_measure), set(made.prompts_to_judge)]
    assert [len(part) for part in parts] == [14, 6, 10] and len(set.union(*parts)) == 30
    assert parts[2] == {f"p{number}" for number in range(0, 30, 3)}
    assert set(made.candidates(3, "measure").prompts) == parts[1]


def test_objectives_are_signed_and_calibrated_on_the_prompts_to_choose_from(tmp_path: Path) -> None:
    """Another file of test prompts changes no scale; features of a text are the scores of the pool."""
    made = source(tmp_path)
    pool, fitted = made.candidates(3), made.split(3, None).calibration
    raw = [made._all.scores[row][..., 0] for row in made._parts[0]]
    assert fitted.shift[0] == pytest.approx(np.nanquantile(raw, 0.01))
    row, column = 3, 1
    text = pool.responses[pool.candidates[row, column]]
    read = made.features(3).represent([pool.prompts[row]], [text])
    assert isinstance(read, torch.Tensor)
    assert read[0].numpy() == pytest.approx(pool.scores[row, column], abs=1e-6)
    small, tall = pool.scores[..., 0], pool.scores[..., 1]
    assert np.nanmax(np.abs(small + tall - 1)) < 1e-9  # minus a reward, calibrated, is what is left of it


def test_people_are_points_of_the_simplex(tmp_path: Path) -> None:
    made = source(tmp_path, people={"a": {"brief": 3, "small": 1}, "b": {"tall": 0.5}}).deployment(3)
    assert made.user_ids == ["a", "b"] and made.weights.tolist() == [[0.25, 0, 0.75], [0, 1, 0]]
    assert made.backbone is not None and made.backbone["class_path"] == "plm.portfolio.features.RewardFeatures"


def test_a_member_is_compared_by_its_own_mix_with_the_best_of_the_others() -> None:
    values = np.random.default_rng(0).random((4, 30, 2))
    values[1, :, 0] += 1  # the first member is best by the first objective
    values[3, :, 1] += 1  # the third by the second, for which the second was made
    first, second, _ = own_mixes(values, np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), [2.0, 0.0, 1.0])
    assert first.gain[0] == pytest.approx((values[1] - values[0]).mean(0)[0])
    assert first.lead is not None and first.lead[1] > 0.5 and first.rival in (1, 2)
    low, high = cluster_bootstrap(values[2, :, 1] - values[3, :, 1])
    assert second.rival == 2 and second.lead is not None
    assert second.lead[1:] == pytest.approx((float(low), float(high))) and second.lead[2] < 0
    shown = own_mix_lines({"own_mix": [first._asdict(), second._asdict()]}, ["a", "b"])
    assert "better than member" in shown[0] and "WORSE than member 2" in shown[1]
    assert f"KL 2.0 nats, a gain of {first.gain[0] / 2:.3f} for each" in shown[0] and "KL" not in shown[1]
    (alone,) = own_mixes(values[:2], np.array([[1.0, 0.0]]), [0.5])
    assert alone.rival is None and alone.lead is None
    few = own_mixes(values[:3, :7], np.eye(2), [0.0, 0.0])
    shown = own_mix_lines({"own_mix": [mix._asdict() for mix in few]}, ["a", "b"])
    assert "nan" not in shown[0] and "no verdict, for want of 8 prompts, against member 1" in shown[0]


def test_covariance_of_weights_whose_sum_is_known() -> None:
    """The covariance of a normal vector given its sum, by conditioning."""
    draws = np.random.default_rng(0).normal(size=(8, 3))
    precision = draws.T @ draws
    whole = np.linalg.inv(precision)
    ones = np.ones(3)
    expected = whole - np.outer(whole @ ones, whole @ ones) / (ones @ whole @ ones)
    assert simplex_covariance(precision) == pytest.approx(expected)


def test_policies_need_sampled_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "recipes/palm_alpaca_eval.yaml")
    assert main(["portfolio", "--config", config, *MODEL, str(tmp_path)]) != 0
    assert "expected rewards to be SampledRewards, got RewardTable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"people": {"a": {"smal": 1}}}, "people.a: expected objectives .*, got 'smal'; did you mean 'small'?"),
        ({"people": {"a": {"small": -1}}}, "weights >= 0"),
        ({"value_prompts": 1}, "rewards.value_prompts: expected at least 2, got 1"),
        ({"sharpness": float("nan")}, "rewards.sharpness: expected a finite number of nats > 0, got nan"),
        ({"test_share": 1.0}, "rewards.test_share: expected a share between 0 and 1, got 1.0"),
    ],
)
def test_wrong_sources_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(tmp_path, **options)


@pytest.mark.parametrize(("given", "meant"), [("-wrds", "-words"), ("wrds", "words")])
def test_a_near_name_keeps_its_minus(given: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{given}'; did you mean '{meant}'\?"):
        SampledRewards("s.jsonl", {"case": Style("lower_case"), "words": Length()}, {"a": "case", "b": given})


def test_counts_and_rates_are_checked_before_anything_runs() -> None:
    with pytest.raises(ValueError) as error:
        WrittenMembers(tiny_causal_lm(), rounds=-1, num_samples=0, max_new_tokens=0)
    assert str(error.value).splitlines() == [
        "policies.rounds: expected at least 0, got -1",
        "policies.num_samples: expected at least 1, got 0",
        "policies.max_new_tokens: expected at least 1, got 0",
    ]
    with pytest.raises(ValueError) as error:
        LoRADPOFit(beta=0.0, rank=0, alpha=float("inf"), lr=float("nan"), epochs=0, pairs_per_step=-2)
    assert str(error.value).splitlines() == [
        "policies.fit.rank: expected at least 1, got 0",
        "policies.fit.epochs: expected at least 1, got 0",
        "policies.fit.pairs_per_step: expected at least 1, got -2",
        "policies.fit.beta: expected a finite number > 0, got 0.0",
        "policies.fit.alpha: expected a finite number > 0, got inf",
        "policies.fit.lr: expected a finite number > 0, got nan",
    ]


def test_a_recipe_with_a_wrong_count_gets_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(recipe(tmp_path))
    for args, message in (
        (["--policies.rounds", "-1"], "policies.rounds: expected at least 0, got -1"),
        (["--policies.fit.epochs", "0"], "policies.fit.epochs: expected at least 1, got 0"),
        (["--beta", "-1"], "beta: expected a finite number >= 0, got -1"),
    ):
        assert main(["portfolio", "--config", path, *args]) != 0
        shown = capsys.readouterr().err
        assert message in shown and "Traceback" not in shown and not (tmp_path / "runs").exists()


def test_fewer_objectives_are_for_people_who_weigh_no_others(tmp_path: Path) -> None:
    """Or for users whose weights are given."""
    people = {"a": {"small": 1, "tall": 3}, "b": {"tall": 2}}
    assert source(tmp_path, people=people).deployment(2).weights.tolist() == [[0.25, 0.75], [0, 1]]
    made = source(tmp_path, people={**people, "cem": {"brief": 1}})
    with pytest.raises(ValueError, match=r"rewards.people.cem weighs 'brief', got 2; .* --weights FILE"):
        made.deployment(2)
    found = made.deployment(2, (["x"], np.array([[0.5, 0.5]])))
    assert found.user_ids == ["x"] and found.weights.tolist() == [[0.5, 0.5]]


def test_what_nobody_can_tell_apart_is_said(tmp_path: Path) -> None:
    made = source(tmp_path)
    weights = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    (note,) = undecided(made.candidates(3), weights, list(OBJECTIVES), "the unaligned one")
    assert note.startswith("by 0.50 tall + 0.50 small all responses are worth the same") and note.endswith(
        "is the unaligned one"
    )
