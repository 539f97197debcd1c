"""``plm rewardbench``: RewardBench 2 scores of a checkpoint."""

from __future__ import annotations

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Score the benchmark and print the table of its subsets.

    Raises:
        ValueError: If the checkpoint or the benchmark cannot be read, or the user is unknown.
    """
    parser = OptionParser(
        prog="plm rewardbench",
        description="RewardBench 2 scores of a checkpoint, as one user or as the population: a check that "
        "personalisation leaves the shared reward intact.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_argument("--questions", metavar="FILE", help="the benchmark: Parquet or JSONL; default: download it")
    parser.add_shared("--user", help="score as this user; default: the population")
    parser.add_shared("--users")
    parser.add_shared("--output", help="JSON file of the scores and of every answer's reward")
    options = parser.parse(args)

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from plm.atomic import write_json
    from plm.evaluation import print_parts
    from plm.learned_rewards import MethodReward
    from plm.rewardbench import answer, read_questions, subset_scores

    reward = MethodReward(options.ckpt_path, options.user, options.users)
    answered = answer(read_questions(options.questions), reward.score)
    scores = subset_scores(answered)
    table = Table("subset", "prompts", "score", box=SIMPLE_HEAD)
    for subset, score in scores.items():
        count = sum(subset in ("overall", entry.subset) for entry in answered)
        table.add_row(subset, str(count), f"{score:.1%}")
    print_parts(table)
    if options.output:
        write_json(
            options.output, {"user": options.user, "scores": scores, "answers": [entry._asdict() for entry in answered]}
        )
        print(f"written to {options.output}")
