from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plm.data.sources.reviews import ReviewPairs, passages, read_reviews
from plm.data.splits import split_pairs

DATA = Path(os.environ.get("PLM_DATA", Path(__file__).parents[3] / "../shared/data")).resolve() / "imdb"


def write(folder: Path, train: list[str], test: list[str]) -> None:
    for half, texts in (("train", train), ("test", test)):
        table = pa.table({"text": texts, "label": ["pos", "neg"] * (len(texts) // 2) + ["pos"] * (len(texts) % 2)})
        pq.write_table(table, folder / f"{half}.parquet")


def review(number: int) -> str:
    """Three sentences of 5, 6 and 7 words, with white space that running text does not keep."""
    return f'Film {number} has  a dog. It\n\nmeets cat {number} and dies. (Dog {number} says "no!") Never again.'


def test_a_text_is_cut_into_whole_sentences() -> None:
    text = 'One is it. Two is "this!" Three, e.g. that? (Four.) five. Six. Seven is by far the longest of all.'
    sentences = ["One is it.", 'Two is "this!"', "Three, e.g. that?", "(Four.) five.", "Six."]
    sentences += ["Seven is by far the longest of all."]
    assert [" ".join(words) for words in passages(text, 1, 80)] == sentences
    found = passages(text, 3, 6)
    assert [word for words in found for word in words] == text.split()
    assert all(len(words) <= 6 for words in found[:-1]) and len(found[-1]) == 8
    assert found == passages(text, 3, 6)


def test_passages_have_any_number_of_sentences() -> None:
    texts = [" ".join(f"S{number} {place}." for place in range(300)) for number in range(10)]
    lengths = [len(words) // 2 for text in texts for words in passages(text, 4, 80)]
    assert sorted(set(lengths)) == [1, 2, 3, 4]
    assert np.bincount(lengths)[1:] / len(lengths) == pytest.approx([0.25] * 4, abs=0.05)


def test_pairs_are_how_a_passage_goes_on_against_how_another_does(tmp_path: Path) -> None:
    write(tmp_path, [review(number) for number in range(60)], [review(number) for number in range(50, 110)])
    source = ReviewPairs(str(tmp_path), prompt_words=3, response_words=9, max_sentences=2)
    assert source.name == f"text of {tmp_path.name}"
    table = source.load()
    texts = table.texts()
    own = {half: [r.text for r in read_reviews(str(tmp_path), half, "text")] for half in ("train", "test")}
    assert table.user_ids == ["everyone"]
    both = len({*own["train"]} & {*own["test"]})
    assert table.dropped["repeated"] >= both > 0  # a review of both halves is one of the first
    for row in range(table.num_pairs):
        (prompt, chosen), (same, rejected) = texts[table.chosen[row]], texts[table.rejected[row]]
        assert prompt == same and len(prompt.split()) == 3 and 1 <= len(chosen.split()) <= 9
        assert chosen[0] == rejected[0] == " "  # as running text, so that a token holds its space
        half = own["train" if table.row_split[row] == 0 else "test"]
        assert sum(prompt + chosen in text for text in half) == 1
        assert not any(prompt + rejected in text for text in half) and any(rejected in text for text in half)
    words = {side: [len(texts[i][1].split()) for i in getattr(table, side)] for side in ("chosen", "rejected")}
    assert np.mean(np.array(words["chosen"]) == np.array(words["rejected"])) > 0.8
    splits = split_pairs(table, val_rows=0.2)
    assert splits.group_by == "dialogue" and (splits.user_split == 0).all()


def test_the_numbers_of_passages_are_limited_and_too_few_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [review(number) for number in range(100)], [review(number) for number in range(150, 250)])
    table = ReviewPairs(str(tmp_path), prompt_words=2, num_train=5, num_test=3).load()
    assert [(table.row_split == split).sum() for split in (0, 2)] == [5, 3]
    with pytest.raises(ValueError, match=r"expected two or more passages to train on in .*, got 0; raise response_w"):
        ReviewPairs(str(tmp_path), prompt_words=40).load()
    prompts = ReviewPairs(str(tmp_path), part="prompts", prompt_words=2, num_test=None).load()
    films = [{prompt for prompt in one.prompts if prompt.startswith("Film")} for one in (prompts, table)]
    assert all(films) and not films[0] & films[1]
    with pytest.raises(ValueError, match=r"ReviewPairs\.part: expected one of text, prompts, got 'judge'"):
        ReviewPairs(str(tmp_path), part="judge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ReviewPairs\.prompt_words: .* got 0\nReviewPairs\.num_test: .* got 1"):
        ReviewPairs(str(tmp_path), prompt_words=0, num_test=1)


@pytest.mark.real
@pytest.mark.slow
def test_real_reviews_leave_enough_to_train_on() -> None:
    if not DATA.is_dir():
        pytest.skip(f"no imdb in {DATA.parent}; set PLM_DATA")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = ReviewPairs(str(DATA)).load()
        split_pairs(table)
    assert (table.row_split == 0).sum() > 60_000 and (table.row_split == 2).sum() == 1000
    assert table.dropped["repeated"] < 1000
