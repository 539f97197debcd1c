"""Where the objectives of a portfolio come from: named columns of a reward table, or the bases of a trained LoRe.

Axes: X prompts, C candidates of a prompt (padded), R objectives, U users, D feature width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor

from plm.arrays import Float64Array, IntArray
from plm.checkpoint import load_method
from plm.data.files import read_rows
from plm.data.keys import position_in_run
from plm.data.sources import PairSource
from plm.data.sources.corpus import local_files
from plm.data.values import is_number, short, to_id
from plm.evaluation import print_parts
from plm.messages import nearest
from plm.method import PersonalizationMethod
from plm.portfolio.features import Calibration
from plm.recipe.fit import run_recipe
from plm.types import UserState

Users = tuple[list[str], Float64Array]
"""Ids and weights ``(U, R)`` of users."""

_LOW, _HIGH = 0.01, 0.99  # quantiles that rewards are calibrated by


class Split(NamedTuple):
    """Normalised rewards of the prompts a portfolio is chosen on and of those it is judged on."""

    train: Float64Array
    """``(X, C, R)`` in [0, 1], or about so for bases; nan = no such candidate."""
    test: Float64Array
    """The same for other prompts, by the calibration of ``train``."""
    calibration: Calibration


class Deployment(NamedTuple):
    """What a portfolio needs to be used as a method: how features become objectives, and the users."""

    objectives: Tensor
    """``(D, R)``."""
    backbone: dict[str, Any] | None
    user_ids: list[str]
    weights: Float64Array
    """``(U, R)``."""


class RewardSource(ABC):
    """Objectives and a shared pool of candidates; the constructor is cheap."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the objectives."""

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Make what is missing, in the folder of the run."""

    @abstractmethod
    def split(self, num_objectives: int, rng: np.random.Generator | None) -> Split:
        """Halve the prompts at random and calibrate on the first half; without ``rng`` all are on both sides."""

    @abstractmethod
    def deployment(self, num_objectives: int, users: Users | None = None) -> Deployment:
        """Describe how the portfolio serves users: those of the source, unless others are given."""


class RewardTable(RewardSource):
    """A table with one row per response and a column per objective.

    Every objective is calibrated to [0, 1] by its 1 % and 99 % quantiles over the candidates that the portfolio is
    chosen on; users weigh calibrated objectives. A row that lacks a number is left out.

    Args:
        path: Parquet file; a relative path is also looked up in the folder named by PLM_DATA.
        objectives: Name of an objective -> its column; ``-column`` where less is better.
        prompt: Column of the prompt that a response belongs to.
    """

    def __init__(self, path: str, objectives: dict[str, str], prompt: str = "prompt_id") -> None:
        if len(objectives) < 2:
            raise ValueError(f"rewards.objectives: expected at least two objectives, got {objectives!r}")
        self.path, self.objectives, self.prompt = path, objectives, prompt

    @property
    def names(self) -> list[str]:
        """Names of the objectives, in the order of the recipe."""
        return list(self.objectives)

    def prepare(self, folder: Path) -> None:
        """Do nothing: the table is there."""

    @cached_property
    def _raw(self) -> Float64Array:
        """``(X, C, R)`` signed columns, read once."""
        columns = {name: column.removeprefix("-") for name, column in self.objectives.items()}
        parts = []
        for file in local_files(self.path):
            present = pq.read_schema(file).names
            for name in [self.prompt, *columns.values()]:
                if name not in present:
                    raise ValueError(
                        f"{file}: expected the column {name!r}, got {present}{self._meant(name, present)}; "
                        "correct rewards.objectives or rewards.prompt"
                    )
            parts.append(_columns(file, self.prompt, list(columns.values())))
        prompts = np.concatenate([prompt for prompt, _ in parts])
        values = np.concatenate([numbers for _, numbers in parts])
        values *= [-1.0 if column.startswith("-") else 1.0 for column in self.objectives.values()]
        kept = np.isfinite(values).all(axis=1)
        _, row = np.unique(prompts[kept], return_inverse=True)
        values = values[kept][np.argsort(row, kind="stable")]
        count = np.bincount(row)
        if (count > 1).sum() < 2:
            raise ValueError(
                f"{self.path}: expected at least 2 prompts with 2 or more complete responses, got {(count > 1).sum()}; "
                "check rewards.prompt"
            )
        if not kept.all():
            print_parts(
                f"{(~kept).sum():,} of {len(kept):,} responses are left out: an objective is nan, inf or missing"
            )
        row = np.sort(row)
        table = np.full((len(count), int(count.max()), len(columns)), np.nan)
        table[row, position_in_run(row)] = values
        return table[count > 1]

    def _meant(self, column: str, present: Iterable[str]) -> str:
        """Advise a near name of a column, written as in the recipe, with the minus of an objective."""
        written = next((name for name in self.objectives.values() if name.removeprefix("-") == column), column)
        return nearest(written, signed_like(written, present))

    def split(self, num_objectives: int, rng: np.random.Generator | None) -> Split:
        """Halve the prompts; calibrate on the first half."""
        table = self._raw[..., :num_objectives]
        train, test = halves(len(table), rng)
        fitted = calibration(table[train], self.names)
        return Split(fitted.clipped(table[train]), fitted.clipped(table[test]), fitted)

    def deployment(self, num_objectives: int, users: Users | None = None) -> Deployment:
        """Take calibrated objectives as features; no user is known but those given."""
        ids, weights = ([], np.zeros((0, num_objectives))) if users is None else users
        return Deployment(torch.eye(num_objectives), None, ids, weights)


def _columns(file: str, prompt: str, columns: list[str]) -> tuple[npt.NDArray[np.str_], Float64Array]:
    """Read prompts ``(N,)`` as texts and columns of numbers ``(N, R)`` of one file; nan where a number is missing.

    Raises:
        ValueError: If a column holds something else, or not one finite number.
    """
    read = pq.read_table(file, columns=list(dict.fromkeys([prompt, *columns]))).to_pydict()
    numbers = np.full((len(read[prompt]), len(columns)), np.nan)
    for place, column in enumerate(columns):
        cells = read[column]
        wrong = [cell for cell in cells if not (cell is None or isinstance(cell, int | float | Decimal))]
        if not wrong:
            numbers[:, place] = np.array(cells, dtype=np.float64)
        if cells and not np.isfinite(numbers[:, place]).any():
            raise ValueError(
                f"{file}: expected numbers in the column {column!r}, got {short((wrong or cells)[0])}; correct "
                "rewards.objectives"
            )
    return np.array([str(cell) for cell in read[prompt]]), numbers


def signed_like(name: str, valid: Iterable[str]) -> list[str]:
    """Give valid names the minus that ``name`` has, or none.

    >>> signed_like("-sentimnt", ["sentiment", "length"])
    ['-sentiment', '-length']
    """
    sign = "-" if name.startswith("-") else ""
    return [sign + name for name in valid]


def calibration(table: Float64Array, names: list[str]) -> Calibration:
    """Find shift and scale by which the 1 % and 99 % quantiles of each objective, ``(X, C, R)``, become 0 and 1.

    Raises:
        ValueError: If an objective is the same for nearly all responses.
    """
    flat = table.reshape(-1, table.shape[-1])
    low, high = np.nanquantile(flat, _LOW, axis=0), np.nanquantile(flat, _HIGH, axis=0)
    flatness = [name for name, is_flat in zip(names, high <= low, strict=False) if is_flat]
    if flatness:
        raise ValueError(f"rewards.objectives: {flatness} are the same for nearly all responses; leave them out")
    return Calibration(low.tolist(), (high - low).tolist())


class LoReBases(RewardSource):
    """The bases of a trained LoRe as objectives, its users' weights, and slates drawn from the responses of a corpus.

    All bases share one scale: a scale for each would change what the users' weights mean. Within a slate each basis
    is counted from its lowest reward, which changes no choice.

    Args:
        source: Pairs whose responses are the candidates; the responses to one prompt are halved between choosing and
            judging.
        ckpt_path: Checkpoint of a method whose user weights lie on the simplex, such as PublishedLoRe.
        recipe: Recipe that trains one first, where ``ckpt_path`` is null.
        candidates: Responses of a slate.
        slates: Slates of each half.
    """

    def __init__(
        self,
        source: PairSource,
        ckpt_path: str | None = None,
        recipe: str | None = None,
        candidates: int = 8,
        slates: int = 300,
    ) -> None:
        if (ckpt_path is None) == (recipe is None):
            raise ValueError(f"rewards: give either ckpt_path or recipe, got {ckpt_path!r} and {recipe!r}")
        if candidates < 2 or slates < 1:
            raise ValueError(f"rewards: expected candidates >= 2 and slates >= 1, got {candidates!r} and {slates!r}")
        self.source, self.ckpt_path, self.recipe = source, ckpt_path, recipe
        self.candidates, self.slates = candidates, slates

    @property
    def names(self) -> list[str]:
        """Numbers of the bases."""
        return [f"basis {index + 1}" for index in range(self._bases.shape[1])]

    def prepare(self, folder: Path) -> None:
        """Train the method of the recipe, when there is no checkpoint."""
        if self.ckpt_path is None:
            assert self.recipe is not None
            where = ["--checkpoint.dirpath", str(folder / "scorer"), "--checkpoint.filename", "scorer"]
            quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
            run_recipe(["fit", "--config", self.recipe, "--final_test", "false", *where, *quiet])
            self.ckpt_path = str(folder / "scorer" / "scorer.ckpt")

    @cached_property
    def _method(self) -> PersonalizationMethod:
        assert self.ckpt_path is not None
        return load_method(self.ckpt_path)

    @cached_property
    def _users(self) -> tuple[list[str], Float64Array]:
        """Ids and weights of all users beside the checkpoint."""
        ids = self._method.known_users.store.ids
        state = self._method.known_users.store.get(ids)[0].tensors
        weights = state["weights"].double().numpy() if "weights" in state else np.zeros((1, 1))
        if "weights" not in state or weights.min() < -1e-5 or abs(weights.sum(axis=1) - 1).max() > 1e-3:
            raise ValueError(
                f"expected a method whose user weights lie on the simplex in {self.ckpt_path!r}, got "
                f"{type(self._method).__name__} with other states; train a plm.methods.lore.PublishedLoRe"
            )
        weights = np.clip(weights, 0, None)
        return ids, weights / weights.sum(axis=1, keepdims=True)

    @cached_property
    def _bases(self) -> Tensor:
        """``(D, R)`` read off the method by scoring unit features for users of one basis each."""
        width, num = self._method.feature_dim, self._users[1].shape[1]
        population = self._method.population_state(1).tensors

        def scores(features: Tensor, basis: int) -> Tensor:
            rows = len(features)
            tensors = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in population.items()}
            tensors["weights"] = torch.eye(num)[basis].repeat(rows, 1)
            return self._method.score(features, UserState(tensors, torch.zeros(rows, dtype=torch.long)))

        with torch.no_grad():
            origin = torch.cat([scores(torch.zeros(1, width), basis) for basis in range(num)])  # not 0 where centred
            bases = torch.stack([scores(torch.eye(width), basis) for basis in range(num)], dim=1) - origin
            probe = torch.linspace(-1, 1, width)[None]
            if not torch.allclose(scores(probe, 0) - origin[0], probe @ bases[:, 0], rtol=1e-3, atol=1e-4):
                raise ValueError(
                    f"expected rewards linear in the features, got {type(self._method).__name__}, "
                    "whose are not; use LoRe"
                )
        return bases

    @cached_property
    def _pool(self) -> tuple[Float64Array, list[IntArray]]:
        """Rewards ``(I, R)`` of all responses, and the rows of each prompt's."""
        table = self.source.load()
        prompts = [table.prompts[row] for row in table.items[:, 0]]
        texts = [table.responses[row] for row in table.items[:, 1]]
        features = self._method.text_encoder(prompts, texts)
        assert isinstance(features, Tensor)
        rewards = (features @ self._bases).double().numpy()
        groups = [np.flatnonzero(table.items[:, 0] == prompt) for prompt in range(len(table.prompts))]
        most = max(map(len, groups))
        if most < 2 * self.candidates:
            raise ValueError(
                f"expected prompts with {2 * self.candidates} responses, got at most {most}; lower rewards.candidates"
            )
        return rewards, [rows for rows in groups if len(rows) >= 2 * self.candidates]

    def split(self, num_objectives: int, rng: np.random.Generator | None) -> Split:
        """Halve the responses to each prompt; draw slates from each half."""
        if num_objectives != len(self.names):
            raise ValueError(f"num_objectives: expected all {len(self.names)} bases, got {num_objectives}")
        rewards, groups = self._pool
        draw = np.random.default_rng(0) if rng is None else rng
        sides: tuple[list[Float64Array], list[Float64Array]] = ([], [])
        sizes = np.array([len(rows) for rows in groups], dtype=np.float64)
        parts = [[rows[half] for half in halves(len(rows), rng)] for rows in groups]
        for side, slates in enumerate(sides):
            for group in draw.choice(len(groups), self.slates, p=sizes / sizes.sum()):
                slates.append(rewards[draw.choice(parts[group][side], self.candidates, replace=False)])
        train, test = (np.stack(slates) for slates in sides)
        train, test = (slates - slates.min(axis=1, keepdims=True) for slates in (train, test))
        scale = float(np.quantile(train.max(axis=1), _HIGH, axis=0).max())
        return Split(train / scale, test / scale, Calibration([0.0] * num_objectives, [scale] * num_objectives))

    def deployment(self, num_objectives: int, users: Users | None = None) -> Deployment:
        """Serve by the scorer's backbone and bases, and its users unless others are given."""
        ids, weights = self._users if users is None else users
        return Deployment(self._bases, self._method.hparams.get("backbone"), ids, weights)


def read_weights(path: str, num_objectives: int | None = None) -> Users:
    """Read users from JSONL rows ``{"user_id": ..., "weights": [...]}`` -> ids and ``(U, R)``, each row summing to one.

    Args:
        path: The file.
        num_objectives: R; None = as many as the first user weighs.

    Raises:
        ValueError: Naming the file that cannot be read, or all malformed lines.
    """
    num, seen = num_objectives, set()

    def parse(record: dict[str, Any]) -> tuple[str, Float64Array]:
        nonlocal num
        try:
            user, weights = to_id(record.get("user_id")), finite_weights(record.get("weights"), num)
        except ValueError:
            numbers = "finite numbers" if num is None else f"{num} finite numbers"
            raise ValueError(
                f'expected {{"user_id": non-empty text, "weights": [{numbers} >= 0, not all 0]}}, got {short(record)}'
            ) from None
        if user in seen:
            raise ValueError(f"expected each user once, got {user!r} again")
        seen.add(user)
        num = len(weights)
        return user, weights / weights.sum()

    try:
        rows = read_rows(Path(path), parse, '{"user_id": ..., "weights": [...]}')
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--weights: expected a JSONL file of users, got {path!r} ({reason})") from error
    except ValueError as error:
        raise ValueError(f"--weights: {error}") from error
    return [user for user, _ in rows], np.stack([weights for _, weights in rows])


def finite_weights(value: Any, num: int | None) -> Float64Array:
    """Turn a list of numbers into weights ``(R,)``, as they are.

    Raises:
        ValueError: If it is something else, does not hold ``num`` numbers, or cannot be made to sum to one.
    """
    is_list = isinstance(value, list) and num in (None, len(value))
    if not is_list or not all(map(is_number, value)):
        raise ValueError("expected a list of finite numbers")
    weights = np.array(value, dtype=np.float64)
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not ((weights >= 0).all() and 0 < total < math.inf):
        raise ValueError("expected finite numbers >= 0, not all 0")
    return weights


def halves(num: int, rng: np.random.Generator | None) -> tuple[IntArray, IntArray]:
    """Draw two random halves of ``num`` rows, or return all rows twice."""
    if rng is None:
        return np.arange(num), np.arange(num)
    order = rng.permutation(num)
    return order[: (num + 1) // 2], order[(num + 1) // 2 :]
