"""A data report as a terminal table, Markdown, one HTML page with plots, and JSON; an audit as HTML and JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plm.atomic import write_json, write_text
from plm.audit.check import DataReport, percent
from plm.audit.verdict import Audit
from plm.evaluation import Section, TableRow, difference, html_page, interval, markdown_table, png, points
from plm.evaluation.figures import HARMED, HELPED, INK, blank

_COLOUR = {"problem": "red", "warning": "yellow", "info": "dim"}
_VERDICT = {
    "problem": "There are problems: results on these data would be wrong or could not be trusted.",
    "warning": "Nothing is wrong for sure, but look at the warnings.",
    "info": "Nothing suspicious was found.",
}
_MALFORMED = (
    "A fit stops at the malformed rows: mend them, or leave them out with on_error: skip. Nothing else is a problem."
)


def conclusion(report: DataReport) -> str:
    """The findings in a sentence or two."""
    problems = {finding.topic for finding in report.findings if finding.level == "problem"}
    return _MALFORMED if problems and problems <= {"malformed", "left out"} else _VERDICT[report.worst]


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
    console.print(conclusion(report), style=_COLOUR[report.worst].replace("dim", "green"))


def write(report: DataReport, folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md`` and ``report.html``; returns their paths."""
    write_json(folder / "report.json", report.as_dict())
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", page(report))
    return [folder / name for name in ("report.json", "report.md", "report.html")]


def _findings(report: DataReport) -> Section:
    """The table of findings; each row's kind is its level."""
    rows = [TableRow([finding.level, finding.topic, finding.text], finding.level) for finding in report.findings]
    return Section("Findings", ["", "about", "finding"], rows, is_text=True)


def _tables(report: DataReport) -> list[Section]:
    """Everything else that is a table."""
    counts = [TableRow([name, f"{count:,}"]) for name, count in report.counts.items()]
    sections = [Section("Counts", ["what", "how many"], counts)]
    if report.leaks:
        heads = ["what", "of the same user", "of anyone"]
        rows = [TableRow([leak.unit, f"{leak.same_user:,}", f"{leak.anyone:,}"]) for leak in report.leaks]
        sections.append(Section("Test pairs that share something with training", heads, rows))
    if report.probe is not None:
        probe = report.probe
        held_out = {
            "length": probe.length,
            "length and format": probe.surface,
            "gain over the better of length and chance": probe.gain,
        }
        shares = {name: "not probed" if share is None else percent(share) for name, share in held_out.items()}
        rows = [TableRow(list(item)) for item in {"chance": "50.0%", **shares}.items()]
        sections.append(Section("Held-out accuracy of probes that read no content", ["probe", "accuracy"], rows))
        rows = [TableRow([name, f"{weight:+.2f}"]) for name, weight in probe.features if weight]
        title = "What the format probe looks at (positive: chosen has more)"
        sections.append(Section(title, ["feature", "weight"], rows))
        rows = [TableRow([trace.name, f"{trace.num_pairs:,}", percent(trace.rejected)]) for trace in probe.traces]
        if rows:
            heads = ["a response that", "pairs", "on the rejected side"]
            sections.append(Section("Traces on one side of a pair", heads, rows))
    return sections


def markdown(report: DataReport) -> str:
    """The report as Markdown."""
    findings = _findings(report)
    rows = [TableRow([f"**{level}**", *cells]) for (level, *cells), _ in findings.rows]
    lines = [f"# Data report: {report.name}", "", conclusion(report), "", *markdown_table(findings.heads, rows)]
    for table in _tables(report):
        lines += ["", f"## {table.title}", "", *markdown_table(table.heads, table.rows)]
    return "\n".join([*lines, ""])


def page(report: DataReport) -> str:
    """The report as one HTML page that needs nothing else."""
    pictures = [Section(title, pictures={title: content}) for title, content in plots(report).items()]
    verdict = Section("", lines=[conclusion(report)])
    return html_page(f"Data report: {report.name}", [verdict, _findings(report), *pictures, *_tables(report)])


def plots(report: DataReport) -> dict[str, bytes]:
    """PNG pictures by title: pairs per user, and the probes against chance."""
    pictures = {}
    figure = blank(7, 2.8)
    axes = figure.add_subplot()
    per_user = report.pairs_per_user[report.pairs_per_user > 0]
    edges = np.unique(np.geomspace(1, max(int(per_user.max()), 2) + 1, 31).round())
    axes.hist(per_user, bins=edges.tolist(), color=HELPED)
    axes.set(xscale="log", xlabel="pairs of a user", ylabel="users", title="Pairs per user")
    if report.num_weights:
        axes.axvline(report.num_weights, color=HARMED, label=f"{report.num_weights} weights to fit")
        axes.legend(frameon=False)
    pictures["pairs per user"] = png(figure)
    if report.probe is not None:
        probe = report.probe
        figure = blank(7, 2.2)
        axes = figure.add_subplot()
        named = {"length and format": probe.surface, "length": probe.length, "longer is chosen": probe.longer}
        shares = {name: share for name, share in named.items() if share is not None}
        values = [share.value for share in shares.values()]
        error = [[s.value - s.low for s in shares.values()], [s.high - s.value for s in shares.values()]]
        axes.barh(list(shares), values, xerr=error, color=HARMED if probe.is_leak else HELPED, ecolor=INK, height=0.55)
        axes.axvline(0.5, color=INK, linestyle=":", linewidth=1)
        axes.set(xlim=(0, 1.02), xlabel="held-out accuracy", title="What the surface reveals about the labels")
        pictures["surface probe"] = png(figure)
    return pictures


# ---------------------------------------------------------------------- an audit
_STATES = {"found": ("FOUND", "problem"), "clear": ("not found", "info"), "unknown": ("not known", "warning")}
_CONTROLS = {
    "personal_minus_global": "own state − population",
    "personal_minus_other": "own state − another user's",
    "shuffled_minus_global": "state from permuted users − population",
    "flipped_minus_global": "state from reversed labels − population",
}


def fault_table(audit: Audit) -> Section:
    """What was looked for, and whether it was found."""
    rows = []
    for fault in audit.faults:
        state, kind = _STATES[fault.state]
        rows.append(TableRow([fault.name, state, fault.text], kind))
    return Section("What was looked for", ["", "verdict", "why"], rows, is_text=True)


def control_tables(audit: Audit) -> list[Section]:
    """The model that was scored, and a probe of words and surface, beside their controls."""
    heads = ["", "points", "found four times in five from"]
    sections = []
    if audit.model is not None:
        numbers = audit.model.numbers
        accuracy = points(numbers["accuracy"], "") + interval(numbers, "accuracy")
        rows = [TableRow(["accuracy, mean over users %", accuracy, ""])]
        if audit.reported is not None:
            rows.append(TableRow(["accuracy as it is reported", audit.reported, ""]))
        rows += [
            TableRow([text, difference(numbers, name), points(numbers[f"{name}_mde"], "")])
            for name, text in _CONTROLS.items()
            if name in numbers
        ]
        num_scored = audit.model.num_expected - audit.model.num_missing
        title = f"The model that was scored: {numbers['num_users']:,} users, {num_scored:,} pairs"
        sections.append(Section(title, heads, rows))
    if audit.controls:
        rows = [
            TableRow([control.name, difference(vars(control), "difference"), points(control.difference_mde, "")])
            for control in audit.controls[1:]
        ]
        title = f"A probe of words and surface, over its {points(audit.controls[0].accuracy, '')} % for everybody"
        sections.append(Section(title, heads, rows))
    return sections


def noise_lines(audit: Audit) -> list[str]:
    """How much of the labels anything can predict."""
    lines = []
    if not np.isnan(audit.ceiling):
        num_repeated = audit.repeats.agreeing + audit.repeats.contradicting
        text = (
            f"{audit.repeats.contradicting:,} of {num_repeated:,} repeated comparisons of one user were answered the "
            "other way"
        )
        low, high = (points(bound, "") for bound in audit.repeats.interval)
        lines.append(f"{text}: nothing is right on more than {points(audit.ceiling, '')} % [{low}, {high}]")
    else:
        lines.append("how often users contradict themselves cannot be told: no ceiling is known")
    if audit.num_shared:
        text = "a model that does not know the user is right on at most"
        ceiling = points(audit.shared_ceiling, "")
        lines.append(f"{audit.num_shared:,} pairs compare what others compare too: {text} {ceiling} % of them")
    return lines


def audit_page(audit: Audit) -> str:
    """The audit as one HTML page: the verdict, the controls, the findings on the data, and hashes of what was read."""
    hashes = [TableRow(list(item)) for item in audit.inputs.items()]
    sections = [
        Section("", lines=[audit.verdict]),
        fault_table(audit),
        *control_tables(audit),
        Section("Noise ceiling", lines=noise_lines(audit)),
        _findings(audit.data),
        *_tables(audit.data),
        Section(f"What was read: {audit.hash}", ["file", "sha256"], hashes, is_text=True),
    ]
    return html_page(f"Audit: {audit.name}", sections)


def write_audit(audit: Audit, folder: Path) -> list[Path]:
    """Write ``audit.html`` and ``audit.json``; returns their paths."""
    write_json(folder / "audit.json", audit.as_dict())
    write_text(folder / "audit.html", audit_page(audit))
    return [folder / "audit.html", folder / "audit.json"]
