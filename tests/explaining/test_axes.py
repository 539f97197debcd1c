"""Principal axes of rewards, and clusters, against what can be derived by hand or is planted."""

from __future__ import annotations

import numpy as np
import pytest

from plm.explaining.axes import PrincipalAxes, cluster_users, not_told_apart, principal_axes


def test_axes_are_the_singular_vectors_of_what_users_deviate_by() -> None:
    draw = np.random.default_rng(0)
    margins, moved = draw.normal(size=(50, 4)), draw.normal(size=(30, 4)) * [3.0, 1.0, 0.3, 0.1]
    axes = principal_axes(margins, moved)
    deviations = margins @ moved.T / np.sqrt(len(margins))  # (N, U)
    expected = np.linalg.svd(deviations, compute_uv=False)[:4] / np.sqrt(len(moved))
    np.testing.assert_allclose(axes.spread, expected, rtol=1e-10)
    np.testing.assert_allclose(margins @ axes.directions @ axes.coordinates.T, margins @ moved.T, atol=1e-10)
    unit = np.square(margins @ axes.directions).mean(0)
    np.testing.assert_allclose(unit, 1.0)
    assert ((axes.coordinates > 0).sum(0) >= (axes.coordinates < 0).sum(0)).all()
    assert axes.shares.sum() == pytest.approx(1.0) and axes.num_shown == (axes.shares >= 0.05).sum()


def test_an_axis_with_as_many_on_both_sides_points_to_those_farther_out() -> None:
    places = np.array([[3.0], [1.0], [-2.0], [-2.0]])
    for turn in (1.0, -1.0, 0.3, -4.0):
        axes = principal_axes(np.array([[1.0], [2.0]]) * turn, places / turn)
        assert np.sign(axes.coordinates[:, 0]).tolist() == [1, 1, -1, -1]


def test_axes_do_not_depend_on_the_coordinates_of_a_fit() -> None:
    """Bases turned, stretched and flipped, and a basis twice: users are where they were."""
    draw = np.random.default_rng(1)
    margins, moved = draw.normal(size=(40, 3)), draw.normal(size=(25, 3)) * [2.0, 1.0, 0.5]
    axes = principal_axes(margins, moved)
    turn = draw.normal(size=(3, 3))
    for other in (
        principal_axes(margins @ turn, moved @ np.linalg.inv(turn).T),
        principal_axes(-margins, -moved),
        principal_axes(np.hstack([margins, margins]), np.hstack([0.25 * moved, 0.75 * moved])),
    ):
        np.testing.assert_allclose(other.coordinates[:, :3], axes.coordinates, atol=1e-8)
        assert other.coordinates.shape[1] == 3


def test_users_who_do_not_differ_have_no_axes() -> None:
    axes = principal_axes(np.eye(3), np.zeros((5, 3)))
    assert axes.coordinates.shape == (5, 0) and axes.num_shown == 0 and not axes.spread.any()


def test_axes_of_like_variance_are_not_told_apart() -> None:
    """Of 200 users a variance has a standard error of a tenth."""
    half = np.ones(100)
    signs = np.stack([np.r_[half, -half], np.tile([1.0, -1.0], 100), np.tile([1.0, 1.0, -1.0, -1.0], 50)], axis=1)
    axes = PrincipalAxes(np.eye(3), signs * np.sqrt([1.0, 0.95, 0.5]))
    assert not_told_apart(axes).tolist() == [True, False, False]


def cloud(kind: str, num_users: int, seed: int) -> np.ndarray:
    draw, scale = np.random.default_rng(seed), np.array([1.0, 0.6, 0.3])
    if kind == "normal":
        return draw.normal(size=(num_users, 3)) * scale
    if kind == "even":
        return draw.uniform(-1, 1, (num_users, 3)) * scale
    if kind == "one-sided":
        return draw.exponential(size=(num_users, 3)) * scale
    return np.where(np.arange(num_users)[:, None] < 2, 30.0, draw.normal(size=(num_users, 3)) * scale)


@pytest.mark.parametrize("kind", ["normal", "even", "one-sided", "with two far away"])
def test_no_clusters_are_found_in_a_cloud(kind: str) -> None:
    assert not [seed for seed in range(4) if cluster_users(cloud(kind, 80, seed)).label.any()]


@pytest.mark.parametrize("sizes", [(45, 15), (30, 20, 10)])
def test_planted_groups_are_found_whole(sizes: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 5.0]])[: len(sizes)]
    planted = np.repeat(np.arange(len(sizes)), sizes)
    points = centres[planted] + 0.6 * draw.normal(size=(sum(sizes), 2))
    order = draw.permutation(len(points))
    clusters = cluster_users(points[order])
    assert clusters.label.tolist() == planted[order].tolist()  # the largest first
    assert cluster_users(-points[order]).label.tolist() == clusters.label.tolist()


def test_few_users_and_small_parts_are_no_clusters() -> None:
    apart = np.array([[0.0], [9.0]])
    assert not cluster_users(np.repeat(apart, [7, 7], axis=0)).label.any()
    assert not cluster_users(np.repeat(apart, [60, 7], axis=0)).label.any()
    assert not cluster_users(np.zeros((40, 2))).label.any()
    assert np.bincount(cluster_users(np.repeat(apart, [60, 8], axis=0)).label).tolist() == [60, 8]
