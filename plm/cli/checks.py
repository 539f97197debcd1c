"""``plm audit``, ``compare`` and ``verify``: what pairs and results can be trusted for."""

from __future__ import annotations

from pathlib import Path

from plm.cli.options import ROWS, OptionParser, add_reading, reading_of, split_overrides


def audit(args: list[str]) -> None:
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


def compare(args: list[str]) -> None:
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


def verify(args: list[str]) -> None:
    """Fit a recipe and compare it with its paper, or say what it needs.

    Raises:
        ValueError: If the recipe names no paper, or cannot be read or run.
    """
    parser = OptionParser(
        prog="plm verify",
        description="Does a recipe reach the number of the paper that it names? The recipes of papers are in\n"
        "recipes/papers, such as recipes/papers/lore_polis_k2.yaml. It is fitted as by plm fit, and its test is put\n"
        "beside the paper's number: within the run's 95% interval over users, above, below, with a known artefact.\n"
        "Options of a recipe may follow, as for plm fit: --data.source.init_args.seed 1.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe with a key paper")
    parser.add_argument(
        "--dry",
        action="store_true",
        help="say what it needs, and run nothing: data, encoder, texts, memory and hours",
    )
    parser.add_shared("--results", metavar="RUN", help="a run of it, by folder or name below runs/, and fit nothing")
    parser.add_shared("--config", action="append", default=[], help="recipe or group that wins over it")
    own, overrides = split_overrides(args)
    options = parser.parse(own)
    if options.results is not None and (options.dry or overrides or options.config):
        parser.error("--results takes a run as it is: leave out --dry, --config and options of the recipe")

    from plm.recipe.defaults import find_config
    from plm.recipe.paper import read_paper

    recipe = find_config(options.recipe)
    paper = read_paper(recipe)

    from plm.evaluation import print_parts, section_table
    from plm.fitting import Run, fit_recipe
    from plm.verifying import changed_keys, comparison, needs

    title = f"{paper.source}: {paper.table}"
    if options.dry:
        print_parts(title, *(f"  {what}: {text}" for what, text in needs(str(recipe), overrides, options.config)))
        return

    if options.results is None:
        configs = [part for file in (recipe, *options.config) for part in ("--config", str(file))]
        found = fit_recipe([*configs, *(f"--{override}" for override in overrides)])
    else:
        folder = Path(options.results)
        found = Run(folder if folder.is_dir() else "runs" / folder)
    section = comparison(paper, found.metrics, changed_keys(str(recipe), found))
    print_parts(f"\n{title}", *([section_table(section)] if section.rows else []), *section.lines)
