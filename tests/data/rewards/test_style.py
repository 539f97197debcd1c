from __future__ import annotations

import pytest

from plm.data.rewards import Length, Lexicon, Style

TEXT = "I'm sure: you'll like it! Won't you? We did, we did, we did."


@pytest.mark.parametrize(
    ("rule", "text", "value"),
    [
        ("questions", "Why? Why not?", 2 / 3),
        ("exclamations", TEXT, 1 / 13),
        ("first_person", TEXT, 4 / 13),
        ("second_person", TEXT, 2 / 13),
        ("distinct_words", "a rose is a rose", 3 / 5),
        ("no_repeats", "we did, we did, we did", 2 / 4),
        ("no_repeats", "so short", 1.0),
        ("lower_case", "Ab c 1!", 2 / 3),
        ("distinct_words", "...", 0.0),
        ("first_person", "", 0.0),
    ],
)
def test_rules_are_counted_by_hand(rule: str, text: str, value: float) -> None:
    assert Style(rule).score([""], [text]).tolist() == [pytest.approx(value)]  # type: ignore[arg-type]


def test_length_and_lexicon() -> None:
    texts = ["one", "one two three", ""]
    assert Length().score([""] * 3, texts).tolist() == [1, 3, 0]
    assert Length(target=2).score([""] * 3, texts).tolist() == [-1, -1, -2]
    assert Lexicon(["Two", "don't"]).score([""] * 2, ["ONE two, don’t!", "..."]).tolist() == pytest.approx([2 / 3, 0])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Style\.rule: expected one of .*, got 'question'; did you mean 'questions'"):
        Style("question")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Length\.target: .* got -1"):
        Length(target=-1)
    with pytest.raises(ValueError, match="expected words, got none"):
        Lexicon([])
