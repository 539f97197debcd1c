"""Small files with the schema of each corpus that recipes of papers read, where those look for them: below PLM_DATA."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plm.data.sources import hh, personalllm, prism, tldr, ultrafeedback_p

WORDS = "bus line road park tree dog cat bird song lamp river stone".split()


def said(*numbers: int) -> str:
    """A text of a few words that numbers choose, with one that is in no other text."""
    rng = np.random.default_rng(numbers)
    return " ".join(rng.choice(WORDS, size=rng.integers(3, 9))) + f" t{'t'.join(map(str, numbers))}"


def parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_prism(root: Path) -> None:
    """20 people with 6 dialogues of two turns: four replies, then two."""
    people = [f"user{number}" for number in range(20)]
    lines(root / prism.REPO / "survey.jsonl", [{"user_id": user, "num_completed_conversations": 6} for user in people])
    rows = [
        {
            "conversation_id": f"c{6 * person + dialogue}",
            "user_id": user,
            "turn": turn,
            "user_prompt": said(person, dialogue, turn),
            "model_response": said(person, dialogue, turn, reply),
            "score": 90 if reply == (person + dialogue) % 2 else 10 * reply,
            "if_chosen": reply == (person + dialogue) % 2,
        }
        for person, user in enumerate(people)
        for dialogue in range(6)
        for turn in range(2)
        for reply in range(4 - 2 * turn)
    ]
    lines(root / prism.REPO / "utterances.jsonl", rows)


def write_tldr(root: Path) -> None:
    """13 workers with 14 or more comparisons, 12 of them also in the half of the test."""

    def row(worker: int, number: int) -> dict[str, Any]:
        summaries = [{"text": said(worker, number, side), "policy": "sup4"} for side in range(2)]
        info = {"post": said(worker, number)}
        return {"info": info, "summaries": summaries, "choice": number % 2, "worker": f"w{worker:02d}"}

    train = [row(worker, number) for worker in range(13) for number in range(14 + worker)]
    test = [row(worker, 100 + number) for worker in range(12) for number in range(8)]
    parquet(root / tldr.REPO / "comparisons/train/0000.parquet", train)
    parquet(root / tldr.REPO / "comparisons/validation/0000.parquet", test)


def write_personalllm(root: Path) -> None:
    """60 prompts to train on and 6 of the test, each with 8 replies and their 10 rewards."""
    rng = np.random.default_rng(0)
    for half, numbers in (("train", range(60)), ("test", range(60, 66))):
        rows = []
        for number in numbers:
            row: dict[str, Any] = {"prompt": said(number)}
            for reply in range(1, 1 + personalllm.NUM_RESPONSES):
                row[f"response_{reply}"] = said(number, reply)
                row |= {f"response_{reply}_{model}": float(rng.normal()) for model in personalllm.REWARD_MODELS}
            rows.append(row)
        parquet(root / personalllm.REPO / f"default/{half}/0000.parquet", rows)


def write_ultrafeedback(root: Path) -> None:
    """200 prompts with two completions and four ratings of each."""
    rng = np.random.default_rng(0)
    rated, pairs = [], []
    for number in range(200):
        prompt, texts = said(number), [said(number, side) for side in range(2)]
        annotations = [
            {name: {"Rating": str(rng.integers(1, 6))} for name in ultrafeedback_p.ATTRIBUTES} for _ in texts
        ]
        completions = [{"annotations": a, "response": text} for a, text in zip(annotations, texts, strict=True)]
        rated.append({"instruction": prompt, "completions": completions})
        chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for text in texts]
        pairs.append({"prompt": prompt, "chosen": chats[0], "rejected": chats[1]})
    lines(root / ultrafeedback_p.RATINGS_REPO / "part.jsonl", rated)
    parquet(root / ultrafeedback_p.PAIRS_REPO / "default/train/0000.parquet", pairs)


def write_hh(root: Path) -> None:
    """30 and 10 transcripts of each half."""
    for subset in hh.TYPES:
        for half, size in (("train", 30), ("test", 10)):
            heads = [f"\n\nHuman: {said(number)} {subset} {half}\n\nAssistant: " for number in range(size)]
            rows = [
                {"chosen": f"{head}{said(n, 1)}", "rejected": f"{head}{said(n, 2)}"} for n, head in enumerate(heads)
            ]
            lines(root / hh.REPO / f"{subset}-base/{half}.jsonl.gz", rows)


def write_polis(root: Path) -> None:
    """12 seen and 10 unseen residents with 12 pairs each."""
    rows = [
        {
            "user_id": f"u{user}",
            "prompt": "",
            "chosen": said(number),
            "rejected": said(number, user),
            "row_split": "test" if number > 7 else "train",
            "user_split": "seen" if user < 12 else "unseen",
        }
        for user in range(22)
        for number in range(12)
    ]
    parquet(root / "polis_bowling_green/prefs.parquet", rows)


def write_responses(root: Path) -> None:
    """12 prompts with 4 responses each, as ``plm sample`` writes them."""
    rows = [
        {
            "prompt": said(number),
            "responses": [" " + said(number, one) for one in range(4)],
            "split": "test" if number > 8 else "train",
        }
        for number in range(12)
    ]
    lines(root / "responses.jsonl", rows)


WRITERS: dict[str, Callable[[Path], None]] = {
    "PrismPairs": write_prism,
    "TldrPairs": write_tldr,
    "TldrLengthPairs": write_tldr,
    "PersonalLlmPairs": write_personalllm,
    "UltraFeedbackPPairs": write_ultrafeedback,
    "PetsPairs": lambda _: None,
    "HHPairs": write_hh,
    "PairFiles": write_polis,
    "SampledResponses": write_responses,
}
"""Class of a source -> what writes its files below a folder."""
