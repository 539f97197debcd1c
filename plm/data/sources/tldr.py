"""Reddit TL;DR: crowd workers who compare two summaries of a post, by their own labels or by PAL's rule of lengths.

Paper: Stiennon et al. 2020, arXiv 2009.01325. Split: LoRe, arXiv 2504.14439, section 5 (40 workers, 20 seen).
Protocol: a worker is a user; the prompt is the post alone; the corpus's ``train`` half gives training and support pairs
(at most 150 of a seen and 50 of an unseen worker, drawn once), its ``validation`` half gives every test pair; workers
with at least 50 comparisons in ``train`` and one in ``validation``; half of them seen.
Deviations: workers are sorted before they are shuffled (the released code shuffles a set of strings, whose order
changes from run to run) and chosen by the paper's threshold instead of leaving out the two smallest; comparisons
without a post (news articles of the validation half) are left out instead of prompting with the word None.
PAL, arXiv 2406.08469: see `TldrLengthPairs`.
Licence: see the dataset card on the hub (posts by Reddit users).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from plm.data.schema import PairTable, make_pairs
from plm.data.sources import PairSource
from plm.data.sources.corpus import PARQUET, corpus_files, corpus_rows, usable

REPO = "openai/summarize_from_feedback"
NUM_SEEN = 10
"""PAL's seen users: the workers with the most comparisons."""
SHORT_RANKS = (3, 4, 5)
"""Those of them, ranked by comparisons from 0, who prefer the shorter summary."""
SHORT_SHARE = 9 / 31
"""Of PAL's unseen users, who prefer it."""


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


def read_halves(path: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of both halves of the corpus, each with its side of the split: ``train`` or ``test``."""
    columns = {name: name for name in ("info", "summaries", "choice", "worker")}
    for half, row_split in (("train", "train"), ("validation", "test")):
        for row in corpus_rows(corpus_files(path, REPO, f"comparisons/{half}/*.parquet", PARQUET), columns):
            yield row_split, row


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
        pairs = [comparison(row, row_split) for row_split, row in read_halves(self.path)]
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


def by_length(row: Mapping[str, Any], shorter: bool) -> Mapping[str, Any]:
    """A row whose choice is the longer or the shorter summary, in characters; of equal ones the second."""
    left, right = (len(summary["text"]) for summary in row["summaries"])
    return {**row, "choice": int(left >= right if shorter else left <= right)}


class TldrLengthPairs(PairSource):
    """Reddit TL;DR as PAL labels it: what the worker chose is discarded, seven in ten prefer the longer summary.

    Comparisons of two supervised policies (``sup`` and not ``ppo`` in both names). The ten workers with the most of
    them in ``train`` are seen, and are tested in ``validation``; other workers with ``min_pairs`` in ``validation`` are
    unseen. Length and a sign per user tell everything: a method has to beat ``plm leaderboard``'s length baseline.

    Which of the unseen workers prefer the shorter summary is a list of names in PAL's code; here the same share is
    drawn.

    Args:
        path: As of `TldrPairs`.
        min_pairs: Fewest comparisons of an unseen worker.
        unseen_pairs: Support pairs of an unseen worker, 1 to 100 in PAL's settings; the others are the test.
        seed: Of who prefers what among the unseen, and of their support.
    """

    name = "tldr-length"
    checked_on = "schema"

    def __init__(self, path: str | None = None, min_pairs: int = 100, unseen_pairs: int = 50, seed: int = 0) -> None:
        self.path, self.min_pairs, self.unseen_pairs, self.seed = path, min_pairs, unseen_pairs, seed

    def load(self) -> PairTable:
        """Read both halves, rank the workers and label their comparisons."""
        rows = [(row_split, row) for row_split, row in read_halves(self.path)]
        kept = [
            (row_split, row)
            for row_split, row in rows
            if all("sup" in summary["policy"] and "ppo" not in summary["policy"] for summary in row["summaries"])
            and comparison(row, row_split)["prompt"] is not None
        ]
        count = Counter((row["worker"], row_split) for row_split, row in kept)
        ranked = sorted((worker for worker, part in count if part == "train"), key=lambda w: (-count[w, "train"], w))
        seen, rng = ranked[:NUM_SEEN], np.random.default_rng(self.seed)
        able = sorted({worker for worker, _ in count if count[worker, "test"] >= self.min_pairs} - set(seen))
        few = rng.permutation(able).tolist()[: round(SHORT_SHARE * len(able))]
        shorter = {*(seen[rank] for rank in SHORT_RANKS if rank < len(seen)), *few}
        pairs, used = [], Counter[str]()
        for place in rng.permutation(len(kept)).tolist():
            row_split, row = kept[place]
            worker = row["worker"]
            if worker not in seen and (worker not in able or row_split == "train"):
                continue
            pair = {**comparison(by_length(row, worker in shorter), row_split), "user_split": "seen"}
            if worker not in seen:
                used[worker] += 1
                is_support = used[worker] <= self.unseen_pairs
                pair |= {"user_split": "unseen", "row_split": "train" if is_support else "test"}
            pairs.append(pair)
        found, dropped = usable(pairs)
        counts = {"other_policies_or_no_post": len(rows) - len(kept), "other_workers": len(kept) - len(pairs)}
        return make_pairs(found, self.name, {**dropped, **counts})
