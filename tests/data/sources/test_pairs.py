from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from plm.data.sources.pairs import PairFiles

ROOT = Path(__file__).parents[3]

LINE = '{"user_id": "u%d", "prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PLM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "set").mkdir(parents=True)
    for index in range(2):
        (tmp_path / "data" / "set" / f"{index}.jsonl").write_text(LINE % index)
    return tmp_path / "data"


def test_path_list_glob_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert PairFiles(str(folder / "set" / "0.jsonl")).load().user_ids == ["u0"]
    assert PairFiles("~/set/1.jsonl").load().user_ids == ["u1"]
    assert PairFiles("data/set/*.jsonl").load().user_ids == ["u0", "u1"]
    assert PairFiles(["data/set/1.jsonl", "data/set/0.jsonl"]).load().position(0) == "data/set/1.jsonl:1"


def test_relative_path_is_found_under_plm_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLM_DATA", str(folder))
    source = PairFiles("set/0.jsonl")
    assert source.load().user_ids == ["u0"] and source.name == "set/0.jsonl"


def test_missing_file_names_plm_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'set/9.jsonl', got no such file .*PLM_DATA is not set.*set PLM_DATA to the"):
        PairFiles("set/9.jsonl").load()
    monkeypatch.setenv("PLM_DATA", str(folder))
    with pytest.raises(ValueError, match="PLM_DATA is '"):
        PairFiles("set/9.jsonl").load()


REAL = Path(os.environ.get("PLM_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "num_pairs", "num_users"), [("polis_bowling_green", 75_616, 1_066), ("jester5k", 199_512, 4_994)]
)
def test_real_sets(name: str, num_pairs: int, num_users: int) -> None:
    path = REAL / name / "prefs.parquet"
    if not path.exists():
        pytest.skip(f"{name} is not in the folder named by PLM_DATA")
    table = PairFiles(str(path)).load()
    assert (table.num_pairs, table.num_users) == (num_pairs, num_users)
    assert (table.row_split >= 0).all() and table.dropped == {}


@pytest.mark.parametrize(
    ("group", "header", "left", "right"),
    [
        ("label_studio", "prompt,answer1,answer2,id,comparison,annotator", "left", "right"),
        (
            "argilla",
            "prompt,response-0,response-1,id,preference.responses,preference.responses.users",
            "['response-0']",
            "['response-1']",
        ),
        ("two_responses", "prompt,response_a,response_b,id,winner,user_id", "model_a", "model_b"),
        ("two_responses", "prompt,response_a,response_b,id,winner,user_id", "response_a", "response_b"),
    ],
)
def test_exports_of_annotation_tools_give_the_right_labels(
    tmp_path: Path, group: str, header: str, left: str, right: str
) -> None:
    """Anna likes short responses and Ben long ones, wherever these stand in the row."""
    rows = []
    for number in range(20):
        short, long = f"No {number}", f"No {number}, and here is why"
        sides = (short, long) if number % 3 else (long, short)
        for user in ("anna", "ben"):
            liked = short if user == "anna" else long
            by = f"['{user}']" if group == "argilla" else user
            rows.append(f'p{number},"{sides[0]}","{sides[1]}",{number},{left if sides[0] == liked else right},{by}')
    path = tmp_path / "export.csv"
    path.write_text("\n".join([header, *rows]))
    spec = yaml.safe_load((ROOT / f"conf/data/{group}.yaml").read_text())["data"]["source"]["init_args"]
    table = PairFiles(**{**spec, "path": str(path)}).load()
    texts = table.texts()
    longer = [len(texts[c][1]) > len(texts[r][1]) for c, r in zip(table.chosen, table.rejected, strict=True)]
    assert table.num_pairs == 40 and table.user_ids == ["anna", "ben"]
    assert [bool(user) for user in table.user] == longer


def test_folders_of_the_datasets_library_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"user_id": "u", "prompt": f"p{n}", "chosen": [{"role": "assistant", "content": f"a{n}"}], "rejected": [
        {"role": "assistant", "content": "b"}]} for n in range(5)]  # fmt: skip
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    table = PairFiles(str(tmp_path / "one")).load()
    assert table.prompts == [f"p{n}" for n in range(5)] and set(table.responses) == {"b", *(f"a{n}" for n in range(5))}
    assert table.position(4).endswith(".arrow:row 1")
    datasets.DatasetDict(train=saved.select([3, 1])).save_to_disk(tmp_path / "split")
    assert PairFiles(str(tmp_path / "split")).load().prompts == ["p3", "p1"]
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="expected one split, got test, train; name one of these folders"):
        PairFiles(str(tmp_path / "splits")).load()
    assert PairFiles(str(tmp_path / "splits" / "test")).load().num_pairs == 5
    (broken,) = (tmp_path / "split" / "train").glob("*.arrow")
    broken.write_bytes(b"no table")
    with pytest.raises(ValueError, match="expected an Arrow file, got"):
        PairFiles(str(tmp_path / "split")).load()


def test_a_dataset_of_the_hub_is_its_training_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is asked for the Parquet copy, or for the files that are named."""
    asked = []

    def download(repo: str, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, repo_type, revision, *allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("plm.data.sources.corpus.offline_options", dict)
    for name in ("default/train/0.parquet", "data/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "data/x.jsonl").write_text(LINE % 1)
    pq.write_table(pa.Table.from_pylist([json.loads(LINE % 2)]), tmp_path / "default/train/0.parquet")
    assert PairFiles("hf://datasets/anna/birds").load().user_ids == ["u2"]
    assert PairFiles("hf://datasets/anna/birds/data/*.jsonl").load().user_ids == ["u1"]
    assert asked == [
        ("anna/birds", "dataset", "refs/convert/parquet", "*/train/*.parquet"),
        ("anna/birds", "dataset", "main", "data/*.jsonl"),
    ]
    (tmp_path / "other/train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([json.loads(LINE % 2)]), tmp_path / "other/train/0.parquet")
    with pytest.raises(ValueError, match="expected one configuration in the dataset anna/birds, got default, other"):
        PairFiles("hf://datasets/anna/birds").load()
    with pytest.raises(ValueError, match=r"expected hf://datasets/OWNER/NAME or .*, got 'hf://datasets/birds'"):
        PairFiles("hf://datasets/birds").load()


@pytest.mark.parametrize(
    ("group", "layout"),
    [
        ("label_studio", "label_studio"), ("argilla", "argilla"), ("two_responses", "two_responses"),
        ("long_ratings", "long_ratings"), ("helpsteer", "helpsteer2"), ("ultrafeedback", "ultrafeedback"),
    ],
)  # fmt: skip
def test_groups_read_the_examples_of_the_manual(tmp_path: Path, group: str, layout: str) -> None:
    page = (ROOT / "docs/data.md").read_text().split(f"\n## {layout}\n")[1]
    kind, content = re.findall(r"```(json|csv)\n(.*?)```", page, re.DOTALL)[0]
    path = tmp_path / f"example.{'csv' if kind == 'csv' else 'jsonl'}"
    path.write_text(content)
    spec = yaml.safe_load((ROOT / f"conf/data/{group}.yaml").read_text())["data"]["source"]["init_args"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*judgements left out")
        table = PairFiles(**{**spec, "path": str(path)}).load()
    (_, _, *pairs) = [line for line in page.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert table.num_pairs == len(pairs)
