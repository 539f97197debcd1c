"""``plm verify``: a paper's number beside that of the recipe that reruns it."""

from __future__ import annotations

from pathlib import Path

from plm.cli.options import OptionParser, split_overrides


def run(args: list[str]) -> None:
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
