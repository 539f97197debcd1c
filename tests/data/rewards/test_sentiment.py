from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from plm.data.rewards import Sentiment
from plm.data.rewards.sentiment import windows
from plm.data.sources.reviews import SHARES, read_reviews

DATA = Path(os.environ.get("PLM_DATA", Path(__file__).parents[3] / "../shared/data")).resolve() / "imdb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews whose sentiment is one word."""
    folder = tmp_path_factory.mktemp("reviews")
    rng = np.random.default_rng(0)
    things = np.array("plot cast dog song war town car scene light music crime night river road".split())
    for half in ("train", "test"):
        liked = rng.random(300) < 0.5
        texts = [
            " ".join([*rng.choice(things, 7), "superb" if good else "dreadful", *rng.choice(things, 7)])
            for good in liked
        ]
        labels = ["pos" if good else "neg" for good in liked]
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{half}.parquet")
    return folder


def test_parts_are_disjoint_and_whole(folder: Path) -> None:
    parts = {part: {r.text for r in read_reviews(str(folder), "train", part)} for part in SHARES}
    table = pq.read_table(folder / "train.parquet").to_pylist()
    assert set().union(*parts.values()) == {row["text"] for row in table}
    assert sum(map(len, parts.values())) == len({row["text"] for row in table})
    assert [round(len(part) / 300, 1) for part in parts.values()] == [0.5, 0.1, 0.2, 0.2]
    positive = {row["text"]: row["label"] == "pos" for row in table}
    assert all(review.positive == positive[review.text] for review in read_reviews(str(folder), "train", "judge"))


def test_scores_are_those_of_scikit_learn(folder: Path, tmp_path: Path) -> None:
    reviews = [review for half in ("train", "test") for review in read_reviews(str(folder), half, "reward")]
    pieces = [(piece, good) for text, good in reviews for piece in windows(text, 6)]
    assert len(pieces) == 2 * len(reviews)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w[\w']*\b", min_df=3, max_features=60_000
    )
    model = LogisticRegression(C=3.0, max_iter=200).fit(
        vectorizer.fit_transform([piece for piece, _ in pieces]), [good for _, good in pieces]
    )
    texts = ["A superb plot, a superb dog!", "dreadful night", "nothing known here", ""]
    reward = Sentiment(str(folder), window=6, cache_dir=str(tmp_path))
    found = reward.score([""] * 4, texts)
    np.testing.assert_allclose(found, model.decision_function(vectorizer.transform(texts)), rtol=1e-9)
    assert found[0] > 1 and found[1] < -1


def test_the_trained_classifier_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Sentiment(str(folder), cache_dir=str(tmp_path)).score([""], ["superb"])
    judge = Sentiment(str(folder), part="judge", cache_dir=str(tmp_path)).score([""], ["superb"])
    assert first != judge
    assert len(list((tmp_path / "rewards").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr("plm.data.rewards.sentiment._train", None)
        assert Sentiment(str(folder), cache_dir=str(tmp_path)).score([""], ["superb"]) == first
    Sentiment(str(folder), window=5, cache_dir=str(tmp_path)).score([""], ["superb"])  # another training, another file
    assert len(list((tmp_path / "rewards").iterdir())) == 3


def test_wrong_parts_and_reviews_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Sentiment\.part: expected reward or judge, got 'text'"):
        Sentiment("x", part="text")  # type: ignore[arg-type]
    table = pa.table({"text": [f"good film {n}" for n in range(30)], "label": ["pos"] * 30})
    for half in ("train", "test"):
        pq.write_table(table, tmp_path / f"{half}.parquet")
    with pytest.raises(ValueError, match="expected positive and negative reviews"):
        Sentiment(str(tmp_path), cache_dir=str(tmp_path)).score([""], ["good"])


@pytest.mark.real
@pytest.mark.slow
def test_both_classifiers_know_the_sentiment_of_unseen_reviews(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no imdb in {DATA.parent}; set PLM_DATA")
    reviews = read_reviews(str(DATA), "test", "text")[:2000]
    liked = np.array([review.positive for review in reviews])
    scores = []
    for part in ("reward", "judge"):
        reward = Sentiment(str(DATA), part=part, cache_dir=str(tmp_path))  # type: ignore[arg-type]
        scores.append(reward.score([""] * len(reviews), [review.text for review in reviews]))
        assert ((scores[-1] > 0) == liked).mean() > 0.87
    assert np.corrcoef(scores)[0, 1] > 0.8
