"""``plm audit`` and ``compare``: what pairs and results can be trusted for."""

from __future__ import annotations

from pathlib import Path

from plm.cli.options import ROWS, OptionParser, add_reading, reading_of


def run(args: list[str]) -> int:
    """Run one of the verbs, the first of the arguments; returns the exit status.

    Raises:
        ValueError: If a file cannot be read; malformed rows are named by their lines.
    """
    return {"audit": _audit, "compare": _compare}[args[0]](args[1:])


def _audit(args: list[str]) -> int:
    """Write a verdict on pairs and on what somebody says of a model on them."""
    parser = OptionParser(
        prog="plm audit",
        description="Can results on these pairs be trusted? One page of verdict on files of pairs with user ids and,\n"
        "where given, on what somebody says of a model on them: labels in the format, dialogues on both sides of the\n"
        "split, a shuffled user column, ties dropped from the denominator, model selection on the test; with\n"
        "controls, noise ceiling, minimum detectable effects and hashes of all files. Writes audit.html and\n"
        "audit.json. The split is the column row_split (train, val, test), or --test_pairs.",
    )
    parser.add_argument("pairs", nargs="+", metavar="PAIRS", help=f"preference pairs: {ROWS}")
    add_reading(parser)
    parser.add_argument("--test_pairs", nargs="+", default=[], metavar="FILE", help="pairs of the test, PAIRS train")
    parser.add_shared(
        "--results",
        help="per-item file of a model, as of plm compare; items are the column item of PAIRS, or plm predict's",
    )
    parser.add_argument("--reported", metavar="X", help="accuracy that is claimed of it, as printed: 0.742 or 74.2%%")
    parser.add_argument(
        "--candidates",
        metavar="FILE",
        help="the epochs or settings it was chosen from, a row each: candidate, validation, test (higher is better),\n"
        "selected (true for one)",
    )
    parser.add_shared("--output", metavar="DIR", required=True, help="folder of the report")
    options = parser.parse(args)
    if options.reported and not options.results:
        parser.error("--reported goes with --results")

    from plm.audit.report import control_tables, fault_table, noise_lines, write_audit
    from plm.audit.verdict import audit_files
    from plm.evaluation import print_parts, section_table

    audit = audit_files(
        options.pairs,
        reading=reading_of(options),
        test_pairs=options.test_pairs,
        scores=options.results,
        reported=options.reported,
        candidates=options.candidates,
    )
    tables = [section_table(section) for section in (fault_table(audit), *control_tables(audit))]
    print_parts(*tables, *noise_lines(audit), audit.verdict)
    for path in write_audit(audit, Path(options.output)):
        print(f"written to {path}")
    return 0


def _compare(args: list[str]) -> int:
    """Compare what several models got right."""
    parser = OptionParser(
        prog="plm compare",
        description="Which model is better on the same judgements? Two or more runs, by folder or name below runs/,\n"
        "are paired by user, unseen and seen users apart; runs of other splits are refused. Or per-item files with\n"
        "the columns item, user (or user_id), and correct (0 to 1) or margin (above 0 = right, 0 = one half); rows\n"
        "whose column tie is true are left out; a run among files stands for the predictions.csv of plm predict. The\n"
        "difference of each user counts once, intervals and p-values are over users, those of several models by Holm.\n"
        "The last column is the smallest difference that would be found four times in five.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a run, or {ROWS}; two or more")
    parser.add_shared("--columns", help="column of the files that holds NAME, e.g. user=annotator")
    parser.add_shared("--output", help="also write the numbers as JSON, by group of users (all: of files)")
    options = parser.parse(args)
    if len(options.models) < 2:
        parser.error("expected two models or more, got one")
    if len(set(options.models)) < len(options.models):
        parser.error("expected every model once")

    from plm.atomic import write_json
    from plm.audit.models import compare
    from plm.evaluation import print_parts, section_table

    result = compare(*options.models, columns=dict(options.columns))
    print_parts(*map(section_table, result.sections()))
    if options.output:
        write_json(options.output, result.groups)
        print(f"written to {options.output}")
    return 0
