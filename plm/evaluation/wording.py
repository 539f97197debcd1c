"""Numbers and verdicts in words: accuracies in per cent, differences in points, intervals in brackets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plm.evaluation.statistics import MIN_USERS

_NOTHING = 1e-9
"""What is closer to zero is a zero, of which sums of floats have left something."""


def verdict(name: str, numbers: Mapping[str, float]) -> str:
    """Say in one sentence whether personalisation helps a group of users, and whether it is their own that helps.

    Helping requires two intervals above zero: over the global control, and over another user's state where measured.
    """
    if "personal_minus_global" not in numbers:
        return f"{name}: no verdict: the method serves every user alike"
    low, high = numbers["personal_minus_global_low"], numbers["personal_minus_global_high"]
    gain = difference(numbers, "personal_minus_global", " points")
    if math.isnan(low):
        advice = "; hold out more of them (data.unseen_users)" if name == "unseen" else ""
        return f"{name}: no verdict: an interval needs {MIN_USERS} users, got {numbers['num_users']:.0f}{advice}"
    other = ""
    if "personal_minus_other" in numbers:
        other = f"{difference(numbers, 'personal_minus_other')} over another user's state"
    if max(-low, high) < _NOTHING:
        reason = "its users do not differ, each has the accuracy of its global control"
        return f"{name}: no evidence of personalisation: {reason}"
    if high < -_NOTHING:
        return f"{name}: personalisation harms: {gain} against its global control"
    if low < _NOTHING:
        found = numbers.get("personal_minus_global_mde", math.nan)
        limit = "" if math.isnan(found) else f"; {points(found, '')} would have been found four times in five"
        return f"{name}: no evidence of personalisation: {gain} over its global control{limit}"
    if other and numbers["personal_minus_other_low"] < _NOTHING:
        return f"{name}: no evidence of personalisation: {gain} over its global control, but only {other}"
    return f"{name}: personalisation helps: {gain} over its global control" + (f", {other}" if other else "")


def shot_units(curve: Mapping[str, Any]) -> str:
    """What the shots of a few-shot curve are: pairs, or dialogues; older curves do not say."""
    return "dialogues" if curve.get("shot_unit") == "dialogue" else "pairs"


def points(value: float, sign: str = "+") -> str:
    """Format a hundred times ``value`` with one decimal and without a negative zero: 0.043 -> ``+4.3``."""
    return format(round(100 * value, 1) + 0.0, f"{sign}.1f")


def bound(value: float) -> str:
    """Format the end of an interval like `points`, but one that is not zero shows the digit that says so.

    >>> bound(0.043), bound(0.0004), bound(-0.00001), bound(0.0), bound(1e-17)
    ('4.3', '0.04', '-0.001', '0.0', '0.0')
    """
    percent, digits = 100 * value, 1
    while abs(value) >= _NOTHING and not round(percent, digits):
        digits += 1
    return format(round(percent, digits) + 0.0, f".{digits}f")


def interval(numbers: Mapping[str, float], name: str) -> str:
    """Format the interval of a named number, times a hundred: `` [low, high]``; empty where there is none."""
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    return "" if math.isnan(low) else f" [{bound(low)}, {bound(high)}]"


def difference(numbers: Mapping[str, float], name: str, unit: str = "") -> str:
    """Format a named number with its sign and interval, times a hundred: ``+3.4 points [2.1, 4.7]``."""
    return f"{points(numbers[name])}{unit}{interval(numbers, name)}"


def p_value(value: float) -> str:
    """Format a p-value with three decimals; a dash where there is none."""
    return "–" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"
