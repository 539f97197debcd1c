"""A data report as a terminal table, Markdown, one HTML page with plots, and JSON."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plm.atomic import write_json, write_text
from plm.audit.check import DataReport, percent

_COLOUR = {"problem": "red", "warning": "yellow", "info": "dim"}
_VERDICT = {
    "problem": "There are problems: results on these data would be wrong or could not be trusted.",
    "warning": "Nothing is wrong for sure, but look at the warnings.",
    "info": "Nothing suspicious was found.",
}
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#22262B}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #ddd}
td.n{text-align:right}.problem{color:#B3261E;font-weight:600}.warning{color:#9A6700;font-weight:600}.info{color:#6B7280}
img{max-width:100%}"""
_INK, _BAR, _MARK = "#22262B", "#3C8D6E", "#C2524B"


def show(report: DataReport, console: Console) -> None:
    """Print the report."""
    counts = Table(title=escape(report.name), box=SIMPLE_HEAD, show_header=False, title_justify="left")
    for name, count in report.counts.items():
        counts.add_row(name, f"{count:,}")
    console.print(counts)
    table = Table("", "about", "finding", box=SIMPLE_HEAD)
    for finding in report.findings:
        colour = _COLOUR[finding.level]
        table.add_row(f"[{colour}]{finding.level}[/]", finding.topic, escape(finding.text))
    console.print(table)
    console.print(_VERDICT[report.worst], style=_COLOUR[report.worst].replace("dim", "green"))


def write(report: DataReport, folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md`` and ``report.html``; returns their paths."""
    write_json(folder / "report.json", report.as_dict())
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", page(report))
    return [folder / name for name in ("report.json", "report.md", "report.html")]


def _tables(report: DataReport) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, column names, rows) of everything that is a table."""
    tables = [("Counts", ["what", "how many"], [[name, f"{count:,}"] for name, count in report.counts.items()])]
    if report.leaks:
        rows = [[leak.unit, f"{leak.same_user:,}", f"{leak.anyone:,}"] for leak in report.leaks]
        tables.append(
            ("Test pairs that share something with training", ["what", "of the same user", "of anyone"], rows)
        )
    if report.probe is not None:
        probe = report.probe
        held_out = {
            "length": probe.length,
            "length and format": probe.surface,
            "gain over the better of length and chance": probe.gain,
        }
        rows = [[name, "not probed" if share is None else percent(share)] for name, share in held_out.items()]
        rows = [["chance", "50.0%"], *rows]
        tables.append(("Held-out accuracy of probes that read no content", ["probe", "accuracy"], rows))
        rows = [[name, f"{weight:+.2f}"] for name, weight in probe.features if weight]
        tables.append(("What the format probe looks at (positive: chosen has more)", ["feature", "weight"], rows))
        rows = [[trace.name, f"{trace.num_pairs:,}", percent(trace.rejected)] for trace in probe.traces]
        if rows:
            tables.append(("Traces on one side of a pair", ["a response that", "pairs", "on the rejected side"], rows))
    return tables


def markdown(report: DataReport) -> str:
    """The report as Markdown."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"# Data report: {report.name}", "", _VERDICT[report.worst], "", "| | about | finding |", "|---|---|---|"]
    lines += [f"| **{f.level}** | {f.topic} | {cell(f.text)} |" for f in report.findings]
    for heading, names, rows in _tables(report):
        lines += ["", f"## {heading}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join([*lines, ""])


def page(report: DataReport) -> str:
    """The report as one HTML page that needs nothing else."""
    parts = [f"<h1>Data report: {html.escape(report.name)}</h1><p class='{report.worst}'>{_VERDICT[report.worst]}</p>"]
    found = "".join(
        f"<tr><td class='{f.level}'>{f.level}</td><td>{f.topic}</td><td>{html.escape(f.text)}</td></tr>"
        for f in report.findings
    )
    parts.append(f"<table><tr><th></th><th>about</th><th>finding</th></tr>{found}</table>")
    for title, image in plots(report).items():
        parts.append(f"<img alt='{html.escape(title)}' src='data:image/png;base64,{base64.b64encode(image).decode()}'>")
    for heading, names, rows in _tables(report):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(heading)}</h2><table><tr>{head}</tr>{body}</table>")
    title = html.escape(report.name)
    head = f"<meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def plots(report: DataReport) -> dict[str, bytes]:
    """PNG pictures by title: pairs per user, and the probes against chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def picture(figure: Figure) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png")
        return buffer.getvalue()

    out = {}
    figure = Figure(figsize=(7, 2.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    per_user = report.pairs_per_user[report.pairs_per_user > 0]
    edges = np.unique(np.geomspace(1, max(per_user.max(), 2) + 1, 31).round())
    axes.hist(per_user, bins=edges.tolist(), color=_BAR)
    axes.set(xscale="log", xlabel="pairs of a user", ylabel="users", title="Pairs per user")
    if report.num_weights:
        axes.axvline(report.num_weights, color=_MARK, label=f"{report.num_weights} weights to fit")
        axes.legend(frameon=False)
    out["pairs per user"] = picture(figure)
    if report.probe is not None:
        probe = report.probe
        figure = Figure(figsize=(7, 2.2), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        named = {"length and format": probe.surface, "length": probe.length, "longer is chosen": probe.longer}
        shares = {name: share for name, share in named.items() if share is not None}
        values = [share.value for share in shares.values()]
        error = [[s.value - s.low for s in shares.values()], [s.high - s.value for s in shares.values()]]
        axes.barh(list(shares), values, xerr=error, color=_MARK if probe.is_leak else _BAR, ecolor=_INK, height=0.55)
        axes.axvline(0.5, color=_INK, linestyle=":", linewidth=1)
        axes.set(xlim=(0, 1.02), xlabel="held-out accuracy", title="What the surface tells about the labels")
        out["surface probe"] = picture(figure)
    return out
