"""Named rewards of responses that a policy has sampled, as the objectives of a portfolio.

Axes: X prompts, C candidates of a prompt (padded), R objectives, U users.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from plm.arrays import Float64Array, IntArray
from plm.data.keys import digest, mix, seed_key
from plm.data.rewards import Reward
from plm.data.sources.population import CandidatePool
from plm.data.sources.sampled import SampledPairs
from plm.messages import Problems, nearest
from plm.portfolio.features import Calibration, RewardFeatures, reward_spec
from plm.portfolio.objectives import Deployment, RewardSource, Split, Users, calibration, halves, signed_like


class SampledRewards(RewardSource):
    """Rewards of the responses that ``plm sample`` wrote; people weigh them.

    Prompts fall into three parts: those whose responses members are chosen from, or trained on; ``value_prompts`` of
    the training ones, on which policies that write are measured; and those of the test, on which the finished members
    are judged. Each objective is calibrated to [0, 1] by its 1 % and 99 % quantiles over the first part.

    Args:
        path: JSONL files with one prompt a line: ``prompt``, ``responses`` (a list), and ``split`` (train or test) in
            all lines or in none. Relative paths are also looked up under PLM_DATA.
        rewards: Name -> what responses are scored by.
        objectives: Name of an objective -> its reward; ``-reward`` where less is better.
        people: Name -> weights of objectives by name, such as ``{anna: {brief: 2, positive: 1}}``; made to sum to one.
        value_prompts: Prompts that policies are measured on.
        test_share: Share of the prompts kept for the test where the files name no split.
        sharpness: Nats by which the best value of an objective raises the log-odds that somebody chooses a response
            over one of the worst; for users who are inferred from pairs.
        seed: Another seed draws other value prompts.
    """

    def __init__(
        self,
        path: str | list[str],
        rewards: dict[str, Reward],
        objectives: dict[str, str],
        people: dict[str, dict[str, float]] | None = None,
        value_prompts: int = 120,
        test_share: float = 0.2,
        sharpness: float = 8.0,
        seed: int = 0,
    ) -> None:
        self.path, self.rewards, self.objectives = path, dict(rewards), dict(objectives)
        self.people, self.value_prompts, self.test_share = dict(people or {}), value_prompts, test_share
        self.sharpness, self.seed = sharpness, seed
        self._calibrations: dict[int, Calibration] = {}
        problems = Problems("rewards.")
        for name, reward in self.objectives.items():
            if reward.removeprefix("-") not in rewards:
                expected = f"a reward ({', '.join(rewards)}), or -reward where less is better"
                problems.add(f"objectives.{name}", expected, reward, nearest(reward, signed_like(reward, rewards)))
        if len(self.objectives) < 2:
            problems.add("objectives", "at least two", objectives)
        for person, weights in self.people.items():
            for name in [name for name in weights if name not in self.objectives]:
                expected = f"objectives ({', '.join(objectives)})"
                problems.add(f"people.{person}", expected, name, nearest(name, objectives))
            if min(weights.values(), default=0) < 0 or not 0 < sum(weights.values()) < math.inf:
                problems.add(f"people.{person}", "finite weights >= 0 that are not all 0", weights)
        problems.at_least(2, value_prompts=value_prompts)
        problems.inner_shares(test_share=test_share)
        if not 0 < sharpness < math.inf:
            problems.add("sharpness", "a finite number of nats > 0", sharpness)
        problems.check()

    @property
    def names(self) -> list[str]:
        """Names of the objectives, in the order of the recipe."""
        return list(self.objectives)

    def prepare(self, folder: Path) -> None:
        """Do nothing: the samples are there."""

    # ------------------------------------------------------------------ prompts
    @cached_property
    def _all(self) -> CandidatePool:
        """All prompts with their responses, and objectives before calibration."""
        source = SampledPairs(self.path, self.rewards, num_people=1, test_share=self.test_share, seed=self.seed)
        names = list(self.rewards)
        signed = [(-1.0 if name.startswith("-") else 1.0, name.removeprefix("-")) for name in self.objectives.values()]
        scores = np.stack([sign * source.pool.scores[..., names.index(name)] for sign, name in signed], axis=-1)
        return replace(source.pool, scores=scores)

    @cached_property
    def _parts(self) -> tuple[IntArray, IntArray]:
        """Rows of the prompts to choose from and of those to measure on."""
        train = np.flatnonzero(~self._all.test)
        if len(train) < self.value_prompts + 2:
            raise ValueError(
                f"rewards.value_prompts: expected fewer than the {len(train)} training prompts, got "
                f"{self.value_prompts}; lower it"
            )
        prompts = [self._all.prompts[row] for row in train]
        order = np.argsort(mix(digest(prompts), seed_key(self.seed)), kind="stable")
        return np.sort(train[order[self.value_prompts :]]), np.sort(train[order[: self.value_prompts]])

    @property
    def prompts_to_measure(self) -> list[str]:
        """Prompts on which policies that write are measured while members are chosen."""
        return [self._all.prompts[row] for row in self._parts[1]]

    @property
    def prompts_to_judge(self) -> list[str]:
        """Prompts that nothing has been chosen, calibrated or trained on."""
        return [self._all.prompts[row] for row in np.flatnonzero(self._all.test)]

    def candidates(self, num_objectives: int, part: Literal["choose", "measure", "judge"] = "choose") -> CandidatePool:
        """Prompts to choose from, to measure on, or of the test, with their responses and calibrated objectives."""
        pool, fitted = self._all, self._calibration(num_objectives)
        rows = {"choose": self._parts[0], "measure": self._parts[1], "judge": np.flatnonzero(pool.test)}[part]
        scores = fitted.clipped(pool.scores[rows][..., :num_objectives])
        prompts = [pool.prompts[row] for row in rows]
        return CandidatePool(prompts, pool.responses, pool.candidates[rows], scores, pool.test[rows])

    # ------------------------------------------------------------------ objectives
    def split(self, num_objectives: int, rng: np.random.Generator | None) -> Split:
        """Halve the prompts to choose from; calibrate on the first half."""
        table: Float64Array = self._all.scores[self._parts[0]][..., :num_objectives]
        train, test = halves(len(table), rng)
        fitted = self._calibration(num_objectives) if rng is None else calibration(table[train], self.names)
        return Split(fitted.clipped(table[train]), fitted.clipped(table[test]), fitted)

    def _calibration(self, num_objectives: int) -> Calibration:
        """The calibration on all prompts to choose from, found once for each number of objectives."""
        if num_objectives not in self._calibrations:
            table = self._all.scores[self._parts[0]][..., :num_objectives]
            self._calibrations[num_objectives] = calibration(table, self.names)
        return self._calibrations[num_objectives]

    def features(self, num_objectives: int) -> RewardFeatures:
        """The calibrated objectives of any response."""
        objectives = dict(list(self.objectives.items())[:num_objectives])
        used = {name.removeprefix("-") for name in objectives.values()}
        specs = {name: reward_spec(reward) for name, reward in self.rewards.items() if name in used}
        return RewardFeatures(specs, objectives, *self._calibration(num_objectives))

    def deployment(self, num_objectives: int, users: Users | None = None) -> Deployment:
        """Take calibrated objectives as features, and the people as users unless others are given."""
        ids, weights = self._people(num_objectives) if users is None else users
        scaled = self.sharpness * torch.eye(num_objectives)
        return Deployment(scaled, self.features(num_objectives).spec(), ids, weights)

    def _people(self, num_objectives: int) -> Users:
        """The people and their weights of the first so many objectives.

        Raises:
            ValueError: If somebody does weigh another.
        """
        beyond = {
            person: name
            for person, weighed in self.people.items()
            for name in self.names[num_objectives:]
            if weighed.get(name, 0) > 0
        }
        if beyond:
            person, name = next(iter(beyond.items()))
            raise ValueError(
                f"num_objectives: expected all {len(self.names)}, as rewards.people.{person} weighs {name!r}, got "
                f"{num_objectives}; take that weight out, or give users by --weights FILE"
            )
        weights = np.array([[weighed.get(name, 0.0) for name in self.names] for weighed in self.people.values()])
        weights = weights.reshape(-1, len(self.names))[:, :num_objectives]
        return list(self.people), weights / weights.sum(1, keepdims=True)
