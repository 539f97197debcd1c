"""An explanation as one HTML page, tables for the terminal, and JSON."""

from __future__ import annotations

import math
from pathlib import Path

from plm.atomic import write_json, write_text
from plm.evaluation import Section, TableRow, difference, html_page, points
from plm.explaining.axes import LEAST_SHARE, NUM_DRAWS
from plm.explaining.explanation import Contrast, Direction, Evidence, Explanation
from plm.messages import counted

_LONGEST = 1_200
"""Characters of a text on the page; the JSON file holds all of it."""
_AXES = (
    "An axis is a direction in which users' rewards differ, not a column of the checkpoint: bases of this method may "
    "be turned and flipped without a change of anybody's reward, and the axes stay. + is the side with more users, and "
    "no better one.",
    "Margins towards + and − are those of a user one spread (the root mean square over users) from the population.",
)
_BASES = (
    "Each {word} is shown as a user who is all of it, which nobody need be: see how much of it users have at most. "
    "Other corners around the same users would serve them as well, so that what users mix counts more than corners.",
    "A user's largest {word} may be everybody's largest. Leaning towards a {word} are those who exceed the population "
    "in it more than in any other.",
)
_TEXTS = (
    "Rewards compare responses to one prompt alone, so that texts are shown in twos: those of the data on which the "
    "margin, the reward of the first less that of the second, is farthest from the population's. They are extremes, "
    "not averages; what they have in common is for the reader to judge.",
    "Length is the correlation of the margins with how much longer one of two responses is: near 1 or -1, little but "
    "length is seen here.",
    "All texts are of the data that were given, and no user is named. Where users never chose between such texts, they "
    "show what the model makes of them, and no taste of anybody.",
)
_RULE = (
    "Clusters are those of k-means by users' rewards, as many as the gap statistic finds (Tibshirani, Walther, Hastie "
    "2001), where none of {draws} clouds without clusters, uniform boxes along the same axes and as wide, can be "
    "divided as well. None are claimed unless users' own weights predict pairs of the data better than another user's."
)


def lines(explanation: Explanation) -> list[str]:
    """What is to be known first: whether users differ, whether that is shown, and clusters."""
    users = counted(explanation.num_users, "user")
    without = f" ({explanation.num_without:,} without pairs are left out)" if explanation.num_without else ""
    texts = counted(explanation.num_comparisons, "comparison")
    if explanation.users_differ:
        first = (
            f"{explanation.method}, {users}{without}, {texts}: users' margins deviate from the population's by "
            f"{explanation.spread:.3f}, whose own size is {explanation.margin:.3f} (root mean squares)"
        )
    else:
        first = f"{explanation.method}, {users}{without}, {texts}: users do not differ"
    groups = len(explanation.clusters)
    clusters = f"{groups} clusters" if groups else "no clusters are claimed"
    return [first, _evidence_line(explanation.evidence), f"{clusters}: {explanation.clusters_say}"]


def _evidence_line(evidence: Evidence) -> str:
    """Whether weights say something about their users."""
    if not evidence.num_pairs:
        which = "of a known user is in the test of the fit" if evidence.held_out else "of the data is a known user's"
        return f"no pair {which}: whether weights say something about users is not shown"
    what = f"{counted(evidence.num_pairs, 'pair')} of {counted(evidence.num_users, 'known user')}"
    gain = difference(evidence._asdict(), "difference", " points")
    found = (
        f"own weights are right on {points(evidence.own, '')} % of {what}, another user's on "
        f"{points(evidence.other, '')} %, the population's on {points(evidence.population, '')} %: own less another's "
        f"{gain}"
    )
    doubt = "" if evidence.difference_low > 0 else "; that users differ is not shown"
    honest = "no user was learned from these" if evidence.held_out else "too good, if users were learned from these"
    return f"{found}{doubt}; {honest}"


def tables(explanation: Explanation) -> list[Section]:
    """How much of each direction there is, and the clusters."""
    sections = []
    rows = [TableRow(_cells(one, explanation.num_users)) for one in explanation.directions]
    if rows and explanation.word == "axis":
        heads = ["", "share of variance %", "users whose largest", "users towards +", "towards −", "length", ""]
        title = "In what users differ: principal axes of their rewards"
        hidden = explanation.unshown_share
        note = [f"other axes have {points(hidden, '')} % of the variance, less than {LEAST_SHARE:.0%} each"]
        sections.append(Section(title, heads, rows, lines=note if hidden > 0.0005 else []))
    elif rows:
        heads = ["", "mean weight", "population's", "most", "users whose largest", "leaning", "length", ""]
        sections.append(Section(f"How much of each {explanation.word} users have", heads, rows))
    if explanation.clusters:
        heads = ["cluster", "users", *(one.name for one in explanation.directions)]
        rows = [
            TableRow(
                [
                    str(number),
                    _share(one.num_users, explanation.num_users),
                    *(f"{value:+.3f}" if explanation.word == "axis" else f"{value:.3f}" for value in one.centre),
                ]
            )
            for number, one in enumerate(explanation.clusters, 1)
        ]
        place = "place on each axis, in margins" if explanation.word == "axis" else "weights"
        sections.append(Section(f"Clusters of users: mean {place}", heads, rows))
    return sections


def _cells(one: Direction, num_users: int) -> list[str]:
    """A row of the table of directions."""
    length = "–" if math.isnan(one.length) else f"{one.length:+.2f}"
    if one.sides is None:
        weights = [f"{value:.3f}" for value in (one.share, one.centre, one.most)]
        return [
            one.name,
            *weights,
            *(_share(count, num_users) for count in (one.largest, one.leaning)),
            length,
            one.note,
        ]
    counts = [_share(count, num_users) for count in (one.largest, *one.sides)]
    return [one.name, points(one.share, ""), *counts, length, one.note]


def _share(count: int, num_users: int) -> str:
    """A count of users, and their share."""
    return f"{count:,} ({count / num_users:.0%})"


def texts(explanation: Explanation) -> list[Section]:
    """The comparisons of each direction."""
    sections = []
    for one in explanation.directions:
        if not one.contrasts:
            continue
        if one.sides is None:
            title = f"{one.name}: liked more, and less, than by the population"
            heads = ["liked more", "liked less", "margin", "population's margin", "prompt", "where"]
        else:
            title = f"{one.name}: what both sides like"
            heads = [
                "liked more towards +",
                "liked more towards −",
                "margin towards +",
                "towards −",
                "population's",
                "prompt",
                "where",
            ]
        rows = [TableRow(_contrast(pair)) for pair in one.contrasts]
        sections.append(Section(title, heads, rows, is_text=True))
    return sections


def _contrast(pair: Contrast) -> list[str]:
    """A row of texts."""
    margins = [pair.here, pair.population] if math.isnan(pair.opposite) else [pair.here, pair.opposite, pair.population]
    return [
        _cut(pair.liked),
        _cut(pair.other),
        *(f"{value:+.2f}" for value in margins),
        _cut(pair.prompt),
        Path(pair.where).name,
    ]


def _cut(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def page(explanation: Explanation) -> str:
    """The explanation as one HTML page that needs nothing else."""
    kind = _AXES if explanation.word == "axis" else tuple(line.format(word=explanation.word) for line in _BASES)
    reading = Section("How to read this", lines=[*kind, *_TEXTS, _RULE.format(draws=NUM_DRAWS)])
    return html_page(
        f"What users of {explanation.method} differ in",
        [Section("", lines=lines(explanation)), *tables(explanation), *texts(explanation), reading],
    )


def write(explanation: Explanation, folder: Path) -> list[Path]:
    """Write ``explain.html`` and ``explain.json``; returns their paths."""
    write_json(folder / "explain.json", explanation.as_dict())
    write_text(folder / "explain.html", page(explanation))
    return [folder / "explain.html", folder / "explain.json"]
