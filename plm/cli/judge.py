"""``plm judge``: do the users' policies of a checkpoint write what their users like?"""

from __future__ import annotations

from pathlib import Path

from plm.cli.options import OptionParser, add_policy, add_settings, check_best_of, integer, settings_of


def run(args: list[str]) -> None:
    """Write, value and compare texts, and report.

    Raises:
        ValueError: If a file cannot be read, a user is unknown, or nobody writes.
    """
    parser = OptionParser(
        prog="plm judge",
        description="Whether each user's policy writes what the user likes. Users' policies, the population's (of an\n"
        "unknown user) and the unaligned one, the language model as it is, write on the same held-out prompts with\n"
        "the same seeds; every person of --rewards values all texts, in standard deviations of the unaligned policy's\n"
        "texts (z_score: false: as they come). Intervals resample prompts. Where rows have a split, only those of the\n"
        "test are used. With --policy or --policy_url and --best_of that model is the unaligned policy, and each text\n"
        "of a user is the best of N that it writes by the reward of the method, which may be any; an empty text is\n"
        "chosen only where all N are.",
    )
    parser.add_shared("--ckpt_path", required=True, help="checkpoint of a method with a policy")
    parser.add_shared("--prompts", required=True)
    parser.add_shared("--rewards", required=True)
    parser.add_shared("--user", nargs="+", help="default: the people who are users of the checkpoint")
    parser.add_shared("--users")
    parser.add_argument("--num_prompts", type=integer(1), metavar="N", help="the first N prompts (default: all)")
    parser.add_shared("--num_samples", default=4, help="texts of each policy on each prompt (default 4)")
    parser.add_shared(
        "--output",
        metavar="DIR",
        help="folder for judge.md and judge.json; default: <stem>.judge beside the checkpoint",
    )
    parser.add_shared("--best_of")
    add_settings(parser)
    add_policy(parser)
    options = parser.parse(args)
    check_best_of(parser, options)

    from rich.console import Console

    from plm.backbones import device
    from plm.checkpoint import load_method
    from plm.cli.writing import policy_of, progress_bar
    from plm.judging import report
    from plm.judging.tastes import read_tastes
    from plm.judging.written import judge_users, users_to_judge
    from plm.method.abilities import Writer
    from plm.recipe.prompts import held_out_prompts

    tastes = read_tastes(options.rewards, [])
    prompts = held_out_prompts(options.prompts)[: options.num_prompts]
    method = load_method(options.ckpt_path, device(), options.users)
    can_judge = isinstance(method, Writer) or options.best_of
    users = users_to_judge(method, tastes, options.user, options.ckpt_path) if can_judge else []
    per_prompt = options.num_samples * (options.best_of or 2 + len(users))
    policy = policy_of(options) if options.best_of else None
    with progress_bar("writing", per_prompt * len(prompts)) as on_progress:
        result = judge_users(
            method,
            tastes,
            prompts,
            users,
            num_samples=options.num_samples,
            settings=settings_of(options),
            policy=policy,
            best_of=options.best_of or 1,
            on_progress=on_progress,
        )
    report.show(result, Console())
    folder = Path(options.output or Path(options.ckpt_path).with_suffix(".judge"))
    report.write(result, folder)
    print(f"written to {folder}")
