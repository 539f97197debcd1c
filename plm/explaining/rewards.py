"""The rewards that users share, read on texts: of the population, and along each of them.

Axes: I texts, N comparisons, C cells (a text scored for a state), U users, K shared rewards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.data.schema import PairTable
from plm.data.splits import TEST, Splits
from plm.evaluation import run_folder
from plm.explaining.axes import PrincipalAxes, principal_axes
from plm.method import PersonalizationMethod
from plm.method.abilities import Explainable
from plm.scoring import ROWS_AT_ONCE
from plm.types import UserState, take_rows

NEGLIGIBLE = 1e-3
"""Spread of users, as a share of the population's margins, below which they are said not to differ."""


class Users(NamedTuple):
    """The known users of whom there are pairs."""

    ids: list[str]
    state: UserState
    weights: Float64Array
    """``(U, K)``."""
    moved: Float64Array
    """``(U, K)`` weights less those of the population."""
    num_without: int
    """Others, of whom there are none, and who have the population's state."""


def pairs_nobody_learned(
    ckpt_path: str | Path, method: PersonalizationMethod, table: PairTable, splits: Splits
) -> BoolArray | None:
    """``(pairs,)`` those of the test of a checkpoint's fit, of users who are as the fit has left them.

    Args:
        ckpt_path: The checkpoint.
        method: The loaded method.
        table: The pairs.
        splits: How they are split now.

    Returns:
        None where it is not known: without ``splits.json`` of the run beside it, or if that is of another split.
    """
    try:
        facts = json.loads((run_folder(ckpt_path) / "splits.json").read_text(encoding="utf-8"))
        if facts.get("split_hash") != splits.hash:
            return None
    except (OSError, ValueError, AttributeError):
        return None
    trained, stored = set(method.user_ids), method.users.found(table.user_ids)
    as_fitted = [name in trained and name in stored and stored[name].version == 1 for name in table.user_ids]
    held_out: BoolArray = np.array(as_fitted, dtype=np.bool_)[table.user] & (splits.stage == TEST)
    return held_out


class SharedRewards(NamedTuple):
    """What is shared, read on I texts and N comparisons of two of them."""

    population: Float64Array
    """``(I,)`` rewards for a user without pairs."""
    along: Float64Array
    """``(I, K)`` what a basis says beyond the population; where weights are no shares, what one unit of it adds."""
    margins: Float64Array
    """``(N, K)`` the same of the first text of a comparison less the second."""
    axes: PrincipalAxes
    """Of the users' deviations, on these comparisons."""
    margin: float
    """Root mean square of the population's margins."""
    spread: float
    """Root mean square of what users' margins are beyond the population's."""

    @property
    def users_differ(self) -> bool:
        """Whether the spread is more than nothing."""
        return self.spread > NEGLIGIBLE * self.margin


def explainable(method: PersonalizationMethod) -> Explainable:
    """The method itself, whose users are weights of shared rewards.

    Raises:
        ValueError: If they are not.
    """
    if isinstance(method, Explainable) and method.has_weights:
        return method
    reason = " as it is set" if isinstance(method, Explainable) else ""
    raise ValueError(
        f"users of {type(method).__name__}{reason} are no weights of a few rewards that all share: there are no bases "
        "or prototypes to show, as there are of LoRe, PAL, PReF, MRM, UserEmbedding, and of LoRADPO with mode: basis"
    )


def users_of(method: PersonalizationMethod) -> Users:
    """The known users of a loaded method.

    Raises:
        ValueError: If users are no weights of shared rewards, or none is known.
    """
    shared = explainable(method)
    ids = method.users.ids
    if not ids:
        raise ValueError(f"expected users in {str(method.users.place)!r}, got none; run plm adapt, or give --users")
    state, _ = method.known_users.lookup(ids)
    rows = state.num_pairs.nonzero()[:, 0]
    kept = state.take(rows)
    weights, centre = (_double(shared.basis_weights(some)) for some in (kept, method.population_state(1)))
    names = [ids[row] for row in rows.tolist()]
    return Users(names, kept, weights, weights - centre, len(ids) - len(rows))


def shared_states(method: PersonalizationMethod) -> UserState:
    """The population, then one state for each basis: all of it, or where weights are no shares one unit more."""
    shared = explainable(method)
    centre = method.population_state(1)
    weights = shared.basis_weights(centre)
    units = torch.eye(weights.shape[1], device=weights.device, dtype=weights.dtype)
    return UserState.cat([centre, shared.with_weights(units if shared.mixes else weights + units)])


def read_rewards(
    method: PersonalizationMethod,
    texts: Sequence[tuple[str, str]],
    states: UserState,
    item: IntArray,
    row: IntArray,
) -> Float64Array:
    """Rewards of cells ``(C,)``; each text is encoded once.

    Args:
        method: A loaded method.
        texts: I prompts and responses.
        states: Users.
        item: ``(C,)`` the text of a cell.
        row: ``(C,)`` its user among ``states``.

    Raises:
        ValueError: If a reward is not finite, or a text cannot be read.
    """
    rewards = np.zeros(len(item))
    order = np.argsort(item, kind="stable")
    used, begin = np.unique(item[order], return_index=True)
    ends = np.append(begin, len(item))
    for start in range(0, len(used), ROWS_AT_ONCE):
        some = used[start : start + ROWS_AT_ONCE]
        prompts, responses = ([texts[number][side] for number in some.tolist()] for side in (0, 1))
        features, of_prompts = method.text_encoder(prompts, responses), method.text_encoder.prompts(prompts)
        cells = order[ends[start] : ends[start + len(some)]]
        for cell in np.split(cells, range(ROWS_AT_ONCE, len(cells), ROWS_AT_ONCE)):
            place = torch.from_numpy(np.searchsorted(some, item[cell]))
            read = take_rows(features, place.to(method.device))
            assert read is not None
            with torch.no_grad():
                rewards[cell] = _double(
                    method.score(
                        read,
                        states,
                        rows=torch.from_numpy(row[cell]),
                        prompt_features=take_rows(of_prompts, place.to(method.device)),
                    )
                )
    if not np.isfinite(rewards).all():
        raise ValueError(f"expected finite rewards from {type(method).__name__}, got others; its training diverged")
    return rewards


def shared_rewards(
    method: PersonalizationMethod, users: Users, rewards: Float64Array, first: IntArray, second: IntArray
) -> SharedRewards:
    """What is shared, from the rewards of I texts for the `shared_states` ``(I, 1 + K)`` and comparisons ``(N,)``."""
    population, along = rewards[:, 0], rewards[:, 1:] - rewards[:, :1]
    margins, margin = along[first] - along[second], population[first] - population[second]
    axes = principal_axes(margins, users.moved)
    spread = float(np.sqrt(np.square(axes.spread).sum()))
    return SharedRewards(population, along, margins, axes, float(np.sqrt(np.square(margin).mean())), spread)


def scorers(
    method: PersonalizationMethod, prompts: Sequence[str], responses: Sequence[str], first: IntArray, second: IntArray
) -> dict[str, Float64Array]:
    """Rewards ``(I,)`` of texts by each basis alone, by name.

    Where weights are shares a basis is a user who is all of it. Else bases are arbitrary coordinates; in their place
    are users one spread from the population to either side, along each principal axis of the users on these texts.

    Args:
        method: A loaded method.
        prompts: Of the I texts.
        responses: The texts.
        first: ``(N,)`` texts that are compared.
        second: ``(N,)`` what each is compared with.

    Raises:
        ValueError: If users are no weights of shared rewards, or none is known.
    """
    shared, users, states = explainable(method), users_of(method), shared_states(method)
    texts = list(zip(prompts, responses, strict=True))
    item, row = cells(len(texts), states.num_users)
    rewards = read_rewards(method, texts, states, item, row).reshape(len(texts), -1)
    if shared.mixes:
        return {f"{shared.word_for_basis} {number}": column for number, column in enumerate(rewards.T[1:])}
    found = shared_rewards(method, users, rewards, first, second)
    named: dict[str, Float64Array] = {}
    for number in range(found.axes.num_shown if found.users_differ else 0):
        step = found.axes.spread[number] * (found.along @ found.axes.directions[:, number])
        named[f"axis {number + 1} +"] = found.population + step
        named[f"axis {number + 1} −"] = found.population - step
    return named


def cells(num_texts: int, num_states: int) -> tuple[IntArray, IntArray]:
    """Every text for every state, text by text: ``(I x S,)`` each."""
    return np.repeat(np.arange(num_texts), num_states), np.tile(np.arange(num_states), num_texts)


def _double(values: torch.Tensor) -> Float64Array:
    """As numbers of NumPy."""
    numbers: Float64Array = values.detach().double().cpu().numpy()
    return numbers
