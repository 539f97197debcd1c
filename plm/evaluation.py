"""Statistics over users: bootstrap intervals, verdicts, and the table, files and pictures a test ends with.

Users are the unit of sampling: pairs of one user hang together, so intervals resample users, never pairs.

Axes: U users, M statistics, K shot counts, R repeats.
"""

from __future__ import annotations

import csv
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.special import stdtrit

from plm.metrics import FewShotTable, FloatArray, UserTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
"""Level of every interval."""

MIN_USERS = 8
"""Fewer users than this get no interval and no verdict: too few resamples differ."""

_CHUNK = 4_000_000  # draws held in memory at once
_CURVE = "#D9793B"
_HELPED, _HARMED, _SAME = "#3C8D6E", "#C2524B", "#B8BCC2"
_INK, _FAINT = "#22262B", "#6B7280"


# ---------------------------------------------------------------------- statistics
def cluster_bootstrap(
    values: FloatArray, weights: FloatArray | None = None, *, num_resamples: int = 2000, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """95% interval of a mean over users, by resampling users with replacement.

    All statistics share the same resamples. Percentiles are expanded for few users (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 3.4): the plain percentile interval is too narrow by about
    ``sqrt((U - 1) / U)`` and a normal instead of a t quantile.

    Args:
        values: ``(U,)`` or ``(U, M)``, one value per user and statistic; nan = the user has none.
        weights: The same shape, non-negative: weight of each user in the mean; pair counts make a macro mean a micro
            one. All alike by default.
        num_resamples: Random draws of U users.
        seed: Seed of the draws.

    Returns:
        Lower and upper ends, of shape ``()`` or ``(M,)``; nan where fewer than `MIN_USERS` users have a value
        or one of them is infinite.
    """
    shape, num_users = values.shape[1:], len(values)
    flat = values.reshape(num_users, -1)
    present = ~np.isnan(flat)
    weight = np.where(present, 1.0 if weights is None else weights.reshape(num_users, -1), 0.0)
    total = np.where(np.isfinite(flat), flat, 0.0) * weight
    low, high = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], np.nan)
    enough = (present.sum(axis=0) >= MIN_USERS) & ~np.isinf(flat).any(axis=0)
    if not enough.any():
        return low.reshape(shape), high.reshape(shape)
    sums = _resample(np.concatenate([total, weight], axis=1), num_resamples, seed)  # (resamples, 2M)
    with np.errstate(invalid="ignore"):
        means = sums[:, : flat.shape[1]] / sums[:, flat.shape[1] :]
    for index in np.flatnonzero(enough):
        tail = _expanded_tail(int(present[:, index].sum()))
        low[index], high[index] = np.nanquantile(means[:, index], [tail, 1 - tail])
    return low.reshape(shape), high.reshape(shape)


def _resample(columns: FloatArray, num_resamples: int, seed: int) -> FloatArray:
    """Sums of ``(U, C)`` columns over U users drawn with replacement, ``(num_resamples, C)``: counts @ columns."""
    rng, num_users = np.random.default_rng(seed), len(columns)
    step = max(1, _CHUNK // num_users)
    sums = []
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        draws = rng.integers(num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        counts = np.bincount(draws.ravel(), minlength=size * num_users).reshape(size, num_users)
        sums.append(counts @ columns)
    return np.concatenate(sums)


def _expanded_tail(num_users: int) -> float:
    """Percentile whose normal quantile, shrunk as U users shrink it, is the t quantile of `CONFIDENCE`."""
    quantile = float(stdtrit(num_users - 1, (1 + CONFIDENCE) / 2))
    return NormalDist().cdf(-quantile * math.sqrt(num_users / (num_users - 1)))


def summarize(table: UserTable, num_resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Point estimates of a group of users, and ``<name>_low`` and ``<name>_high`` for those that have an interval."""
    numbers = table.estimates()
    if not len(table.user_row):
        return numbers
    one = np.ones_like(table.num_pairs)
    columns = {
        "accuracy": (table.accuracy, one),
        "accuracy_micro": (table.accuracy, table.num_pairs),
        "log_loss": (table.log_loss, one),
        "global_accuracy": (table.global_accuracy, one),
        "personal_minus_global": (table.personal_minus_global, one),
        "other_accuracy": (table.other_accuracy, one),
        "personal_minus_other": (table.personal_minus_other, one),
    }
    low, high = cluster_bootstrap(
        np.stack([values for values, _ in columns.values()], axis=1),
        np.stack([weights for _, weights in columns.values()], axis=1),
        num_resamples=num_resamples,
        seed=seed,
    )
    for index, name in enumerate(columns):
        if name in numbers:
            numbers |= {f"{name}_low": float(low[index]), f"{name}_high": float(high[index])}
    return numbers


def summarize_few_shot(table: FewShotTable, num_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The few-shot curve: for each shot count the mean over repeats of the macro accuracy over users.

    Returns:
        Lists over shot counts: ``shots``, ``accuracy`` with its user-clustered interval ``accuracy_low`` and
        ``accuracy_high``, ``accuracy_sd`` over repeats (nan for one repeat), and, where zero shots were measured, the
        paired ``gain`` over zero shots with ``gain_low`` and ``gain_high``; plus ``num_users`` and ``num_repeats``.
    """
    num_repeats = table.accuracy.shape[1]
    per_user = np.nanmean(table.accuracy, axis=1).T  # (U, K)
    macro = np.nanmean(table.accuracy, axis=2)  # (K, R)
    low, high = cluster_bootstrap(per_user, num_resamples=num_resamples, seed=seed)
    curve: dict[str, Any] = {
        "num_users": len(table.user_row),
        "num_repeats": num_repeats,
        "shots": table.shots.tolist(),
        "accuracy": per_user.mean(axis=0).tolist(),
        "accuracy_low": low.tolist(),
        "accuracy_high": high.tolist(),
        "accuracy_sd": macro.std(axis=1, ddof=1).tolist() if num_repeats > 1 else [math.nan] * len(table.shots),
    }
    if table.shots[0] == 0:
        gain = per_user - per_user[:, :1]
        low, high = cluster_bootstrap(gain, num_resamples=num_resamples, seed=seed)
        curve |= {"gain": gain.mean(axis=0).tolist(), "gain_low": low.tolist(), "gain_high": high.tolist()}
    return curve


def verdict(name: str, numbers: Mapping[str, float]) -> str:
    """One sentence about a group of users: does personalisation help, and is it theirs?

    Helping asks for two intervals above zero: over the global control, and over another user's state where measured.
    """
    if "personal_minus_global" not in numbers:
        return f"{name}: no global control was measured"
    low, high = numbers["personal_minus_global_low"], numbers["personal_minus_global_high"]
    gain = _difference(numbers, "personal_minus_global", " points")
    if math.isnan(low):
        return f"{name}: no verdict: an interval needs {MIN_USERS} users, got {numbers['num_users']:.0f}"
    other = ""
    if "personal_minus_other" in numbers:
        other = f"{_difference(numbers, 'personal_minus_other')} over another user's state"
    if high < 0:
        return f"{name}: personalisation harms: {gain} against its global control"
    if low <= 0:
        return f"{name}: no evidence of personalisation: {gain} over its global control"
    if other and numbers["personal_minus_other_low"] <= 0:
        return f"{name}: no evidence of personalisation: {gain} over its global control, but only {other}"
    return f"{name}: personalisation helps: {gain} over its global control" + (f", {other}" if other else "")


# ---------------------------------------------------------------------- terminal and files
def _points(value: float, sign: str = "+") -> str:
    """Hundred times ``value`` with one decimal and never a negative zero: 0.043 -> ``+4.3``."""
    return format(round(100 * value, 1) + 0.0, f"{sign}.1f")


def _interval(numbers: Mapping[str, float], name: str) -> str:
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    return "" if math.isnan(low) else f" [{_points(low, '')}, {_points(high, '')}]"


def _difference(numbers: Mapping[str, float], name: str, unit: str = "") -> str:
    return f"{_points(numbers[name])}{unit}{_interval(numbers, name)}"


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )


def summary_table(groups: Mapping[str, Mapping[str, float]]) -> Table:
    """The table a test ends with: one row per group of users, accuracies in per cent, differences in points."""
    table = _table("Test, 95% intervals over users")
    table.add_column("", style="bold", no_wrap=True)
    for head in (
        "users",
        "pairs",
        "accuracy %",
        "global %",
        "personal − global",
        "personal − other",
        "log-loss",
        "ECE",
    ):
        table.add_column(head, justify="right", no_wrap=head in ("users", "pairs", "log-loss", "ECE"))
    for name, numbers in groups.items():
        cells = [f"{numbers['num_users']:,.0f}", f"{numbers['num_pairs']:,.0f}"]
        if "accuracy" in numbers:
            cells.append(_points(numbers["accuracy"], "") + _interval(numbers, "accuracy"))
            cells.append(_points(numbers["global_accuracy"], "") if "global_accuracy" in numbers else "–")
            for key in ("personal_minus_global", "personal_minus_other"):
                cells.append(_difference(numbers, key) if key in numbers else "–")
            cells += [f"{numbers['log_loss']:.3f}", f"{numbers['ece']:.3f}"]
        table.add_row(name, *cells)
    return table


def few_shot_table(curve: Mapping[str, Any]) -> Table:
    """The few-shot curve in the terminal: one row per shot count."""
    title = f"Few-shot curve, {curve['num_users']:,} unseen users, {curve['num_repeats']} repeats"
    table = _table(title)
    for head in ("shots", "accuracy %", "sd over repeats", "gain over 0 shots"):
        table.add_column(head, justify="right")
    for index, shots in enumerate(curve["shots"]):
        row = {name: values[index] for name, values in curve.items() if isinstance(values, list)}
        spread = "–" if math.isnan(row["accuracy_sd"]) else _points(row["accuracy_sd"], "")
        gain = _difference(row, "gain") if shots and "gain" in row else "–"
        table.add_row(str(shots), _points(row["accuracy"], "") + _interval(row, "accuracy"), spread, gain)
    return table


def write_json(path: str | Path, entries: Mapping[str, Any], merge: bool = False) -> None:
    """Write ``entries`` as JSON in one step; nan becomes null.

    Args:
        path: The file; its folder is made.
        entries: What to write.
        merge: Keep the file's other top-level entries.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if merge and path.is_file() else {}
    text = json.dumps(_finite({**kept, **entries}), indent=2, allow_nan=False, ensure_ascii=False)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """Replace nan and infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


USER_COLUMNS = ["user_id", "split", "num_pairs", "accuracy", "global_accuracy", "gain"]
"""Columns of ``per_user.csv``; gain = accuracy - global accuracy."""


def user_rows(groups: Mapping[str, UserTable], user_ids: Sequence[str]) -> list[list[Any]]:
    """One row of `USER_COLUMNS` per user of each group; ``user_ids`` by user row."""
    rows: list[list[Any]] = []
    for split, table in groups.items():
        columns = (table.user_row, table.num_pairs, table.accuracy, table.global_accuracy, table.personal_minus_global)
        for row, num_pairs, *values in zip(*(column.tolist() for column in columns), strict=True):
            rows.append([user_ids[row], split, int(num_pairs), *(None if math.isnan(v) else v for v in values)])
    return rows


def write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file in one step; None becomes an empty cell."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    os.replace(temporary, path)


# ---------------------------------------------------------------------- pictures
def few_shot_figure(curve: Mapping[str, Any]) -> Figure:
    """Accuracy of unseen users against support pairs, with its 95% band and the zero-shot line."""
    figure = _figure(7.2, 4.4)
    axes = figure.add_subplot()
    _tidy(axes)
    shots, accuracy = np.array(curve["shots"]), 100 * np.array(curve["accuracy"], dtype=float)
    low, high = (100 * np.array(curve[f"accuracy_{end}"], dtype=float) for end in ("low", "high"))
    at = np.log2(shots + 1.0)
    color = _CURVE
    axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0, label="95% interval over users")
    if shots[0] == 0:
        axes.axhline(accuracy[0], color=_FAINT, linewidth=1.1, linestyle=(0, (4, 3)), label="global control (0 shots)")
    axes.plot(at, accuracy, color=color, linewidth=2.2, marker="o", markersize=6, markeredgecolor="white", zorder=3)
    if shots[0] == 0 and len(shots) > 1:
        gain = _difference({key: curve[key][-1] for key in ("gain", "gain_low", "gain_high")}, "gain", " points")
        top = (at[-1], np.fmax(high[-1], accuracy[-1]))
        text = axes.annotate(f"{gain} over 0 shots", top, (0, 6), textcoords="offset points", ha="right", color=_INK)
        text.set(fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    axes.set_xticks(at, [str(k) for k in shots])
    axes.set_xlabel("preference pairs per unseen user (shots)")
    axes.set_ylabel("accuracy, mean over users (%)")
    axes.margins(x=0.03, y=0.1)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), frameon=False, fontsize=9, labelcolor=_FAINT)
    what = f"{curve['num_users']:,} unseen users; the pairs of each shot count drawn {curve['num_repeats']} times"
    _headline(axes, "How many pairs does a new user need?", what.replace("drawn 1 times", "drawn once"))
    return figure


def gain_figure(groups: Mapping[str, UserTable]) -> Figure:
    """Histogram of what personalisation does to each user, one panel per group of users."""
    figure = _figure(7.2, 0.6 + 2.9 * len(groups))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    gains = {name: 100 * g[~np.isnan(g)] for name, g in ((n, t.personal_minus_global) for n, t in groups.items())}
    reach = max((float(np.abs(gain).max()) for gain in gains.values() if len(gain)), default=0.0)
    edges = _gain_edges(reach, max((len(gain) for gain in gains.values()), default=0))
    for axes, (name, gain) in zip(panels, gains.items(), strict=True):
        _tidy(axes)
        parts = {"harmed": gain[gain < 0], "unchanged": gain[gain == 0], "helped": gain[gain > 0]}
        colors = [_HARMED, _SAME, _HELPED]
        axes.hist(list(parts.values()), bins=edges.tolist(), stacked=True, color=colors, rwidth=0.92)
        axes.axvline(0, color=_INK, linewidth=0.9)
        axes.set_ylabel("users")
        axes.margins(y=0.18)
        if not len(gain):
            continue
        mean, side = gain.mean(), 1 if gain.mean() >= 0 else -1
        axes.axvline(mean, color=_INK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean {_points(mean / 100)}".replace("-", "−"),
            (mean, 0.98),
            (6 * side, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="top",
            color=_INK,
            fontweight="bold",
        )
        shares = ", ".join(f"{len(part) / len(gain):.0%} {what}" for what, part in reversed(parts.items()))
        _headline(axes, f"{name.capitalize()} users", f"{len(gain):,} users: {shares}")
    figure.align_ylabels()
    panels[-1].set_xlabel("accuracy with the user's own state − with the population's (points)")
    return figure


def _gain_edges(reach: float, num_users: int) -> FloatArray:
    """Bin edges with a bin centred on zero, symmetric, about sqrt(users) bins between 11 and 41."""
    half = int(np.clip(math.sqrt(max(num_users, 1)) / 2, 5, 20))
    return np.linspace(-1.0, 1.0, 2 * half + 2, dtype=np.float64) * max(reach, 1.0)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # a second to import: only when a picture is drawn

    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SAME)
    axes.tick_params(color=_SAME, labelcolor=_INK, labelsize=9)
    axes.grid(axis="y", color="#E7E9EC", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)


def _headline(axes: Axes, title: str, what: str) -> None:
    axes.set_title(f"{title}\n", loc="left", color=_INK, fontweight="bold", fontsize=12)
    axes.text(0, 1.02, what, transform=axes.transAxes, color=_FAINT, fontsize=9, va="bottom")
