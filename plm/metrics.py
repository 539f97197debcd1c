"""Exact per-user sums over margins, and the numbers drawn from them.

A metric keeps one row of sums per user, so millions of pairs cost no memory and neither the cut into batches nor the
number of processes changes a result. Intervals live in ``plm.evaluation``.

Axes: B pairs in a batch, U users, K shot counts, R repeats, N calibration bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from plm.arrays import Float64Array, IntArray

NUM_BINS = 15
"""Calibration bins of equal width between confidence 0.5 and 1."""

QUANTILES = {"accuracy_p10": 0.1, "accuracy_p50": 0.5, "accuracy_p90": 0.9}
"""Which per-user quantiles are reported, and their names."""

CONTROL_MARGINS = ("population_margin", "other_margin", "bradley_terry_margin", "flipped_margin")
"""Margins of a test pair by other states than the user's: the population's, another user's, the Bradley-Terry model of
all users, and the user's own learned from reversed labels."""

_COLUMNS = (
    "num_pairs",
    "correct",
    "loss",
    "ties",
    "labelled_ties",
    "global_pairs",
    "global_correct",
    "global_loss",
    "other_pairs",
    "other_correct",
    "bradley_terry_pairs",
    "bradley_terry_correct",
    "bradley_terry_loss",
    "personal_pairs",
    "flipped_pairs",
    "reversed_pairs",
)


@dataclass(frozen=True)
class UserTable:
    """What a method got right for a group of users, one row per user who stated at least one preference.

    A user without a control (no population or other-user margin) holds nan there.
    """

    user_row: IntArray
    """``(U,)`` row among all users of the datamodule."""
    num_pairs: Float64Array
    """``(U,)`` pairs judged; pairs labelled as ties are not."""
    accuracy: Float64Array
    """``(U,)`` share of pairs with a positive margin; a margin of zero counts one half."""
    log_loss: Float64Array
    """``(U,)`` mean of ``-log sigmoid(margin)``, in nats."""
    global_accuracy: Float64Array
    """``(U,)`` accuracy of the population state: the global control."""
    global_log_loss: Float64Array
    """``(U,)`` log-loss of the population state."""
    other_accuracy: Float64Array
    """``(U,)`` accuracy of another user's state: the other-user control."""
    bradley_terry_accuracy: Float64Array
    """``(U,)`` accuracy of the ridge-tuned Bradley-Terry model of the same training pairs."""
    bradley_terry_log_loss: Float64Array
    """``(U,)`` its log-loss."""
    majority_accuracy: Float64Array
    """``(U,)`` accuracy of what most training users preferred, where pairs share responses with theirs."""
    personal_pairs: Float64Array
    """``(U,)`` pairs whose margin is not that of the population; 0 = the user is served the population."""
    flipped_pairs: int
    """Pairs with a personal term, the margin less the population's, that were also judged with reversed labels."""
    reversed_pairs: int
    """Those whose personal term changes its sign when the labels of the user's support are reversed."""
    ties: int
    """Pairs whose margin is exactly zero."""
    labelled_ties: int
    """Pairs the users themselves called ties: left out of everything else."""
    bins: Float64Array
    """``(N, 3)`` pairs, summed confidence and summed correctness of each calibration bin."""

    @property
    def personal_minus_global(self) -> Float64Array:
        """``(U,)`` gain of each user over the global control."""
        return self.accuracy - self.global_accuracy

    @property
    def personal_minus_other(self) -> Float64Array:
        """``(U,)`` gain of each user over another user's state."""
        return self.accuracy - self.other_accuracy

    @property
    def personal_minus_bradley_terry(self) -> Float64Array:
        """``(U,)`` gain of each user over the ridge-tuned Bradley-Terry model."""
        return self.accuracy - self.bradley_terry_accuracy

    @property
    def personal_minus_majority(self) -> Float64Array:
        """``(U,)`` gain of each user over the majority."""
        return self.accuracy - self.majority_accuracy

    @property
    def calibration_error(self) -> float:
        r"""Expected calibration error over all pairs.

        The preferred response is always the first, so every label is 1 and only the side of the margin can be judged:
        a pair's confidence is ``sigmoid(|margin|)`` in [0.5, 1] and its correctness 1, 0.5 or 0 for a margin above, at
        or below zero. With ``N`` bins of equal width,
        :math:`ECE = \sum_n \frac{pairs_n}{pairs} |correctness_n - confidence_n|`, bin means on the right.
        """
        return calibration_error(self.bins)

    def estimates(self) -> dict[str, float]:
        """Estimate all numbers, macro over users unless their name says otherwise; absent controls are left out."""
        counts: dict[str, float] = {
            "num_users": len(self.user_row),
            "num_pairs": int(self.num_pairs.sum()),
            "ties": self.ties,
            "labelled_ties": self.labelled_ties,
        }
        if not len(self.user_row):
            return counts
        numbers: dict[str, float] = {
            "accuracy": float(self.accuracy.mean()),
            "accuracy_micro": float(np.average(self.accuracy, weights=self.num_pairs)),
            **{name: float(np.quantile(self.accuracy, level)) for name, level in QUANTILES.items()},
            "log_loss": float(self.log_loss.mean()),
            "ece": self.calibration_error,
        }
        if not np.isnan(self.global_accuracy).all():
            gain = self.personal_minus_global
            numbers |= {
                "global_accuracy": float(np.nanmean(self.global_accuracy)),
                "global_log_loss": float(np.nanmean(self.global_log_loss)),
                "personal_minus_global": float(np.nanmean(gain)),
                "users_helped": int((gain > 0).sum()),
                "users_harmed": int((gain < 0).sum()),
                "users_served_population": int((self.personal_pairs[~np.isnan(gain)] == 0).sum()),
            }
        if self.flipped_pairs:
            numbers["flip_reversed"] = self.reversed_pairs / self.flipped_pairs
        for names in (
            ("bradley_terry_accuracy", "bradley_terry_log_loss", "personal_minus_bradley_terry"),
            ("majority_accuracy", "personal_minus_majority"),
            ("other_accuracy", "personal_minus_other"),
        ):
            if not np.isnan(getattr(self, names[0])).all():
                numbers |= {name: float(np.nanmean(getattr(self, name))) for name in names}
        return numbers | counts


class PreferenceMetric(Metric):
    """Accuracy, log-loss, calibration and both controls of one group of users, exact across batches and processes.

    Sums are float64 and added up by user row, so memory is ``U x 16`` numbers whatever the number of pairs.

    Args:
        num_users: Number U of users of the datamodule, seen and unseen: the range of ``user_row``.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    sums: Tensor
    bins: Tensor

    def __init__(self, num_users: int) -> None:
        super().__init__()
        self.num_users = num_users
        zeros = torch.zeros(num_users, len(_COLUMNS), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("bins", torch.zeros(NUM_BINS, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        margin: Tensor,
        user_row: Tensor,
        tie: Tensor | None = None,
        population_margin: Tensor | None = None,
        other_margin: Tensor | None = None,
        bradley_terry_margin: Tensor | None = None,
        flipped_margin: Tensor | None = None,
    ) -> None:
        """Add pairs.

        Args:
            margin: ``(B,)`` reward of chosen minus reward of rejected.
            user_row: ``(B,)`` int64 in ``[0, num_users)``.
            tie: ``(B,)`` bool, True = labelled a tie: counted and otherwise left out.
            population_margin: ``(B,)`` margins of the population state.
            other_margin: ``(B,)`` margins of another user's state.
            bradley_terry_margin: ``(B,)`` margins of the ridge-tuned Bradley-Terry model.
            flipped_margin: ``(B,)`` margins of the users' states after all labels of their support were reversed; with
                ``population_margin``.

        Raises:
            ValueError: If a user row is out of range.
        """
        _check_rows(user_row, self.num_users)
        kept = torch.ones_like(user_row, dtype=torch.bool) if tie is None else ~tie
        rows = user_row[kept]
        correct, loss = _correctness_and_loss(margin[kept])
        ones, zeros = torch.ones_like(correct), torch.zeros_like(correct)
        columns = [ones, correct, loss, (margin[kept] == 0).double(), zeros]
        for control, size in ((population_margin, 3), (other_margin, 2), (bradley_terry_margin, 3)):
            judged = [zeros] * size if control is None else [ones, *_correctness_and_loss(control[kept])]
            columns += judged[:size]
        columns += _personal_terms(margin[kept], population_margin, flipped_margin, kept)
        self.sums.index_add_(0, rows, torch.stack(columns, dim=1))
        if tie is not None:
            self.sums[:, _COLUMNS.index("labelled_ties")].index_add_(0, user_row[tie], tie[tie].double())
        confidence, bins = _bins(margin[kept])
        self.bins.index_add_(0, bins, torch.stack([ones, confidence, correct], dim=1))

    def table(self) -> UserTable:
        """Per-user results of all processes; every process must call it."""
        with self.sync_context():
            return self._table()

    def compute(self) -> dict[str, Tensor]:
        """Point estimates of all processes by name, see `UserTable.estimates`."""
        numbers = self._table().estimates()
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}

    def _table(self) -> UserTable:
        sums = self.sums.cpu().numpy()
        column = {name: sums[:, index] for index, name in enumerate(_COLUMNS)}
        (rows,) = np.nonzero(column["num_pairs"])

        def mean(total: str, pairs: str) -> Float64Array:
            count = column[pairs][rows]
            return np.where(count > 0, column[total][rows] / np.maximum(count, 1), np.nan)

        return UserTable(
            user_row=rows.astype(np.int64),
            num_pairs=column["num_pairs"][rows],
            accuracy=mean("correct", "num_pairs"),
            log_loss=mean("loss", "num_pairs"),
            global_accuracy=mean("global_correct", "global_pairs"),
            global_log_loss=mean("global_loss", "global_pairs"),
            other_accuracy=mean("other_correct", "other_pairs"),
            bradley_terry_accuracy=mean("bradley_terry_correct", "bradley_terry_pairs"),
            bradley_terry_log_loss=mean("bradley_terry_loss", "bradley_terry_pairs"),
            majority_accuracy=np.full(len(rows), np.nan),
            personal_pairs=column["personal_pairs"][rows],
            flipped_pairs=int(column["flipped_pairs"].sum()),
            reversed_pairs=int(column["reversed_pairs"].sum()),
            ties=int(column["ties"].sum()),
            labelled_ties=int(column["labelled_ties"].sum()),
            bins=self.bins.cpu().numpy().copy(),
        )


class FewShotTable(NamedTuple):
    """What a method got right for every user at every shot count and repeat."""

    shots: IntArray
    """``(K,)`` requested support pairs, ascending."""
    user_row: IntArray
    """``(U,)`` row among all users of the datamodule."""
    accuracy: Float64Array
    """``(K, R, U)``, nan where a user has no pair."""
    log_loss: Float64Array
    """``(K, R, U)``, in nats."""
    bins: Float64Array
    """``(K, N, 3)`` as in `UserTable`, summed over repeats."""


class FewShotMetric(Metric):
    """Accuracy, log-loss and calibration by shot count, repeat and user, exact across batches and processes.

    Args:
        users: Rows of the users of the curve among all of the datamodule; nothing is kept of the others.
        shots: The shot counts of the curve.
        num_repeats: Random draws of the support per shot count.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    cells: Tensor
    bins: Tensor
    users: Tensor
    shots: Tensor

    def __init__(self, users: Iterable[int], shots: Sequence[int], num_repeats: int) -> None:
        super().__init__()
        self.num_repeats = num_repeats
        self.register_buffer("users", torch.tensor(sorted(set(users)), dtype=torch.long), persistent=False)
        self.register_buffer("shots", torch.tensor(sorted(set(shots)), dtype=torch.long), persistent=False)
        zeros = torch.zeros(len(self.shots), num_repeats, len(self.users), 3, dtype=torch.float64)
        self.add_state("cells", zeros, dist_reduce_fx="sum")
        bins = torch.zeros(len(self.shots), NUM_BINS, 3, dtype=torch.float64)
        self.add_state("bins", bins, dist_reduce_fx="sum")

    def update(
        self, margin: Tensor, user_row: Tensor, num_shots: Tensor, repeat: Tensor, tie: Tensor | None = None
    ) -> None:
        """Add pairs.

        Args:
            margin: ``(B,)`` reward of chosen minus reward of rejected.
            user_row: ``(B,)`` int64, of the users of the curve.
            num_shots: ``(B,)`` int64, one of ``shots``.
            repeat: ``(B,)`` int64 in ``[0, num_repeats)``.
            tie: ``(B,)`` bool, True = labelled a tie: left out.

        Raises:
            ValueError: If a user row, shot count or repeat is not one that was announced.
        """
        strange = user_row[~torch.isin(user_row, self.users)].tolist()
        if strange:
            raise ValueError(
                f"expected user rows of the {len(self.users)} users of the curve, got {sorted(set(strange))[:5]}; "
                "few-shot batches hold users whom training does not see"
            )
        shot = torch.searchsorted(self.shots, num_shots).clamp(max=len(self.shots) - 1)
        if (self.shots[shot] != num_shots).any() or ((repeat < 0) | (repeat >= self.num_repeats)).any():
            raise ValueError(
                f"expected shots among {self.shots.tolist()} and repeats below {self.num_repeats}, got shots "
                f"{sorted(set(num_shots.tolist()))} and repeats {sorted(set(repeat.tolist()))}; the datamodule's shots "
                "and repeats must be those of its few-shot batches"
            )
        kept = torch.ones_like(user_row, dtype=torch.bool) if tie is None else ~tie
        correct, loss = _correctness_and_loss(margin[kept])
        ones = torch.ones_like(correct)
        place = torch.searchsorted(self.users, user_row)
        cell = ((shot * self.num_repeats + repeat) * len(self.users) + place)[kept]
        self.cells.view(-1, 3).index_add_(0, cell, torch.stack([ones, correct, loss], dim=1))
        confidence, number = _bins(margin[kept])
        self.bins.view(-1, 3).index_add_(
            0, shot[kept] * NUM_BINS + number, torch.stack([ones, confidence, correct], dim=1)
        )

    def table(self) -> FewShotTable:
        """Per-user results of all processes; every process must call it."""
        with self.sync_context():
            return self._table()

    def compute(self) -> dict[str, Tensor]:
        """``"accuracy@k"`` -> macro accuracy over users, averaged over repeats."""
        shots, _, accuracy, *_ = self._table()
        if not accuracy.shape[2]:
            return {}
        means = np.nanmean(accuracy, axis=1).mean(axis=1)
        return {f"accuracy@{k}": torch.tensor(mean, dtype=torch.float64) for k, mean in zip(shots, means, strict=True)}

    def _table(self) -> FewShotTable:
        pairs, correct, loss = self.cells.cpu().numpy().transpose(3, 0, 1, 2)  # (K, R, U) each
        (rows,) = np.nonzero(pairs.sum(axis=(0, 1)))
        pairs = pairs[..., rows]
        accuracy, log_loss = (
            np.where(pairs > 0, total[..., rows] / np.maximum(pairs, 1), np.nan) for total in (correct, loss)
        )
        shots = self.shots.cpu().numpy().copy()
        users = self.users.cpu().numpy()[rows]
        return FewShotTable(shots, users, accuracy, log_loss, self.bins.cpu().numpy().copy())


def _correctness_and_loss(margin: Tensor) -> tuple[Tensor, Tensor]:
    """Correctness (1, one half for a margin of zero, 0) and log-loss of ``(B,)`` margins, in float64."""
    margin = margin.detach().double()
    return (margin > 0).double() + 0.5 * (margin == 0).double(), -F.logsigmoid(margin)


def _bins(margin: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of ``(B,)`` margins in [0.5, 1], in float64, and the calibration bin of each."""
    confidence = torch.sigmoid(margin.detach().double().abs())
    return confidence, ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(0, NUM_BINS - 1)


def calibration_error(bins: Float64Array) -> float:
    """Expected calibration error of ``(N, 3)`` bins, see `UserTable.calibration_error`."""
    pairs, confidence, correct = bins.T
    return float(np.abs(correct - confidence).sum() / pairs.sum())


def _personal_terms(margin: Tensor, population: Tensor | None, flipped: Tensor | None, kept: Tensor) -> list[Tensor]:
    """Whether pairs have a personal term, were also judged with reversed labels, and changed its sign: three ``(B,)``.

    ``margin`` holds the kept pairs alone.
    """
    zeros = torch.zeros_like(margin, dtype=torch.float64)
    if population is None:
        return [zeros, zeros, zeros]
    term = margin.detach() - population[kept].detach()
    if flipped is None:
        return [(term != 0).double(), zeros, zeros]
    reverse = flipped[kept].detach() - population[kept].detach()
    return [(term != 0).double(), (term != 0).double(), (term * reverse < 0).double()]


def _check_rows(user_row: Tensor, num_users: int) -> None:
    if len(user_row) and not 0 <= int(user_row.min()) <= int(user_row.max()) < num_users:
        raise ValueError(
            f"expected user rows in [0, {num_users}), got {int(user_row.min())} to {int(user_row.max())}; "
            "evaluation batches need user_row, the row among all users of the datamodule"
        )
