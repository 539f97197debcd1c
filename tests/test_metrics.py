"""PreferenceMetric and FewShotMetric against numbers derived by hand, and their exactness across batches and ranks."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from plm.metrics import NUM_BINS, FewShotMetric, PreferenceMetric, UserTable, calibration_error


def random_pairs(num_pairs: int = 400, num_users: int = 17, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    margin = torch.randn(num_pairs, generator=rng)
    margin[::31] = 0
    return {
        "margin": margin,
        "user_row": torch.randint(num_users, (num_pairs,), generator=rng),
        "tie": torch.rand(num_pairs, generator=rng) < 0.1,
        "population_margin": torch.randn(num_pairs, generator=rng),
        "other_margin": torch.randn(num_pairs, generator=rng),
    }


def part(pairs: dict[str, torch.Tensor], index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    return {name: value[index] for name, value in pairs.items()}


def assert_same(a: UserTable, b: UserTable) -> None:
    for name in ("user_row", "num_pairs", "accuracy", "global_accuracy", "other_accuracy"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)  # halves add up exactly
    for name in ("log_loss", "global_log_loss", "bins"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-13, err_msg=name)
    assert (a.ties, a.labelled_ties) == (b.ties, b.labelled_ties)


def test_estimates_by_hand():
    # user 0: right, zero margin -> 1.5 of 2; user 2: wrong, wrong, wrong, right -> 1 of 4; user 1 says nothing
    metric = PreferenceMetric(4)
    metric.update(
        torch.tensor([1.0, 0.0, -1.0, -1.0, -1.0, 2.0, 5.0, -5.0]),
        torch.tensor([0, 0, 2, 2, 2, 2, 2, 3]),
        tie=torch.tensor([False] * 6 + [True] * 2),
        population_margin=torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0]),
        other_margin=torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        flipped_margin=torch.tensor([2.0, -2.0, 3.0, -1.0, -1.0, 0.0, 5.0, -5.0]),
    )
    out = {name: value.item() for name, value in metric.compute().items()}
    assert out["accuracy"] == (0.75 + 0.25) / 2
    assert out["accuracy_micro"] == pytest.approx(2.5 / 6)
    assert out["global_accuracy"] == 0.5  # one of two, two of four
    assert out["personal_minus_global"] == 0.0
    assert (out["users_helped"], out["users_harmed"]) == (1, 1)
    # terms 0, +1, -2, 0, 0, +1; reversed +1, -1, +2, 0, 0, -1: of the three that are not zero all change their sign
    assert out["flip_reversed"] == 1.0 and out["users_served_population"] == 0
    assert out["other_accuracy"] == 0.5  # none of two, four of four
    assert out["personal_minus_other"] == 0.0
    assert (out["num_users"], out["num_pairs"], out["ties"], out["labelled_ties"]) == (2, 6, 1, 2)
    assert out["accuracy_p10"] == pytest.approx(0.25 + 0.1 * 0.5)
    assert out["accuracy_p50"] == 0.5
    loss_0 = (math.log1p(math.exp(-1)) + math.log(2)) / 2
    loss_2 = (3 * math.log1p(math.e) + math.log1p(math.exp(-2))) / 4
    assert out["log_loss"] == pytest.approx((loss_0 + loss_2) / 2, rel=1e-12)
    np.testing.assert_array_equal(metric.table().user_row, [0, 2])


def test_log_loss_is_exact_for_large_margins():
    metric = PreferenceMetric(3)
    metric.update(torch.tensor([-1e30, 30.0, -750.0]), torch.tensor([0, 1, 2]))
    np.testing.assert_allclose(metric.table().log_loss, [1e30, math.log1p(math.exp(-30)), 750.0], rtol=1e-7)
    assert math.isfinite(metric.compute()["ece"].item())


def test_calibration_error_by_hand():
    # ten pairs of confidence 0.8, six of them right, and five of confidence 0.6 that are all right: two bins
    sure, unsure = math.log(0.8 / 0.2), math.log(0.6 / 0.4)
    metric = PreferenceMetric(1)
    metric.update(torch.tensor([sure] * 6 + [-sure] * 4 + [unsure] * 5), torch.zeros(15, dtype=torch.long))
    assert metric.compute()["ece"].item() == pytest.approx((10 * 0.2 + 5 * 0.4) / 15, abs=1e-6)


def test_calibration_error_vanishes_for_calibrated_margins():
    rng = torch.Generator().manual_seed(0)
    margin = 2 * torch.randn(200_000, generator=rng)
    signed = torch.where(torch.rand(len(margin), generator=rng) < torch.sigmoid(margin), margin, -margin)
    metric = PreferenceMetric(1)
    metric.update(signed, torch.zeros(len(signed), dtype=torch.long))
    assert metric.compute()["ece"].item() < 0.006
    assert metric.bins.shape == (NUM_BINS, 3)


def test_controls_are_left_out_when_not_measured():
    metric = PreferenceMetric(2)
    metric.update(torch.tensor([1.0, -1.0]), torch.tensor([0, 1]))
    numbers = metric.compute()
    assert not any("global" in name or "other" in name or "users_h" in name for name in numbers)
    assert np.isnan(metric.table().personal_minus_global).all()


def test_nothing_measured_gives_counts_only():
    metric = PreferenceMetric(2)
    metric.update(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert metric.table().estimates() == {"num_users": 0, "num_pairs": 0, "ties": 0, "labelled_ties": 0}


def test_a_nan_margin_shows_in_the_log_loss():
    metric = PreferenceMetric(1)
    metric.update(torch.tensor([float("nan"), 1.0]), torch.zeros(2, dtype=torch.long))
    assert math.isnan(metric.compute()["log_loss"].item())
    assert metric.compute()["accuracy"].item() == 0.5


def test_batching_does_not_matter():
    pairs, whole, pieces = random_pairs(), PreferenceMetric(17), PreferenceMetric(17)
    whole.update(**pairs)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    for index in shuffled.split([1, 199, 37, 163]):
        pieces.update(**part(pairs, index))
    assert_same(whole.table(), pieces.table())


def test_merging_two_metrics_equals_one():
    pairs = random_pairs()
    whole, left, right = (PreferenceMetric(17) for _ in range(3))
    whole.update(**pairs)
    left.update(**part(pairs, slice(0, 150)))
    right.update(**part(pairs, slice(150, None)))
    left.merge_state(right)
    assert_same(whole.table(), left.table())


@pytest.mark.parametrize("row", [-1, 2])
def test_user_row_out_of_range(row: int):
    with pytest.raises(ValueError, match=r"expected user rows in \[0, 2\)"):
        PreferenceMetric(2).update(torch.tensor([1.0]), torch.tensor([row]))


def few_shot_pairs() -> dict[str, torch.Tensor]:
    # users 1 and 3; zero shots: 1 of 2 and 0 of 1; four shots, repeat 0: 2 of 2 and 1 of 1; repeat 1: 1 of 2 and 1 of 1
    return {
        "margin": torch.tensor([1.0, -1, -1, 1, -1, -1, 1, 1, 1, 1, -1, 1]),
        "user_row": torch.tensor([1, 1, 3] * 4),
        "num_shots": torch.tensor([0] * 6 + [4] * 6),
        "repeat": torch.tensor([0] * 3 + [1] * 3 + [0] * 3 + [1] * 3),
    }


def test_few_shot_by_hand():
    metric = FewShotMetric(range(5), shots=[4, 0], num_repeats=2)
    metric.update(**few_shot_pairs())
    table = metric.table()
    np.testing.assert_array_equal(table.shots, [0, 4])
    np.testing.assert_array_equal(table.user_row, [1, 3])
    np.testing.assert_array_equal(table.accuracy, [[[0.5, 0], [0.5, 0]], [[1, 1], [0.5, 1]]])
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    half = (right + wrong) / 2
    expected = [[[half, wrong], [half, wrong]], [[right, right], [half, right]]]
    np.testing.assert_allclose(table.log_loss, expected)
    # confidence 0.731 throughout, where 2 of 6 and 5 of 6 pairs are right
    certain = 1 / (1 + math.exp(-1))
    errors = [calibration_error(bins) for bins in table.bins]
    np.testing.assert_allclose(errors, [certain - 2 / 6, 5 / 6 - certain])
    assert {name: value.item() for name, value in metric.compute().items()} == {"accuracy@0": 0.25, "accuracy@4": 0.875}


def test_few_shot_batching_and_labelled_ties():
    pairs, metric = few_shot_pairs(), FewShotMetric(range(5), [0, 4], 2)
    for index in torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(5):
        metric.update(**part(pairs, index))
    metric.update(*(torch.ones(1, dtype=torch.long) * n for n in (-9, 2, 4, 0)), tie=torch.tensor([True]))
    whole = FewShotMetric(range(5), [0, 4], 2)
    whole.update(**pairs)
    np.testing.assert_array_equal(metric.table().accuracy, whole.table().accuracy)
    np.testing.assert_array_equal(metric.table().user_row, [1, 3])


@pytest.mark.parametrize("wrong", [{"num_shots": torch.tensor([3])}, {"repeat": torch.tensor([2])}])
def test_few_shot_unannounced(wrong: dict[str, torch.Tensor]):
    zero = torch.zeros(1, dtype=torch.long)
    pair = {"margin": torch.ones(1), "user_row": zero, "num_shots": zero, "repeat": zero} | wrong
    with pytest.raises(ValueError, match="expected shots among"):
        FewShotMetric(range(5), [0, 4], 2).update(**pair)


def test_few_shot_keeps_cells_of_its_own_users_alone():
    metric = FewShotMetric([3, 1], [0, 4], 2)
    metric.update(**few_shot_pairs())
    assert metric.cells.shape == (2, 2, 2, 3) and metric.table().user_row.tolist() == [1, 3]
    whole = FewShotMetric(range(5), [0, 4], 2)
    whole.update(**few_shot_pairs())
    np.testing.assert_array_equal(metric.table().accuracy, whole.table().accuracy)
    with pytest.raises(ValueError, match=r"of the 1 users of the curve, got \[1\]"):
        FewShotMetric([3], [0, 4], 2).update(**few_shot_pairs())


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    pairs = random_pairs()
    metric, empty_there = PreferenceMetric(17), FewShotMetric(range(5), [0, 4], 2)
    metric.update(**part(pairs, torch.arange(400) % 2 == rank))  # every user on both ranks
    if rank == 0:
        empty_there.update(**few_shot_pairs())
    torch.save((vars(metric.table()), metric.compute(), empty_there.table().accuracy), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    whole, few_shot = PreferenceMetric(17), FewShotMetric(range(5), [0, 4], 2)
    whole.update(**random_pairs())
    few_shot.update(**few_shot_pairs())
    for rank in range(2):
        table, numbers, accuracy = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert_same(UserTable(**table), whole.table())
        assert {k: v.item() for k, v in numbers.items()} == pytest.approx(whole.table().estimates(), rel=1e-13)
        np.testing.assert_array_equal(accuracy, few_shot.table().accuracy)
