from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from plm.data.sources.grammar import GrammarPeople, GrammarResponses, attributes
from plm.data.sources.samples import SampledResponses


def written(file: Path) -> str:
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z", "x", "w"], "split": "train"},
        {"prompt": "b", "responses": ["x", "v", "u"], "split": "test"},
        {"prompt": "c", "responses": ["x", "x"], "split": "train"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_every_response_is_in_a_pair_of_everyone(tmp_path: Path) -> None:
    """Distinct responses in order, two by two; of an odd number the last goes with the first."""
    table = SampledResponses(written(tmp_path / "s.jsonl")).load()
    texts = table.texts()
    pairs = [(*texts[one], texts[two][1]) for one, two in zip(table.chosen, table.rejected, strict=True)]
    assert pairs == [("a", "x", "y"), ("a", "z", "w"), ("b", "x", "v"), ("b", "u", "x")]
    assert table.user_ids == ["everyone"] and table.dropped == {"one_response": 1}
    assert table.row_split.tolist() == [0, 0, 2, 2]
    few = SampledResponses(written(tmp_path / "s.jsonl"), num_responses=2).load()
    assert few.num_pairs == 2
    with pytest.raises(ValueError, match=r"num_responses: expected at least 2 or null, got 1"):
        SampledResponses("s.jsonl", num_responses=1)


def test_a_grammar_says_what_it_was_asked_to_say() -> None:
    """Sixteen different responses to each prompt; attributes are read off the words and are all about as frequent."""
    table = GrammarResponses(40, 16).load()
    texts = table.texts()
    assert table.num_pairs == 40 * 8 and len(set(texts)) == 40 * 16
    levels = [attributes(response) for _, response in texts]
    for name in ("mood", "address", "ending", "length"):
        share = [sum(level[name] == value for level in levels) / len(levels) for value in range(3)]
        assert sum(share) == pytest.approx(1) and min(share) > 0.2
    assert all(prompt.split()[-2] in response.split() for prompt, response in texts)
    assert attributes(" sir , tea is lovely by day and at night and in between ?") == {
        "mood": 2,
        "address": 2,
        "ending": 2,
        "length": 2,
    }
    assert GrammarResponses(40, 16).load().texts() == texts
    with pytest.raises(ValueError, match="num_prompts: expected 2 to 160, got 999"):
        GrammarResponses(999)


def test_people_of_a_grammar_prefer_by_weighed_levels() -> None:
    """One direction per person explains all pairs of the person; they see the same test prompts, others to train on."""
    source = GrammarPeople(num_people=5, prompts_per_person=12, num_prompts=40)
    table = source.load()
    assert table.num_users == 5 and table.num_pairs == 5 * (12 + 8)
    everyone = GrammarResponses(40, 16).load()
    texts = table.texts()
    assert set(texts) <= set(everyone.texts())
    weights = np.random.default_rng((0, 1)).standard_normal((4, 5))
    shown = []
    for user in range(5):
        mine = table.user == user
        test = table.row_split[mine] == 2
        rows = zip(table.chosen[mine], table.rejected[mine], table.chosen_score[mine], strict=True)
        for chosen, rejected, score in rows:
            (prompt, best), (_, worst) = texts[chosen], texts[rejected]
            value = {
                text: float((np.array(list(attributes(text).values())) - 1) @ weights[:, user])
                for asked, text in everyone.texts()
                if asked == prompt
            }
            assert value[best] == max(value.values()) == pytest.approx(score, abs=1e-5)
            assert value[worst] == min(value.values())
        shown.append((set(table.prompt[mine][test]), set(table.prompt[mine][~test])))
    assert all(test == shown[0][0] for test, _ in shown) and shown[0][1] != shown[1][1]
    with pytest.raises(ValueError, match=r"GrammarPeople\.num_people: expected at least 1, got 0"):
        GrammarPeople(num_people=0)
