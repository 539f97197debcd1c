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
from plm.messages import nearest
from plm.portfolio.features import RewardFeatures, reward_spec
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
        problems = [
            f"objectives.{name}: expected a reward ({', '.join(rewards)}), or -reward where less is better, got {one!r}"
            f"{nearest(one, signed_like(one, rewards))}"
            for name, one in self.objectives.items()
            if one.removeprefix("-") not in rewards
        ]
        if len(self.objectives) < 2:
            problems.append(f"objectives: expected at least two, got {objectives!r}")
        for person, weights in self.people.items():
            problems += [
                f"people.{person}: expected objectives ({', '.join(objectives)}), got {name!r}"
                f"{nearest(name, objectives)}"
                for name in weights
                if name not in self.objectives
            ]
            if min(weights.values(), default=0) < 0 or not 0 < sum(weights.values()) < math.inf:
                problems.append(f"people.{person}: expected finite weights >= 0 that are not all 0, got {weights!r}")
        if value_prompts < 2:
            problems.append(f"value_prompts: expected at least 2, got {value_prompts!r}")
        if not 0 < test_share < 1:
            problems.append(f"test_share: expected a share between 0 and 1, got {test_share!r}")
        if not 0 < sharpness < math.inf:
            problems.append(f"sharpness: expected a finite number of nats > 0, got {sharpness!r}")
        if problems:
            raise ValueError("\n".join(f"rewards.{problem}" for problem in problems))

    @property
    def names(self) -> list[str]:
        """Names of the objectives, in the order of the recipe."""
        return list(self.objectives)

    def prepare(self, folder: Path) -> None:
        """Nothing is missing."""

    # ------------------------------------------------------------------ prompts
    @cached_property
    def _all(self) -> CandidatePool:
        """Everything, with objectives before calibration."""
        source = SampledPairs(self.path, self.rewards, num_people=1, test_share=self.test_share, seed=self.seed)
        names = list(self.rewards)
        signed = [(-1.0 if one.startswith("-") else 1.0, one.removeprefix("-")) for one in self.objectives.values()]
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
        about, pool = self.split(num_objectives, None).calibration, self._all
        rows = {"choose": self._parts[0], "measure": self._parts[1], "judge": np.flatnonzero(pool.test)}[part]
        scores = np.clip((pool.scores[rows][..., :num_objectives] - about["shift"]) / about["scale"], 0, 1)
        prompts = [pool.prompts[row] for row in rows]
        return CandidatePool(prompts, pool.responses, pool.candidates[rows], scores, pool.test[rows])

    # ------------------------------------------------------------------ objectives
    def split(self, num_objectives: int, rng: np.random.Generator | None) -> Split:
        """Halve the prompts to choose from; calibrate on the first half."""
        table: Float64Array = self._all.scores[self._parts[0]][..., :num_objectives]
        train, test = halves(len(table), rng)
        about = calibration(table[train], self.names)
        calibrated = np.clip((table - about["shift"]) / about["scale"], 0, 1)
        return Split(calibrated[train], calibrated[test], about)

    def features(self, num_objectives: int) -> RewardFeatures:
        """The calibrated objectives of any response."""
        about = self.split(num_objectives, None).calibration
        objectives = dict(list(self.objectives.items())[:num_objectives])
        used = {one.removeprefix("-") for one in objectives.values()}
        specs = {name: reward_spec(reward) for name, reward in self.rewards.items() if name in used}
        return RewardFeatures(specs, objectives, about["shift"], about["scale"])

    def deployment(self, num_objectives: int, given: Users | None = None) -> Deployment:
        """Features are the calibrated objectives; users are the people, unless others are given."""
        ids, users = self._people(num_objectives) if given is None else given
        scaled = self.sharpness * torch.eye(num_objectives)
        return Deployment(scaled, self.features(num_objectives).spec(), ids, users)

    def _people(self, num_objectives: int) -> Users:
        """The people, if they weigh nothing but the first so many objectives.

        Raises:
            ValueError: If somebody does weigh another.
        """
        beyond = {
            who: name
            for who, own in self.people.items()
            for name in self.names[num_objectives:]
            if own.get(name, 0) > 0
        }
        if beyond:
            who, name = next(iter(beyond.items()))
            raise ValueError(
                f"num_objectives: expected all {len(self.names)}, as rewards.people.{who} weighs {name!r}, got "
                f"{num_objectives}; take that weight out, or give users by --weights FILE"
            )
        weights = np.array([[own.get(name, 0.0) for name in self.names] for own in self.people.values()])
        weights = weights.reshape(-1, len(self.names))[:, :num_objectives]
        return list(self.people), weights / weights.sum(1, keepdims=True)
