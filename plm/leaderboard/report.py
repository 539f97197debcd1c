"""A leaderboard as terminal table, Markdown, CSV, JSON and one HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from plm.atomic import write_csv, write_json, write_text
from plm.evaluation import interval, plain_table, points
from plm.leaderboard.results import GROUPS, Row, Versus, all_pairs, ranked, verdicts, versus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBERS = (
    "num_users num_pairs accuracy accuracy_low accuracy_high accuracy_seed_sd accuracy_micro accuracy_p10 log_loss ece "
    "global_accuracy personal_minus_global personal_minus_global_low personal_minus_global_high personal_minus_other "
    "personal_minus_other_low personal_minus_other_high users_helped users_harmed"
).split()
_FACTS = ("shared_parameters", "parameters_per_user", "parameters", "fit_seconds", "adapt_ms")

NOTES = (
    "Accuracy is the mean over users of each user's share of right pairs, in per cent; a margin of zero counts one "
    "half. Brackets are 95 % intervals from resampling users. Seeds are averaged per user before anything else, so "
    "intervals cover the choice of users; the spread of seeds is the column sd.",
    "personal − global compares a user's own state with the population's state of the same method, personal − other "
    "with the state of a random other user, both in points. A method must win both to claim personalisation.",
    "vs is the paired difference to the opponent over the same users, in points; p is corrected by Holm over the "
    "methods of a table. Worst decile is the accuracy that a tenth of users stay at or below. Helped and harmed count "
    "users above and below their global control. Parameters count shared ones and those of all seen users.",
)
"""How to read the tables."""

FEW_SHOT = "Accuracy of unseen users in per cent, by how many of their pairs a method was given"


@dataclass(frozen=True)
class Leaderboard:
    """All rows on one split."""

    title: str
    all_rows: Sequence[Row]
    opponent: str
    """Name of the row that all others are compared with."""
    data: Mapping[str, Any]
    """Counts of the data and the hash of the split."""
    about: Mapping[str, Any]
    """Date, commit, version, command, seeds, candidates."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Row that is not there -> why."""

    @cached_property
    def rows(self) -> list[Row]:
        """Rows in the order of the tables."""
        return ranked(self.all_rows)

    @cached_property
    def versus(self) -> list[Versus]:
        """Every row against the opponent."""
        return versus(self.rows, self.opponent)

    @cached_property
    def pairs(self) -> list[Versus]:
        """Every method against every other."""
        return all_pairs(self.rows)

    @property
    def groups(self) -> list[str]:
        """Groups of users that some row has."""
        return [group for group in GROUPS if any(group in row.numbers for row in self.rows)]

    @property
    def verdicts(self) -> list[str]:
        """A sentence per method and group."""
        return [sentence for row in self.rows for sentence in verdicts(row)]

    @property
    def failures(self) -> list[str]:
        """A line per failed run."""
        return [f"{row.name}, seed {seed}: {error}" for row in self.rows for seed, error in row.errors.items()]

    @property
    def absences(self) -> list[str]:
        """A line per row that is left out."""
        return [f"{name}: {why}" for name, why in self.left_out.items()]

    @property
    def few_shot(self) -> list[list[str]]:
        """Heads, then a line per row: accuracy of unseen users at every number of pairs. Empty where no row has any."""
        rows = [row for row in self.rows if row.few_shot]
        if not rows:
            return []
        shots = (rows[0].few_shot or {})["shots"]
        lines = [["pairs per unseen user", *map(str, shots)]]
        for row in rows:
            accuracy = [math.nan if value is None else 100 * value for value in (row.few_shot or {})["accuracy"]]
            lines.append([row.name, *(_number(value, ".1f") for value in accuracy)])
        return lines

    def heads(self) -> list[str]:
        """Heads of the columns after the name."""
        return [
            "kind",
            "accuracy %",
            "sd",
            "micro %",
            "log-loss",
            "ECE",
            "personal − global",
            "personal − other",
            f"vs {self.opponent}",
            "p",
            "worst decile %",
            "helped/harmed",
            "parameters",
            "fit s",
            "adapt ms/user",
        ]

    def cells(self, row: Row, group: str) -> list[str]:
        """Text of the columns after the name."""
        numbers = row.numbers.get(group)
        if numbers is None:
            error = next(iter(row.errors.values()), f"no {group} users")
            return [row.kind, f"failed: {error}" if row.errors else f"– {error}", *["–"] * (len(self.heads()) - 2)]
        test = next((v for v in self.versus if v.group == group and v.first == row.name), None)
        own = row.kind != "baseline" and row.is_personal
        return [
            row.kind,
            _points(numbers, "accuracy") + interval(numbers, "accuracy"),
            _points(numbers, "accuracy_seed_sd"),
            _points(numbers, "accuracy_micro"),
            _number(numbers.get("log_loss"), ".3f"),
            _number(numbers.get("ece"), ".3f"),
            _points(numbers, "personal_minus_global", "+") + interval(numbers, "personal_minus_global") if own else "–",
            _points(numbers, "personal_minus_other", "+") + interval(numbers, "personal_minus_other")
            if own and "personal_minus_other" in numbers
            else "–",
            f"{points(test.difference)} [{points(test.low, '')}, {points(test.high, '')}]"
            if test and not math.isnan(test.low)
            else "–",
            _p_value(test.p_holm) if test else "–",
            _points(numbers, "accuracy_p10"),
            f"{numbers['users_helped']:.0f}/{numbers['users_harmed']:.0f}" if own else "–",
            _number(row.facts.get("parameters"), ",.0f"),
            _number(row.facts.get("fit_seconds"), ".1f"),
            _number(row.facts.get("adapt_ms"), ".2f") if row.is_personal else "–",
        ]

    def caption(self, group: str) -> str:
        """What a table is about."""
        numbers = next(row.numbers[group] for row in self.rows if group in row.numbers)
        return f"{self.title}: {numbers['num_users']:,.0f} {group} users, {numbers['num_pairs']:,.0f} pairs"

    def facts(self) -> list[str]:
        """Where the numbers come from, a line each."""
        split = ", ".join(f"{key} {value}" for key, value in self.data.items() if key.startswith(("users", "pairs")))
        lines = [f"{key}: {value}" for key, value in self.about.items()]
        return [*lines, f"split: {str(self.data['split_hash'])[:12]} by {self.data['group_by']}; {split}"]


# ---------------------------------------------------------------------- formats
def terminal(board: Leaderboard) -> list[Table | str]:
    """Tables and sentences for the terminal."""
    parts: list[Table | str] = []
    for group in board.groups:
        table = plain_table(board.caption(group))
        table.add_column("", style="bold", no_wrap=True)
        shown = [head for head in board.heads() if head not in ("kind", "micro %", "sd")]
        for head in shown:
            table.add_column(head, justify="left" if head == "accuracy %" else "right")
        for index, row in enumerate(board.rows):
            if index and row.kind != board.rows[index - 1].kind:
                table.add_section()
            texts = dict(zip(board.heads(), board.cells(row, group), strict=True))
            table.add_row(row.name, *(_short(texts[head]) for head in shown))
        parts += [table, ""]
    if curves := board.few_shot:
        table = plain_table(FEW_SHOT)
        for index, head in enumerate(curves[0]):
            table.add_column(head, justify="right" if index else "left")
        for line in curves[1:]:
            table.add_row(*line)
        parts += [table, ""]
    return [*parts, *board.verdicts, *board.failures, *(f"left out: {line}" for line in board.absences)]


def markdown(board: Leaderboard) -> str:
    """The leaderboard as Markdown."""
    lines = [f"## {board.title}", "", *(f"- {fact}" for fact in board.facts()), ""]
    for group in board.groups:
        heads = ["", *board.heads()]
        lines += [f"**{board.caption(group)}**", "", _md_row(heads), _md_row(["---"] * len(heads))]
        lines += [_md_row([row.name, *board.cells(row, group)]) for row in board.rows]
        lines.append("")
    if curves := board.few_shot:
        lines += [f"**{FEW_SHOT}**", "", _md_row(curves[0]), _md_row(["---"] * len(curves[0]))]
        lines += [*(_md_row(line) for line in curves[1:]), ""]
    for title, listed in _lists(board).items():
        lines += _md_list(title, listed)
    lines += _md_list("Rows", [f"{row.name}: {row.about}. `{row.command}`" for row in board.rows if row.command])
    return "\n".join([*lines, *(f"*{note}*\n" for note in NOTES)])


def records(board: Leaderboard) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of numbers, one row per row and group, for CSV and W&B."""
    tests = {(v.group, v.first): v for v in board.versus}
    columns = ["row", "kind", "group", "seeds", "error", *_NUMBERS]
    columns += ["vs_opponent", "vs_opponent_low", "vs_opponent_high", "vs_opponent_p_holm", *_FACTS]
    rows: list[list[Any]] = []
    for row in board.rows:
        for group in board.groups:
            numbers, test = row.numbers.get(group, {}), tests.get((group, row.name))
            against = [test.difference, test.low, test.high, test.p_holm] if test else [None] * 4
            values = [numbers.get(name) for name in _NUMBERS] + against + [row.facts.get(name) for name in _FACTS]
            error = "; ".join(row.errors.values())
            clean = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
            rows.append([row.name, row.kind, group, row.num_seeds, error, *clean])
    return columns, rows


def as_json(board: Leaderboard) -> dict[str, Any]:
    """Everything but per-user values."""
    rows = []
    for row in board.rows:
        kept = {key: value for key, value in vars(row).items() if key != "users"}
        rows.append({**kept, "errors": {str(seed): text for seed, text in row.errors.items()}})
    return {
        "title": board.title,
        "about": dict(board.about),
        "data": dict(board.data),
        "opponent": board.opponent,
        "left_out": dict(board.left_out),
        "rows": rows,
        "versus_opponent": [test._asdict() for test in board.versus],
        "all_pairs": [test._asdict() for test in board.pairs],
        "verdicts": board.verdicts,
    }


def page(board: Leaderboard, figures: Mapping[str, Figure]) -> str:
    """One HTML page with everything inside."""
    parts = [f"<h1>{html.escape(board.title)}</h1>", _list(board.facts())]
    for group in board.groups:
        heads = "".join(f"<th>{html.escape(head)}</th>" for head in ["", *board.heads()])
        body = "".join(
            f'<tr class="{row.kind}"><th>{html.escape(row.name)}</th>'
            + "".join(f"<td>{html.escape(text)}</td>" for text in board.cells(row, group))
            + "</tr>"
            for row in board.rows
        )
        parts += [f"<h2>{html.escape(board.caption(group))}</h2>", f"<div><table><tr>{heads}</tr>{body}</table></div>"]
    if curves := board.few_shot:
        parts += [f"<h2>{html.escape(FEW_SHOT)}</h2>", f"<div><table>{''.join(map(_html_row, curves))}</table></div>"]
    for title, lines in _lists(board).items():
        parts += [f"<h2>{title}</h2>", _list(lines)] if lines else []
    for title, figure in figures.items():
        image = base64.b64encode(png(figure)).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{image}">'
        )
    commands = [f"{row.name}: {row.about}. {row.command}" for row in board.rows]
    parts += ["<h2>Rows</h2>", _list(commands), "<h2>How to read this</h2>", _list(NOTES)]
    return _PAGE.format(title=html.escape(board.title), body="\n".join(parts))


def write(board: Leaderboard, figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write all formats into a folder; returns their paths."""
    write_text(folder / "leaderboard.md", markdown(board) + "\n")
    write_csv(folder / "leaderboard.csv", *records(board))
    write_json(folder / "leaderboard.json", as_json(board))
    write_text(folder / "leaderboard.html", page(board, figures))
    for name, figure in figures.items():
        (folder / f"{_slug(name)}.png").write_bytes(png(figure))
    files = [folder / f"leaderboard.{kind}" for kind in ("md", "csv", "json", "html")]
    return [*files, *(folder / f"{_slug(name)}.png" for name in figures)]


def png(figure: Figure) -> bytes:
    """A picture's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# ---------------------------------------------------------------------- words
def _slug(name: str) -> str:
    return "_".join(name.lower().split())


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _points(numbers: Mapping[str, float], name: str, sign: str = "") -> str:
    value = numbers.get(name, math.nan)
    return "–" if math.isnan(value) else points(value, sign)


def _versus(test: Versus) -> str:
    span = f"[{points(test.low, '')}, {points(test.high, '')}]"
    return f"{test.first} − {test.second} {points(test.difference)} {span}, p {_p_value(test.p_holm)}"


def _p_value(value: float) -> str:
    return "–" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _lists(board: Leaderboard) -> dict[str, list[str]]:
    """Title -> sentences, below the tables."""
    tested = {group: [v for v in board.pairs if v.group == group and not math.isnan(v.low)] for group in board.groups}
    pairs = [f"{group} users: {'; '.join(map(_versus, tests))}" for group, tests in tested.items() if tests]
    return {
        "Verdicts": board.verdicts,
        "Methods against each other, Holm-corrected over the pairs of a group": pairs,
        "Failed runs": board.failures,
        "Left out": board.absences,
        "Candidates of each method, selected on validation rows": _selected(board),
    }


def _selected(board: Leaderboard) -> list[str]:
    return [
        f"{row.name}: {json.dumps(row.arguments) if row.arguments else 'as given'}, "
        + (f"of {row.num_candidates} candidates" if row.num_candidates > 1 else "not searched (1 candidate)")
        for row in board.rows
        if row.kind == "method" and any(other.num_candidates > 1 for other in board.rows)
    ]


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _md_list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"**{title}**", "", *(f"- {line}" for line in lines), ""] if lines else []


def _html_row(cells: Sequence[str]) -> str:
    return f"<tr><th>{html.escape(cells[0])}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells[1:])}</tr>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #22262b; max-width: 1500px; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e7e9ec; white-space: nowrap; }}
tr > th:first-child {{ text-align: left; }}
tr.control, tr.baseline {{ color: #6b7280; }}
img {{ max-width: 100%; }}
</style></head><body>
{body}
</body></html>
"""
