"""Simulated people who compare responses that a policy has sampled, by rewards that are computed here.

Protocol: each person weighs rewards, brought to one scale; of the responses to a prompt they compare the best with the
worst (LatentDPO, arXiv 2412.20834 and its code; LoRe, arXiv 2504.14439, section 5), or two at random, and choose by the
Bradley-Terry model.
Deviations: which rewards, and how sure people are, is up to the recipe.

Axes: P prompts, C responses of a prompt (padded), A rewards, U people, N pairs.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.special import expit

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.data.keys import digest
from plm.data.rewards import Reward, scores_of
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource, numbered
from plm.data.sources.population import (
    CandidatePool,
    best_and_worst,
    dirichlet_weights,
    shown_prompts,
    smallest_preference,
    standardise,
)
from plm.data.sources.samples import read_samples
from plm.messages import Problems, nearest


class SampledPairs(PairSource):
    """People with known tastes who compare responses sampled from a policy.

    Prompts of the training and of the test are disjoint for everybody. Scores of the pairs are the person's own reward
    of each response. Equal responses to a prompt are one; a prompt of one response is left out and counted.

    Args:
        path: JSONL files with one prompt a line: ``prompt``, ``responses`` (a list), and ``split`` (train or test) in
            all lines or in none. Relative paths are also looked up under PLM_DATA.
        rewards: Name -> what responses are scored by.
        people: Name -> weights of rewards by name, such as ``{positive: {sentiment: 1}, short: {length: -1}}``.
        num_people: So many more people, whose weights are drawn from a Dirichlet distribution over all rewards.
        concentration: Of that distribution: small gives people of one interest each.
        pairs: ``best_worst`` compares the best with the worst response of a prompt, ``random`` two at random.
        pairs_per_prompt: Comparisons of each prompt; more than one needs random pairs.
        prompts_per_person: Most training prompts shown to each person, drawn for each; null = all.
        temperature: A person prefers a to b with probability sigmoid((a - b) / temperature); 0 = never in doubt.
        test_share: Share of the prompts kept for the test where the files name no split.
        z_score: Whether each reward is brought to mean 0 and standard deviation 1 over all responses.
        seed: Another seed draws other people, pairs and test prompts.
    """

    def __init__(
        self,
        path: str | list[str],
        rewards: dict[str, Reward],
        people: dict[str, dict[str, float]] | None = None,
        num_people: int = 0,
        concentration: float = 0.1,
        pairs: Literal["best_worst", "random"] = "best_worst",
        pairs_per_prompt: int = 1,
        prompts_per_person: int | None = None,
        temperature: float = 0.0,
        test_share: float = 0.2,
        z_score: bool = True,
        seed: int = 0,
    ) -> None:
        self.path, self.rewards, self.people = path, dict(rewards), dict(people or {})
        self.num_people, self.concentration = num_people, concentration
        self.pairs, self.pairs_per_prompt, self.prompts_per_person = pairs, pairs_per_prompt, prompts_per_person
        self.temperature, self.test_share, self.z_score, self.seed = temperature, test_share, z_score, seed
        self._check_arguments()

    def _check_arguments(self) -> None:
        """Raise one error about all arguments that are out of range."""
        problems = Problems("SampledPairs.")
        problems.say("SampledPairs.rewards: expected at least one, got none", when=not self.rewards)
        nobody = not self.people and self.num_people < 1
        problems.say("SampledPairs.people: expected some, or num_people > 0, got none", when=nobody)
        names = f"names of rewards ({', '.join(self.rewards)})"
        for person, weights in self.people.items():
            for name in weights:
                if name not in self.rewards:
                    problems.add(f"people.{person}", names, name, nearest(name, self.rewards))
            if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
                problems.add(f"people.{person}", "finite weights that are not all 0", weights)
        problems.at_least(0, num_people=self.num_people, temperature=self.temperature)
        problems.at_least(1, pairs_per_prompt=self.pairs_per_prompt, prompts_per_person=self.prompts_per_person)
        problems.positive(concentration=self.concentration)
        problems.inner_shares(test_share=self.test_share)
        problems.choices(pairs=(self.pairs, ("best_worst", "random")))
        problems.say(
            f"SampledPairs.pairs_per_prompt: best against worst is one pair, got {self.pairs_per_prompt!r}",
            when=self.pairs == "best_worst" and self.pairs_per_prompt > 1,
        )
        problems.check()

    @property
    def name(self) -> str:
        """Name of the first file."""
        return f"sampled/{Path(self.path if isinstance(self.path, str) else self.path[0]).stem}"

    @cached_property
    def pool(self) -> CandidatePool:
        """Prompts and responses with their raw rewards ``(P, C, A)``, read and scored once."""
        sampled, test, self._dropped = read_samples(self.path, self.test_share, self.seed)
        prompts = [prompt for prompt, texts in sampled.items() for _ in texts]
        responses = [text for texts in sampled.values() for text in texts]
        scores = iter(scores_of(self.rewards, prompts, responses))  # (A,) of each response
        replies = {prompt: {text: next(scores) for text in texts} for prompt, texts in sampled.items()}
        return CandidatePool.of(replies, test)

    @cached_property
    def weights(self) -> dict[str, Float64Array]:
        """Person -> weights ``(A,)``: those with a name, then those who were drawn."""
        names = list(self.rewards)
        weights_of = {
            person: np.array([by_reward.get(name, 0.0) for name in names]) for person, by_reward in self.people.items()
        }
        if self.num_people:
            drawn = dirichlet_weights(self.num_people, len(names), self.concentration, self.seed)
            weights_of |= dict(zip(numbered("person", self.num_people), drawn, strict=True))
        return weights_of

    def load(self) -> PairTable:
        """Let every person compare the responses to the prompts shown to them."""
        pool, people = self.pool, list(self.weights)
        scores = standardise(pool.scores) if self.z_score else pool.scores
        columns: list[IntArray] = []
        worth: list[Float64Array] = []
        ties = 0
        for user, (person, weights) in enumerate(self.weights.items()):
            rng = np.random.default_rng((self.seed, int(digest([person])[0])))
            shown = shown_prompts(pool.test, self.prompts_per_person, rng)
            if self.pairs == "best_worst":
                first, second = best_and_worst(scores, weights[None], shown[None])[0].T
            else:
                first, second = _two_of(np.isnan(scores[shown, :, 0]), self.pairs_per_prompt, rng)
            prompt, value = np.repeat(shown, self.pairs_per_prompt), scores @ weights  # (N,), (P, C)
            a, b = value[prompt, first], value[prompt, second]
            chance = np.where(a > b, 1.0, 0.0) if self.temperature == 0 else expit((a - b) / self.temperature)
            wins = rng.random(len(prompt)) < chance
            chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
            kept = np.abs(a - b) > smallest_preference(scores, weights[None])
            ties += int((~kept).sum())
            rows = np.stack([np.full(len(prompt), user), prompt, chosen, rejected])[:, kept]
            columns.append(rows)
            worth.append(value[rows[1], rows[2:]])
        user_of, prompt, chosen, rejected = np.concatenate(columns, axis=1)
        if not len(user_of):
            raise ValueError(f"expected pairs, got none in {self.name}: all responses to a prompt are worth the same")
        chosen_score, rejected_score = np.concatenate(worth, axis=1).astype(np.float32)
        return pair_table(
            people,
            pool.prompts,
            pool.responses,
            user=user_of,
            prompt=prompt,
            chosen=pool.candidates[prompt, chosen],
            rejected=pool.candidates[prompt, rejected],
            chosen_score=chosen_score,
            rejected_score=rejected_score,
            row_split=np.where(pool.test[prompt], 2, 0),
            dropped={**self._dropped, "ties": ties},
        )


def _two_of(missing: BoolArray, times: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Columns ``(N,)`` of two different responses to each prompt, so many times.

    Args:
        missing: ``(P, C)`` True = no such response.
        times: Pairs of each prompt.
        rng: What draws them.
    """
    again = np.repeat(missing, times, axis=0)
    two = np.argsort(rng.random(again.shape) + again, axis=1)[:, :2]  # what is missing comes last
    return two[:, 0], two[:, 1]
