"""Grids and exact covers of PALM against published weights, hand-made fixtures and brute force."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from plm.methods.palm.bounds import Slack
from plm.methods.palm.cover import cell, certified_cover, repaired, uncovered
from plm.methods.palm.grid import (
    Weights,
    as_array,
    combined_grid,
    combined_grid_size,
    combined_levels,
    direct_grid,
    kmeans_weights,
    lattice,
    lattice_weights,
    lifted_grid,
    random_weights,
    rational,
    two_sided_levels,
)
from tests.parity.palm_references import in_cell, route_to_grid

EPS, DELTA = Fraction(2, 5), Fraction(1, 80)
PUBLISHED = [0, 0.167, 0.219, 0.282, 0.354, 0.434, 0.5, 0.566, 0.646, 0.718, 0.781, 0.833, 1]
FIXTURE_A = direct_grid([Fraction(1, 80), Fraction(17, 240), Fraction(149, 720), Fraction(2, 5)], 3)
FIXTURE_B = lifted_grid([Fraction(1, 100), Fraction(3, 50), Fraction(47, 250), Fraction(14, 25)], 3)


def exactly(weights: np.ndarray) -> list[Weights]:
    """Floats as rationals that sum to one."""
    rows = [[Fraction(round(value * 10**9), 10**9) for value in row[:-1]] for row in weights]
    return [(*row, 1 - sum(row)) for row in rows]


def test_the_two_objective_grid_is_the_published_one() -> None:
    first = np.sort(as_array(combined_grid(0.4, 0.2, 2))[:, 0])
    assert np.round(first, 3).tolist() == PUBLISHED


@pytest.mark.parametrize(("num", "size"), [(2, 13), (3, 127), (4, 1105)])
def test_published_sizes(num: int, size: int) -> None:
    grid = combined_grid(0.4, 0.2, num)
    assert len(grid) == len(set(grid)) == size == combined_grid_size(0.4, 0.2, num)
    assert all(sum(weights) == 1 and min(weights) >= 0 for weights in grid)


@pytest.mark.parametrize(
    ("eps", "delta", "num", "size"),
    [(1, 0.5, 6, 665), (0.8, 0.4, 5, 781), (0.5, 0.25, 4, 671), (0.2, 0.1, 3, 631), (0.4, 0.0125, 3, 721)],
)
def test_sizes_of_other_grids(eps: float, delta: float, num: int, size: int) -> None:
    assert combined_grid_size(eps, delta, num) == size == len(combined_grid(eps, delta, num))


def test_levels_have_their_limits() -> None:
    """Additive without eps: two deltas apart. Combined levels grow by 1 + eps."""
    steps = two_sided_levels(0, Fraction(1, 20), last=1)
    assert np.diff([float(level) for level in steps]) == pytest.approx([0.1] * (len(steps) - 1))
    inner = combined_levels(0.4, 0.2)[1:-1]
    assert {after / before for before, after in itertools.pairwise(inner)} == {Fraction(7, 5)}
    assert two_sided_levels(EPS, DELTA) == [Fraction(1, 80), Fraction(17, 240), Fraction(149, 720), Fraction(2, 5)]
    with pytest.raises(ValueError, match="0 <= eps <= 1"):
        combined_levels(1.5, 0.2)


@pytest.mark.parametrize("fixture", [FIXTURE_A, FIXTURE_B], ids=["A", "B"])
def test_fixtures_of_48_weights_cover(fixture: list[Weights]) -> None:
    assert len(fixture) == 48
    assert uncovered(fixture, EPS, DELTA) is None
    assert covers_by_brute_force(fixture)


def covers_by_brute_force(grid: list[Weights]) -> bool:
    """Every elementary box between the sorted faces of all cells that meets the simplex lies inside one cell."""
    boxes = np.array([[[float(a), float(b)] for a, b in cell(weights, EPS, DELTA)] for weights in grid])
    faces = [np.unique(np.round([0, 1, *boxes[:, axis].ravel()], 12)) for axis in range(3)]
    low = np.stack([g.ravel() for g in np.meshgrid(*(f[:-1] for f in faces), indexing="ij")], 1)
    high = np.stack([g.ravel() for g in np.meshgrid(*(f[1:] for f in faces), indexing="ij")], 1)
    meets = (low.sum(1) < 1 - 1e-9) & (high.sum(1) > 1 + 1e-9)
    low, high = low[meets], high[meets]
    inside = np.zeros(len(low), dtype=bool)
    for box in boxes:
        inside |= ((box[:, 0] <= low + 1e-9) & (high <= box[:, 1] + 1e-9)).all(1)
    return bool(inside.all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_48_random_weights_are_refuted(seed: int) -> None:
    grid = exactly(random_weights(48, 3, np.random.default_rng(seed)))
    assert_refuted(grid)
    assert not covers_by_brute_force(grid)


@pytest.mark.parametrize("steps", [8, 9])
def test_lattices_of_45_and_55_weights_are_refuted(steps: int) -> None:
    assert_refuted(lattice(steps, 3))


def assert_refuted(grid: list[Weights]) -> None:
    """The witness is a user whom no weights serve."""
    witness = uncovered(grid, EPS, DELTA)
    assert witness is not None and sum(witness) == 1 and min(witness) >= 0
    assert not any(in_cell(weights, witness, EPS, DELTA) for weights in grid)


@pytest.mark.parametrize(("eps", "delta", "num"), [(0.4, 0.2, 2), (0.4, 0.2, 3), (0.5, 0.25, 4), (0.8, 0.4, 5)])
def test_combined_grids_cover(eps: float, delta: float, num: int) -> None:
    assert uncovered(combined_grid(eps, delta, num), eps, delta) is None


def test_a_grid_with_a_hole_is_repaired() -> None:
    """Removing a needed weight vector leaves a witness; the repair loop closes it."""
    holed = [weights for weights in FIXTURE_A if max(weights) < Fraction(9, 10)]
    witness = uncovered(holed, EPS, DELTA)
    assert witness is not None and max(witness) > Fraction(3, 4)
    mended = repaired(holed, EPS, DELTA)
    assert mended[: len(holed)] == holed and uncovered(mended, EPS, DELTA) is None
    with pytest.raises(ValueError, match="do not cover"):
        repaired(holed[:5], EPS, DELTA, max_added=1)


@pytest.mark.parametrize(("slack", "num"), [((0.2, 0.08), 2), ((0.2, 0.08), 3), ((0.4, 0.2), 5), ((1.0, 0.5), 3)])
def test_certified_covers_cover_and_are_no_larger_than_the_grid(slack: tuple[float, float], num: int) -> None:
    """What repairs add is checked from the start; a cell without an upper end is left to the theorem."""
    cover = certified_cover(Slack(*slack), num)
    assert cover.size <= combined_grid_size(*slack, num)
    assert cover.proof == ("theorem" if slack[0] == 1 else "exact check")
    if cover.proof == "exact check":
        grid = repaired(direct_grid(two_sided_levels(*slack), num), *slack)
        assert len(grid) == cover.size and uncovered(grid, *slack) is None


def test_four_objectives_of_252_weights_cover() -> None:
    grid = direct_grid(two_sided_levels(EPS, DELTA, last=Fraction(9, 25)), 4)
    assert len(grid) == 252 and uncovered(grid, EPS, DELTA) is None


@pytest.mark.parametrize("num", [2, 3, 4, 6, 10])
@pytest.mark.parametrize(("eps", "delta"), [(0.4, 0.2), (0.2, 0.05), (1.0, 0.5)])
def test_the_router_ends_in_a_cell_of_the_grid(num: int, eps: float, delta: float) -> None:
    rng = np.random.default_rng(num)
    users = np.concatenate([rng.dirichlet(np.full(num, a), 400) for a in (1, 0.3, 0.1)] + [np.eye(num)])
    users /= users.sum(1, keepdims=True)
    routed = route_to_grid(users, eps, delta)
    assert (np.abs(routed - users) <= eps * users + delta + 1e-12).all()
    if num <= 3:
        grid = {tuple(row) for row in np.round(as_array(combined_grid(eps, delta, num)), 9)}
        assert {tuple(row) for row in np.round(routed, 9)} <= grid


def test_small_weights_are_rounded_together() -> None:
    """Lifted (1, 0.08, 0.05) at delta 0.2: their sum 0.13 is nearer to one step than to none, so the larger gets it."""
    users = np.array([[1.0, 0.08, 0.05], [1.0, 0.05, 0.04]])
    routed = route_to_grid(users / users.sum(1, keepdims=True), 0.4, 0.2)
    assert routed.tolist() == [pytest.approx([1 / 1.2, 0.2 / 1.2, 0.0]), [1.0, 0.0, 0.0]]


def test_slack_is_relative_to_the_user() -> None:
    """A member at 0.5 serves a user at (0.5 + d) / (1 - e); the other way round it would not."""
    member, user = (Fraction(1, 2), Fraction(1, 2)), (Fraction(7, 8), Fraction(1, 8))
    assert not in_cell(member, user, EPS, DELTA)
    assert in_cell((Fraction(9, 10), Fraction(1, 10)), user, EPS, DELTA)
    assert cell(member, EPS, DELTA)[0] == (Fraction(39, 112), Fraction(41, 48))
    assert rational(0.4) == EPS


def test_baselines_have_the_size_asked_for() -> None:
    rng = np.random.default_rng(0)
    assert lattice(12, 2) == [(Fraction(k, 12), Fraction(12 - k, 12)) for k in range(13)]
    for num in (1, 3, 5, 8):
        for weights in (
            lattice_weights(num, 3, rng),
            random_weights(num, 3, rng),
            kmeans_weights(random_weights(50, 3, rng), num, rng),
        ):
            assert weights.shape == (num, 3) and np.allclose(weights.sum(1), 1) and (weights >= 0).all()
    vertices = lattice_weights(3, 3, rng)
    assert sorted(map(tuple, vertices)) == sorted(map(tuple, np.eye(3)))
