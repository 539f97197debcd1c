"""RewardBench 2 scores against hand-made cases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plm.backbones import HashingBackbone
from plm.checkpoint import KnownUsers
from plm.cli import main
from plm.methods.bradley_terry import BradleyTerry
from plm.rewardbench import (
    Answered,
    Stats,
    answer,
    point,
    read_questions,
    subset_scores,
    ties_score,
    ties_stats,
)


def test_points_are_shared_by_equals() -> None:
    assert [point(2.0, [1.0, 0.0, -1.0]), point(1.0, [1.0, 1.0, 0.0]), point(0.0, [1.0])] == [
        1,
        pytest.approx(1 / 3),
        0,
    ]


def test_ties_formula_by_hand() -> None:
    """Two numbers: 1 is right everywhere with gaps 2 (tied, spread 1) and 1.5 (ref); 2 is wrong on its tied prompt."""
    tied = {"1": ties_stats([4.0, 3.0], [1.0, 0.0]), "2": ties_stats([4.0, 1.0], [2.0])}
    ref = {"1": ties_stats([1.5], [0.0, -1.0]), "2": ties_stats([3.0], [2.0])}
    assert tied["1"] == Stats(True, 2.0, 1.0) and tied["2"] == Stats(False, -1.0, 3.0) and ref["1"].spread == 0
    excess = (math.tanh(1.5 / 1 - 1) + math.tanh(-1 / 3 - 1)) / 2
    expected = 0.3 * 0.5 + 0.3 * 1.0 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * excess
    assert ties_score(ref, tied) == pytest.approx(expected)


def test_gap_of_the_ref_prompt_only_counts_in_the_hard_term() -> None:
    tied, ref = {"1": ties_stats([4.0, 3.0], [1.0])}, {"1": ties_stats([0.5], [0.0])}
    assert ties_score(ref, tied) == pytest.approx(0.3 + 0.3 + 0.2 + 0.0 + 0.01 * math.tanh(-0.5))


def test_no_spread_is_infinitely_good_and_nothing_by_nothing_is_zero() -> None:
    even, none = ties_stats([1.0, 1.0], [0.0]), ties_stats([1.0, 1.0], [1.0])
    assert ties_score({"1": ties_stats([1.0], [0.0])}, {"1": even}) == pytest.approx(1.01)
    assert ties_score({"1": none}, {"1": none}) == 0.0
    with pytest.raises(ValueError, match="as ref:N and tied:N"):
        ties_score({"1": even}, {"2": even})


def test_subsets_weigh_the_same() -> None:
    answered = [Answered(str(n), "Math", [1.0], [float(n > 0), 0.0]) for n in range(2)]
    answered += [Answered("9", "Focus", [0.0], [1.0])]
    answered += [Answered("ref:1", "Ties", [1.0], [0.0]), Answered("tied:1", "Ties", [1.0, 1.0], [0.0])]
    scores = subset_scores(answered)
    assert scores == {"Focus": 0.0, "Math": 0.75, "Ties": pytest.approx(1.01), "overall": pytest.approx(1.76 / 3)}
    with pytest.raises(ValueError, match="ref:N or tied:N, got 'x1'"):
        subset_scores([Answered("x1", "Ties", [1.0], [0.0])])


def row(number: Any, subset: str, right: list[str], wrong: list[str]) -> dict[str, Any]:
    return {
        "id": number,
        "subset": subset,
        "prompt": f"p{number}",
        "chosen": right,
        "rejected": wrong,
        "num_correct": 1,
    }


ROWS = [
    row("0", "Math", ["good"], ["bad", "bad bad", "bad so"]),
    row("1", "Math", ["bad"], ["good", "good good", "x"]),
    row("ref:5", "Ties", ["good"], ["bad"]),
    row("tied:5", "Ties", ["good", "good good"], ["bad"]),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ROWS))
    return path


def test_answers_keep_their_places(file: Path) -> None:
    questions = read_questions(str(file))
    seen: list[int] = []

    def length(prompts: list[str], texts: list[str]) -> Any:
        seen.append(len(texts))
        assert len(prompts) == len(texts) and prompts[0] == "p0"
        return np.array([len(text) for text in texts])

    assert answer(questions, length)[0] == Answered("0", "Math", [4], [3, 7, 6])
    assert answer(questions, length)[3] == Answered("tied:5", "Ties", [4, 9], [3]) and seen == [13, 13]


def test_malformed_questions(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(row("7", "Math", [], ["x"])) + "\n")
    with pytest.raises(ValueError, match=r"right and wrong answers .* none for \['7'\]"):
        read_questions(str(path))


def judge() -> BradleyTerry:
    """A reward that counts the word good."""
    backbone = HashingBackbone(dim=64)
    method = BradleyTerry(1, 64, backbone=backbone.spec()).eval()
    with torch.no_grad():
        method.directions.copy_(backbone.encode(["good"]).T.expand_as(method.directions))
    method.encode = lambda prompts, texts: backbone.encode(list(texts))
    method.find_users = KnownUsers(method, "none.db")
    return method


def test_the_command_scores_a_method(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("plm.learned_rewards.load_method", lambda path, device, users: judge())
    out = file.parent / "scores.json"
    assert main(["rewardbench", "--ckpt_path", "x.ckpt", "--questions", str(file), "--output", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert saved["scores"]["Math"] == 0.5 and saved["scores"]["Ties"] > 0.99 and len(saved["answers"]) == 4
    assert "overall" in capsys.readouterr().out
    assert main(["rewardbench", "--ckpt_path", "x.ckpt", "--questions", str(file), "--user", "somebody"]) == 1
    assert "no user 'somebody' beside 'x.ckpt'; run plm adapt first" in capsys.readouterr().err


def test_rewards_that_are_no_numbers_are_refused(file: Path) -> None:
    def some(prompts: list[str], texts: list[str]) -> Any:
        return np.array([np.nan if text == "good good" else 1.0 for text in texts])

    with pytest.raises(ValueError, match=r"expected finite rewards, got nan for an answer to '1' .2 of 13 answers"):
        answer(read_questions(str(file)), some)
