"""Features of a file are those that whoever wrote it had, and nothing else passes for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import plm
from plm.backbones import Backbone, FeatureFiles, HashingBackbone

TURNS = [
    {"role": "user", "content": "Tea?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "?"},
]
FEATURES = [[0.5, 1.0], [2.0, -1.0], [3.0, 4.0]]


def written(folder: Path, **columns: Any) -> str:
    usual = {"prompt": ["p", "p", "q"], "response": ["a", "b", None], "features": FEATURES}
    path = folder / "features.parquet"
    pq.write_table(pa.table({name: col for name, col in {**usual, **columns}.items() if col is not None}), path)
    return str(path)


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)])
def test_texts_are_found_by_prompt_and_response(kind: pa.DataType, tmp_path: Path) -> None:
    backbone = FeatureFiles(written(tmp_path, features=pa.array(FEATURES, kind)))
    assert backbone.feature_dim == 2
    assert torch.equal(backbone.represent(["p", "p", "p"], ["b", "a", "b"]), torch.tensor(FEATURES)[[1, 0, 1]])  # type: ignore[arg-type]
    assert torch.equal(backbone.represent([""], ["q"]), torch.tensor(FEATURES[2:]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got none of 1, such as 'p\\n\\nc'"):
        backbone.represent(["p"], ["c"])


def test_messages_are_found_however_they_are_written(tmp_path: Path) -> None:
    prompts = [json.dumps(TURNS), json.dumps(TURNS, indent=1).replace("\n", ""), json.dumps(TURNS[:1])]
    canonical = json.dumps(TURNS, separators=(",", ":"))
    for column in (prompts[:1] + prompts[:1] + prompts[2:], pa.array([TURNS, TURNS, TURNS[:1]])):
        backbone = FeatureFiles(written(tmp_path, prompt=column))
        assert torch.equal(backbone.represent([canonical], ["b"]), torch.tensor(FEATURES[1:2]))  # type: ignore[arg-type]
        assert torch.equal(backbone.represent([""], ["Tea?"]), torch.tensor(FEATURES[2:]))  # type: ignore[arg-type]


def test_an_array_beside_the_texts_is_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array(FEATURES, np.float16))
    np.save(tmp_path / "head.npy", np.array([1.0, -1.0]))
    options = {"array": str(tmp_path / "x.npy"), "head": str(tmp_path / "head.npy")}
    backbone = FeatureFiles(written(tmp_path, features=None), **options)
    assert torch.equal(backbone.represent(["p"], ["b"]), torch.tensor(FEATURES[1:2]))  # type: ignore[arg-type]
    assert backbone.reference_head is not None and backbone.reference_head.tolist() == [1.0, -1.0]
    again = Backbone.from_spec(backbone.spec())
    before = again.key()
    assert before == backbone.key()
    np.save(tmp_path / "x.npy", np.array(FEATURES, np.float16) + 1)
    assert again.key() != before  # other numbers are another cache


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"features": None}, {}, "expected the columns prompt, response, features, got prompt, response; features is"),
        ({"features": [[1.0], [2.0, 3.0], [4.0]]}, {}, r"equally many decimal numbers .* of lengths \[1, 2\]"),
        ({"features": [[1.0], None, [4.0]]}, {}, r"of lengths \[0, 1\]"),
        ({"features": [[1.0], [None], [4.0]]}, {}, "with 1 nulls"),
        ({"features": [[1], [2], [3]]}, {}, "expected lists of equally many decimal numbers"),
        ({"features": ["a", "b", "c"]}, {}, "expected lists of numbers in the column features, got string"),
        ({"features": [[1.0], [float("nan")], [3.0]]}, {}, "expected finite numbers, got others in row 1"),
        ({"response": ["a", "a", None]}, {}, "rows 0 and 1 have one text and other features"),
        ({}, {"array": "absent.npy"}, "expected a file of features, got 'absent.npy', which does not exist"),
        ({}, {"array": "few.npy"}, r"expected numbers of shape \(3, D\), .* got float64 of shape \(2, 2\)"),
        ({}, {"array": "no.npy"}, "expected a .npy file"),
        ({}, {"head": "few.npy"}, r"expected 2 numbers in 'few.npy', got shape \(2, 2\)"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    columns: dict[str, Any], options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("few.npy", np.ones((2, 2)))
    Path("no.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=message):
        backbone = FeatureFiles(written(tmp_path, **columns), **options)
        backbone.represent(["p", "p"], ["a", "b"])
        _ = backbone.reference_head
    with pytest.raises(ValueError, match=r"absent\.parquet', which does not exist"):
        FeatureFiles("absent.parquet").key()
    Path("text.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"text\.parquet: expected a Parquet file"):
        _ = FeatureFiles("text.parquet").feature_dim


def test_a_model_of_a_file_is_that_of_the_encoder_who_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["notebook"])
    draw, rows = random.Random(0), []
    for user in range(12):
        for number in range(12):
            sides = [f"the sea at {draw.randrange(99)}", f"the snow at {draw.randrange(99)}"]
            chosen, rejected = sides if user % 2 else sides[::-1]
            rows.append({"user_id": user, "prompt": f"where {number}", "chosen": chosen, "rejected": rejected})
    encoder = HashingBackbone(dim=128, include_prompt=True)
    texts = sorted({(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")})
    prompts, responses = map(list, zip(*texts, strict=True))
    path = written(
        tmp_path, prompt=prompts, response=responses, features=encoder.represent(prompts, responses).tolist()
    )
    fast = {"trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 2, "trainer.enable_progress_bar": False}
    options = {**fast, "data.shots": [], "data.cache_dir": str(tmp_path / "cache")}
    runs = [plm.fit(rows, "LoRe", backbone=one, options=options, num_bases=2) for one in (encoder, FeatureFiles(path))]
    groups = [run.metrics["seen"] for run in runs]
    assert groups[0] == groups[1]
    prompt, response = texts[0]
    scores = [run.method.score([response], user_id=3, prompts=prompt) for run in runs]
    assert torch.equal(*scores)
    with pytest.raises(ValueError, match="expected features of every text"):
        runs[1].method.score(["a text that nobody has encoded"], user_id=3)
