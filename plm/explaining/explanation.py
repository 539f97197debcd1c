"""Explain what users of a method differ in: who leans where, whether there are clusters, and the texts that tell.

Axes: I texts, N comparisons, M judgements of known users, U users, K shared rewards.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.data.keys import digest
from plm.data.schema import PairTable
from plm.data.values import plain_prompt
from plm.evaluation import MIN_USERS, cluster_bootstrap
from plm.explaining.axes import LEAST_PART, Clusters, cluster_users, not_told_apart
from plm.explaining.rewards import (
    SharedRewards,
    Users,
    cells,
    explainable,
    read_rewards,
    shared_rewards,
    shared_states,
    users_of,
)
from plm.method import PersonalizationMethod
from plm.types import UserState

NUM_TEXTS = 5
"""Comparisons that are shown of a direction."""
LEAST_WEIGHT = 0.01
"""Mean weight below which a basis that is nobody's largest gets no texts."""


class Contrast(NamedTuple):
    """Two responses to a prompt, on which a direction and the population are far apart."""

    prompt: str
    liked: str
    """What the direction, or its + end, likes more than the population does."""
    other: str
    """The other response, which the − end of an axis likes more than the population does."""
    population: float
    """Reward of ``liked`` less that of ``other`` for a user without pairs."""
    here: float
    """The same for the basis alone, or for a user one spread towards +."""
    opposite: float
    """The same for a user one spread towards −; nan of a basis."""
    where: str
    """The first pair of the two in the data, as ``file:line``."""


class Direction(NamedTuple):
    """A basis, a prototype or a principal axis."""

    name: str
    share: float
    """Of a basis the mean weight of users, of an axis its share of the variance of users' rewards."""
    centre: float
    """Weight of the population; 0 of an axis."""
    most: float
    """The largest weight, or distance on an axis, that a user has."""
    largest: int
    """Users who have more of this than of any other."""
    leaning: int
    """Users who exceed the population in this more than in any other; of an axis the same as ``largest``."""
    sides: tuple[int, int] | None
    """Users towards + and − of an axis."""
    length: float
    """Correlation of what it says of comparisons with which response is longer, from -1 to 1."""
    note: str
    contrasts: list[Contrast]


class Evidence(NamedTuple):
    """Whether weights say something about their users: judgements predicted by their own and by another user's."""

    held_out: bool
    """Whether all of these judgements are known to be none that users were learned from."""
    num_users: int
    num_pairs: int
    own: float
    """Accuracy with users' own weights, mean over users."""
    population: float
    other: float
    """With those of another user, the next by a hash of the ids."""
    difference: float
    """Own less other."""
    difference_low: float
    difference_high: float


class Cluster(NamedTuple):
    """Users who belong together."""

    num_users: int
    centre: list[float]
    """Mean weight of each basis, or mean place on each axis that is shown."""


@dataclass(frozen=True)
class Explanation:
    """What a page says of a method."""

    method: str
    word: str
    """``basis``, ``prototype`` or ``axis``."""
    num_users: int
    num_without: int
    """Known users without pairs, who count nowhere."""
    num_comparisons: int
    margin: float
    """Root mean square over comparisons of the population's margin."""
    spread: float
    """Root mean square over users and comparisons of what users' margins are beyond the population's."""
    users_differ: bool
    evidence: Evidence
    directions: list[Direction]
    unshown_share: float
    """Share of the variance of the axes that are not shown."""
    clusters: list[Cluster]
    """None where none are claimed."""
    clusters_say: str
    """Why clusters are claimed or not."""

    def as_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        directions = [
            {**one._asdict(), "contrasts": [pair._asdict() for pair in one.contrasts]} for one in self.directions
        ]
        clusters = [one._asdict() for one in self.clusters]
        return {**asdict(self), "evidence": self.evidence._asdict(), "directions": directions, "clusters": clusters}


class _Comparisons(NamedTuple):
    """Distinct comparisons of a table, whoever made them."""

    first: IntArray
    """``(N,)`` rows of the table's items, and so is ``second``."""
    second: IntArray
    row: IntArray
    """``(N,)`` the first pair that makes each."""


def explain(method: PersonalizationMethod, table: PairTable, held_out: BoolArray | None = None) -> Explanation:
    """Say what the known users of a method differ in, with texts of a table of pairs alone.

    The method's users are weights of a few shared rewards. Where weights are shares, each basis or prototype is shown.
    Where they are coordinates, which a fit may turn and flip freely, the principal axes of the users' rewards on these
    comparisons are, see `plm.explaining.axes.principal_axes`.

    Args:
        method: A method of ``plm.load_method``.
        table: Pairs; those of known users also show whether weights say something about their users.
        held_out: ``(pairs,)`` which of them no user was learned from; None = it is not known.

    Raises:
        ValueError: If the method's users are no weights of shared rewards, none is known, or a text cannot be read.
    """
    shared, users = explainable(method), users_of(method)
    pairs, judgements = _comparisons(table), _judgements(table, users, held_out)
    rewards, evidence = _read(method, table, users, pairs, judgements, held_out is not None)
    found = shared_rewards(method, users, rewards, pairs.first, pairs.second)
    clusters, says = _clusters(users, found, evidence)
    longer = np.array([np.log1p(len(response)) for _, response in table.texts()])
    reader = _Reader(table, pairs, found, longer[pairs.first] - longer[pairs.second])
    if shared.mixes:
        word, places = shared.word_for_basis, users.weights
        directions = reader.bases(word, places, users.moved)
    else:
        word, places = "axis", found.axes.coordinates[:, : found.axes.num_shown]
        directions = reader.axes() if found.users_differ else []
    groups = []
    for label in range(int(clusters.label.max()) + 1 if clusters is not None else 0):
        assert clusters is not None
        part = places[clusters.label == label]
        groups.append(Cluster(len(part), part.mean(0).tolist()))
    return Explanation(
        method=type(method).__name__,
        word=word,
        num_users=len(users.ids),
        num_without=users.num_without,
        num_comparisons=len(pairs.row),
        margin=found.margin,
        spread=found.spread,
        users_differ=found.users_differ,
        evidence=evidence,
        directions=directions,
        unshown_share=0.0 if shared.mixes or not directions else 1.0 - sum(one.share for one in directions),
        clusters=groups,
        clusters_say=says,
    )


# ---------------------------------------------------------------------- what is read
def _comparisons(table: PairTable) -> _Comparisons:
    """The distinct comparisons, in the order of their texts."""
    row = np.unique(table.comparison, return_index=True)[1]
    both = np.sort(np.stack([table.chosen[row], table.rejected[row]]), axis=0)
    return _Comparisons(both[0], both[1], row)


class _Judgements(NamedTuple):
    """M pairs of known users that are no ties."""

    row: IntArray
    """``(M,)`` rows of the table."""
    user: IntArray
    """``(M,)`` rows of the known users."""


def _judgements(table: PairTable, users: Users, held_out: BoolArray | None) -> _Judgements:
    """Those that may be evidence."""
    place = {name: number for number, name in enumerate(users.ids)}
    user = np.array([place.get(name, -1) for name in table.user_ids], dtype=np.int64)[table.user]
    row = np.flatnonzero((user >= 0) & ~table.tie & (True if held_out is None else held_out))
    return _Judgements(row, user[row])


def _read(
    method: PersonalizationMethod,
    table: PairTable,
    users: Users,
    pairs: _Comparisons,
    judgements: _Judgements,
    held_out: bool,
) -> tuple[Float64Array, Evidence]:
    """Rewards ``(items, 1 + K)`` of the shared states, zero for items of no pair, and the evidence."""
    states = shared_states(method)
    used = np.unique(np.concatenate([pairs.first, pairs.second]))
    number, state = cells(len(used), states.num_users)
    own = judgements.user
    present = np.unique(own)
    ring = present[np.argsort(digest([users.ids[user] for user in present.tolist()]), kind="stable")]
    after = np.zeros(len(users.ids), dtype=np.int64)
    after[ring] = np.roll(ring, -1)
    chosen, rejected = table.chosen[judgements.row], table.rejected[judgements.row]
    item = np.concatenate([used[number], chosen, rejected, chosen, rejected])
    row = np.concatenate([state, *(states.num_users + user for user in (own, own, after[own], after[own]))])
    values = read_rewards(method, table.texts(), UserState.cat([states, users.state]), item, row)
    rewards = np.zeros((len(table.items), states.num_users))
    rewards[used] = values[: len(number)].reshape(len(used), -1)
    of_chosen, of_rejected, other_chosen, other_rejected = values[len(number) :].reshape(4, -1)
    margins = (
        of_chosen - of_rejected,
        rewards[chosen, 0] - rewards[rejected, 0],
        other_chosen - other_rejected,
    )
    return rewards, _evidence(margins, own, held_out)


def _evidence(margins: tuple[Float64Array, ...], user: IntArray, held_out: bool) -> Evidence:
    """Accuracies from margins ``(M,)`` by own weights, the population's and another user's; each user counts once."""
    names, row, count = np.unique(user, return_inverse=True, return_counts=True)
    own, population, other = (np.bincount(row, (np.sign(margin) + 1) / 2, len(names)) / count for margin in margins)
    low, high = cluster_bootstrap(own - other) if len(names) else (np.nan, np.nan)
    means = {"own": own, "population": population, "other": other, "difference": own - other}
    return Evidence(
        held_out=held_out,
        num_users=len(names),
        num_pairs=len(user),
        difference_low=float(low),
        difference_high=float(high),
        **{name: float(values.mean()) if len(names) else float("nan") for name, values in means.items()},
    )


# ---------------------------------------------------------------------- clusters
def _clusters(users: Users, found: SharedRewards, evidence: Evidence) -> tuple[Clusters | None, str]:
    """Clusters of users by their rewards, None where none are claimed, and why."""
    if not found.users_differ:
        return None, "users do not differ: each has the population's reward"
    if not evidence.num_pairs:
        return None, "there are no pairs of known users to tell by, so that nothing shows whether weights mean anything"
    if evidence.num_users < MIN_USERS:
        return None, f"pairs of {MIN_USERS} known users are needed to tell, the data hold those of {evidence.num_users}"
    if not evidence.difference_low > 0:
        return None, "users' own weights do not predict their pairs better than another user's, beyond chance"
    clusters = cluster_users(found.axes.coordinates)
    if clusters.label.any():
        return clusters, f"users are further apart than in clouds without clusters (p = {clusters.p_value:.2f})"
    if np.isnan(clusters.p_value):
        return None, f"whatever their number, one has fewer than {MIN_USERS} users, or than {LEAST_PART:.0%} of them"
    return None, f"users are no further apart than in one cloud without clusters (p = {clusters.p_value:.2f})"


# ---------------------------------------------------------------------- directions
class _Reader(NamedTuple):
    """What directions are described with."""

    table: PairTable
    pairs: _Comparisons
    found: SharedRewards
    longer: Float64Array
    """``(N,)`` by how much the first text of a comparison is longer, in logarithms."""

    def bases(self, word: str, weights: Float64Array, moved: Float64Array) -> list[Direction]:
        """Every basis or prototype, from weights ``(U, K)`` of users and what they are beyond the population's."""
        is_away = np.abs(moved).max(1, initial=0.0) > 0  # who is served the population leans nowhere
        largest = np.bincount(weights.argmax(1), minlength=weights.shape[1])
        leaning = np.bincount(moved[is_away].argmax(1), minlength=weights.shape[1])
        directions = []
        for number, mean in enumerate(weights.mean(0)):
            beyond = self.found.margins[:, number]
            is_used = self.found.users_differ and (mean >= LEAST_WEIGHT or largest[number] > 0)
            directions.append(
                Direction(
                    f"{word} {number}",
                    float(mean),
                    float(mean - moved[:, number].mean()),
                    float(weights[:, number].max()),
                    int(largest[number]),
                    int(leaning[number]) if self.found.users_differ else 0,
                    None,
                    self._length(beyond),
                    "" if is_used or not self.found.users_differ else "hardly any user has it: no texts",
                    self._contrasts(beyond, with_opposite=False) if is_used else [],
                )
            )
        return directions

    def axes(self) -> list[Direction]:
        """The principal axes that are worth a look."""
        axes = self.found.axes
        close = not_told_apart(axes)
        is_away = np.abs(axes.coordinates).max(1, initial=0.0) > 0
        largest = np.bincount(np.abs(axes.coordinates[is_away]).argmax(1), minlength=len(axes.shares))
        directions = []
        for number in range(axes.num_shown):
            place = axes.coordinates[:, number]
            beyond = axes.spread[number] * (self.found.margins @ axes.directions[:, number])
            directions.append(
                Direction(
                    f"axis {number + 1}",
                    float(axes.shares[number]),
                    0.0,
                    float(np.abs(place).max()),
                    int(largest[number]),
                    int(largest[number]),
                    (int((place > 0).sum()), int((place < 0).sum())),
                    self._length(beyond),
                    f"too close to axis {number + 2} to be told apart (North's rule)" if close[number] else "",
                    self._contrasts(beyond, with_opposite=True),
                )
            )
        return directions

    def _length(self, beyond: Float64Array) -> float:
        """Cosine of ``(N,)`` margins and differences in length: which of two texts comes first changes nothing."""
        size = np.sqrt(np.square(beyond).sum() * np.square(self.longer).sum())
        return float(beyond @ self.longer / size) if size > 0 else float("nan")

    def _contrasts(self, beyond: Float64Array, with_opposite: bool) -> list[Contrast]:
        """The comparisons with the largest ``(N,)`` margins beyond the population's, each response once."""
        shown: set[int] = set()
        contrasts: list[Contrast] = []
        for index in np.argsort(-np.abs(beyond), kind="stable").tolist():
            items = self.pairs.first[index], self.pairs.second[index]
            liked, other = items if beyond[index] > 0 else items[::-1]
            (prompt, first), (_, second) = self.table.items[liked].tolist(), self.table.items[other].tolist()
            if not beyond[index] or len(contrasts) == NUM_TEXTS:
                break
            if {first, second} & shown:
                continue
            shown |= {first, second}
            population = float(self.found.population[liked] - self.found.population[other])
            gain = abs(float(beyond[index]))
            contrasts.append(
                Contrast(
                    plain_prompt(self.table.prompts[prompt]),
                    self.table.responses[first],
                    self.table.responses[second],
                    population,
                    population + gain,
                    population - gain if with_opposite else float("nan"),
                    self.table.position(int(self.pairs.row[index])),
                )
            )
        return contrasts
