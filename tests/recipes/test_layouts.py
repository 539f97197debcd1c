"""Files as annotation tools export them train a method that finds the taste of unseen users, and never its reverse."""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import plm
from plm.cli import main
from plm.data.layouts import LAYOUTS
from tests.marks import slow_but

ROOT = Path(__file__).parents[2]
RECIPE = """
defaults: [{data: %s}, {backbone: hashing}, {trainer: cpu}, {logger: csv}]
model: {class_path: LoRe, init_args: {num_bases: 2}}
trainer: {max_epochs: 50}
"""
LIKED = {True: "red warm ruby", False: "blue cold azure"}


def judgements(num_users: int = 30, num_pairs: int = 20) -> list[tuple[str, str, str, str, bool]]:
    """(user, prompt, left, right, left is better): odd users like red, even ones blue."""
    rng = random.Random(0)
    rows = []
    for user in range(num_users):
        for number in range(num_pairs):
            red_left = rng.random() < 0.5
            texts = [f"{LIKED[red]} {rng.randrange(10**6)}" for red in (red_left, not red_left)]
            rows.append((f"u{user}", f"Paint {user} {number}.", *texts, red_left == bool(user % 2)))
    return rows


def label_studio(row: tuple[str, str, str, str, bool]) -> dict[str, Any]:
    user, prompt, left, right, won = row
    return {
        "prompt": prompt, "answer1": left, "answer2": right, "comparison": "left" if won else "right", "annotator": user
    }  # fmt: skip


def argilla(row: tuple[str, str, str, str, bool]) -> dict[str, Any]:
    user, prompt, left, right, won = row
    return {
        "id": prompt, "status": "completed", "prompt": prompt, "response-0": left, "response-1": right,
        "preference.responses": ["response-0" if won else "response-1"], "preference.responses.users": [user],
        "preference.responses.status": ["submitted"],
    }  # fmt: skip


@pytest.mark.parametrize("export", slow_but([label_studio, argilla], argilla))
def test_a_planted_taste_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plm"])
    rows = [export(row) for row in judgements()]
    with (tmp_path / "export.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setenv("PLM_PAIRS", "export.csv")
    (tmp_path / "mine.yaml").write_text(RECIPE % export.__name__)
    assert main(["fit", "--config", "mine.yaml", "--data.cache_dir", str(tmp_path / "cache")]) == 0
    (metrics,) = tmp_path.rglob("metrics.json")
    assert json.loads(metrics.read_text())["unseen"]["accuracy"] > 0.75
    (checkpoint,) = tmp_path.rglob("best.ckpt")
    method = plm.load_method(str(checkpoint))
    known = method.users.ids
    red, blue = (method.score([LIKED[side]] * len(known), user_id=known) for side in (True, False))
    assert (red > blue).tolist() == [int(user[1:]) % 2 == 1 for user in known], "labels are reversed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* left out")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_from_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Copies of the example of docs/data.md, each about another bird and by another user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plm"])
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8").split(f"\n## {layout}\n")[1]
    kind, content = re.findall(r"```(json|csv)\n(.*?)```", page, re.DOTALL)[0]
    copies = [
        re.sub(
            r"\b(anna|ben|eve|w[123])\b",
            rf"\g<1>{copy % 10}",
            re.sub(r"\b(bird|fish|Rhyme|Hi|m[123])\b", rf"\g<1>{copy}", content),
        )
        for copy in range(40)
    ]
    header = content.splitlines()[0] if kind == "csv" else None
    lines = [line for copy in copies for line in copy.splitlines()[header is not None :]]
    path = Path("mine.csv" if header else "mine.jsonl")
    path.write_text("\n".join([header, *lines] if header else lines))
    source = f"source: {{class_path: PairFiles, init_args: {{path: {path}, layout: {layout}}}}}"
    Path("mine.yaml").write_text(RECIPE.replace("{data: %s}, ", "") + f"data: {{{source}}}")
    options = ["--data.cache_dir", str(tmp_path / "cache"), "--data.unseen_users", "0"]
    assert main(["fit", "--config", "mine.yaml", *options, "--trainer.max_epochs", "3"]) == 0
