"""``plm score``, ``rewardbench`` and ``explain``: rewards of responses by a checkpoint, and what users differ in."""

from __future__ import annotations

import sys
from pathlib import Path

from plm.cli.options import (
    ROWS,
    OptionParser,
    add_ray,
    add_reading,
    check_config_or_pairs,
    check_ray,
    read_as_trained,
    split_overrides,
)
from plm.cli.shares import run_by_ray


def run(args: list[str]) -> int:
    """Write the rewards as JSONL.

    Raises:
        ValueError: If the checkpoint or a row cannot be read, or a reward is not finite.
    """
    parser = OptionParser(
        prog="plm score",
        description='Rewards of responses. Input rows: {"response": ..., "prompt": ..., "user_id": ...}, '
        "the last two optional.\n"
        "Output rows: the input with reward and user_known; an unknown user gets the population reward.\n"
        "Rewards compare responses for one user; they do not compare users. Those of a portfolio are by the mix of\n"
        "the member that serves the user, as plm generate --best_of chooses, not by the user's own weights.\n"
        "--reference adds win_probability: how likely the user prefers the response to one of the reference\n"
        "responses, on one scale for all users.\n"
        "Processes that share the work get --shard 1/4 to --shard 4/4, in any order, at once or not: each writes a\n"
        "file of its own, out-1of4.jsonl for --output out.jsonl, and these in order are what one process writes.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_argument("--responses", required=True, metavar="FILE", help=f"responses to score: {ROWS}")
    parser.add_shared("--user", help="user of the rows without a user_id")
    parser.add_shared("--users")
    parser.add_argument(
        "--reference", metavar="FILE", help="responses to compare with, a few hundred, in the same formats"
    )
    parser.add_shared("--shard", help="the I-th of K equal shares of the rows, in their order (default: all)")
    parser.add_shared("--output", help="JSONL file of rewards; default: standard output")
    add_ray(parser, "where all see the checkpoint, its users and the files; --output is one file then")
    options = parser.parse(args)
    check_ray(parser, options)
    if options.engine == "ray":
        if options.output is None:
            parser.error("--engine ray needs --output FILE, beside which workers write theirs")
        return run_by_ray("score", args, options)

    from plm.checkpoint import load_method
    from plm.cli.writing import with_results, write_rows
    from plm.scoring import read_responses, score_responses

    rows = read_responses(options.responses, options.user, options.shard)
    method = load_method(options.ckpt_path, users=options.users)
    scores = score_responses(method, rows, read_responses(options.reference) if options.reference else None)
    known = scores.is_known.tolist()
    results = {"reward": scores.rewards.tolist(), "user_known": known}
    if scores.win_probability is not None:
        results["win_probability"] = scores.win_probability.tolist()
    output_rows = (
        with_results(row.record, row.user_id, **dict(zip(results, values, strict=True)))
        for row, *values in zip(rows, *results.values(), strict=True)
    )
    write_rows(output_rows, options.output)
    num_unknown = len(known) - sum(known)
    if num_unknown:
        print(
            f"{num_unknown} of {len(rows)} rows have no known user: population rewards, user_known false",
            file=sys.stderr,
        )
    return 0


def rewardbench(args: list[str]) -> None:
    """Score the benchmark and print the table of its subsets.

    Raises:
        ValueError: If the checkpoint or the benchmark cannot be read, or the user is unknown.
    """
    parser = OptionParser(
        prog="plm rewardbench",
        description="RewardBench 2 scores of a checkpoint, as one user or as the population: a check that "
        "personalisation leaves the shared reward intact. --bases adds each basis or prototype as a scorer of its own, "
        "for the methods of plm explain.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_argument("--questions", metavar="FILE", help="the benchmark: Parquet or JSONL; default: download it")
    parser.add_shared("--user", help="score as this user; default: the population")
    parser.add_argument(
        "--bases",
        action="store_true",
        help="also score by each basis alone; where weights have any sign, as users to both sides of their axes",
    )
    parser.add_shared("--users")
    parser.add_shared("--output", help="JSON file of the scores and of every answer's reward")
    options = parser.parse(args)

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from plm.atomic import write_json
    from plm.evaluation import print_parts
    from plm.explaining import scorers
    from plm.learned_rewards import MethodReward
    from plm.rewardbench import answer, answers_of, read_questions, subset_scores

    reward = MethodReward(options.ckpt_path, options.user, options.users)
    questions = read_questions(options.questions)
    answered = answer(questions, reward.score)
    bases = {}
    if options.bases:
        prompts, texts, _, right, wrong = answers_of(questions)
        for name, rewards in scorers(reward.method, prompts, texts, right, wrong).items():
            bases[name] = answer(questions, lambda *_, found=rewards: found)
    scores, of_bases = subset_scores(answered), {name: subset_scores(entries) for name, entries in bases.items()}
    table = Table("subset", "prompts", "score", *bases, box=SIMPLE_HEAD)
    for subset in scores:
        count = sum(subset in ("overall", entry.subset) for entry in answered)
        table.add_row(subset, str(count), *(f"{found[subset]:.1%}" for found in (scores, *of_bases.values())))
    print_parts(table, *(["users do not differ: there is no axis to score by"] if options.bases and not bases else []))
    if options.output:
        entries = {"user": options.user, "scores": scores, "answers": [entry._asdict() for entry in answered]}
        write_json(options.output, {**entries, **({"bases": of_bases} if options.bases else {})})
        print(f"written to {options.output}")


def explain(args: list[str]) -> None:
    """Show what users differ in, and write the page.

    Raises:
        ValueError: If the checkpoint or the pairs cannot be read, or its users are no weights of shared rewards.
    """
    parser = OptionParser(
        prog="plm explain",
        description="What users of a checkpoint differ in, for methods whose users are weights of a few rewards that\n"
        "all share: how much of each basis or prototype users have, clusters of users where there is evidence, and\n"
        "the pairs of texts on which a basis is farthest from the population. Where weights have any sign, bases are\n"
        "arbitrary, and the principal axes of the users' rewards are shown. All texts are those of the pairs that are\n"
        "given, and no user is named. Files are read with the columns of the training's, unless options say how.\n"
        "Options of a recipe may follow, as for plm fit: --data.source.init_args.NAME VALUE.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_shared("--users")
    parser.add_shared(
        "--config",
        help="recipe whose pairs are shown; if it is that of the fit, those of the test tell whether users differ",
    )
    parser.add_shared("--pairs", help=f"instead of a recipe: files of preference pairs, {ROWS}")
    add_reading(parser)
    parser.add_shared(
        "--output",
        metavar="DIR",
        help="folder for explain.html and explain.json; default: <stem>.explain beside the checkpoint",
    )
    own, overrides = split_overrides(args)
    options = parser.parse(own)
    check_config_or_pairs(parser, options, overrides)

    from plm.backbones import device
    from plm.checkpoint import load_method
    from plm.data.splits import split_pairs
    from plm.evaluation import print_parts, section_table
    from plm.explaining import explain, pairs_nobody_learned
    from plm.explaining.report import lines, tables, write
    from plm.recipe.read import build_source, merged_recipe, split_options

    method = load_method(options.ckpt_path, device(), options.users)
    if options.pairs:
        table, held_out = read_as_trained(options), None
    else:
        recipe = merged_recipe(options.config, overrides)
        table = build_source(recipe).load()
        splits = split_pairs(table, **split_options(recipe))
        held_out = pairs_nobody_learned(options.ckpt_path, method, table, splits)
    explanation = explain(method, table, held_out)
    print_parts(*lines(explanation), *map(section_table, tables(explanation)))
    for path in write(explanation, Path(options.output or Path(options.ckpt_path).with_suffix(".explain"))):
        print(f"written to {path}")
