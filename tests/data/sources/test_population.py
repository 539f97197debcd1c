from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plm.data.sources.personalllm import NUM_RESPONSES, REWARD_MODELS, PersonalLlmPairs
from plm.data.sources.population import (
    CandidatePool,
    best_and_worst,
    dirichlet_weights,
    smallest_preference,
    standardise,
)
from plm.data.sources.simulated import SimulatedPairs
from plm.data.splits import split_pairs

REAL = Path(os.environ.get("PLM_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.mark.parametrize(("concentration", "largest"), [(0.001, 0.994), (0.01, 0.943), (0.1, 0.664)])
def test_weights_have_the_known_largest_share_and_no_nan(concentration: float, largest: float) -> None:
    weights = dirichlet_weights(50_000, 10, concentration, seed=0)
    assert np.isfinite(weights).all() and weights.sum(axis=1) == pytest.approx(1.0)
    assert weights.max(axis=1).mean() == pytest.approx(largest, abs=0.003)


def test_a_pool_is_laid_out_prompt_by_prompt_with_padding() -> None:
    """Responses are numbered in the order in which they come, a repeated one once; a prompt may have none."""
    pool = CandidatePool.of({"p": {"a": [1, 2], "b": [3, 4]}, "q": {}, "r": {"b": [5, 6]}}, np.zeros(3, dtype=bool))
    assert (pool.prompts, pool.responses) == (["p", "q", "r"], ["a", "b"])
    assert pool.candidates.tolist() == [[0, 1], [-1, -1], [1, -1]]
    np.testing.assert_array_equal(pool.scores[:, :, 1], [[2, 4], [np.nan] * 2, [6, np.nan]])


def test_best_and_worst_skips_padding_and_ties() -> None:
    nan = np.nan
    scores = np.array([[[1.0, 0], [3, 5], [2, 9]], [[4, 1], [4, 2], [nan, nan]]])  # (2 prompts, 3 candidates, 2)
    weights = np.array([[1.0, 0.0], [0.0, 1.0]])
    shown = np.array([[0, 1], [1, 0]])
    assert best_and_worst(scores, weights, shown).tolist() == [[[1, 0], [-1, -1]], [[1, 0], [2, 0]]]


def test_what_differs_by_rounding_is_a_tie_and_what_differs_by_more_is_none() -> None:
    """A reward and its opposite, weighed alike, are worth 1/2 in every response, whatever floating point says."""
    rng = np.random.default_rng(0)
    raw = rng.random((40, 6, 1)) / 3
    for dtype in (np.float64, np.float32):
        low, high = np.quantile(raw, (0.01, 0.99))
        one, other = ((raw - low) / (high - low)).astype(dtype), ((high - raw) / (high - low)).astype(dtype)
        scores = np.concatenate([one, other], axis=2).astype(np.float64)
        weights, shown = np.array([[0.5, 0.5], [0.5 + 1e-4, 0.5 - 1e-4]]), np.tile(np.arange(40), (2, 1))
        values = scores @ weights[0]
        assert (values.max(1) > values.min(1)).any()  # rounding differs
        alike, nearly = best_and_worst(scores, weights, shown)
        assert (alike == -1).all()
        expected = np.stack([raw[..., 0].argmax(1), raw[..., 0].argmin(1)], axis=1)
        assert nearly.tolist() == expected.tolist()
    assert smallest_preference(scores, 10 * weights) == pytest.approx(10 * smallest_preference(scores, weights))


def test_standardise_ignores_padding_and_survives_a_constant() -> None:
    scores = np.array([[[1.0, 7], [3, 7]], [[np.nan, np.nan], [5, 7]]])
    scaled = standardise(scores)
    assert scaled[..., 1].ravel()[[0, 1, 3]].tolist() == [0, 0, 0]
    assert scaled[0, 0, 0] == pytest.approx(-np.sqrt(1.5)) and scaled[1, 1, 0] == pytest.approx(np.sqrt(1.5))


@pytest.fixture
def table(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    rows = [
        {"pid": p, "text": f"answer {p} {r}", "good": float(rng.normal()), "long": float(rng.normal()) if r else None}
        for p in range(60)
        for r in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "responses.parquet")
    lines = "".join(json.dumps({"pid": p, "question": f"question {p}"}) + "\n" for p in range(60))
    (tmp_path / "prompts.jsonl").write_text(lines)
    return str(tmp_path / "responses.parquet")


def simulated(table: str, **options: object) -> SimulatedPairs:
    base = {"num_seen": 30, "num_unseen": 20, "seen_pairs": 10, "unseen_pairs": 3, "candidates": 4, "key": "pid"}
    prompts = table.replace("responses.parquet", "prompts.jsonl")
    return SimulatedPairs(
        table,
        ["good", "long"],
        prompts=prompts,
        prompt="question",
        response="text",
        **{**base, **options},  # type: ignore[arg-type]
    )


def test_people_choose_by_their_weights(table: str) -> None:
    source = simulated(table, concentration=0.001)
    pairs = source.load()
    pool, scores = source.pool, standardise(source.pool.scores)
    assert pool.scores.shape == (60, 4, 2) and not np.isnan(pool.scores).any()  # rows without a number are left out
    column = {(p, int(r)): c for p in range(60) for c, r in enumerate(pool.candidates[p])}
    response = pairs.items[:, 1]
    for row in range(0, pairs.num_pairs, 7):
        person = int(pairs.user_ids[pairs.user[row]].split("-")[1])
        value = scores[pairs.prompt[row]] @ source.weights[person]
        assert column[pairs.prompt[row], response[pairs.chosen[row]]] == value.argmax()
        assert column[pairs.prompt[row], response[pairs.rejected[row]]] == value.argmin()


def test_the_planted_log_odds_favour_every_choice(table: str) -> None:
    """By weights times attributes, looked up by text; who never errs is sure, whatever the difference."""
    source = simulated(table)
    pairs, log_odds = source.load(), source.planted_log_odds()
    assert log_odds.shape == (pairs.num_pairs,) and (log_odds > 0).all()
    scores = {
        (source.pool.prompts[p], source.pool.responses[r]): value
        for p, (rows, values) in enumerate(zip(source.pool.candidates, standardise(source.pool.scores), strict=True))
        for r, value in zip(rows.tolist(), values, strict=True)
        if r >= 0
    }
    item = pairs.texts()
    difference = [scores[item[c]] - scores[item[r]] for c, r in zip(pairs.chosen, pairs.rejected, strict=True)]
    utility = (np.array(difference) * source.weights[pairs.user]).sum(1)
    assert np.allclose(log_odds / log_odds[0], utility / utility[0])


def test_split_is_by_person_and_by_prompt_for_everybody(table: str) -> None:
    pairs = simulated(table).load()
    seen = pairs.user_split == 0
    counts = [
        int((part & split).sum()) for part in (seen, ~seen) for split in (pairs.row_split == 0, pairs.row_split == 2)
    ]
    assert counts == [30 * 10, 30 * 12, 20 * 3, 20 * 12]
    train, test = (set(pairs.prompt[pairs.row_split == split].tolist()) for split in (0, 2))
    assert not train & test and len(test) == 12
    splits = split_pairs(pairs)
    assert splits.group_by == "prompt" and (splits.user_split == 0).sum() == 30


def test_another_seed_gives_other_people_and_the_same_seed_the_same(table: str) -> None:
    first, again, other = (simulated(table, seed=seed).load() for seed in (0, 0, 1))
    assert (first.chosen == again.chosen).all() and first.prompts == again.prompts
    assert len(first.chosen) != len(other.chosen) or (first.chosen != other.chosen).any()


def test_one_interest_that_nothing_differs_in_gives_no_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{p}", "response": f"r{p}{r}", "flat": 1.0, "real": float(r)} for p in range(10) for r in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    source = SimulatedPairs(
        str(tmp_path / "t.parquet"),
        ["flat", "real"],
        concentration=1e-3,
        num_seen=40,
        num_unseen=0,
        seen_pairs=5,
        seed=1,
    )
    pairs = source.load()
    indifferent = int((source.weights[:, 1] == 0).sum())
    assert indifferent > 0 and pairs.dropped["ties"] == indifferent * (5 + 2)


def test_wrong_arguments_are_collected(table: str) -> None:
    with pytest.raises(
        ValueError, match=r"num_seen: expected at least 1, got 0\n.*concentration: expected a finite number > 0"
    ):
        simulated(table, num_seen=0, concentration=0.0)
    with pytest.raises(ValueError, match="expected at most the 48 training prompts"):
        simulated(table, seen_pairs=49).load()
    with pytest.raises(ValueError, match="two or more attributes"):
        SimulatedPairs(table, ["good"])


def test_personalllm_schema(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for half, size in (("train", 12), ("test", 5)):
        rows = []
        for number in range(size):
            row: dict[str, object] = {"prompt": f"{half} {number}", "id": number}
            for n in range(1, NUM_RESPONSES + 1):
                row[f"response_{n}"] = f"reply {half} {number} {n}"
                row[f"response_{n}_model"] = "x"
                row |= {f"response_{n}_{model}": float(rng.normal()) for model in REWARD_MODELS}
            rows.append(row)
        folder = tmp_path / "default" / half
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "0000.parquet")
    source = PersonalLlmPairs(
        str(tmp_path), concentration=0.001, num_seen=6, num_unseen=4, seen_pairs=8, unseen_pairs=2
    )
    pairs = source.load()
    assert source.pool.scores.shape == (17, 8, 10) and source.name == "personalllm-0.001"
    assert pairs.num_pairs == 6 * 8 + 4 * 2 + 10 * 5
    asked = {pairs.prompts[p].split()[0] for p in pairs.prompt[pairs.row_split == 2]}
    assert asked == {"test"}
    person = int(source.weights[0].argmax())  # nearly one reward model
    row = int(np.flatnonzero(pairs.user == pairs.user_ids.index("seen-00"))[0])
    best = pairs.responses[pairs.items[pairs.chosen[row], 1]]
    place = source.pool.scores[pairs.prompt[row], :, person].argmax()
    assert best == source.pool.responses[source.pool.candidates[pairs.prompt[row], place]]


@pytest.mark.real
def test_real_tables() -> None:
    if not (REAL / "alpaca_eval").is_dir():
        pytest.skip("alpaca_eval is not in the folder named by PLM_DATA")
    names = ["rm_GRM-Gemma-2B-rewardmodel-ft", "rm_Skywork-Reward-Llama-3.1-8B", "rm_internlm2-7b-reward"]
    source = SimulatedPairs(str(REAL / "judgebench" / "judgebench_rm_scores.parquet"), names, num_seen=20, num_unseen=5)
    pairs = source.load()
    assert (
        source.pool.scores.shape == (350, 2, 3) and pairs.num_pairs + pairs.dropped["ties"] == 20 * 45 + 5 * 9 + 25 * 70
    )
