"""The data check: what it flags, what it leaves alone, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plm.audit.check import DataReport, check_pairs, leakage
from plm.audit.report import markdown, plots
from plm.cli import main
from plm.data.agreement import agreement, conflicts
from plm.data.schema import PairTable, make_pairs, pair_table
from plm.data.sources.synthetic import SyntheticPairs
from plm.data.surface import MARGIN, clustered, probe_surface, wilson
from plm.recipe.read import build_source, merged_recipe

CONF = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))
CLEAN = SyntheticPairs(num_users=30, pairs_per_user=40).load()


def rendered(table: PairTable, change: Callable[[str], str], share: float = 1.0, rejected: bool = True) -> PairTable:
    """The table with some rejected (or chosen) responses rendered differently."""
    texts = [*table.responses, *map(change, table.responses)]
    items = np.concatenate([table.items, table.items + np.array([0, len(table.responses)])])
    side = table.rejected if rejected else table.chosen
    moved = np.where(np.random.default_rng(0).random(table.num_pairs) < share, side + len(table.items), side)
    new = {"rejected": moved} if rejected else {"chosen": moved}
    return replace(table, responses=texts, items=items, **new)


def problems(report: DataReport) -> list[str]:
    return [finding.text for finding in report.findings if finding.level == "problem"]


def make(rows: list[dict[str, Any]]) -> PairTable:
    base = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}
    return make_pairs([{**base, **row} for row in rows], "test")


# ---------------------------------------------------------------------- the probe
def test_a_clean_copy_is_not_flagged_and_the_list_leak_is() -> None:
    clean = check_pairs(CLEAN, "clean")
    assert problems(clean) == [] and clean.probe is not None and not clean.probe.is_leak
    leaky = check_pairs(rendered(CLEAN, lambda text: repr([text])), "leaky")
    assert leaky.worst == "problem" and leaky.probe is not None
    assert leaky.probe.surface.value == 1.0 and leaky.probe.gain.low > MARGIN
    assert any("in square brackets, like a list" in text and "100.0%" in text for text in problems(leaky))
    assert any(text.startswith("probable leak") for text in problems(leaky))


def test_a_source_that_never_read_its_corpus_is_warned_about() -> None:
    finding = check_pairs(CLEAN, "clean", checked_on="schema").findings[0]
    assert (finding.level, finding.topic) == ("warning", "source") and "not yet on the corpus" in finding.text


def test_a_leak_in_a_few_pairs_is_found_by_its_trace() -> None:
    report = check_pairs(rendered(CLEAN, lambda text: repr([text]), share=0.08), "few")
    assert report.probe is not None and report.probe.gain.low < MARGIN
    assert len(problems(report)) == 1 and "like a list" in problems(report)[0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda text: f"{text}<|eot_id|>", "special token"),
        (lambda text: f"Assistant: {text}", "name of a speaker"),
        (lambda text: f"{text} ", "ends with white space"),
        (lambda text: f'"{text}"', "in quotes"),
    ],
)
def test_other_traces_of_rendering(change: Callable[[str], str], name: str) -> None:
    probe = probe_surface(rendered(CLEAN, change, share=0.1, rejected=False))
    assert probe is not None and probe.is_leak
    assert [trace.rejected.value for trace in probe.traces if name in trace.name] == [0.0]


def test_a_mark_on_both_sides_is_no_leak() -> None:
    both = rendered(rendered(CLEAN, lambda text: f'"{text}"'), lambda text: f'"{text}"', rejected=False)
    probe = probe_surface(both)
    assert probe is not None and not probe.is_leak and probe.traces == []


def test_taste_for_length_is_information() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(600):
        short, long = (
            " ".join(["word"] * int(size)) + f" {number}." for size in (rng.integers(5, 20), rng.integers(25, 60))
        )
        rows.append({"user_id": f"u{number % 30}", "prompt": f"p{number % 100}", "chosen": long, "rejected": short})
    report = check_pairs(make(rows), "length")
    assert report.probe is not None and report.probe.length.value > 0.99 and not report.probe.is_leak
    (found,) = [finding for finding in report.findings if finding.topic == "length"]
    assert found.level == "info" and "longer response in 100.0%" in found.text
    assert problems(report) == []


def test_noise_stays_at_chance() -> None:
    rng = np.random.default_rng(1)
    rows = [
        {"user_id": f"u{n % 20}", "prompt": f"p{n % 50}", "chosen": f"{rng.random()}", "rejected": f"{rng.random()}"}
        for n in range(800)
    ]
    probe = probe_surface(make(rows))
    assert probe is not None and probe.surface.low < 0.5 < probe.surface.high and not probe.is_leak
    assert probe_surface(make(rows[:30])) is None


@pytest.mark.parametrize(("num_pairs", "num_texts"), [(80, 160), (400, 60), (80, 12)])
def test_few_users_of_one_prompt_are_not_tested_on_what_was_learned(num_pairs: int, num_texts: int) -> None:
    """Answers of random words and marks, chosen at random: nothing to be told, however few hold them."""
    words = "the a of to and , . ! ? ( ) it was film 1 2 - \" ' I We : * _ # A".split()
    for seed in range(2):
        rng = np.random.default_rng(seed)
        texts = [f"{' '.join(rng.choice(words, rng.integers(8, 15)))} {row}x" for row in range(num_texts)]
        fresh = rng.permutation(num_texts).reshape(2, -1)
        drawn = np.stack([rng.choice(num_texts, 2, replace=False) for _ in range(num_pairs)], axis=1)
        chosen, rejected = fresh if num_texts == 2 * num_pairs else drawn
        user, prompt = np.arange(num_pairs) % 3, np.zeros(num_pairs, dtype=np.int64)
        table = pair_table(["a", "b", "c"], ["p"], texts, user=user, prompt=prompt, chosen=chosen, rejected=rejected)
        report = check_pairs(table, "noise")
        assert report.probe is not None and not report.probe.is_leak and problems(report) == []
        assert (report.probe.surface is None) == (num_texts == 12)
        if report.probe.surface is None:
            assert any("too few users, prompts and responses" in finding.text for finding in report.findings)
            assert "not probed" in markdown(report) and "surface probe" in plots(report)
        leaky = check_pairs(rendered(table, lambda text: f"{{{text[1:-1]}}}"), "leaky")
        assert leaky.probe is not None and leaky.probe.is_leak


def test_intervals() -> None:
    """Four clusters of two equal values: as four independent values; the score interval is the textbook one."""
    share = clustered(np.repeat([0.0, 1.0, 1.0, 0.0], 2), np.repeat(np.arange(4), 2))
    assert (share.value, share.high - share.value) == (0.5, pytest.approx(1.96 * np.sqrt(1 / 3 / 4), rel=1e-4))
    score = wilson(10, 10)
    assert score.high == pytest.approx(1.0) and score.low == pytest.approx(10 / (10 + 1.96**2), rel=1e-4)


# ---------------------------------------------------------------------- rows and splits
def test_conflicts_are_within_a_user_and_disagreement_is_between_users() -> None:
    table = make([{}, {"chosen": "b", "rejected": "a"}, {"user_id": "v"}, {"user_id": "w", "chosen": "c"}])
    assert conflicts(table).tolist() == [0]
    assert agreement(table) == (3, pytest.approx(2 / 3))
    report = check_pairs(table, "torn")
    assert any("1 comparisons were answered both ways" in finding.text for finding in report.findings)


def test_leakage_counts_test_pairs_by_what_they_share() -> None:
    split = {"row_split": "train"}
    test = {"row_split": "test"}
    table = make(
        [
            {"dialogue_id": "d1", "turn": 0, **split},
            {"prompt": "q", "chosen": "x", "rejected": "y", "dialogue_id": "d2", "turn": 0, **split},
            {"chosen": "b", "rejected": "a", "dialogue_id": "d3", "turn": 0, **test},  # the same pair, turned round
            {"prompt": "r", "chosen": "k", "rejected": "l", "dialogue_id": "d2", "turn": 1, **test},  # same dialogue
            {"prompt": "q", "chosen": "x", "rejected": "z", "dialogue_id": "d2", "turn": 0, **test},  # same turn
            {"user_id": "v", "prompt": "q", "chosen": "m", "rejected": "n", "dialogue_id": "d4", "turn": 0, **test},
        ]
    )
    found = {leak.unit: (leak.same_user, leak.anyone) for leak in leakage(table, table.row_split)}
    assert found == {
        "pair": (1, 1),
        "dialogue": (2, 2),
        "turn": (1, 1),
        "prompt": (2, 3),
        "prompt with one of the responses": (2, 2),
        "response": (2, 2),
    }


def test_a_split_that_shares_dialogues_is_a_problem_and_ours_is_not() -> None:
    rows = [
        {
            "user_id": f"u{n % 4}",
            "prompt": f"p{n}",
            "chosen": f"a{n}",
            "rejected": f"b{n}",
            "dialogue_id": f"d{n % 4}-{n // 8}",
            "row_split": "test" if n % 3 == 0 else "train",
        }
        for n in range(96)
    ]
    assert any("share their dialogue" in text for text in problems(check_pairs(make(rows), "shared")))
    ours = check_pairs(make([{k: v for k, v in row.items() if k != "row_split"} for row in rows]), "ours")
    assert problems(ours) == [] and {leak.same_user for leak in ours.leaks} == {0}
    refused = check_pairs(make(rows), "refused", group_by="dialogue")
    assert any("expected every dialogue of a user on one side" in text for text in problems(refused))
    assert refused.training_pairs.tolist() == [-1] * 4


def test_missing_words_ties_and_scores_are_reported() -> None:
    rows = [
        {"prompt": "None"},
        {"chosen": "Yes", "rejected": "yes "},
        {"prompt": "x", "tie": True},
        {"prompt": "y", "chosen_score": 3, "rejected_score": 3},
        {"prompt": "z", "chosen_score": 1, "rejected_score": 3},
    ]
    found = {finding.text.split(",")[0]: finding.level for finding in check_pairs(make(rows), "x").findings}
    text = " | ".join(found)
    for part in (
        "prompt 'None'",
        "capitals or white space",
        "1 of 5 pairs are ties",
        "equal scores",
        "higher score on",
    ):
        assert part in text
    assert "there is one user" in text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"user_id": "nan"}, "1 pairs have the user id 'nan': a missing value became a word"),
        ({"rejected": "NaN"}, "1 pairs have the response 'NaN': a missing value became a word"),
        ({"dialogue_id": "None"}, "1 pairs have the dialogue id 'None': a missing value became a word"),
        ({"user_id": "v.0"}, None),
        ({"user_id": "7.0"}, "1 users have two spellings, such as '7' and '7.0': write them the same way"),
        ({"user_id": "u "}, "1 users have two spellings, such as 'u' and 'u ': write them the same way"),
    ],
)
def test_ids_and_texts_that_a_tool_has_changed_are_problems(row: dict[str, Any], problem: str | None) -> None:
    found = problems(check_pairs(make([{"user_id": "7"}, {"prompt": "q"}, {"prompt": "z", **row}]), "x"))
    assert [text for text in found if "became a word" in text or "spellings" in text] == ([problem] if problem else [])


def test_users_whose_pairs_all_weigh_nothing_are_told() -> None:
    rows = [{"user_id": "v", "weight": 0}, {"user_id": "v", "prompt": "q", "weight": 0}, {"weight": 0}, {"prompt": "q"}]
    told = [finding.text for finding in check_pairs(make(rows), "x").findings if finding.topic == "weights"]
    assert told == ["1 users, such as 'v', have no pair that weighs more than 0: they teach nothing"]


def test_too_few_pairs_for_the_weights_to_fit() -> None:
    report = check_pairs(SyntheticPairs(num_users=20, pairs_per_user=10).load(), "few", num_weights=16)
    texts = [finding.text for finding in report.findings if finding.topic == "pairs per user"]
    assert len(texts) == 2 and all("have fewer than the 16 weights to fit" in text for text in texts)
    assert {finding.level for finding in report.findings if finding.topic == "pairs per user"} == {"warning"}


# ---------------------------------------------------------------------- the command
RECIPE = """
defaults: [{data: synthetic}, {backbone: hashing}, {trainer: cpu}, {logger: csv}]
model: {class_path: plm.methods.lore.LoRe, init_args: {num_bases: 7}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows, texts = [], CLEAN.texts()
    for row in range(0, CLEAN.num_pairs, 3):
        text = {side: texts[getattr(CLEAN, side)[row]][1] for side in ("chosen", "rejected")}
        user, prompt = CLEAN.user_ids[CLEAN.user[row]], CLEAN.prompts[CLEAN.prompt[row]]
        rows.append({"user": user, "prompt": prompt, **text, "rejected": repr([text["rejected"]])})
    (tmp_path / "leaky.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_recipe_is_checked_with_its_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.source.init_args.num_users", "25", "--data.source.init_args.pairs_per_user=20"]
    assert main(["data", "check", "--config", "recipe.yaml", *small, "--output", "out", "--strict"]) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["counts"]["users"] == 25 and report["num_weights"] == 7 and report["worst"] != "problem"
    assert "Data report: synthetic/low_rank-25x20" in (folder / "out" / "report.md").read_text()
    page = (folder / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert "25" in capsys.readouterr().out


def test_what_the_page_shows_is_escaped(folder: Path) -> None:
    lines = [
        {"user": f"<script>{row % 5}", "prompt": "p", "chosen": f"yes {row}", "rejected": f"no {row}"}
        for row in range(40)
    ]
    pairs = folder / "<script>.jsonl"
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "check", "--pairs", str(pairs), "--columns", "user_id=user", "--output", "out"]) == 0
    page = (folder / "out" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_strict_fails_on_the_list_leak_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["data", "check", "--pairs", "leaky.jsonl", "--columns", "user_id=user"]
    assert main(args) == 0
    assert main([*args, "--strict"]) == 1
    (path,) = folder.glob("runs/data_check/*/report.md")
    assert "like a list" in path.read_text() and "**problem**" in path.read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chek"], "did you mean 'check'"),
        (["check"], "either --config or --pairs"),
        (["check", "--pairs", "x.jsonl", "--columns", "user_id"], "expected NAME=COLUMN"),
        (["check", "--pairs", "x.jsonl", "--data.seed", "1"], "needs --config"),
        (["check", "--pairs", "x.jsonl"], "no such file"),
        (["check", "--config", "recipe.yaml", "--data.source.init_args.worlds", "x"], "'worlds' is not accepted"),
        (["check", "--config", "recipe.yaml", "--data.source.init_args.num_users", "${oc.env:NO_SUCH}"], "NO_SUCH"),
        (["check", "--config", "none.yaml"], "no config file"),
    ],
)
def test_mistakes_give_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["data", *args]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_later_class_drops_the_arguments_of_an_earlier_one(folder: Path) -> None:
    source = "data: {source: {class_path: PetsPairs, init_args: {num_seen: 9, num_unseen: 3}}}"
    (folder / "pets.yaml").write_text("defaults: [{data: synthetic}]\n" + source)
    assert main(["data", "check", "--config", "pets.yaml", "--output", "out"]) == 0
    assert json.loads((folder / "out" / "report.json").read_text())["counts"]["users"] == 24


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_data_group_names_a_source_that_can_be_built(path: Path) -> None:
    assert build_source(merged_recipe(str(path), [])).name
