"""Whether bases fit new users as they fitted the unseen users of the fit, on worlds whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.adapting import predicted_new_users
from plm.data.collate import FeaturedPairs
from plm.data.rows import FeatureRows
from plm.data.schema import pair_table
from plm.evaluation import drift_report, summarize_few_shot, unseen_users_curve
from plm.methods.lore import LoRe
from plm.metrics import FewShotTable

DIM, SHOTS, PAIRS = 8, [0, 1, 5, 10], 24


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truth(seed: int) -> LoRe:
    """A method whose bases are the true ones: the population's direction and two others, orthogonal."""
    method = LoRe(1, DIM, num_bases=3, temperature=1.0)
    with torch.no_grad():
        method.bases.copy_(2 * torch.linalg.qr(torch.randn(DIM, DIM, generator=draw(seed))).Q[:, :3])
        method.log_population_spread.fill_(-1.0)
    return method.eval()


def people(directions: Tensor, seed: int, copies: int = 1) -> FeaturedPairs:
    """Pairs of users with directions ``(U, D)``, who choose by the Bradley-Terry model; all come ``copies`` times."""
    num_users, count = len(directions), len(directions) * PAIRS
    sides = torch.randn(2, num_users, PAIRS // copies, DIM, generator=draw(seed)) / 2**0.5
    chance = torch.sigmoid(((sides[0] - sides[1]) * directions[:, None]).sum(-1))
    first = (torch.rand(chance.shape, generator=draw(seed + 1)) < chance).repeat(1, copies)
    sides = sides.repeat(1, 1, copies, 1)
    left = np.arange(count)
    wins = first.flatten().numpy()
    table = pair_table(
        [f"new {row:04}" for row in range(num_users)],
        [f"{row}?" for row in range(count)],
        [f"text {row}" for row in range(2 * count)],
        user=np.repeat(np.arange(num_users), PAIRS),
        prompt=left // PAIRS * PAIRS + left % (PAIRS // copies),
        chosen=np.where(wins, left, left + count),
        rejected=np.where(wins, left + count, left),
    )
    features = sides.reshape(2 * count, DIM).numpy()[table.items[:, 1]]
    return FeaturedPairs(table, FeatureRows(features), None, np.full(num_users, -1))


def directions(method: LoRe, num_users: int, seed: int) -> Tensor:
    """Tastes of users of the world: normal around the population in the span of the bases."""
    weights = torch.randn(num_users, 3, generator=draw(seed)) * torch.tensor([math.exp(-1.0), 1.0, 1.0])
    weights[:, 0] += 1
    return weights @ method.bases.detach().T


def strange(method: LoRe, num_users: int, seed: int) -> Tensor:
    """Tastes as strong as those, across the bases: only what all share is left of them."""
    inside = method.bases.detach()
    across = torch.linalg.svd(inside).U[:, 3:5] * 2
    known = directions(method, num_users, seed)
    others = torch.randn(num_users, 2, generator=draw(seed)) @ across.T
    return known @ inside[:, :1] @ inside[:, :1].T / 4 + others


def report(seed: int, new: Any, num_users: int = 60) -> dict[str, Any]:
    """The report of a world: what is new to users as many and as tested as those of its fit."""
    method = truth(seed)
    fit = predicted_new_users(method, people(directions(method, num_users, seed), seed), SHOTS)
    found = predicted_new_users(method, people(new(method, num_users, seed + 1000), seed + 2000), SHOTS)
    assert fit is not None and found is not None
    return drift_report(found, summarize_few_shot(fit))


def test_users_of_the_same_world_raise_no_alarm_and_others_do() -> None:
    """Of 40 worlds one in 40 is expected to be called worse by chance; tastes across the bases are found in all."""
    alarms = [report(seed, directions)["fit_again"] for seed in range(40)]
    assert sum(alarms) <= 2
    for seed in range(5):
        found = report(seed, strange)
        assert found["fit_again"] and found["shots"] == 10
        assert found["difference"]["gain_high"] < 0 and "as much as then" not in found["verdict"]


def test_what_is_predicted_shares_no_prompt_with_what_is_learned() -> None:
    """Answers by the toss of a coin, each given twice: who has learned one of the two guesses the other."""
    data = people(torch.zeros(200, DIM), seed=0, copies=2)
    found = predicted_new_users(truth(0), data, SHOTS)
    assert found is not None and found.accuracy.shape == (2, 1, 200)
    assert found.accuracy[1].mean() == pytest.approx(0.5, abs=0.03)


def test_pairs_of_new_users_are_divided_as_those_of_the_fit() -> None:
    """Of one prompt, pairs of a user are one group, or one each."""
    data = people(torch.zeros(20, DIM), seed=0)
    data = replace(data, table=replace(data.table, prompt=np.zeros_like(data.table.prompt)))
    assert predicted_new_users(truth(0), data, SHOTS, "prompt") is None  # all of a user on one side
    assert predicted_new_users(truth(0), data, SHOTS, "pair") is not None


def test_pairs_that_cannot_be_divided_are_learned_without_a_report() -> None:
    """The same two answers in several dialogues, now the one liked and now the other."""
    data = people(torch.zeros(20, DIM), seed=0)
    table = data.table
    first = np.arange(table.num_pairs) // PAIRS * PAIRS
    even = np.arange(table.num_pairs) % 2 == 0
    chosen, rejected = table.chosen[first], table.rejected[first]
    sides = {"chosen": np.where(even, chosen, rejected), "rejected": np.where(even, rejected, chosen)}
    dialogues = {"dialogues": [str(row) for row in range(table.num_pairs)], "dialogue": np.arange(table.num_pairs)}
    data = replace(data, table=replace(table, prompt=table.prompt[first], **sides, **dialogues))
    with pytest.warns(UserWarning, match="not predicted before they are learned: expected every pair of a user on one"):
        assert predicted_new_users(truth(0), data, SHOTS, "dialogue") is None


def test_new_users_are_those_whom_nobody_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    method = truth(0)
    data = people(directions(method, 12, 0), seed=0)
    method.user_ids = data.table.user_ids[:4]
    found = predicted_new_users(method, data, SHOTS)
    assert found is not None and len(found.user_row) == 8 and found.shots.tolist() == [0, 10]
    monkeypatch.setattr("plm.adapting.PREDICTED_USERS", 5)
    few = predicted_new_users(method, data, [0, 1, 5, 40])
    assert few is not None and len(few.user_row) == 5 and few.shots.tolist() == [0, 5]
    method.user_ids = data.table.user_ids
    assert predicted_new_users(method, data, SHOTS) is None
    method.user_ids = []
    assert predicted_new_users(method, data, [0, 40]) is None  # nobody has as many


def curve(accuracy: float, reach: float, gain: float, num_users: int = 50) -> dict[str, Any]:
    """The numbers after 5 pairs, with intervals that reach as far to both sides."""
    numbers = {"accuracy": accuracy, "gain": gain}
    ends = {f"{name}_{end}": [None, value + sign * reach] for name, value in numbers.items() for end, sign in ENDS}
    return {
        "num_users": num_users,
        "shots": [0, 5],
        "log_loss": [0.7, 0.6],
        **ends,
        "accuracy": [None, accuracy],
        "gain": [None, gain],
    }


ENDS = (("low", -1), ("high", 1))


def test_intervals_of_the_difference_add_up_in_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.60 +- 0.03 less 0.70 +- 0.04 is -0.10 +- 0.05."""
    table = FewShotTable(np.array([0, 5]), np.arange(30), *[np.zeros((2, 1, 30))] * 2, np.zeros((2, 15, 3)))

    def reported(new: dict[str, Any], fit: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr("plm.evaluation.drift.summarize_few_shot", lambda table: new)
        return drift_report(table, fit)

    found = reported(curve(0.60, 0.03, 0.02, 30), curve(0.70, 0.04, 0.12))
    change = found["difference"]
    assert [change[name] for name in ("accuracy", "accuracy_low", "accuracy_high")] == pytest.approx(
        [-0.10, -0.15, -0.05]
    )
    assert [change[name] for name in ("gain", "gain_low", "gain_high")] == pytest.approx([-0.10, -0.15, -0.05])
    assert found["fit_again"] is True and found["shots"] == 5 and found["new"]["log_loss"] == 0.6
    assert found["verdict"] == (
        "the bases fit these users less well, fit again with their pairs: -10.0 points [-15.0, -5.0] of accuracy "
        "after 5 pairs, against the fit's own test; what their pairs add, -10.0 points [-15.0, -5.0]"
    )
    found = reported(curve(0.66, 0.03, 0.12), curve(0.70, 0.04, 0.12))
    assert found["fit_again"] is False and found["verdict"].startswith(
        "no evidence that the bases fit these users less well: -4.0 points"
    )
    found = reported(curve(0.60, math.nan, 0.12, 30), curve(0.70, 0.04, 0.12, 5))
    assert found["fit_again"] is None and "8 users of each group, got 30 new ones and 5 at the fit" in found["verdict"]


def test_the_curve_of_a_fit_ends_where_its_users_have_no_more_pairs(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"
    assert unseen_users_curve(checkpoint) is None
    (tmp_path / "metrics.json").write_text(json.dumps({"few_shot": curve(0.7, 0.1, 0.1)}))
    (tmp_path / "splits.json").write_text(json.dumps({"pairs_support": 49, "users_unseen": 10, "group_by": "dialogue"}))
    found = unseen_users_curve(checkpoint)
    assert found is not None and found["shots"] == [0] and found["log_loss"] == [0.7] and found["num_users"] == 50
    assert found["group_by"] == "dialogue"
    (tmp_path / "splits.json").write_text(json.dumps({"pairs_support": 50, "users_unseen": 10}))
    assert unseen_users_curve(checkpoint) == {**curve(0.7, 0.1, 0.1), "group_by": "auto"}
    of_dialogues = {"few_shot": {**curve(0.7, 0.1, 0.1), "shot_unit": "dialogue"}}
    (tmp_path / "metrics.json").write_text(json.dumps(of_dialogues))
    assert unseen_users_curve(checkpoint) is None
