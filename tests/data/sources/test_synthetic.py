from __future__ import annotations

import numpy as np
import pytest

from plm.data.sources.phrases import ATTRIBUTES, CORES, FILLERS, NUM_PROMPTS, measure, prompt_texts
from plm.data.sources.synthetic import SyntheticPairs, World

WORLDS: tuple[World, ...] = ("low_rank", "ideal_point", "conflicting_groups")


def source(world: World = "low_rank", **change: object) -> SyntheticPairs:
    return SyntheticPairs(**{"world": world, "num_users": 40, "pairs_per_user": 30, **change})  # type: ignore[arg-type]


def test_keywords_occur_in_their_own_phrases_only() -> None:
    for keyword, phrases in ATTRIBUTES.values():
        assert (measure(phrases).sum(0) == [3 * (keyword == other) for other, _ in ATTRIBUTES.values()]).all()
    asked = prompt_texts(range(NUM_PROMPTS))
    assert len({prompt for prompt, _ in asked}) == NUM_PROMPTS
    cores = [core.format(**parts) for core in CORES for _, parts in asked[:: len(asked) // 500]]
    assert not measure([*cores, *FILLERS, *[prompt for prompt, _ in asked]]).any()


@pytest.mark.parametrize("world", WORLDS)
def test_attributes_are_measurable_in_the_texts(world: World) -> None:
    made = source(world)
    table, truth = made.load(), made.truth
    assert (measure([response for _, response in table.texts()]) == truth.attributes).all()
    assert np.allclose(truth.basis.T @ truth.basis, np.eye(3))
    centred = truth.attributes @ truth.basis
    scale = np.ptp(centred, axis=0) / np.ptp(truth.scores, axis=0)
    assert np.allclose(scale, scale[0])  # objectives are the attributes on the basis, shifted and scaled


@pytest.mark.parametrize("world", WORLDS)
def test_truth_explains_the_choices(world: World) -> None:
    made = source(world, noise=0)
    table, truth = made.load(), made.truth
    score, weights = truth.scores, truth.weights[table.user]
    if world == "ideal_point":
        margin = ((score[table.rejected] - weights) ** 2).sum(1) - ((score[table.chosen] - weights) ** 2).sum(1)
    else:
        margin = ((score[table.chosen] - score[table.rejected]) * weights).sum(1)
    assert (margin >= -1e-9).all() and np.corrcoef(margin, truth.margin)[0, 1] > 0.9999
    assert truth.best_accuracy == 1


@pytest.mark.parametrize("world", WORLDS)
def test_noise_gives_the_promised_accuracy(world: World) -> None:
    made = source(world, num_users=100, noise=0.5)
    assert (made.truth.margin > 0).mean() == pytest.approx(made.truth.best_accuracy, abs=0.02)
    assert 0.6 < made.truth.best_accuracy < 0.9


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_conflicting_groups_leave_nothing_to_a_model_without_users(noise: float) -> None:
    table = source("conflicting_groups", noise=noise).load()
    for seed in range(3):
        score = np.random.default_rng(seed).standard_normal(len(table.items))
        assert (score[table.chosen] > score[table.rejected]).mean() == 0.5


def test_shape_of_the_data() -> None:
    table = source().load()
    assert table.user_ids == [f"user-{index:02d}" for index in range(40)]
    assert (np.bincount(table.user) == 30).all()
    assert len(set(table.responses)) == len(table.responses) > 1500
    per_prompt = np.unique(table.user * len(table.prompts) + table.prompt, return_counts=True)[1]
    assert (per_prompt == 2).all()
    pairs = np.sort(np.stack([table.user * len(table.items) + side for side in (table.chosen, table.rejected)]).ravel())
    assert (np.diff(pairs) > 0).all()  # a user never judges a reply twice


def test_seed_decides_everything() -> None:
    first, again, other = source().load(), source().load(), source(seed=1).load()
    assert first.texts() == again.texts() and (first.chosen == again.chosen).all()
    assert first.texts() != other.texts()


def test_many_pairs_per_user() -> None:
    table = source(num_users=4, pairs_per_user=401).load()
    assert (np.bincount(table.user) == 401).all()


def test_bad_arguments_are_reported_together() -> None:
    with pytest.raises(ValueError, match=r"num_users: .*got 3\n.*num_objectives: expected 1 to 12, got 13\n.*noise"):
        source("conflicting_groups", num_users=3, num_objectives=13, noise=-1)
