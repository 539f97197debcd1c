"""plm judge: policies with planted habits, and the statistics against numpy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM, HashingBackbone, HFBackbone, Policy, RemotePolicy, TextWriter
from plm.checkpoint import load_method
from plm.cli import main
from plm.evaluation import cluster_bootstrap
from plm.generation import Sample, sample, sample_logps, sample_texts
from plm.judging import written
from plm.judging.compare import compare_policies, distinct
from plm.judging.tastes import read_tastes
from plm.judging.written import judge_users
from plm.method.policy import PolicyMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lore import LoRe
from plm.testing import saved
from plm.types import Context, PreferenceBatch, Tokens, UserState
from tests.http_servers import PolicyServer

Folder = Callable[[str], Path]
SHOUT, SPACE = ord("!") - 29, ord(" ") - 29
REWARDS = """
rewards:
  shouting: {class_path: plm.data.rewards.Style, init_args: {rule: exclamations}}
  words: {class_path: plm.data.rewards.Length}
people:
  loud: {shouting: 1}
  wordy: {words: 1}
  quiet: {shouting: -2}
"""


class Biased(PolicyMethod):
    """Each user has a habit: scores that are added to some tokens."""

    def __init__(self, num_users: int, feature_dim: int, backbone: dict[str, Any] | None = None, lr: float = 0.1):
        super().__init__(num_users=num_users, feature_dim=feature_dim, backbone=backbone, lr=lr)

    def writing(self, users: UserState, prompts: Sequence[str]) -> TextWriter:
        return BiasedWriting(self.policy.write(), users.tensors["bias"])

    def user_states(self, user_index: Tensor) -> UserState:
        bias = torch.zeros(2, 98)
        bias[0, SHOUT], bias[1, SPACE] = 3.0, 3.0
        return UserState({"bias": bias[user_index]}, torch.ones_like(user_index))

    def population_state(self, num_users: int) -> UserState:
        return UserState({"bias": torch.zeros(num_users, 98)}, torch.zeros(num_users).long())

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        raise NotImplementedError

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        raise NotImplementedError

    def _adapt(self, context: Context) -> UserState:
        return self.population_state(context.num_users)


class BiasedWriting:
    def __init__(self, inner: TextWriter, bias: Tensor) -> None:
        self.inner, self.bias = inner, bias

    def start(self, prompts: Tokens) -> Tensor:
        return self.inner.start(prompts) + self.bias

    def step(self, token: Tensor) -> Tensor:
        return self.inner.step(token) + self.bias

    def take(self, rows: Tensor) -> None:
        self.inner.take(rows)
        self.bias = self.bias[rows]


def test_differences_and_their_intervals_resample_prompts() -> None:
    values = np.random.default_rng(0).normal(size=(4, 12, 4, 3))
    values[2, :, :, 0] += 2
    out = compare_policies(values, ["a", "z"], ["a", "b", "c"])
    means = values.mean(2)
    assert out["unaligned"]["b"] == pytest.approx(means[0, :, 1].mean())
    gain = means[2] - means[0]
    numbers = out["users"]["a"]["people"]["a"]
    assert numbers["mean"] == pytest.approx(means[2, :, 0].mean())
    assert numbers["difference"] == pytest.approx(gain[:, 0].mean())
    low, high = cluster_bootstrap(gain[:, 0])
    assert (numbers["difference_low"], numbers["difference_high"]) == pytest.approx((float(low), float(high)))
    assert numbers["difference_low"] > 1
    assert out["users"]["a"]["own_minus_others"] == pytest.approx((gain[:, 0] - gain[:, 1:].mean(1)).mean())
    assert list(out["users"]["z"]) == ["people"]  # nobody's values are called z
    population, own = means[1], out["users"]["a"]
    assert own["own_minus_population"] == pytest.approx((means[2] - population)[:, 0].mean())
    assert own["own_minus_population_low"] == pytest.approx(float(cluster_bootstrap((means[2] - population)[:, 0])[0]))
    assert out["population"]["people"]["b"]["difference"] == pytest.approx((population - means[0])[:, 1].mean())
    few = compare_policies(values[:, :5], ["a", "z"], ["a", "b", "c"])["users"]["a"]
    assert np.isnan(few["people"]["a"]["difference_low"]) and np.isnan(few["own_minus_others_high"])


def test_distinct_runs_of_words() -> None:
    assert distinct(["a b a b", "a b"], 1) == 2 / 6
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert np.isnan(distinct(["a", ""], 2))


@pytest.fixture
def checkpoint(causal_lm: Folder) -> Any:
    method = Biased(2, 16, CausalLM(str(causal_lm("gpt2"))).spec())
    method.user_ids = ["loud", "wordy"]
    method.configure_model()
    with saved(method) as path:
        yield path


def command(checkpoint: Path, tmp_path: Path, *extra: str) -> list[str]:
    rows = [{"prompt": f"text {n}", "split": "test" if n % 2 else "train"} for n in range(24)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(REWARDS)
    files = ["--prompts", str(tmp_path / "p.jsonl"), "--rewards", str(tmp_path / "r.yaml")]
    sizes = ["--num_samples", "5", "--max_new_tokens", "30", "--output", str(tmp_path / "out")]
    return ["judge", "--ckpt_path", str(checkpoint), *files, *sizes, *extra]


def test_planted_habits_are_found(
    checkpoint: Path, causal_lm: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match=r"\['quiet'\] are no users of"):
        assert main(command(checkpoint, tmp_path, "--min_new_tokens", "30")) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert (result["num_prompts"], result["num_samples"]) == (12, 5) and list(result["users"]) == ["loud", "wordy"]
    prompts = [f"text {n}" for n in range(1, 24, 2)]
    policy = Policy(CausalLM(str(causal_lm("gpt2"))))
    base = sample(policy, prompts, num_samples=5, max_new_tokens=30, min_new_tokens=30)
    about = result["texts"]["unaligned"]
    flat = [one for row in base for one in row]
    words = np.array([[len(one.text.split()) for one in row] for row in base])
    assert about["words"] == pytest.approx(words.mean()) == about["rewards"]["words"]
    logps = sample_logps(policy, [prompt for prompt in prompts for _ in range(5)], flat).sum()
    assert about["perplexity"] == pytest.approx(float(torch.exp(-logps / (30 * 60))), rel=1e-4)
    assert result["unaligned"] == pytest.approx({"loud": 0, "wordy": 0, "quiet": 0}, abs=1e-9)  # their own mean
    for user, other in (("loud", "wordy"), ("wordy", "loud")):
        numbers = result["users"][user]
        assert numbers["people"][user]["difference_low"] > 1
        assert numbers["own_minus_others_low"] > 0
        assert numbers["people"][other]["difference"] < numbers["people"][user]["difference"]
    loud, quiet = (result["users"]["loud"]["people"][name]["difference"] for name in ("loud", "quiet"))
    assert quiet == pytest.approx(-2 * loud)
    wordy = result["texts"]["wordy"]["words"]
    expected = (wordy - words.mean()) / words.std()
    assert result["users"]["wordy"]["people"]["wordy"]["difference"] == pytest.approx(expected)
    report = (tmp_path / "out" / "judge.md").read_text()
    assert f"| loud | **{loud:+.2f} [" in report and "12 held-out prompts, 5 texts of each policy" in report
    assert result["texts"]["population"] == result["texts"]["unaligned"]  # no habit
    own = result["users"]["loud"]
    assert own["own_minus_population"] == pytest.approx(own["people"]["loud"]["difference"])
    assert result["samples"][0]["prompt"] == "text 1" and "policy of" in shown


@pytest.mark.parametrize("is_served", [False, True])
def test_texts_of_any_policy_are_chosen_by_the_reward_of_a_method(
    causal_lm: Folder, tmp_path: Path, is_served: bool
) -> None:
    """The best of every three by their own reward, empty ones aside; the unaligned policy gives the first of three."""
    torch.manual_seed(0)
    method = LoRe(2, 24, backbone=HashingBackbone(dim=24, ngrams=2).spec(), num_bases=3)
    method.user_ids = ["anna", "ben"]
    method.weights.normal_()
    method.bases.data.normal_()
    prompts, folder, server = [f"text {n}" for n in range(1, 24, 2)], str(causal_lm("gpt2")), PolicyServer()
    with server.running(), saved(method) as path:
        policy = ["--policy_url", server.url] if is_served else ["--policy", folder]
        rewards = {
            user: {
                "class_path": "plm.learned_rewards.MethodReward",
                "init_args": {"ckpt_path": str(path), "user": None if user == "population" else user},
            }
            for user in ("anna", "ben", "population")
        }
        judge = command(path, tmp_path, *policy, "--best_of", "3", "--num_samples", "2", "--user", "anna", "ben")
        judge[judge.index("--rewards") + 1] = json.dumps({"rewards": rewards})
        assert main(judge) == 0
        drawn = {"num_samples": 6, "max_new_tokens": 30}
        texts = sample_texts(RemotePolicy(server.url) if is_served else Policy(CausalLM(folder)), prompts, **drawn)
        loaded, pool = load_method(path), [text for row in texts for text in row]
        scores = {
            user: loaded.score(
                pool,
                user_id=None if user == "population" else user,
                prompts=[prompt for prompt in prompts for _ in range(6)],
            )
            .reshape(12, 2, 3)
            .numpy()
            .astype(float)
            for user in rewards
        }
    empty = np.array([not text for text in pool]).reshape(12, 2, 3)
    assert len(server.bodies) == 2 * 12 * 6 * is_served
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert result["settings"]["best_of"] == 3 and (result["num_prompts"], result["num_samples"]) == (12, 2)
    for writer, entry in {"population": result["population"], **result["users"]}.items():
        best = np.where(empty, -np.inf, scores[writer]).argmax(-1)[..., None]
        for person, found in entry["people"].items():
            first, chosen = scores[person][..., 0], np.take_along_axis(scores[person], best, -1)
            assert found["difference"] == pytest.approx((chosen.mean() - first.mean()) / first.std(), abs=1e-5)
    assert result["users"]["anna"]["people"]["anna"]["difference_low"] > 0
    report = (tmp_path / "out" / "judge.md").read_text()
    assert (result["texts"]["anna"]["perplexity"] is None) == is_served and "| nan |" not in report


@pytest.mark.parametrize("best_of", [1, 2])
def test_an_empty_text_is_chosen_where_there_is_no_other(
    causal_lm: Folder, monkeypatch: pytest.MonkeyPatch, best_of: int
) -> None:
    """Of a method that cannot read it: one unlucky prompt does not end the rest."""
    torch.manual_seed(0)
    method = LoRe(1, 16, backbone=HFBackbone(str(causal_lm("gpt2")), template="response").spec(), num_bases=2)
    method.user_ids = ["anna"]
    method.weights.normal_()
    method.bases.data.normal_()
    prompts, texts = ["a", "b", "c"], [["", ""], ["", "two words"], ["one", "three short words"]]
    pool = [[Sample(text, (1,)) for text in row] for row in texts]
    monkeypatch.setattr(written, "sample", lambda *_, **__: pool)
    tastes = read_tastes("{rewards: {words: {class_path: Length}}}", [])
    policy = Policy(CausalLM(str(causal_lm("gpt2"))))
    with saved(method) as path:
        loaded = load_method(path)
        found = judge_users(
            loaded, tastes, prompts, ["anna"], num_samples=2 // best_of, settings={}, policy=policy, best_of=best_of
        )
        better = {
            user: int(loaded.score(texts[2], prompts="c", **known).argmax())
            for user, known in {"population": {}, "anna": {"user_id": "anna"}}.items()
        }
        with pytest.raises(ValueError, match="expected best_of=1 without a policy whose texts are chosen from, got 4"):
            judge_users(loaded, tastes, prompts, ["anna"], num_samples=1, settings={}, best_of=4)
    shown = [{name: text for name, text in row.items() if name != "prompt"} for row in found["samples"]]
    assert shown[0] == {"unaligned": "", "population": "", "anna": ""}
    if best_of == 1:
        assert found["texts"]["anna"] == found["texts"]["unaligned"]
        return
    assert shown[1] == {"unaligned": "", "population": "two words", "anna": "two words"}
    assert shown[2] == {"unaligned": "one", **{user: texts[2][place] for user, place in better.items()}}


def test_what_cannot_be_judged_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = command(checkpoint, tmp_path)
    short = ["--max_new_tokens", "3"]

    def told(*extra: str, change: dict[str, str] | None = None, status: int = 1) -> str:
        changed = [(change or {}).get(word, word) for word in good]
        assert main([*changed, *short, *extra]) == status
        return capsys.readouterr().err

    rewards = good[good.index("--rewards") + 1]
    assert "no user 'lod' beside" in told("--user", "lod")
    assert "--num_samples: expected an integer >= 1, got 0" in told("--num_samples", "0", status=2)
    one = "{rewards: {zebra: {class_path: Lexicon, init_args: {words: [zebra]}}}}"
    assert "none of the people ['zebra'] is a user of" in told(change={rewards: one})
    assert "rewards ['zebra'] are the same for all texts" in told("--user", "loud", change={rewards: one})
    assert "expected a .yaml file or text like {rewards: {length" in told(change={rewards: "Length"})
    assert "got the keys ['words']" in told(change={rewards: "{words: Length}"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {source: {class_path: PairFiles}}")
    assert "expected data.source to be plm.data.sources.sampled.SampledPairs, got 'PairFiles'" in told(
        change={rewards: str(recipe)}
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "split": "train"}\n')
    assert "expected prompts of split test in" in told()
    with saved(BradleyTerry(1, 4)) as path:
        (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
        assert "BradleyTerry has no policy that writes: give --policy MODEL --best_of N" in told(
            change={str(checkpoint): str(path)}
        )
