"""Protocols of the other corpora, on tiny files of the same schema."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentError, ArgumentParser

from plm.data.schema import PairTable
from plm.data.sources import PairSource
from plm.data.sources.arena import ArenaPairs, decided_pair
from plm.data.sources.community_alignment import CommunityAlignmentPairs, dialogue_pairs
from plm.data.sources.hh import HHPairs
from plm.data.sources.personalllm import PersonalLlmPairs
from plm.data.sources.pets import ENDINGS, NUM_TRAIN, PetsPairs, sentences
from plm.data.sources.tldr import TldrLengthPairs, TldrPairs, by_length, comparison, select_workers
from plm.data.sources.typed import SURVEY, TARGET, TEST, conflict
from plm.data.sources.ultrafeedback_p import (
    ATTRIBUTES,
    PAIRS_REPO,
    RATINGS_REPO,
    UltraFeedbackPPairs,
    opinions,
    parts,
    ratings_of,
)
from plm.data.splits import split_pairs


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def texts(table: PairTable) -> list[tuple[str, str, str, str]]:
    item = table.texts()
    columns = zip(table.user, table.prompt, table.chosen, table.rejected, strict=True)
    return [(table.user_ids[u], table.prompts[p], item[c][1], item[r][1]) for u, p, c, r in columns]


def test_sources_say_what_they_were_tested_on() -> None:
    assert {source.checked_on for source in (ArenaPairs, HHPairs, PersonalLlmPairs, TldrPairs)} == {"schema"}
    assert PetsPairs.checked_on == "corpus"


# ---------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("source", "option", "inherited"),
    [
        (PersonalLlmPairs, "z_score", {"concentration": 0.01, "num_seen": 1000, "seen_pairs": 45, "test_pairs": None}),
        (HHPairs, "support_pairs", {"num_seen": 100, "num_unseen": 100, "seed": 0}),
        (PetsPairs, "pool_size", {"num_seen": 100, "support_pairs": 8, "target_pairs": 32, "seed": 0}),
        (UltraFeedbackPPairs, "survey_size", {"num_seen": 100, "support_pairs": 8, "target_pairs": 32, "seed": 0}),
    ],
)
def test_inherited_arguments_are_options_of_a_recipe(
    source: type[PairSource], option: str, inherited: dict[str, Any]
) -> None:
    """They are checked, documented and have the defaults of the parent, though a source takes them by ``**``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(source, "source")
    parsed = parser.parse_args([]).source
    assert option in parsed and {name: parsed[name] for name in inherited} == inherited
    shown = " ".join(parser.format_help().split())
    assert all(re.search(rf"--source.{name} \S+ [A-Z]", shown) for name in inherited)  # a sentence follows
    for wrong in ("--source.num_seen=many", "--source.num_sen=3"):
        with pytest.raises(ArgumentError):
            parser.parse_args([wrong])


# ---------------------------------------------------------------------- TL;DR
def judged(worker: str, post: str | None, choice: int, name: str) -> dict[str, Any]:
    summaries = [
        {"text": f"left {name}", "policy": "sup", "note": None},
        {"text": f"right {name}", "policy": "sup", "note": None},
    ]
    return {
        "info": {"post": post, "title": "t"},
        "summaries": summaries,
        "choice": choice,
        "worker": worker,
        "split": "x",
    }


def test_a_comparison_prompts_with_the_post_and_never_with_none() -> None:
    pair = comparison(judged("w", " the post ", 1, "x"), "train")
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("the post", "right x", "left x")
    assert comparison(judged("w", None, 0, "x"), "test")["prompt"] is None


def test_workers_need_enough_pairs_in_both_halves() -> None:
    count = {
        ("a", "train"): 5,
        ("a", "test"): 1,
        ("b", "train"): 4,
        ("b", "test"): 9,
        ("c", "train"): 9,
        ("d", "train"): 5,
    }
    count[("d", "test")] = 2
    pairs = [{"user_id": u, "row_split": s} for (u, s), n in count.items() for _ in range(n)]
    picked = select_workers(pairs, 5, seed=0)
    assert sorted(picked) == ["a", "d"] and sorted(picked.values()) == ["seen", "unseen"]
    assert select_workers(pairs[::-1], 5, seed=0) == picked


def test_tldr(tmp_path: Path) -> None:
    train = [judged(w, f"post {w} {n}", n % 2, f"{w}{n}") for w in ("w1", "w2") for n in range(12)]
    train += [judged("rare", "post", 0, "rare")]
    test = [judged(w, f"new {w} {n}", 1, f"new {w}{n}") for w in ("w1", "w2") for n in range(4)]
    test += [judged("w1", None, 0, "news")]
    parquet(tmp_path / "comparisons" / "train" / "0000.parquet", train)
    parquet(tmp_path / "comparisons" / "validation" / "0000.parquet", test)
    table = TldrPairs(str(tmp_path), min_pairs=10, seen_pairs=8, unseen_pairs=3).load()
    assert table.dropped == {"no_post": 1, "few_comparisons": 1, "over_the_limit": 13}
    sizes = Counter(zip(table.user_split.tolist(), table.row_split.tolist(), strict=True))
    assert sizes == {(0, 0): 8, (0, 2): 4, (1, 0): 3, (1, 2): 4}
    assert all("None" not in prompt for prompt in table.prompts)
    assert split_pairs(table).group_by == "prompt"


def test_the_rule_of_lengths_counts_characters_and_gives_ties_to_the_second() -> None:
    def choice(left: str, right: str, shorter: bool) -> int:
        row = {"summaries": [{"text": left}, {"text": right}], "choice": None}
        return int(by_length(row, shorter)["choice"])

    assert [choice("long text", "short", shorter) for shorter in (False, True)] == [0, 1]
    assert [choice("short", "long text", shorter) for shorter in (False, True)] == [1, 0]
    assert [choice("a b", "c d", shorter) for shorter in (False, True)] == [1, 1]


def test_tldr_as_pal_labels_it(tmp_path: Path) -> None:
    """Workers w00 to w11 with 23 to 12 comparisons to train on; the last two are unseen, and so is one of the test."""
    sides = {"left": "x" * 9, "right": "y" * 4}

    def row(worker: str, number: int, half: str, policy: str = "sup1", post: str | None = "post") -> dict[str, Any]:
        texts = [f"{text} {worker} {half} {number}" for text in sides.values()]
        summaries = [{"text": text, "policy": policy, "note": None} for text in texts]
        post = post and f"{post} {worker} {half} {number}"
        return {
            "info": {"post": post, "title": ""},
            "summaries": summaries,
            "choice": 1,
            "worker": worker,
            "split": "x",
        }

    workers = [f"w{rank:02d}" for rank in range(12)]
    train = [row(w, n, "train") for rank, w in enumerate(workers) for n in range(23 - rank)]
    train += [row("w11", n, "train", "sup1_ppo") for n in range(50)] + [
        row("w11", n, "none", post=None) for n in range(50)
    ]
    test = [row(w, n, "test") for w in (*workers, "new", "rare") for n in range(2 if w == "rare" else 8)]
    parquet(tmp_path / "comparisons" / "train" / "0000.parquet", train)
    parquet(tmp_path / "comparisons" / "validation" / "0000.parquet", test)
    table = TldrLengthPairs(str(tmp_path), min_pairs=8, unseen_pairs=3).load()
    longer = Counter((user, chosen.startswith("x")) for user, _, chosen, _ in texts(table))
    short = {user for user in table.user_ids if longer[user, False]}
    assert all(not (longer[user, True] and longer[user, False]) for user in table.user_ids)  # a rule, not a choice
    assert short & set(workers[:10]) == {"w03", "w04", "w05"}
    assert len(short - set(workers[:10])) == 1  # 9 of 31, of three: w10, w11 and new
    sizes = Counter(zip(table.user_split.tolist(), table.row_split.tolist(), strict=True))
    assert sizes == {(0, 0): sum(23 - rank for rank in range(10)), (0, 2): 80, (1, 0): 9, (1, 2): 15}
    assert table.dropped == {"other_policies_or_no_post": 100, "other_workers": 13 + 12 + 2}


# ---------------------------------------------------------------------- types
def test_conflict_needs_two_opinions_against_each_other() -> None:
    assert conflict(np.array([[1, -1, 0], [1, 1, 0], [0, 0, 0], [-1, 0, 1]])).tolist() == [True, False, False, True]


def test_equal_ratings_are_no_opinion_and_na_is_no_rating() -> None:
    assert opinions(np.array([[3, 5, 1]]), np.array([[4, 5, 0]])).tolist() == [[-1, 0, 1]]
    rated = {name: {"Rating": "4"} for name in ATTRIBUTES}
    assert ratings_of({"annotations": rated}) == (4, 4, 4, 4)
    assert ratings_of({"annotations": {**rated, "honesty": {"Rating": "N/A"}}}) is None


def test_survey_pairs_are_training_pairs_that_all_have_a_view_on() -> None:
    opinion = np.array([[1, -1, 0 if row % 2 else 1] for row in range(200)])
    prompts = [f"p{row // 2}" for row in range(200)]
    part = parts(prompts, opinion, 30, seed=0)
    assert (part == SURVEY).sum() == 30 and (part == TEST).sum() == 20  # a tenth of 100 prompts, two pairs each
    assert (opinion[part == SURVEY] != 0).all()
    held = {prompt for prompt, where in zip(prompts, part, strict=True) if where == TEST}
    assert not held & {prompt for prompt, where in zip(prompts, part, strict=True) if where == TARGET}


@pytest.fixture
def feedback(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rated, pairs = [], []
    for number in range(150):
        prompt = f"prompt {number}"
        completions = []
        for side in ("x", "y"):
            given = {name: {"Rating": str(rng.integers(1, 6)), "Rationale": ""} for name in ATTRIBUTES}
            completions.append({"annotations": given, "response": f"{side} {number}", "model": "m"})
        rated.append({"instruction": prompt, "completions": completions, "source": "s"})
        chat = [[{"content": prompt, "role": "user"}, {"content": f"{s} {number}", "role": "assistant"}] for s in "xy"]
        pairs.append({"prompt": prompt, "chosen": chat[0], "rejected": chat[1], "source": "s"})
    pairs.append({**pairs[0], "prompt": "not rated"})
    (tmp_path / RATINGS_REPO).mkdir(parents=True)
    (tmp_path / RATINGS_REPO / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    parquet(tmp_path / PAIRS_REPO / "default" / "train" / "0000.parquet", pairs)
    return tmp_path


def test_ultrafeedback_p2_is_balanced_and_its_survey_is_no_target(feedback: Path) -> None:
    source = UltraFeedbackPPairs(
        str(feedback), survey_size=12, num_seen=5, num_unseen=3, support_pairs=4, target_pairs=100, test_pairs=100
    )
    pool = source.read_pool()
    assert (
        source.name == "ultrafeedback-p-2" and (pool.opinion.sum(axis=1) == 0).all()
    )  # no model is above 50 % unaware
    table = source.load()
    survey = {tuple(sorted(row)) for row in pool.pairs[pool.part == SURVEY][:, 1:].tolist()}
    sides = np.sort(table.items[np.stack([table.chosen, table.rejected]), 1], axis=0).T
    from_survey = np.array([tuple(row) in survey for row in sides.tolist()])
    assert not from_survey[table.row_split == 2].any()
    per_user = np.bincount(table.user, weights=from_survey & (table.row_split == 0))
    assert per_user.tolist() == [4] * 16
    unseen = table.user_split == 1
    assert from_survey[unseen & (table.row_split == 0)].all() and len(np.unique(table.user[unseen])) == 6
    opinion_of = {name: {} for name in pool.types}  # type: ignore[var-annotated]
    for user, prompt, chosen, _ in texts(table):
        assert opinion_of[user.rpartition("-")[0]].setdefault(prompt, chosen) == chosen  # people of a type agree


def test_ultrafeedback_p4_and_wrong_types(feedback: Path) -> None:
    source = UltraFeedbackPPairs(
        str(feedback), ATTRIBUTES, 10, num_seen=2, num_unseen=1, support_pairs=4, target_pairs=10, test_pairs=5
    )
    assert source.load().num_users == 12 and source.name == "ultrafeedback-p-4"
    with pytest.raises(ValueError, match="types: expected two or more of helpfulness"):
        UltraFeedbackPPairs(None, ["helpfulness", "style"])


def test_pets_agree_about_birds_and_rabbits_and_disagree_about_dogs_and_cats() -> None:
    table = PetsPairs(num_seen=20, num_unseen=10, target_pairs=40).load()
    animal = {text: pet for pet in ENDINGS for text in sentences(pet)}
    assert len(animal) == 400
    rank = {"bird": 0, "dog": 1, "cat": 1, "rabbit": 3}
    disputed = 0
    for user, _, chosen, rejected in texts(table):
        pair = (animal[chosen], animal[rejected])
        if set(pair) == {"dog", "cat"}:
            disputed += 1
            assert pair[0] == user.partition("-")[0].removesuffix("s")
        else:
            assert rank[pair[0]] < rank[pair[1]]
    assert disputed / table.num_pairs == pytest.approx(0.5, abs=0.05)
    early = {text for pet in ENDINGS for text in sentences(pet)[:NUM_TRAIN]}
    for split, inside in ((0, True), (2, False)):
        rows = table.row_split == split
        assert {table.responses[r] in early for r in table.items[table.chosen[rows], 1].tolist()} == {inside}
    assert split_pairs(table).group_by == "response"


def test_hh_types_disagree_on_the_harmless_half_only(tmp_path: Path) -> None:
    for subset in ("helpful", "harmless"):
        for half, size in (("train", 20), ("test", 8)):
            rows = []
            for number in range(size):
                head = f"\n\nHuman: {subset} {half} {number}\n\nAssistant: Go on.\n\nHuman: More?\n\nAssistant: "
                rows.append({"chosen": f"{head}good {subset} {number}", "rejected": f"{head}bad {subset} {number}"})
            rows.append({"chosen": "\n\nHuman: cut off", "rejected": "\n\nHuman: cut off"})
            rows.append({**rows[0], "rejected": "\n\nHuman: other\n\nAssistant: bad"})
            rows.append({**rows[0], "rejected": rows[0]["chosen"]})
            rows.append(rows[0])
            folder = tmp_path / f"{subset}-base"
            folder.mkdir(exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{half}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = HHPairs(str(tmp_path), num_seen=3, num_unseen=2, support_pairs=5, target_pairs=50, test_pairs=50).load()
    for user, prompt, chosen, _ in texts(table):
        reverse = user.startswith("helpful") and "harmless" in prompt
        assert chosen.startswith("bad" if reverse else "good") and json.loads(prompt)[1]["content"] == "Go on."
    per_user = np.bincount(table.user[table.row_split == 0])
    assert sorted(set(per_user.tolist())) == [5, 40]  # unseen people give five, seen people all forty
    assert table.dropped == {"no_last_reply": 4, "other_dialogue": 4, "same_text": 4, "duplicates": 4}


# ---------------------------------------------------------------------- live comparisons
def battle(judge: str, number: int, winner: str, **other: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": f"question {judge} {number}"}
    sides = {f"conversation_{s}": [asked, {"role": "assistant", "content": f"{s} {judge} {number}"}] for s in "ab"}
    return {
        "judge": judge,
        "winner": winner,
        "turn": 1,
        "language": "English",
        "tstamp": 1e9 + number,
        **sides,
        **other,
    }


def test_arena(tmp_path: Path) -> None:
    rows = [battle("j1", n, "model_b" if n else "model_a") for n in range(5)] + [battle("j1", 9, "tie")]
    rows += [
        battle("j1", 10, "model_a", language="German"),
        battle("j2", 1, "model_a"),
        battle("j1", 11, "model_a", turn=2),
    ]
    parquet(tmp_path / "default" / "train" / "0000.parquet", rows)
    table = ArenaPairs(str(tmp_path)).load()
    assert texts(table)[:2] == [
        ("j1", "question j1 0", "a j1 0", "b j1 0"),
        ("j1", "question j1 1", "b j1 1", "a j1 1"),
    ]
    assert table.dropped == {"undecided": 1, "several_turns": 1, "other_language": 1, "few_comparisons": 1}
    assert table.timestamp[0] == 1e9 and decided_pair(battle("j", 0, "tie (bothbad)")) == "undecided"


def talk(annotator: str, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"conversation_id": f"{annotator}-{number}", "annotator_id": annotator, "assigned_lang": "en"}
    for turn, picked in (("first", "response_b"), ("second", "d" if number else None)):
        row |= {f"{turn}_turn_prompt": f"{turn} {annotator} {number}", f"{turn}_turn_preferred_response": picked}
        row |= {f"{turn}_turn_response_{letter}": f"{turn} {letter} {annotator} {number}" for letter in "abcd"}
    return row


def test_community_alignment(tmp_path: Path) -> None:
    parquet(tmp_path / "default" / "train" / "0000.parquet", [talk("a1", n) for n in range(6)] + [talk("a2", 1)])
    table = CommunityAlignmentPairs(str(tmp_path), min_pairs=10).load()
    assert table.num_pairs == 5 * 6 + 3 and table.dropped == {"few_pairs": 6}
    assert Counter(np.bincount(table.dialogue).tolist()) == {6: 5, 3: 1}
    assert split_pairs(table, unseen_users=0).group_by == "dialogue"  # siblings share the picked reply
    history = json.loads(table.prompts[table.prompt[np.flatnonzero(table.turn == 1)[0]]])
    assert [message["content"] for message in history] == ["first a1 1", "first b a1 1", "second a1 1"]


def test_a_missing_reply_ends_a_dialogue() -> None:
    row = {
        **dict.fromkeys(f"{t}_turn_prompt" for t in ("third", "fourth")),
        **talk("a", 1),
        "first_turn_response_b": None,
    }
    row |= {f"{t}_turn_preferred_response": None for t in ("third", "fourth")}
    assert {pair["chosen"] for pair in dialogue_pairs(row)} == {None}
