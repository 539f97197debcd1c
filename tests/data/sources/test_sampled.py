from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from plm.arrays import Float64Array
from plm.data.rewards import Length, Lexicon, Reward
from plm.data.sources.sampled import SampledPairs

REWARDS: dict[str, Reward] = {"good": Lexicon(["good"]), "length": Length()}


def write(file: Path, rows: Sequence[dict[str, object]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def sampled(tmp_path: Path) -> str:
    """60 prompts of four responses of 1 to 4 words, one of which says that it is good."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        good = rng.integers(4)
        lines = [" ".join((["good"] if i == good else ["bad"]) + [f"w{number}"] * i) for i in range(4)]
        rows.append({"prompt": f"p{number}", "responses": lines, "split": "test" if number < 12 else "train"})
    return write(tmp_path / "samples.jsonl", rows)


def test_named_people_compare_the_best_with_the_worst(sampled: str) -> None:
    people = {"praise": {"good": 1.0}, "brief": {"length": -1.0}, "both": {"good": 2.0, "length": -0.5}}
    source = SampledPairs(sampled, REWARDS, people, z_score=False)
    table = source.load()
    assert source.name == "sampled/samples" and table.user_ids == ["both", "brief", "praise"]
    assert table.num_pairs == 180 and not table.dropped
    texts = table.texts()
    for row in range(table.num_pairs):
        prompt = texts[table.chosen[row]][0]
        chosen, rejected = texts[table.chosen[row]][1], texts[table.rejected[row]][1]
        assert texts[table.rejected[row]][0] == prompt
        assert table.row_split[row] == (2 if int(prompt[1:]) < 12 else 0)
        who = table.user_ids[table.user[row]]
        if who == "praise":
            assert chosen.startswith("good") and not rejected.startswith("good")
            assert table.chosen_score[row] == pytest.approx(1 / len(chosen.split())) and table.rejected_score[row] == 0
        elif who == "brief":
            assert (len(chosen.split()), len(rejected.split())) == (1, 4)
            assert (table.chosen_score[row], table.rejected_score[row]) == (-1, -4)
        else:
            value = {
                t: 2 * t.startswith("good") / len(t.split()) - 0.5 * len(t.split()) for p, t in texts if p == prompt
            }
            assert table.chosen_score[row] == pytest.approx(max(value.values()))
            assert table.rejected_score[row] == pytest.approx(min(value.values()))


def test_z_scores_bring_rewards_to_one_scale(sampled: str) -> None:
    pool = SampledPairs(sampled, REWARDS, {"a": {"good": 1.0}}).pool
    assert pool.scores.shape == (60, 4, 2)
    table = SampledPairs(sampled, REWARDS, {"a": {"length": -2.0}}).load()
    words = np.array([1, 2, 3, 4])
    expected = -2 * (words - words.mean()) / words.std()
    assert set(np.round(table.chosen_score, 5)) == {np.float32(np.round(expected.max(), 5))}
    assert set(np.round(table.rejected_score, 5)) == {np.float32(np.round(expected.min(), 5))}


def test_doubt_follows_bradley_terry(sampled: str) -> None:
    """Responses of 1 and 4 words at temperature 2: the shorter wins with probability 1 / (1 + exp(-1.5))."""
    people = {f"brief-{n}": {"length": -1.0} for n in range(50)}
    table = SampledPairs(sampled, REWARDS, people, temperature=2.0, z_score=False).load()
    right = table.chosen_score > table.rejected_score
    expected = 1 / (1 + np.exp(-1.5))
    assert abs(right.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(right))
    assert right.reshape(50, 60).std(axis=0).any()  # everybody doubts on their own


def test_random_pairs(sampled: str) -> None:
    table = SampledPairs(
        sampled, REWARDS, {"brief": {"length": -1.0}}, pairs="random", pairs_per_prompt=3, z_score=False
    ).load()
    gaps = (table.chosen_score - table.rejected_score).tolist()
    assert set(gaps) == {1.0, 2.0, 3.0} and table.num_pairs <= 180  # the same pair of a prompt may be drawn twice
    assert np.mean(gaps) == pytest.approx(5 / 3, abs=0.2)


def test_drawn_people(sampled: str) -> None:
    source = SampledPairs(sampled, REWARDS, {"brief": {"length": -1.0}}, num_people=12, concentration=0.1)
    drawn = np.array([weights for who, weights in source.weights.items() if who != "brief"])
    assert list(source.weights)[1:3] == ["person-00", "person-01"] and drawn.shape == (12, 2)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    assert len(source.load().user_ids) == 13
    other = SampledPairs(sampled, REWARDS, num_people=12, seed=1)
    assert not np.allclose(np.array(list(other.weights.values())), drawn)


def test_what_somebody_sees_depends_on_nobody_else(sampled: str) -> None:
    settings = {"temperature": 1.0, "prompts_per_person": 10, "pairs": "random"}
    alone = SampledPairs(sampled, REWARDS, {"b": {"length": 1.0}}, **settings).load()  # type: ignore[arg-type]
    both = SampledPairs(sampled, REWARDS, {"a": {"good": 1.0}, "b": {"length": 1.0}}, **settings).load()  # type: ignore[arg-type]
    rows = np.flatnonzero(both.user == 1)
    mine = [(both.texts()[both.chosen[row]], both.texts()[both.rejected[row]]) for row in rows]
    assert mine == [(alone.texts()[i], alone.texts()[j]) for i, j in zip(alone.chosen, alone.rejected, strict=True)]
    assert (alone.row_split == 0).sum() == 10 and (alone.row_split == 2).sum() == 12


def test_prompts_are_divided_where_the_file_does_not(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "responses": ["a", "b b", "a", " "]} for n in range(20)]
    rows += [{"prompt": "p0", "responses": ["c c c"]}, {"prompt": "lonely", "responses": ["a"]}]
    source = SampledPairs(write(tmp_path / "s.jsonl", rows), REWARDS, {"a": {"length": 1.0}}, test_share=0.25)
    table = source.load()
    assert (table.row_split == 2).sum() == 5 and table.num_pairs == 20
    assert table.dropped == {"one_response": 1}
    assert (np.sort(source.pool.candidates, axis=1)[:, 0] == -1).sum() == 19  # p0 alone has three
    tied = [{"prompt": "p", "responses": ["a", "b"]}, {"prompt": "q", "responses": ["a", "b b"]}]
    table = SampledPairs(write(tmp_path / "t.jsonl", tied), REWARDS, {"a": {"length": 1.0}}).load()
    assert table.dropped == {"ties": 1} and table.num_pairs == 1


def test_wrong_arguments_rows_and_scores_are_refused(sampled: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        SampledPairs(sampled, REWARDS, {"a": {"lenght": 1.0}, "b": {"good": 0.0}}, pairs_per_prompt=2, test_share=0)
    assert str(error.value).splitlines() == [
        "SampledPairs.people.a: expected names of rewards (good, length), got 'lenght'; did you mean 'length'?",
        "SampledPairs.people.b: expected finite weights that are not all 0, got {'good': 0.0}",
        "SampledPairs.test_share: expected a share between 0 and 1, got 0",
        "SampledPairs.pairs_per_prompt: best against worst is one pair, got 2",
    ]
    with pytest.raises(ValueError, match="people: expected some, or num_people > 0, got none"):
        SampledPairs(sampled, REWARDS)
    rows = [
        {"prompt": "p", "responses": "text"},
        {"prompt": 3, "responses": ["a", "b"]},
        {"prompt": "q", "responses": ["a", "b"], "split": "val"},
        {"prompt": "r", "responses": ["a", "b"], "split": "train"},
        {"prompt": "r", "responses": ["c"], "split": "test"},
    ]
    file = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError) as error:
        SampledPairs(file, REWARDS, {"a": {"good": 1.0}}).load()
    assert str(error.value).splitlines() == [
        "4 malformed rows:",
        f"{file}:1: responses: expected a list of texts, got 'text'",
        f"{file}:2: prompt: expected a text, got 3",
        f"{file}:3: split: expected train or test, got 'val'",
        f"{file}:5: split: expected 'train', as before for this prompt, got 'test'",
    ]
    both = [{"prompt": f"p{n}", "responses": ["a", "b b"], **({"split": "train"} if n else {})} for n in range(3)]
    with pytest.raises(ValueError, match="a split of all prompts or of none"):
        SampledPairs(write(tmp_path / "both.jsonl", both), REWARDS, {"a": {"good": 1.0}}).load()
    one = [{"prompt": f"p{n}", "responses": ["a", "a"]} for n in range(3)]
    with pytest.raises(ValueError, match="two or more prompts with two different responses"):
        SampledPairs(write(tmp_path / "one.jsonl", one), REWARDS, {"a": {"good": 1.0}}).load()

    class Broken(Reward):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
            return np.full(len(responses), np.nan)

    with pytest.raises(ValueError, match="finite score of each of 240 responses from the reward 'broken'"):
        SampledPairs(sampled, {"broken": Broken()}, {"a": {"broken": 1.0}}).load()
