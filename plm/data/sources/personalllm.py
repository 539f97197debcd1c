"""PersonalLLM: people simulated as mixtures of ten reward models over eight replies to open-ended prompts.

Paper: Zollo et al., arXiv 2409.20296. Protocol: LoRe, arXiv 2504.14439, section 5: weights ~ Dirichlet(0.001, 0.01 or
0.1), 1,000 seen and 1,000 unseen people, 45 and 9 training prompts, all 1,000 test prompts; best against worst of the
eight replies, without noise.
Deviations: pairs are indices into the pool of replies, never a (people, prompts, features) tensor; the weights come
from a generator that gives no nan at 0.001. ``z_score`` false mixes the raw rewards as LoRe does, so that reward models
with a large spread dominate; PersonalLLM's own simulation brings them to one scale. ``beaver_7b`` is a *cost* model
that enters with a positive sign, as published.
Licence: see the dataset card on the hub.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from plm.data.sources.corpus import PARQUET, corpus_files, corpus_rows
from plm.data.sources.population import CandidatePool, PopulationPairs

REPO = "namkoong-lab/PersonalLLM"
NUM_RESPONSES = 8
REWARD_MODELS = (
    "gemma_2b", "gemma_7b", "mistral_raft", "llama3_sfairx", "oasst_deberta_v3", "beaver_7b", "oasst_pythia_7b",
    "oasst_pythia_1b", "mistral_ray", "mistral_weqweasdas",
)  # fmt: skip


class PersonalLlmPairs(PopulationPairs):
    """PersonalLLM: simulated people over reward models.

    Args:
        path: Folder with ``default/train/*.parquet`` and ``default/test/*.parquet``; null = download from the hub.
        z_score: Whether rewards are brought to one scale before they are weighed; false as in LoRe.
        **population: The other arguments of `PopulationPairs`.
    """

    checked_on = "schema"

    def __init__(self, path: str | None = None, z_score: bool = False, **population: Any) -> None:
        super().__init__(z_score=z_score, **population)
        self.path = path

    @property
    def name(self) -> str:
        """The corpus and the concentration."""
        return f"personalllm-{self.concentration:g}"

    def read_pool(self) -> CandidatePool:
        """Read prompts, replies and rewards of both halves; a prompt of both halves is a training prompt."""
        numbers = range(1, NUM_RESPONSES + 1)
        names = ["prompt", *(f"response_{n}" for n in numbers)]
        names += [f"response_{n}_{model}" for n in numbers for model in REWARD_MODELS]
        is_test: list[bool] = []
        replies_of: dict[str, dict[str, list[float]]] = {}
        for half in ("train", "test"):
            files = corpus_files(self.path, REPO, f"default/{half}/*.parquet", PARQUET)
            for row in corpus_rows(files, {name: name for name in names}):
                if row["prompt"] in replies_of:
                    continue
                is_test.append(half == "test")
                replies = replies_of[row["prompt"]] = {}
                for n in numbers:
                    text, rewards = row[f"response_{n}"], [row[f"response_{n}_{model}"] for model in REWARD_MODELS]
                    if text and text.strip() and None not in rewards:
                        replies.setdefault(text, rewards)
        return CandidatePool.of(replies_of, np.array(is_test, dtype=np.bool_))
