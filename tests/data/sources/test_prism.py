from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from plm.data.schema import make_pairs
from plm.data.sources.prism import PrismPairs, dialogue_pairs, lore_split, natural

REAL = Path(os.environ.get("PLM_DATA", Path(__file__).parents[4] / "shared" / "data")) / "prism_structure"


def utterance(turn: int, reply: str | None, score: int, chosen: bool, **other: Any) -> dict[str, Any]:
    base = {"conversation_id": "c1", "user_id": "user1", "turn": turn, "user_prompt": f"question {turn}"}
    return {**base, "model_response": reply, "score": score, "if_chosen": chosen, **other}


DIALOGUE = [
    utterance(0, "a", 80, True),
    utterance(0, "b", 20, False),
    utterance(0, "c", 80, False),
    utterance(0, "EMPTY STRING", 1, False),
    utterance(1, "e", 10, False),
    utterance(1, "d", 60, True),
]


def test_every_rejected_response_is_a_pair_with_the_whole_history() -> None:
    pairs = dialogue_pairs(DIALOGUE)
    assert [(p["chosen"], p["rejected"], p["turn"], p["tie"]) for p in pairs] == [
        ("a", "b", 0, False),
        ("a", "c", 0, True),
        ("d", "e", 1, False),
    ]
    assert [m["content"] for m in pairs[2]["prompt"]] == ["question 0", "a", "question 1"]
    assert [m["role"] for m in pairs[2]["prompt"]] == ["user", "assistant", "user"]
    assert len(pairs[0]["prompt"]) == 1 and (pairs[0]["chosen_score"], pairs[0]["rejected_score"]) == (80, 20)


def test_a_dialogue_ends_where_no_reply_was_chosen() -> None:
    assert len(dialogue_pairs([*DIALOGUE[:2], utterance(1, "d", 5, False), utterance(2, "x", 9, True)])) == 1


def test_a_list_of_responses_is_refused() -> None:
    """The published formatting leak: all rejected responses of a turn as one list."""
    row = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": ["b", "c"]}
    with pytest.raises(ValueError, match="not a list of 2 strings; write one row per response"):
        make_pairs([row], "prism")


def test_natural_order() -> None:
    assert sorted(["c10", "c9", "c1"], key=natural) == ["c1", "c9", "c10"]


def test_split_divides_people_then_dialogues() -> None:
    own = {f"user{n}": [f"c{n}-{d}" for d in range(4 if n % 2 else 7)] for n in range(20)}
    users, rows = lore_split(own)
    assert set(users) == {f"user{n}" for n in range(0, 20, 2)} and len(rows) == 70
    per_user = [[rows[d] for d in own[user]].count("train") for user in users]
    assert per_user == [3] * 10  # half of seven, rounded down
    assert lore_split(dict(reversed(own.items()))) == (users, rows)
    assert lore_split(own, seed=1) != (users, rows)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    people = [f"user{n}" for n in range(10)]
    survey = [{"user_id": user, "num_completed_conversations": 6} for user in people]
    survey.append({"user_id": "user99", "num_completed_conversations": 0})
    rows = []
    for number, user in enumerate(people):
        for dialogue in range(6 if number else 2):
            where = {"user_id": user, "conversation_id": f"c{number}{dialogue}"}
            for row in DIALOGUE:
                text = row["model_response"] and f"{row['model_response']} of {where['conversation_id']}"
                rows.append({**row, **where, "model_response": text, "utterance_id": "unread"})
    for name, content in (("survey", survey), ("utterances", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return tmp_path


def test_load_gives_a_split_table(corpus: Path) -> None:
    table = PrismPairs(str(corpus)).load()
    assert table.num_users == 9 and table.dropped == {"few_dialogues": 8}
    assert table.num_pairs == 9 * 6 * 4 and table.tie.mean() == 0.25  # "EMPTY STRING of ..." is a reply here
    assert sorted(np.unique(table.row_split).tolist()) == [0, 2]
    split_of_dialogue = {(d, s) for d, s in zip(table.dialogue.tolist(), table.row_split.tolist(), strict=True)}
    assert len(split_of_dialogue) == 54  # a dialogue is on one side
    seen = {table.user_ids[row] for row in table.user[table.user_split == 0]}
    users, _ = lore_split({f"user{n}": [f"c{n}{d}" for d in range(6 if n else 2)] for n in range(10)})
    assert seen == {user for user, split in users.items() if split == "seen"} and 7 <= len(seen) <= 8


@pytest.mark.real
def test_parity_with_the_published_split() -> None:
    if not (REAL / "structure.parquet").exists():
        pytest.skip("prism_structure is not in the folder named by PLM_DATA")
    own: dict[str, list[str]] = {}
    for row in pq.read_table(REAL / "structure.parquet").to_pylist():
        own.setdefault(row["user_id"], []).append(row["conversation_id"])
    users, rows = lore_split(own)
    published = json.loads((REAL / "lore_split_ids_50_approx.json").read_text())
    groups = {kind: [user for user, split in users.items() if split == kind] for kind in ("seen", "unseen")}
    halves = {kind: [row for row, split in rows.items() if split == kind] for kind in ("train", "test")}
    assert [len(part) for part in (*groups.values(), *halves.values())] == [1029, 259, 3864, 3869]
    assert groups["seen"] == published["seen_user_ids"] and groups["unseen"] == published["unseen_user_ids"]
    assert halves["train"] == published["train_dialog_ids"] and halves["test"] == published["test_dialog_ids"]
