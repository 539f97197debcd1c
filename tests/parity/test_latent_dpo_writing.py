"""Latent people write: many in one batch, each text from a draw of its own, and mixtures of people."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.checkpoint import load_method
from plm.cli import main
from plm.generation import sample
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.methods.latent_dpo.maths import Gaussian, implicit_rewards
from plm.testing import saved
from plm.types import Context, UserState

WIDTH, PROMPTS = 16, ["how is it", "tell me of the sea, please", "no"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def clap(steered: Callable[[int], CLaP]) -> Iterator[Path]:
    with saved(steered(WIDTH)) as path:
        yield path


def people(clap: Path, **options: Any) -> LatentDPO:
    """Two people with random policies."""
    spec = ClapLatents(str(clap)).spec()
    method = LatentDPO(2, 2 * WIDTH, spec, prompt_dim=16, **options)
    method.user_ids = ["anna", "ben"]
    torch.manual_seed(1)
    method.policies.data.normal_()
    method.num_pairs.fill_(7)
    return method


@pytest.fixture(scope="module")
def checkpoint(clap: Path) -> Iterator[Path]:
    with saved(people(clap)) as path:
        yield path


def test_everybody_writes_as_if_alone(checkpoint: Path) -> None:
    """Users and prompts share a batch; each text has a latent of its own, from its user's policy at its prompt."""
    method = load_method(checkpoint)
    asked, users = PROMPTS * 3, [user for user in ("anna", "ben", "zoe") for _ in PROMPTS]
    with pytest.warns(UserWarning, match="treated as the population: 'zoe'"):
        together = sample(method, asked, user_id=users, num_samples=2, **SETTINGS)
    for place in (0, 3, 4):
        alone = sample(method, [asked[place]], user_id=users[place], num_samples=2, **SETTINGS)
        assert alone == together[place : place + 1]
    assert together[6:] == sample(method, PROMPTS, num_samples=2, **SETTINGS)
    assert together[:3] != together[3:6] and together[:3] != together[6:] and together[3:6] != together[6:]


def test_latents_come_from_the_policy_and_of_strangers_from_that_of_the_population(clap: Path) -> None:
    keys = every = torch.arange(4000)
    for temperature in (1.0, 0.5, 0.0):
        method = people(clap, latent_temperature=temperature, variance="free")
        method.population.copy_(method.policies[0])
        with saved(method) as path:
            loaded = load_method(path)
            assert isinstance(loaded, LatentDPO) and loaded.encode_prompts is not None
            features = loaded.encode_prompts(PROMPTS[:1])
            own = loaded.user_states(torch.tensor([1])).take(torch.zeros(4000).long())
            policy = loaded.latent_policies(own.take(torch.tensor([0])), features)
            drawn = loaded.latent_states(own, every, PROMPTS[:1] * 4000, keys).tensors["latent"]
            nobody = loaded.latent_states(loaded.population_state(1), 0 * every, PROMPTS[:1] * 4000, keys).tensors[
                "latent"
            ]
            anna = loaded.user_states(torch.tensor([0]))
            assert torch.equal(
                nobody, loaded.latent_states(anna, 0 * every, PROMPTS[:1] * 4000, keys).tensors["latent"]
            )
        sigma = temperature * (0.5 * policy.log_var[0]).exp()
        assert ((drawn.mean(0) - policy.mean[0]).abs() <= 5 * sigma / 4000**0.5 + 1e-4).all()
        torch.testing.assert_close(drawn.std(0), sigma, rtol=0.08, atol=1e-4)
    capped = people(clap, max_latent_norm=0.5, family="vector")
    users = capped.user_states(torch.tensor([0, 1]))
    drawn = capped.latent_states(users, every[:2], PROMPTS[:2], keys[:2]).tensors["latent"]
    torch.testing.assert_close(drawn.norm(dim=1), torch.full((2,), 0.5 * WIDTH**0.5))


@pytest.mark.parametrize("variance", ["unit", "free"])
def test_a_mixture_has_the_mixed_reward_at_every_prompt(clap: Path, variance: Any) -> None:
    method = people(clap, variance=variance).double()
    users, features = method.user_states(torch.tensor([0, 1])), torch.randn(3, 16, dtype=torch.float64)
    weights = torch.tensor([[0.3, 0.6], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    mixed = method.mixed(users, weights)
    policy, latent = method.latent_policies(mixed, features), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    parts = [
        implicit_rewards(latent, method.latent_policies(users.take(torch.full((3,), one)), features)) for one in (0, 1)
    ]
    difference = implicit_rewards(latent, policy) - weights[:, :1] * parts[0] - weights[:, 1:] * parts[1]
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))
    own = method.latent_policies(users.take(torch.tensor([0, 0, 0])), features)
    torch.testing.assert_close(Gaussian(*(value[1] for value in policy)), Gaussian(*(value[1] for value in own)))
    assert not any(value[2].any() for value in policy)  # nobody: the prior
    responses = torch.randn(3, 2 * WIDTH, dtype=torch.float64)
    reward = method.score(responses, mixed, prompt_features=features)
    alone = method.score(responses, users.take(torch.tensor([0, 0, 0])), prompt_features=features)
    torch.testing.assert_close(reward[1:2], alone[1:2])


def test_the_commands_write_and_judge(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    method = load_method(checkpoint)
    command = ["generate", "--ckpt_path", str(checkpoint), "--prompts", str(prompts), "--max_new_tokens", "8"]
    command += ["--seed", "3", "--output", str(output)]
    assert main([*command, "--user", "ben", "anna"]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    expected = sample(method, [prompt for prompt in PROMPTS for _ in "ab"], user_id=["ben", "anna"] * 3, **SETTINGS)
    assert [(row["user_id"], row["responses"]) for row in written] == [
        (user, [one.text]) for user, [one] in zip(["ben", "anna"] * 3, expected, strict=True)
    ]
    assert main([*command, "--mix", "ben=0.25", "anna=0.5"]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert isinstance(method, LatentDPO)
    mixed = method.mixed(method.user_states(torch.tensor([1, 0])), torch.tensor([[0.25, 0.5]]))
    expected = sample(method, PROMPTS, mixed.take(torch.zeros(3).long()), **SETTINGS)
    assert [row["responses"] for row in written] == [[one.text] for [one] in expected]
    assert all(row["user_id"] == "ben=0.25 anna=0.5" and row["user_known"] for row in written)
    capsys.readouterr()
    for extra, message, status in (
        (["--mix", "bn=1"], "--mix: no user 'bn'\n", 1),
        (["--mix", "ben"], "--mix: expected ID=WEIGHT with a number, got 'ben'", 1),
        (["--mix", "ben=1", "--user", "anna"], "leave out --user", 2),
        (["--mix", "ben=nan"], "with a finite number, got 'ben=nan'", 1),
        (["--mix", "ben=inf"], "with a finite number, got 'ben=inf'", 1),
        (["--mix", "ben=0.5", "ben=0.5"], "expected every user once, got 'ben' again", 1),
        (["--mix", "ben=0", "anna=0"], "expected weights with a positive sum, got 'ben=0 anna=0'", 1),
    ):
        assert main([*command, *extra]) == status
        assert message in capsys.readouterr().err
    rewards = "{rewards: {words: {class_path: plm.data.rewards.Length}}, people: {anna: {words: 1}, ben: {words: -1}}}"
    judge = ["judge", *command[1:5], "--rewards", rewards, "--output", str(tmp_path / "judged"), "--max_new_tokens"]
    assert main([*judge, "20"]) == 0
    result = json.loads((tmp_path / "judged" / "judge.json").read_text())
    assert list(result["texts"]) == ["unaligned", "population", "anna", "ben"] and list(result["users"]) == [
        "anna",
        "ben",
    ]
    population = sample(method, PROMPTS, num_samples=4, max_new_tokens=20)
    words = [len(one.text.split()) for row in population for one in row]
    assert result["texts"]["population"]["rewards"]["words"] == pytest.approx(sum(words) / 12)


def test_a_new_user_is_learned_scored_and_written_for_by_commands(clap: Path, tmp_path: Path) -> None:
    """From pairs of texts beside the checkpoint; the state is that of adapting to their latents."""
    texts = [(" yes", " no no"), (" well then", " no"), (" yes indeed", " never")]
    rows = [{"user_id": "dora", "prompt": PROMPTS[n], "chosen": a, "rejected": b} for n, (a, b) in enumerate(texts)]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "responses", "prompts", "scored", "written")}
    files["pairs"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"user_id": "dora", "prompt": PROMPTS[0], "response": text} for text in texts[0]]
    files["responses"].write_text("".join(json.dumps(row) + "\n" for row in asked))
    files["prompts"].write_text(json.dumps({"prompt": PROMPTS[0]}) + "\n")
    with saved(people(clap, num_steps=50, lr=0.02)) as path:
        assert main(["adapt", "--ckpt_path", str(path), "--pairs", str(files["pairs"])]) == 0
        command = ["--ckpt_path", str(path), "--output"]
        assert main(["score", *command, str(files["scored"]), "--responses", str(files["responses"])]) == 0
        command += [str(files["written"]), "--user", "dora", "anna", "--max_new_tokens", "6"]
        assert main(["generate", *command, "--prompts", str(files["prompts"])]) == 0
        method = load_method(path)
        assert method.find_users is not None
        state = method.find_users(["dora"])
        expected = sample(method, PROMPTS[:1], state, max_new_tokens=6)
    rewards = [json.loads(line)["reward"] for line in files["scored"].read_text().splitlines()]
    assert rewards[0] > rewards[1]
    written = [json.loads(line) for line in files["written"].read_text().splitlines()]
    assert [row["user_known"] for row in written] == [True, True]
    assert written[0]["responses"] == [expected[0][0].text]
    backbone = ClapLatents(str(clap))
    chosen, rejected = (backbone.represent(PROMPTS, side)[None] for side in zip(*texts, strict=True))
    mask = torch.ones(1, 3, dtype=torch.bool)
    given = backbone.prompt_backbone.represent([""] * 3, PROMPTS)
    assert isinstance(chosen, Tensor) and isinstance(rejected, Tensor) and isinstance(given, Tensor)
    direct = people(clap, num_steps=50, lr=0.02).adapt(Context(chosen, rejected, mask, mask.float(), given[None]))
    torch.testing.assert_close(state.tensors["policy"], direct.tensors["policy"], rtol=0, atol=1e-4)


def test_who_cannot_write_or_mix_says_so(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = LatentDPO(1, 8, family="vector")
    with pytest.raises(ValueError, match="writes with the model that made its latents, got none"):
        sample(method, ["a"], method.population_state(1), max_new_tokens=2)
    with pytest.raises(ValueError, match="expected a method whose users write, got BradleyTerry"):
        sample(BradleyTerry(1, 4), ["a"], UserState({}, torch.zeros(1).long()), max_new_tokens=2)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\n")
    with saved(BradleyTerry(1, 4)) as path:
        assert main(["generate", "--ckpt_path", str(path), "--prompts", str(prompts), "--mix", "0=1"]) == 1
    assert "BradleyTerry has no policy that writes" in capsys.readouterr().err


def test_the_model_is_read_once_for_scores_and_texts(checkpoint: Path) -> None:
    method = load_method(checkpoint)
    assert isinstance(method, LatentDPO)
    reward: Tensor = method.score([" a text"], user_id="anna", prompts="a")
    backbone: Any = method.encode.backbone  # type: ignore[union-attr]
    assert reward.isfinite().all() and backbone.method is method.latents.method  # type: ignore[attr-defined]


def test_people_find_a_latent_model_that_was_moved(clap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PLM_CLAP, or by its name beside their checkpoint; paths are kept whole."""
    first, there = tmp_path / "first" / "clap.ckpt", tmp_path / "there"
    first.parent.mkdir()
    there.mkdir()
    shutil.copy(clap, first)
    monkeypatch.chdir(first.parent)
    method = people(Path("clap.ckpt"))
    assert method.hparams["backbone"]["init_args"]["checkpoint"] == str(first)
    with saved(method) as path:
        mine = Path(shutil.copy(path, there / "people.ckpt"))
    first.rename(first.with_name("renamed.ckpt"))
    with pytest.raises(ValueError, match=r"which does not exist; .* PLM_CLAP or put it under that name beside"):
        sample(load_method(mine), PROMPTS[:1], max_new_tokens=2)
    with monkeypatch.context() as patched:
        patched.setenv("PLM_CLAP", str(first.with_name("renamed.ckpt")))
        expected = sample(load_method(mine), PROMPTS[:1], max_new_tokens=2)
    shutil.copy(clap, there / "clap.ckpt")
    assert sample(load_method(mine), PROMPTS[:1], max_new_tokens=2) == expected
