"""The audit: planted faults are found, clean copies are not accused, and the page says why."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plm.audit.check import conversations
from plm.audit.items import read_items
from plm.audit.report import noise_lines
from plm.audit.results import (
    Candidate,
    claim_fault,
    item_rows,
    read_candidates,
    score_model,
    selection_fault,
    tie_fault,
)
from plm.audit.signal import NUM_PERMUTATIONS, _effect, read_signal
from plm.audit.verdict import Audit, audit_files, run_split
from plm.cli import main
from plm.data.keys import pair_names
from plm.data.schema import make_pairs, read_pairs
from plm.data.splits import TEST, split_pairs, write_splits

Rows = list[dict[str, Any]]
FORMAT, SPLIT, USERS, TIES, SELECTION = (
    "labels in the format",
    "a dialogue on both sides of the split",
    "a shuffled user column",
    "ties dropped from the denominator",
    "model selection on test",
)
CLAIM = "a reported accuracy that the scores do not give"
TOPICS = ["sea wave tide", "snow ski ice", "code bug loop", "bread oven flour", "song drum choir", "ball goal team"]


class World:
    """40 users, each with eight dialogues of three turns, who like some topics and dislike others.

    Dialogues are split whole. A model was scored on the test: right on three pairs in four, even on one in ten, which
    count one half. Of eight epochs the one with the best validation value is reported.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        texts = []
        for _ in range(80):
            topic = rng.integers(len(TOPICS), size=2)
            words = [word for row in topic for word in rng.choice(TOPICS[row].split(), 2)]
            texts.append((topic, f"{' '.join(rng.permutation([*words, 'the', 'is', 'very']))}."))
        self.pairs: Rows = []
        for user in range(40):
            taste = 2.0 * rng.standard_normal(len(TOPICS))
            for dialogue in range(8):
                for turn in range(3):
                    first, second = (texts[row] for row in rng.choice(len(texts), 2, replace=False))
                    gain = float(taste[first[0]].sum() - taste[second[0]].sum())
                    if rng.random() > 1 / (1 + math.exp(-gain)):
                        first, second = second, first
                    self.pairs.append(
                        {
                            "item": f"{user}/{dialogue}/{turn}",
                            "user_id": f"user {user}",
                            "prompt": f"question {rng.integers(200)}",
                            "chosen": first[1],
                            "rejected": second[1],
                            "dialogue_id": f"{user}/{dialogue}",
                            "turn": turn,
                            "row_split": "train" if dialogue < 4 else "val" if dialogue < 5 else "test",
                        }
                    )
        margins = np.where(rng.random(len(self.pairs)) < 0.75, 1.0, -1.0) * rng.random(len(self.pairs))
        margins[rng.random(len(margins)) < 0.1] = 0.0
        self.scores: Rows = [
            {"item": pair["item"], "user": pair["user_id"], "margin": margin}
            for pair, margin in zip(self.pairs, margins.tolist(), strict=True)
            if pair["row_split"] == "test"
        ]
        validation = 0.7 + 0.02 * rng.standard_normal(8)
        test = validation + 0.02 * rng.standard_normal(8)
        self.candidates: Rows = [
            {
                "candidate": f"epoch {n}",
                "validation": validation[n],
                "test": test[n],
                "selected": n == validation.argmax(),
            }
            for n in range(8)
        ]
        self.rng = rng

    def plant(self, fault: str) -> None:
        """Do what somebody did."""
        if fault == FORMAT:
            for pair in self.pairs:
                pair["rejected"] = repr([pair["rejected"]])
        elif fault == SPLIT:
            splits = self.rng.permutation([pair["row_split"] for pair in self.pairs])
            for pair, split in zip(self.pairs, splits.tolist(), strict=True):
                pair["row_split"] = split
            self.scores = [
                {"item": pair["item"], "user": pair["user_id"], "margin": 1.0}
                for pair in self.pairs
                if pair["row_split"] == "test"
            ]
        elif fault == USERS:
            users = self.rng.permutation([pair["user_id"] for pair in self.pairs]).tolist()
            of = dict(zip((pair["item"] for pair in self.pairs), users, strict=True))
            for row, key in [*((pair, "user_id") for pair in self.pairs), *((row, "user") for row in self.scores)]:
                row[key] = of[row["item"]]
        elif fault == TIES:
            self.scores = [row for row in self.scores if row["margin"] != 0]
        elif fault == SELECTION:
            values = sorted(self.candidates, key=lambda row: row["validation"])
            values[0]["test"] = max(row["test"] for row in values) + 0.01  # overfitted, and lucky on the test
            for row in self.candidates:
                row["selected"] = row is values[0]

    def audit(self, folder: Path, **options: Any) -> Audit:
        """Write the files and audit them."""
        for name, rows in (("pairs", self.pairs), ("scores", self.scores), ("candidates", self.candidates)):
            (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row, default=bool) for row in rows))
        scores, candidates = str(folder / "scores.jsonl"), str(folder / "candidates.jsonl")
        return audit_files([str(folder / "pairs.jsonl")], scores=scores, candidates=candidates, **options)


def states(audit: Audit) -> dict[str, str]:
    return {fault.name: fault.state for fault in audit.faults}


@pytest.mark.filterwarnings("ignore:row_split shares", "ignore:.*duplicate pairs left out")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
@pytest.mark.parametrize("planted", ["", FORMAT, SPLIT, USERS, TIES, SELECTION])
def test_planted_faults_are_found_and_nothing_else(tmp_path: Path, planted: str, seed: int) -> None:
    """Each of five faults, in 20 worlds; a clean copy has none of them."""
    world = World(seed)
    world.plant(planted)
    audit = world.audit(tmp_path)
    expected = dict.fromkeys((FORMAT, SPLIT, USERS, TIES, SELECTION), "clear")
    assert states(audit) == (expected | {planted: "found"} if planted else expected), audit.faults
    assert audit.verdict.startswith("Not to be trusted: " + planted if planted else "None of the faults")


# ---------------------------------------------------------------------- the command
def test_the_command_writes_a_page_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(3)
    for row in world.scores:
        row |= {"population_margin": -1, "flipped_margin": -row["margin"]}
    world.plant(TIES)
    found = world.audit(tmp_path)
    args = ["audit", str(tmp_path / "pairs.jsonl"), "--results", str(tmp_path / "scores.jsonl"), "--output"]
    assert main([*args, str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert numbers["verdict"] in capsys.readouterr().out and numbers["verdict"].startswith(f"Not to be trusted: {TIES}")
    assert {fault["name"]: fault["state"] for fault in numbers["faults"]} == states(found) | {SELECTION: "unknown"}
    hashes = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("pairs.jsonl", "scores.jsonl")]
    assert list(numbers["inputs"].values()) == hashes
    assert numbers["hash"] == hashlib.sha256("".join(hashes).encode()).hexdigest()
    # the model's own numbers: every margin of the population is wrong, reversed labels turn every pair around
    model = numbers["model"]["numbers"]
    assert model["personal_minus_global"] == pytest.approx(model["accuracy"])
    assert model["flipped_minus_global"] == pytest.approx(1 - model["accuracy"])
    page = (tmp_path / "out" / "audit.html").read_text()
    for text in (
        numbers["hash"],
        *hashes,
        TIES,
        "state from reversed labels",
        "reversed labels",
        "test pairs have no score",
    ):
        assert text in page, text
    assert page.count("<!doctype html>") == 1 and "<script" not in page


def test_what_is_not_given_is_not_known(tmp_path: Path) -> None:
    world = World(0)
    rows = [{key: pair[key] for key in ("user_id", "prompt", "chosen", "rejected")} for pair in world.pairs]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    audit = audit_files([str(tmp_path / "plain.jsonl")])
    assert states(audit) == {FORMAT: "clear", SPLIT: "unknown", USERS: "clear", TIES: "unknown", SELECTION: "unknown"}
    assert audit.verdict == f"None of the faults that were looked for. Not known: {SPLIT}; {TIES}; {SELECTION}."


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_split_of_one_side_is_not_known(tmp_path: Path, side: str) -> None:
    rows = [pair | {"row_split": side} for pair in World(0).pairs]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert states(audit_files([str(tmp_path / "one.jsonl")]))[SPLIT] == "unknown"


def test_an_item_of_several_pairs_is_refused(tmp_path: Path) -> None:
    row = {"item": "a", "user_id": "u", "prompt": "p", "responses": ["x", "y", "z"], "ratings": [3, 2, 1]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="one pair a line where files have a column item, got 3 pairs in 1 line"):
        item_rows(read_pairs([tmp_path / "p.jsonl"]))


@pytest.mark.filterwarnings("ignore:row_split shares", "ignore:.*duplicate pairs left out")
def test_the_test_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    """Also with pairs that are in both."""
    world = World(1)
    parts: dict[str, Rows] = {"train": [], "test": []}
    for pair in world.pairs:
        part = pair.pop("row_split")
        del pair["dialogue_id"], pair["turn"]
        parts["test" if part == "test" else "train"].append(pair)
    files = {name: tmp_path / f"{name}.jsonl" for name in parts}
    for copied, expected in ((0, "clear"), (2, "found")):
        for name, rows in parts.items():
            more = (
                [row | {"item": f"copy of {row['item']}"} for row in parts["train"][:copied]] if name == "test" else []
            )
            files[name].write_text("\n".join(map(json.dumps, [*rows, *more])))
        audit = audit_files([str(files["train"])], test_pairs=[str(files["test"])])
        (fault,) = [fault for fault in audit.faults if fault.name == SPLIT]
        assert fault.state == expected, fault
    assert "2 pairs are in the training and in the test files" in fault.text


# ---------------------------------------------------------------------- scores, a reported accuracy, candidates
def judged(tmp_path: Path, margins: list[float]) -> Any:
    """Three users with two, two and six pairs, all scored."""
    users = ["a"] * 2 + ["b"] * 2 + ["c"] * 6
    rows = [
        {"user_id": user, "prompt": f"{n}", "chosen": "x", "rejected": "y", "item": n} for n, user in enumerate(users)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = [
        {"item": n, "user": user, "margin": margin}
        for n, (user, margin) in enumerate(zip(users, margins, strict=False))
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, scores)))
    table = read_pairs([tmp_path / "p.jsonl"])
    return score_model(table, np.ones(10, dtype=bool), read_items(tmp_path / "s.jsonl"))


@pytest.mark.parametrize(
    ("reported", "state", "text"),
    [
        (None, "clear", "each of 10 test pairs has a score, 3 of them even"),
        ("0.639", "clear", "mean over users, one half"),  # (3/4 + 1/2 + 4/6) / 3
        ("65%", "clear", "mean over pairs, one half"),  # 6.5 / 10
        ("50.0", "clear", "mean over users, wrong where it cannot tell"),  # (1/2 + 1/2 + 3/6) / 3
        ("75.0", "found", "mean over users, without the pairs that it cannot tell"),  # (1/1 + 1/2 + 3/4) / 3
        ("0.714", "found", "mean over pairs, without the pairs that it cannot tell"),  # 5 / 7
        ("91.3", "unknown", "none of what the scores give"),
    ],
)
def test_a_reported_accuracy_is_counted_again(tmp_path: Path, reported: str | None, state: str, text: str) -> None:
    """One user is right once and even once, one right and wrong, one right thrice, even twice and wrong once."""
    model = judged(tmp_path, [1, 0, 1, -1, 1, 1, 1, 0, 0, -1])
    fault = tie_fault(model, reported, is_split=True)
    assert model.numbers["accuracy"] == pytest.approx(23 / 36) and model.numbers["accuracy_micro"] == pytest.approx(
        0.65
    )
    assert (fault.state, text in fault.text) == (state, True), fault


@pytest.mark.parametrize(
    ("reported", "state", "text"),
    [
        ("63.9", "clear", "the reported 63.9 is 63.89 %, the mean over users, one half"),  # 23 / 36
        ("63.8", "found", "none of what the scores give: 63.89 % mean over users, one half"),
        ("0.64", "clear", "is 63.89 %"),
        ("75.0", "clear", "is 75.00 %, the mean over users, without the pairs that it cannot tell"),
        ("91%", "found", "71.43 % mean over pairs, without the pairs that it cannot tell"),
    ],
)
def test_a_claim_is_laid_beside_what_the_scores_give(tmp_path: Path, reported: str, state: str, text: str) -> None:
    fault = claim_fault(judged(tmp_path, [1, 0, 1, -1, 1, 1, 1, 0, 0, -1]), reported)
    assert (fault.state, text in fault.text) == (state, True), fault


def test_a_claim_is_heard_where_few_pairs_have_a_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four scored pairs of ten one user has 2 of 2, one 1 of 2, and nothing says which pairs are the test's."""
    few = judged(tmp_path, [1, 1, 1, -1])
    assert (
        claim_fault(few, "75%").text
        == "the reported 75% is 75.00 %, the mean over users, without the pairs that have no score"
    )
    args = [
        "audit",
        str(tmp_path / "p.jsonl"),
        "--results",
        str(tmp_path / "s.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*args, "--reported", "50.1%"]) == 0
    numbers = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert numbers["reported"] == "50.1%" and CLAIM in numbers["verdict"]
    assert numbers["faults"][-1]["state"] == "found" and "75.00 % mean over users" in numbers["faults"][-1]["text"]
    assert "50.1%" in (tmp_path / "out" / "audit.html").read_text() and "50.1%" in capsys.readouterr().out
    assert main([*args, "--reported", "174"]) == 1
    assert "--reported: expected an accuracy" in capsys.readouterr().err


def test_the_folder_of_a_run_says_which_pairs_are_the_test_s(tmp_path: Path) -> None:
    """Where it was fit on these very pairs, and only there."""
    world = World(0)
    for pair in world.pairs:
        del pair["row_split"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, world.pairs)))
    table = read_pairs([tmp_path / "pairs.jsonl"])
    options: dict[str, Any] = {"group_by": "dialogue", "unseen_users": 0.25, "val_rows": 0.1, "test_rows": 0.2}
    splits = split_pairs(table, seed=3, **options)
    tested = np.flatnonzero(splits.stage == TEST).tolist()
    lines = [f"{world.pairs[row]['item']},{world.pairs[row]['user_id']},1" for row in tested]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "predictions.csv").write_text("\n".join(["item,user,margin", *lines]))
    write_splits(tmp_path / "run" / "splits.json", splits, table.user_ids, options | {"split_seed": 3})
    audit = audit_files([str(tmp_path / "pairs.jsonl")], scores=str(tmp_path / "run"))
    assert audit.model is not None and audit.model.num_missing == 0 and audit.model.num_expected == len(tested)
    assert states(audit)[SPLIT] == states(audit)[TIES] == "clear"
    assert audit.data.counts["pairs test or query"] == len(tested)
    world.pairs.pop()
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, world.pairs)))
    assert run_split(read_pairs([tmp_path / "pairs.jsonl"]), tmp_path / "run") == {}
    (tmp_path / "run" / "splits.json").write_text("{")
    with pytest.raises(ValueError, match=r"splits\.json is damaged: JSONDecodeError"):
        run_split(table, tmp_path / "run")


def test_a_claim_may_be_of_unseen_users(tmp_path: Path) -> None:
    """Users a and b are seen, with 1 and 0 of 2, and c is not, with 6 of 6."""
    judged(tmp_path, [1, 1, -1, -1, 1, 1, 1, 1, 1, 1])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"users": "unseen" if row["user"] == "c" else "seen"}) for row in rows]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    model = score_model(read_pairs([tmp_path / "p.jsonl"]), np.ones(10, dtype=bool), read_items(tmp_path / "s.jsonl"))
    for reported, users in (("100%", "unseen users"), ("50.0", "seen users")):
        fault = claim_fault(model, reported)
        assert fault.state == "clear" and f"tell, {users}" in fault.text, fault
    assert claim_fault(model, "66.7").text.endswith("one half for what the model cannot tell")  # (1 + 0 + 1) / 3


def test_the_folder_of_a_run_stands_for_the_predictions_beside_it(tmp_path: Path) -> None:
    world = World(0)
    expected = world.audit(tmp_path)
    predictions = tmp_path / "run-predict" / "predictions.csv"
    for folder in (tmp_path / "run", predictions.parent):
        folder.mkdir()
    with predictions.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(world.scores[0]))
        writer.writeheader()
        writer.writerows(world.scores)
    found = audit_files(
        [str(tmp_path / "pairs.jsonl")],
        scores=str(tmp_path / "run"),
        candidates=str(tmp_path / "candidates.jsonl"),
    )
    assert [(fault.name, fault.state, fault.text) for fault in found.faults] == [
        (fault.name, fault.state, fault.text) for fault in expected.faults
    ]
    assert str(predictions) in found.inputs


def test_missing_scores_are_ties_unless_half_was_reported(tmp_path: Path) -> None:
    model = judged(tmp_path, [1, 0.5, 1, -1, 1, 1, 1])  # of the last user three are missing
    fault = tie_fault(model, None, is_split=False)
    assert fault.state == "found" and "3 of 10 test pairs have no score" in fault.text
    assert "83.3 % of those scored and 75.0 %" in fault.text  # (1 + 1/2 + 1) / 3, (1 + 1/2 + 4.5/6) / 3
    assert tie_fault(model, "75.0", is_split=True).state == "clear"
    assert tie_fault(model, "83.3", is_split=True).state == "found"
    few = judged(tmp_path, [1, 1, 1, 1])
    assert tie_fault(few, None, is_split=False).state == "unknown"  # which pairs are the test's is not said
    assert tie_fault(few, None, is_split=True).state == "found"
    for wrong in ("many", "-3", "174"):
        with pytest.raises(ValueError, match="--reported: expected an accuracy"):
            tie_fault(model, wrong, is_split=True)


def test_scores_of_other_pairs_or_users_are_refused(tmp_path: Path) -> None:
    judged(tmp_path, [1] * 10)
    table = read_pairs([tmp_path / "p.jsonl"])
    everything = np.ones(10, dtype=bool)
    for change, message in (
        ({"item": "zz"}, r"got 1 others.*\n  'zz'"),
        ({"user": "z"}, r"got 1 of others:\n  '3': user 'z'"),
    ):
        rows = [{"item": 3, "user": "b", "margin": 1} | change]
        (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ValueError, match=message):
            score_model(table, everything, read_items(tmp_path / "s.jsonl"))
    with pytest.raises(ValueError, match="expected scores of test pairs"):
        (tmp_path / "s.jsonl").write_text('{"item": 3, "user": "b", "margin": 1}')
        score_model(table, np.arange(10) == 4, read_items(tmp_path / "s.jsonl"))


def test_pairs_without_items_have_those_of_predictions(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "prompt": f"{n}", "chosen": "x", "rejected": "y"} for n in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = read_pairs([tmp_path / "p.jsonl"])
    assert item_rows(table) == {name: row for row, name in enumerate(pair_names(table))}
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row | {"item": "same"}) for row in rows))
    with pytest.raises(ValueError, match=r"every item once.*got 2 again:\n  'same': .*:1 and .*:2"):
        item_rows(read_pairs([tmp_path / "p.jsonl"]))


def candidates(*rows: tuple[float | None, float, bool]) -> list[Candidate]:
    return [Candidate(f"epoch {n}", *row) for n, row in enumerate(rows)]


def test_who_was_selected_by_what() -> None:
    assert selection_fault(candidates((0.7, 0.6, True), (0.6, 0.9, False))).state == "clear"
    found = selection_fault(candidates((0.7, 0.6, False), (0.6, 0.9, True)))
    assert found.state == "found" and "prefer 'epoch 0', whose test value is 0.6 instead of 0.9" in found.text
    assert selection_fault(candidates((0.7, 0.6, True), (0.7, 0.9, False))).state == "clear"  # equals
    assert selection_fault(candidates((-0.7, -0.2, False), (-0.6, -0.3, False), (-0.9, -0.5, True))).state == "unknown"
    assert selection_fault(candidates((None, 0.6, False), (None, 0.9, True))).state == "found"
    assert selection_fault(candidates((None, 0.6, True), (None, 0.9, False))).state == "unknown"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("candidate,test,selected\na,1,true\nb,2,true", "got 2 and 2 selected"),
        ("candidate,test,selected\na,1,true", "got 1 and 1 selected"),
        ("candidate,test,selected,validation\na,1,true,\nb,2,false,3", "a validation value of every candidate"),
        ("candidate,tset,selected\na,1,true\nb,2,true", r"c.csv:2: missing 'test'.*rename 'tset'"),
        ("candidate,test,selected\na,x,true\nb,2,true", r"c.csv:2: test: expected a number"),
    ],
)
def test_malformed_candidates(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "c.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_candidates(str(tmp_path / "c.csv"))


# ---------------------------------------------------------------------- noise, conversations, the test of users
@pytest.mark.filterwarnings("ignore:.*duplicate pairs left out")
def test_the_noise_ceiling_is_known_where_somebody_contradicts_themselves(tmp_path: Path) -> None:
    """Of ten comparisons made twice nine are answered alike: 1 - 2 e (1 - e) = 0.9, e = 0.0528. Copies say nothing."""
    rows = [{"user_id": "u", "prompt": f"{n}", "chosen": "x", "rejected": "y"} for n in range(10)]
    again = [row | ({"chosen": "y", "rejected": "x"} if n == 0 else {}) for n, row in enumerate(rows)]
    for name, second in (("torn", again), ("copied", rows)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [*rows, *second])))
    torn, copied = (audit_files([str(tmp_path / f"{name}.jsonl")]) for name in ("torn", "copied"))
    assert torn.ceiling == pytest.approx(1 - 0.052786, abs=1e-6) and math.isnan(copied.ceiling)
    assert "1 of 10 repeated comparisons" in noise_lines(torn)[0] and "cannot be told" in noise_lines(copied)[0]


def test_prompts_that_continue_another_are_one_conversation() -> None:
    def messages(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    prompts = [messages("Hi"), messages("Hi", "Yes?", "Go"), messages("Hi", "Yes?", "Go", "No", "Why"), messages("Ho")]
    rows = [{"user_id": "u", "prompt": prompt, "chosen": "x", "rejected": "y"} for prompt in [*prompts, "Hi"]]
    found = conversations(make_pairs(rows, "test")).tolist()
    assert found[0] == found[1] == found[2] != -1 and found[3:] == [-1, -1]


def test_the_moments_of_the_score_test() -> None:
    """Against loops over pairs of pairs; the mean over permuted columns is what each two pairs pull on average."""
    rng = np.random.default_rng(0)
    x, residual, user = rng.standard_normal((40, 3)), rng.random(40), np.arange(40) % 9
    pull = residual[:, None] * x
    slope = residual * (1 - residual)
    same = [(i, j) for i in range(40) for j in range(40) if i != j and user[i] == user[j]]
    excess = sum(pull[i] @ pull[j] for i, j in same)
    total = pull.sum(0) @ pull.sum(0) - (pull**2).sum()
    excess -= len(same) * total / (40 * 39)
    expected = sum(slope[i] * slope[j] * (x[i] @ x[j]) ** 2 for i, j in same)
    score, variance, unit = _effect(x, residual, user)
    assert unit > 0 and variance == pytest.approx(max(score, 0.0) / unit)
    scatter = expected / unit
    assert score * scatter == pytest.approx(excess, abs=4 * scatter / math.sqrt(NUM_PERMUTATIONS))


def test_controls_of_the_probe(tmp_path: Path) -> None:
    """Own pairs help, those of permuted users do not, and reversed labels harm."""
    world = World(2)
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, world.pairs)))
    table = read_pairs([tmp_path / "p.jsonl"])
    signal, controls = read_signal(table, table.row_split)
    assert signal is not None and signal.is_found and signal.num_users == 40
    gains = {control.name: control for control in controls}
    assert list(gains) == ["everybody", "own pairs", "permuted users", "reversed labels"]
    assert gains["own pairs"].difference_low > 0 > gains["reversed labels"].difference_high
    assert abs(gains["permuted users"].difference) < 0.02
    few = table.take(np.arange(30))
    assert read_signal(few, few.row_split) == (None, [])
