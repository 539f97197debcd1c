"""Draw the pictures at the end of a test, and give all pictures the same look."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from plm.arrays import Float64Array
from plm.evaluation.wording import difference, points, shot_units
from plm.messages import counted
from plm.metrics import UserTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVE = "#D9793B"
HELPED, HARMED, SAME = "#3C8D6E", "#C2524B", "#B8BCC2"
INK, FAINT = "#22262B", "#6B7280"


def few_shot_figure(curve: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of unseen users against support pairs, with its 95% band and the zero-shot line."""
    figure = blank(7.2, 4.4)
    axes = figure.add_subplot()
    tidy(axes)
    shots, accuracy = np.array(curve["shots"]), 100 * np.array(curve["accuracy"], dtype=float)
    low, high = (100 * np.array(curve[f"accuracy_{end}"], dtype=float) for end in ("low", "high"))
    at = np.log2(shots + 1.0)
    axes.fill_between(at, low, high, color=_CURVE, alpha=0.16, linewidth=0, label="95% interval over users")
    if shots[0] == 0:
        axes.axhline(accuracy[0], color=FAINT, linewidth=1.1, linestyle=(0, (4, 3)), label="global control (0 shots)")
    axes.plot(at, accuracy, color=_CURVE, linewidth=2.2, marker="o", markersize=6, markeredgecolor="white", zorder=3)
    if shots[0] == 0 and len(shots) > 1:
        gain = difference({key: curve[key][-1] for key in ("gain", "gain_low", "gain_high")}, "gain", " points")
        top = (at[-1], np.fmax(high[-1], accuracy[-1]))
        text = axes.annotate(f"{gain} over 0 shots", top, (0, 6), textcoords="offset points", ha="right", color=INK)
        text.set(fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    axes.set_xticks(at, [str(k) for k in shots])
    unit = shot_units(curve)
    axes.set_xlabel(f"{unit} per unseen user (shots)")
    axes.set_ylabel("accuracy, mean over users (%)")
    axes.margins(x=0.03, y=0.1)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), frameon=False, fontsize=9, labelcolor=FAINT)
    subtitle = f"{curve['num_users']:,} unseen users; the {unit} of each shot count drawn {curve['num_repeats']} times"
    headline(axes, f"How many {unit} does a new user need?", subtitle.replace("drawn 1 times", "drawn once"))
    return figure


def gain_figure(groups: Mapping[str, UserTable]) -> Figure:
    """Draw a histogram of what personalisation does to each user, one panel per group of users."""
    figure = blank(7.2, 0.6 + 2.9 * len(groups))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    gains = {name: 100 * g[~np.isnan(g)] for name, g in ((n, t.personal_minus_global) for n, t in groups.items())}
    reach = max((float(np.abs(gain).max()) for gain in gains.values() if len(gain)), default=0.0)
    edges = _gain_edges(reach, max((len(gain) for gain in gains.values()), default=0))
    for axes, (name, gain) in zip(panels, gains.items(), strict=True):
        tidy(axes)
        parts = {"harmed": gain[gain < 0], "unchanged": gain[gain == 0], "helped": gain[gain > 0]}
        colors = [HARMED, SAME, HELPED]
        axes.hist(list(parts.values()), bins=edges.tolist(), stacked=True, color=colors, rwidth=0.92)
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_ylabel("users")
        axes.margins(y=0.18)
        if not len(gain):
            continue
        mean, side = gain.mean(), 1 if gain.mean() >= 0 else -1
        axes.axvline(mean, color=INK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean {points(mean / 100)}".replace("-", "−"),
            (mean, 0.98),
            (6 * side, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="top",
            color=INK,
            fontweight="bold",
        )
        shares = ", ".join(f"{len(part) / len(gain):.0%} {effect}" for effect, part in reversed(parts.items()))
        headline(axes, f"{name.capitalize()} users", f"{counted(len(gain), 'user')}: {shares}")
    figure.align_ylabels()
    panels[-1].set_xlabel("accuracy with the user's own state − with the population's (points)")
    return figure


def calibration_figure(groups: Mapping[str, UserTable]) -> Figure:
    """Draw how often the model is right against how sure it is, one panel per group; calibrated is the diagonal."""
    figure = blank(3.8 * max(len(groups), 1) + 0.4, 4.2)
    panels = figure.subplots(1, max(len(groups), 1), sharey=True, squeeze=False)[0]
    for axes, (name, table) in zip(panels, groups.items(), strict=False):
        tidy(axes)
        pairs, confidence, correct = table.bins[table.bins[:, 0] > 0].T
        axes.plot([50, 100], [50, 100], color=FAINT, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.plot(100 * confidence / pairs, 100 * correct / pairs, color=_CURVE, linewidth=1.4, zorder=2)
        area = 12 + 180 * pairs / max(pairs.max(initial=0), 1)
        axes.scatter(100 * confidence / pairs, 100 * correct / pairs, area, color=_CURVE, edgecolor="white", zorder=3)
        axes.set_xlabel("confidence (%)")
        error = f"calibration error {table.calibration_error:.3f}" if len(pairs) else "no pairs"
        headline(axes, f"{name.capitalize()} users", f"{error}; dot area: pairs")
    panels[0].set_ylabel("accuracy (%)")
    return figure


def _gain_edges(reach: float, num_users: int) -> Float64Array:
    """Bin edges with a bin centred on zero, symmetric, about sqrt(users) bins between 11 and 41."""
    half = int(np.clip(math.sqrt(max(num_users, 1)) / 2, 5, 20))
    return np.linspace(-1.0, 1.0, 2 * half + 2, dtype=np.float64) * max(reach, 1.0)


def blank(width: float, height: float) -> Figure:
    """Make an empty figure of a size in inches, without pyplot and its global state."""
    from matplotlib.figure import Figure  # a second to import: only when a picture is drawn

    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def tidy(axes: Axes) -> None:
    """Leave two faint spines and horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SAME)
    axes.tick_params(color=SAME, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", color="#E7E9EC", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def headline(axes: Axes, title: str, subtitle: str) -> None:
    """Put a bold title at the left and a faint line below it."""
    axes.set_title(f"{title}\n", loc="left", color=INK, fontweight="bold", fontsize=12)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=FAINT, fontsize=9, va="bottom")
