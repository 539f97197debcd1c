"""Simulated people over any table of attribute scores.

Paper: PersonalLLM, arXiv 2409.20296, for the population; LoRe, arXiv 2504.14439, section 5, for the pairs.
Deviations: the attributes are whatever columns the table has, so results are *not* PersonalLLM results; a few
candidates are drawn per prompt instead of eight fixed models; prompts are divided by a hash of their text.
Licence: that of the table (AlpacaEval outputs: CC-BY-NC-4.0; JudgeBench scores: none stated).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from plm.data.keys import digest, mix, seed_key
from plm.data.sources.corpus import corpus_rows, local_files
from plm.data.sources.population import CandidatePool, PopulationPairs
from plm.messages import Problems


def pool_of(
    rows: list[dict[str, Any]], attributes: list[str], candidates: int, test_share: float, seed: int
) -> CandidatePool:
    """Gather the candidates of every prompt: distinct texts, at most ``candidates`` drawn by a hash of the text.

    Args:
        rows: Each with ``prompt``, ``response`` and the attributes; rows that lack a number are left out.
        attributes: Names of the A attributes.
        candidates: Most responses per prompt, C.
        test_share: Share of the prompts asked in the test only.
        seed: Another seed draws other candidates and test prompts.
    """
    replies_of: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values = [row[name] for name in attributes]
        if row["response"] and row["response"].strip() and not any(v is None or v != v for v in values):
            replies_of.setdefault(row["prompt"], {}).setdefault(row["response"], [float(v) for v in values])
    replies_of = {prompt: replies for prompt, replies in replies_of.items() if len(replies) > 1}
    if not replies_of:
        raise ValueError(f"expected prompts with two responses that have all of {attributes}, got none")
    drawn = {}
    for prompt, replies in replies_of.items():
        texts = list(replies)
        order = np.argsort(mix(digest(texts), seed_key(seed)), kind="stable")[:candidates]
        drawn[prompt] = {texts[pick]: replies[texts[pick]] for pick in order.tolist()}
    order = np.argsort(mix(digest(list(drawn)), seed_key(seed)), kind="stable")
    test = np.zeros(len(drawn), dtype=np.bool_)
    test[order[: max(1, round(test_share * len(drawn)))]] = True
    return CandidatePool.of(drawn, test)


class SimulatedPairs(PopulationPairs):
    """Simulated people who weigh attributes of real responses and name the best and worst of a few.

    Args:
        path: Table with one row per response (JSONL, CSV or Parquet); relative paths are also looked up under PLM_DATA.
        attributes: Numeric columns that people weigh; more is better.
        prompts: A second table with the prompt texts, where they are not in the first.
        key: Column that joins the two tables.
        prompt: Column of the prompt text.
        response: Column of the response text.
        candidates: Responses drawn per prompt.
        test_share: Share of the prompts asked in the test only.
        **population: The other arguments of `PopulationPairs`.
    """

    def __init__(
        self,
        path: str,
        attributes: list[str],
        prompts: str | None = None,
        key: str = "prompt_id",
        prompt: str = "prompt",
        response: str = "response",
        candidates: int = 8,
        test_share: float = 0.2,
        **population: Any,
    ) -> None:
        super().__init__(**population)
        self.path, self.attributes, self.prompts = path, list(attributes), prompts
        self.key, self.prompt, self.response = key, prompt, response
        self.candidates, self.test_share = candidates, test_share
        problems = Problems("SimulatedPairs.")
        if len(self.attributes) < 2:
            problems.add("attributes", "two or more attributes", self.attributes)
        problems.at_least(2, candidates=candidates)
        problems.inner_shares(test_share=test_share)
        problems.check()

    @property
    def name(self) -> str:
        """Folder of the table and concentration."""
        return f"simulated/{Path(self.path).parent.name}-{self.concentration:g}"

    def read_pool(self) -> CandidatePool:
        """Read the table, and the prompts where they are apart."""
        columns = {"response": self.response, **{name: name for name in self.attributes}}
        if self.prompts is None:
            rows = corpus_rows(local_files(self.path), {"prompt": self.prompt, **columns})
        else:
            texts = corpus_rows(local_files(self.prompts), {"key": self.key, "prompt": self.prompt})
            text_of = {row["key"]: row["prompt"] for row in texts}
            rows = corpus_rows(local_files(self.path), {"key": self.key, **columns})
            rows = [{**row, "prompt": text_of[row["key"]]} for row in rows if row["key"] in text_of]
        return pool_of(rows, self.attributes, self.candidates, self.test_share, self.seed)
