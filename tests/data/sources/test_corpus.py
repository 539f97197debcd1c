from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plm.data.sources.corpus import corpus_files, corpus_rows, local_files, usable
from plm.hub import no_downloads, offline_options

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "1.jsonl").write_text(lines)
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "3.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "4.parquet")
    (tmp_path / "5.csv").write_text("a,b\n1,x\n2,y\n")
    files = local_files(str(tmp_path / "*"))
    for file in files[:4]:
        assert corpus_rows([file], {"number": "a", "b": "b", "c": "c?"}) == [
            {"number": 1, "b": "x", "c": None},
            {"number": 2, "b": "y", "c": None},
        ]
    assert corpus_rows([files[4]], {"b": "b"}) == [{"b": "x"}, {"b": "y"}]
    assert len(corpus_rows(files, {"a": "a"})) == 10


def test_a_missing_column_and_a_bad_line_are_named(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    path.write_text('{"prompts": "x"}\nnot json\n')
    with pytest.raises(ValueError, match=r"1\.jsonl:2: malformed JSON"):
        corpus_rows([str(path)], {"prompt": "prompt"})
    path.write_text('{"prompts": "x"}\n')
    with pytest.raises(ValueError, match=r"expected the columns \['prompt'\].*did you mean 'prompts'"):
        corpus_rows([str(path)], {"prompt": "prompt"})


def test_a_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "x.jsonl").write_text("{}\n")
    monkeypatch.setenv("PLM_DATA", str(tmp_path))
    assert corpus_files("corpus", "some/repo", "*.jsonl") == [str(tmp_path / "corpus" / "x.jsonl")]


def test_a_dataset_of_the_hub_is_first_looked_for_below_plm_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``OWNER/NAME``, with the layout of its repository: nothing is asked of the hub."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    root = tmp_path / "data [of us]"  # no pattern
    file = root / "some/repo/train/0.parquet"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setenv("PLM_DATA", str(root))
    assert corpus_files(None, "some/repo", "train/*.parquet", "r") == [str(file)]


def test_nothing_is_downloaded_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("plm.hub.is_reachable", lambda _: True)
    with no_downloads():
        assert offline_options() == {"local_files_only": True}
    assert offline_options() == {}


def test_the_hub_gets_exactly_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("plm.data.sources.corpus.offline_options", dict)
    with pytest.raises(ValueError, match=r"expected train/\*\.parquet in the dataset some/repo \(revision r\)"):
        corpus_files(None, "some/repo", "train/*.parquet", "r")
    assert asked == {
        "repo": "some/repo",
        "repo_type": "dataset",
        "revision": "r",
        "allow_patterns": ["train/*.parquet"],
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.parquet").touch()
    assert corpus_files(None, "some/repo", "train/*.parquet") == [str(tmp_path / "train" / "0.parquet")]


def test_offline_and_a_missing_package_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ValueError, match=r"some/repo cannot be downloaded \(no route to host\); go online.*init_args\.path"
    ):
        corpus_files(None, "some/repo", "x.jsonl")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install huggingface_hub, or download x\.jsonl of some/repo"):
        corpus_files(None, "some/repo", "x.jsonl")


def test_unusable_pairs_are_counted_and_lists_are_left_for_validation() -> None:
    pairs = [
        {"chosen": "a", "rejected": "b"},
        {"chosen": "a", "rejected": " "},
        {"chosen": None, "rejected": "b"},
        {"chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": ["b", "c"]},
    ]
    assert usable(pairs) == ([pairs[0], pairs[4]], {"empty": 2, "same_text": 1})
