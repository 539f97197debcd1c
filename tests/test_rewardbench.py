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
from plm.methods.lore import LoRe, PublishedLoRe
from plm.rewardbench import (
    Answered,
    Stats,
    answer,
    answers_of,
    point,
    read_questions,
    subset_scores,
    ties_score,
    ties_stats,
)
from plm.testing import saved


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


def test_all_right_answers_meet_all_wrong_ones(file: Path) -> None:
    answers = answers_of(read_questions(str(file)))
    pairs = [
        (answers.texts[right], answers.texts[wrong]) for right, wrong in zip(answers.right, answers.wrong, strict=True)
    ]
    assert pairs[:3] == [("good", "bad"), ("good", "bad bad"), ("good", "bad so")]
    assert pairs[-2:] == [("good", "bad"), ("good good", "bad")] and len(pairs) == 9
    assert answers.ids[-1] == "tied:5" and answers.prompts[-1] == "ptied:5"


def mixture() -> PublishedLoRe:
    """The first basis counts the word good, the second takes as much off for it."""
    backbone = HashingBackbone(dim=64)
    method = PublishedLoRe(2, 64, num_bases=2, backbone=backbone.spec()).eval()
    method.user_ids = ["anna", "ben"]
    with torch.no_grad():
        good = backbone.encode(["good"])[0]
        method.bases.copy_(torch.stack([good, -good], 1))
        method.mean_weights.copy_(torch.tensor([0.8, 0.2]))
        method.num_pairs.fill_(3)
    return method


def test_each_basis_is_a_scorer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The population's mix is right where its larger basis is, and the other is right where that is wrong."""
    out = file.parent / "scores.json"
    with saved(mixture()) as path:
        command = ["rewardbench", "--ckpt_path", str(path), "--questions", str(file), "--bases", "--output", str(out)]
        assert main(command) == 0
    found = json.loads(out.read_text())
    assert list(found["bases"]) == ["basis 0", "basis 1"]
    assert found["scores"] == pytest.approx(found["bases"]["basis 0"]) and found["scores"]["Math"] == 0.5
    assert found["bases"]["basis 1"]["Ties"] < 0.3 < 0.9 < found["scores"]["Ties"]
    heads = next(line for line in capsys.readouterr().out.splitlines() if "subset" in line)
    assert heads.split() == ["subset", "prompts", "score", "basis", "0", "basis", "1"]


def test_a_method_without_bases_has_none_to_score(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = BradleyTerry(1, 64, backbone=HashingBackbone(dim=64).spec()).eval()
    method.user_ids = ["anna"]
    with saved(method) as path:
        assert main(["rewardbench", "--ckpt_path", str(path), "--questions", str(file), "--bases"]) == 1
    assert "users of BradleyTerry are no weights of a few rewards" in capsys.readouterr().err


def test_users_who_do_not_differ_have_no_axis_to_score_by(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = LoRe(2, 64, num_bases=3, backbone=HashingBackbone(dim=64).spec()).eval()
    method.user_ids = ["anna", "ben"]
    method.num_pairs.fill_(3)
    with saved(method) as path:
        assert main(["rewardbench", "--ckpt_path", str(path), "--questions", str(file), "--bases"]) == 0
    assert "users do not differ: there is no axis to score by" in capsys.readouterr().out
