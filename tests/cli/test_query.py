"""Choosing pairs to ask about: information against brute force, posteriors of every form, and the command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.cli import main
from plm.functional import win_probability
from plm.method import PersonalizationMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lore import LoRe, PublishedLoRe
from plm.methods.pal import PAL
from plm.methods.vpl import VPL
from plm.querying import choose_pairs, entropy, posterior_samples, sampled_chances
from plm.testing import TinyBackbone, saved
from plm.types import UserState

DIM = 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def information(chances: np.ndarray, pairs: list[int]) -> float:
    """Mutual information of the answers to some pairs and the user, from all answers: ``H(Y) - E H(Y | user)``."""
    total = 0.0
    for answers in itertools.product((True, False), repeat=len(pairs)):
        each = np.prod([chances[:, q] if yes else 1 - chances[:, q] for q, yes in zip(pairs, answers, strict=True)], 0)
        total -= each.mean() * np.log(each.mean())
        total += (each * np.log(each)).mean()
    return total


def test_the_greedy_choice_maximises_the_joint_information() -> None:
    chances = torch.sigmoid(draw(40, 9) * 2)
    queries = choose_pairs(chances, 4)
    taken: list[int] = []
    for query in queries:
        gains = {
            q: information(chances.numpy(), [*taken, q]) - (information(chances.numpy(), taken) if taken else 0.0)
            for q in range(9)
            if q not in taken
        }
        assert query.row == max(gains, key=gains.__getitem__)
        assert query.information == pytest.approx(gains[query.row], abs=1e-10)
        assert query.chance == pytest.approx(float(chances[:, query.row].mean()))
        taken.append(query.row)


def test_the_same_question_is_not_asked_twice() -> None:
    """A copy of the best pair tells less than another one; a pair that is noise for everybody tells nothing."""
    sure = (draw(200, 1)[:, 0] > 0).double() * 0.98 + 0.01
    other = (draw(200, 1, seed=1)[:, 0] > 0).double() * 0.9 + 0.05
    noise = torch.full((200,), 0.5, dtype=torch.float64)
    queries = choose_pairs(torch.stack([noise, sure, sure, other], 1), 4)
    assert [query.row for query in queries][:2] == [1, 3]
    assert queries[-1].row == 0 and queries[-1].information == pytest.approx(0.0, abs=1e-9)


def test_beyond_the_enumeration_answers_are_drawn_and_the_information_still_falls() -> None:
    chances = torch.sigmoid(3 * draw(64, 3) @ draw(3, 30, seed=1))
    queries = choose_pairs(chances, 20)
    assert len({query.row for query in queries}) == 20
    gains = [query.information for query in queries]
    assert all(0 <= gain <= np.log(2) for gain in gains) and np.mean(gains[:5]) > 2 * np.mean(gains[15:])
    assert len(choose_pairs(chances, 99)) == 30


def test_samples_have_the_moments_of_both_forms_of_posterior() -> None:
    mean, root = draw(2, 3), draw(2, 3, 3, seed=1)
    covariance = root @ root.mT + 0.1 * torch.eye(3)
    full = UserState({"weights": mean, "precision": torch.linalg.inv(covariance)}, torch.tensor([4, 7]))
    diagonal = UserState({"mean": mean, "log_var": covariance.diagonal(dim1=1, dim2=2).log()}, torch.tensor([4, 7]))
    for state, name, expected in (
        (full, "weights", covariance),
        (diagonal, "mean", torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))),
    ):
        samples = posterior_samples(state, 20_000)
        assert samples.num_pairs.tolist() == [4] * 20_000 + [7] * 20_000
        draws = samples.tensors[name].view(2, -1, 3)
        assert torch.allclose(draws.mean(1), mean, atol=0.1)
        for user in (0, 1):
            assert torch.allclose(draws[user].T.cov(), expected[user], atol=0.05 * float(expected[user].max()))
        assert torch.equal(posterior_samples(state, 5).tensors[name], posterior_samples(state, 5).tensors[name])
        assert not torch.equal(posterior_samples(state, 5, 1).tensors[name], posterior_samples(state, 5).tensors[name])


def test_samples_of_weights_on_the_simplex_stay_there() -> None:
    """Differences of log weights are normal, with the inverse of ``log_precision`` as covariance."""
    root = draw(3, 3, seed=1)
    covariance = root @ root.mT + 0.1 * torch.eye(3)
    weights = torch.softmax(draw(1, 3), -1)
    state = UserState({"weights": weights, "log_precision": torch.linalg.inv(covariance)[None]}, torch.tensor([4]))
    draws = posterior_samples(state, 20_000).tensors["weights"]
    assert torch.allclose(draws.sum(-1), torch.ones(()).double()) and (draws > 0).all()
    contrast = torch.tensor([[1.0, -1, 0], [0, 1, -1]]).double()
    found = draws.log() @ contrast.T
    assert torch.allclose(found.mean(0), (weights.log() @ contrast.T)[0], atol=0.1)
    expected = contrast @ covariance @ contrast.T
    assert torch.allclose(found.T.cov(), expected, atol=0.05 * float(expected.max()))
    sure = UserState({"weights": torch.tensor([[1.0, 0.0]]), "log_precision": torch.eye(2)[None]}, torch.tensor([4]))
    assert posterior_samples(sure, 5).tensors["weights"].isfinite().all()


def test_users_without_a_posterior_are_refused() -> None:
    with pytest.raises(ValueError, match="needs users with an uncertainty"):
        posterior_samples(BradleyTerry(2, DIM).population_state(1), 3)
    with pytest.raises(ValueError, match=r"set model\.prior_precision above 0"):
        posterior_samples(PublishedLoRe(2, DIM, num_bases=3).population_state(1), 3)
    proper = PublishedLoRe(2, DIM, num_bases=3, prior_precision=1.0)
    assert posterior_samples(proper.population_state(1), 3).tensors["weights"].shape == (3, 3)


def test_chances_are_those_of_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples are scored at once."""
    method = LoRe(3, DIM, num_bases=3)
    left, right = draw(5, DIM).float(), draw(5, DIM, seed=1).float()
    samples = posterior_samples(method.population_state(1), 7)
    expected = torch.stack(
        [
            torch.sigmoid((left - right) @ method._bases().detach() @ samples.tensors["weights"][sample])
            for sample in range(7)
        ]
    )
    for floats in (1, 100, 2**20):
        monkeypatch.setattr("plm.querying.MAX_FLOATS", floats)
        assert torch.allclose(sampled_chances(method, left, right, samples), expected, atol=1e-6)


def test_win_probability_is_a_mean_over_the_reference() -> None:
    reward, reference = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0, -2.0])
    up = 1 / (1 + np.exp(-2.0))
    expected = [(0.5 + (1 - up) + up) / 3, (up + 0.5 + 1 / (1 + np.exp(-4.0))) / 3]
    assert win_probability(reward, reference).tolist() == pytest.approx(expected)
    assert win_probability(reward + 100, reference + 100).tolist() == pytest.approx(expected)  # no scale of its own


def test_asked_pairs_teach_more_than_random_ones() -> None:
    """Bayesian users of LoRe: ten asked pairs against ten at random, by the error of the posterior mean."""
    torch.manual_seed(0)
    method = LoRe(2, DIM, num_bases=4)
    method.bases.data = draw(DIM, 4, seed=3).float() / 2
    method.log_population_spread.data.zero_()
    pool = draw(80, DIM, seed=4).float()
    errors: dict[str, list[float]] = {"asked": [], "random": []}
    for user in range(25):
        truth = draw(4, seed=100 + user).float()
        likes = torch.rand(80, generator=torch.Generator().manual_seed(user)) < torch.sigmoid(
            pool @ method._bases().detach() @ (truth + torch.eye(4)[0])
        )
        asked: list[int] = []
        for _ in range(10):
            samples = posterior_samples(state_after(method, pool, likes, asked), 64, seed=len(asked))
            chances = sampled_chances(method, pool, torch.zeros_like(pool), samples)
            chances[:, asked] = 0.5  # nothing to learn there
            asked.append(choose_pairs(chances, 1)[0].row)
        order = torch.randperm(80, generator=torch.Generator().manual_seed(user))[:10].tolist()
        for name, rows in (("asked", asked), ("random", order)):
            weights = state_after(method, pool, likes, rows).tensors["weights"][0]
            errors[name].append(float((weights - truth - torch.eye(4)[0]).square().sum()))
    assert np.mean(errors["asked"]) < 0.9 * np.mean(errors["random"])


def state_after(method: PersonalizationMethod, pool: Tensor, likes: Tensor, rows: list[int]) -> UserState:
    """The user's state after answering some rows."""
    from plm.types import Context

    if not rows:
        return method.population_state(1)
    left, right = pool[rows][None], torch.zeros_like(pool[rows])[None]
    yes = likes[rows][None, :, None]
    mask = torch.ones(1, len(rows)).bool()
    return method.adapt(Context(torch.where(yes, left, right), torch.where(yes, right, left), mask, mask.float()))


# ---------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    "make",
    [
        lambda: LoRe(2, DIM, num_bases=3),
        lambda: VPL(2, DIM, latent_dim=3, hidden_dim=4),
        lambda: PAL(2, DIM, num_prototypes=3),
        lambda: PAL(2, DIM, num_prototypes=3, users="table", head="dist", partition=True),
    ],
    ids=["LoRe", "VPL", "PAL", "PAL partition"],
)
def test_query_writes_the_best_pairs_of_a_pool(
    make: Callable[[], PersonalizationMethod], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    rows = [{"prompt": "hi", "responses": [f"a walk {n}", f"tea {n * 7} toast"], "id": n} for n in range(12)]
    rows[3] = {"chosen": "yes please", "rejected": "no", "id": 3}
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = make()
    spec = TinyBackbone(DIM).spec()
    with saved(method, lambda checkpoint: checkpoint["hyper_parameters"].update(backbone=spec)) as path:
        command = ["query", "--ckpt_path", str(path), "--pool", str(pool), "--user"]
        capsys.readouterr()
        assert main([*command, "1", "--num_pairs", "3"]) == 0
        shown = capsys.readouterr()
        out = [json.loads(line) for line in shown.out.splitlines()]
        assert len(out) == 3 and not shown.err
        assert main([*command, "stranger", "--num_pairs", "2", "--output", str(tmp_path / "out.jsonl")]) == 0
        assert "unknown user 'stranger'" in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert len({row["id"] for row in out}) == 3
    for row in out:
        assert {"user_id": "1"}.items() <= row.items() and rows[row["id"]].items() <= row.items()
        assert 0 < row["information"] <= np.log(2) and 0 < row["chance"] < 1
    gains = [row["information"] for row in out]
    assert gains == sorted(gains, reverse=True)
    texts = [row.get("responses") or [row["chosen"], row["rejected"]] for row in rows]
    left, right = (TinyBackbone(DIM).encode([text[side] for text in texts]) for side in (0, 1))
    with torch.no_grad():
        samples = posterior_samples(method.eval().user_states(torch.tensor([1])), 256)
        chances = sampled_chances(method, left, right, samples)
    gain = entropy(chances.mean(0)) - entropy(chances).mean(0)
    assert out[0]["id"] == int(gain.argmax()) and out[0]["information"] == pytest.approx(float(gain.max()), abs=1e-5)


def test_query_says_what_it_cannot_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Repeated pairs are asked once, also the other way round; nothing is told by answers where users are all alike."""
    rows = [{"prompt": "hi", "responses": ["a walk", "tea"], "id": 0}]
    rows += [{"prompt": "hi", "responses": ["tea", "a walk"], "id": 1}, {"responses": ["a walk", "tea"], "id": 2}]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def query(method: PersonalizationMethod, *args: str) -> tuple[int, str, str]:
        spec = TinyBackbone(DIM).spec()
        with saved(method, lambda checkpoint: checkpoint["hyper_parameters"].update(backbone=spec)) as path:
            capsys.readouterr()
            status = main(["query", "--ckpt_path", str(path), "--user", "1", "--pool", str(pool), *args])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    status, out, err = query(PAL(2, DIM, num_prototypes=3))
    assert status == 0 and {json.loads(line)["id"] for line in out.splitlines()} == {0, 2}
    assert "1 of 3 rows repeat a pair of the pool: asked once" in err and "no answer" not in err
    status, out, err = query(PAL(2, DIM, num_prototypes=1))
    assert status == 0 and "no answer would tell anything about '1'" in err
    assert query(PAL(2, DIM), "--num_draws", "1")[::2] == (
        2,
        "error: --num_draws: expected an integer >= 2, got 1 (plm query --help)\n",
    )
    broken, damaged = PAL(2, DIM), PAL(2, DIM)
    broken.geometry.prototypes.data.fill_(torch.nan)  # type: ignore[union-attr]
    damaged.precision.fill_(torch.nan)
    assert "expected finite rewards from PAL, got nan" in query(broken)[2]
    assert "needs a finite posterior" in query(damaged)[2]


def test_malformed_pools_are_named_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = tmp_path / "pool.jsonl"
    lines = [
        '{"response": ["a", "b"]}',
        '{"responses": ["a"]}',
        '{"responses": ["a", "a"]}',
        "[1]",
        "{",
        '{"chosen": "a"}',
    ]
    pool.write_text("\n".join(lines))
    with saved(LoRe(2, DIM, num_bases=2)) as path:
        capsys.readouterr()
        assert main(["query", "--ckpt_path", str(path), "--user", "1", "--pool", str(pool)]) == 1
    shown = capsys.readouterr().err
    for text in (
        "6 malformed rows",
        ":1: missing 'responses'",
        "responses",
        ":2: responses: expected a list of two",
        ":3:",
        "two different texts",
        ":4: expected a JSON object",
        ":5: malformed JSON",
        ":6:",
    ):
        assert text in shown
    assert main(["query", "--ckpt_path", "x", "--user", "1", "--pool", "y", "--num_pairs", "0"]) == 2
    assert "--num_pairs: expected an integer >= 1, got 0" in capsys.readouterr().err


def test_score_puts_users_on_one_scale_by_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is compared with the reference responses as its own user rewards them."""
    torch.manual_seed(0)
    texts, reference = ["a walk", "tea and toast", "no"], ["yes", "a long walk", "toast"]
    ids = ["0", "1", "0"]
    asked, other = tmp_path / "input.jsonl", tmp_path / "reference.jsonl"
    rows = [{"response": text, "user_id": user} for text, user in zip(texts, ids, strict=True)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text("".join(json.dumps({"response": text}) + "\n" for text in reference))
    method = LoRe(2, DIM, num_bases=3)
    method.weights.normal_()
    method.bases.data.normal_()
    spec = TinyBackbone(DIM).spec()
    with saved(method, lambda checkpoint: checkpoint["hyper_parameters"].update(backbone=spec)) as path:
        capsys.readouterr()
        assert main(["score", "--ckpt_path", str(path), "--responses", str(asked), "--reference", str(other)]) == 0
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    encode = TinyBackbone(DIM).encode
    for row, text, user in zip(out, texts, ids, strict=True):
        with torch.no_grad():
            state = method.user_states(torch.full((4,), int(user)))
            reward, *others = method.score(encode([text, *reference]), state).tolist()
        assert row["reward"] == pytest.approx(reward, abs=1e-5)
        wins = [1 / (1 + np.exp(value - reward)) for value in others]
        assert row["win_probability"] == pytest.approx(np.mean(wins), abs=1e-5)
