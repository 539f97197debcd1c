"""Reddit TL;DR: crowd workers who compare two summaries of a post.

Paper: Stiennon et al. 2020, arXiv 2009.01325. Split: LoRe, arXiv 2504.14439, section 5 (40 workers, 20 seen).
Protocol: a worker is a user; the prompt is the post alone; the corpus's ``train`` half gives training and support pairs
(at most 150 of a seen and 50 of an unseen worker, drawn once), its ``validation`` half gives every test pair; workers
with at least 50 comparisons in ``train`` and one in ``validation``; half of them seen.
Deviations: workers are sorted before they are shuffled (the released code shuffles a set of strings, whose order
changes from run to run) and chosen by the paper's threshold instead of leaving out the two smallest; comparisons
without a post (news articles of the validation half) are left out instead of prompting with the word None.
Licence: see the dataset card on the hub (posts by Reddit users).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plm.data.schema import PairTable, make_pairs
from plm.data.sources import PairSource
from plm.data.sources.corpus import PARQUET, corpus_files, corpus_rows, usable

REPO = "openai/summarize_from_feedback"


def comparison(row: Mapping[str, Any], row_split: str) -> dict[str, Any]:
    """One comparison as a pair; without a post the prompt is None."""
    texts = [summary["text"] for summary in row["summaries"]]
    return {
        "user_id": row["worker"],
        "prompt": (row["info"].get("post") or "").strip() or None,
        "chosen": texts[row["choice"]],
        "rejected": texts[1 - row["choice"]],
        "row_split": row_split,
    }


def select_workers(pairs: Sequence[dict[str, Any]], min_pairs: int, seed: int) -> dict[str, str]:
    """Workers with enough pairs in both halves -> seen or unseen, one half each."""
    count = Counter((pair["user_id"], pair["row_split"]) for pair in pairs)
    able = sorted(
        user for user, split in count if split == "train" and count[user, split] >= min_pairs and count[user, "test"]
    )
    order = np.random.default_rng(seed).permutation(len(able)).tolist()
    return {able[pick]: "seen" if rank < (len(able) + 1) // 2 else "unseen" for rank, pick in enumerate(order)}


class TldrPairs(PairSource):
    """Reddit TL;DR comparisons by worker.

    Args:
        path: Folder with ``comparisons/train/*.parquet`` and ``comparisons/validation/*.parquet``; null = download.
        min_pairs: Fewest training comparisons of a worker.
        seen_pairs: Most training pairs of a seen worker: 100 or 150 in the paper.
        unseen_pairs: Most support pairs of an unseen worker.
        seed: Of the halves and of the pairs drawn.
    """

    checked_on = "schema"

    def __init__(
        self,
        path: str | None = None,
        min_pairs: int = 50,
        seen_pairs: int = 150,
        unseen_pairs: int = 50,
        seed: int = 0,
    ) -> None:
        self.path, self.min_pairs, self.seed = path, min_pairs, seed
        self.limits = {"seen": seen_pairs, "unseen": unseen_pairs}

    @property
    def name(self) -> str:
        """The corpus and its training size."""
        return f"tldr-{self.limits['seen']}"

    def load(self) -> PairTable:
        """Read both halves, pick workers and draw their training pairs."""
        columns = {name: name for name in ("info", "summaries", "choice", "worker")}
        pairs: list[dict[str, Any]] = []
        for half, row_split in (("train", "train"), ("validation", "test")):
            files = corpus_files(self.path, REPO, f"comparisons/{half}/*.parquet", PARQUET)
            pairs += [comparison(row, row_split) for row in corpus_rows(files, columns)]
        posts = [pair for pair in pairs if pair["prompt"] is not None]
        usable_pairs, dropped = usable(posts)
        workers = select_workers(usable_pairs, self.min_pairs, self.seed)
        kept = [{**pair, "user_split": workers[pair["user_id"]]} for pair in usable_pairs if pair["user_id"] in workers]
        rng, used = np.random.default_rng([self.seed, 1]), Counter[str]()
        drawn: list[dict[str, Any]] = []
        for row in rng.permutation(len(kept)).tolist():
            pair = kept[row]
            if pair["row_split"] == "train":
                used[pair["user_id"]] += 1
                if used[pair["user_id"]] > self.limits[pair["user_split"]]:
                    continue
            drawn.append(pair)
        counts = {"no_post": len(pairs) - len(posts), "few_comparisons": len(usable_pairs) - len(kept)}
        counts["over_the_limit"] = len(kept) - len(drawn)
        return make_pairs(drawn, self.name, {**dropped, **counts})
