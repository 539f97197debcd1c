"""``plm generate`` and ``sample``: texts for users of a checkpoint, and responses of a policy for later stages."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from plm.cli.options import OptionParser, add_policy, add_settings, check_best_of, check_policy, settings_of
from plm.messages import counted

_SHOWN = 200


def run(args: list[str]) -> None:
    """Write texts for users.

    Raises:
        ValueError: If the checkpoint or the prompts cannot be read, a user to mix is unknown, or nobody can write.
    """
    parser = OptionParser(
        prog="plm generate",
        description="Responses to prompts, written for users of a checkpoint, all of them in the same batches.\n"
        "A method with a policy writes itself, a portfolio by the member that serves the user; any other method\n"
        "chooses the best of N that --policy writes. An unknown user, or nobody, gets the policy, or the reward, of\n"
        "the population: of a portfolio the one member whose largest regret is smallest if it alone serves everybody.\n"
        "Output rows: the prompt's with user_id, user_known and responses (chosen ones with rewards). A text depends\n"
        "on policy, prompt and seed, not on its batch. The file appears when all is written; the same command goes on\n"
        "where it was killed.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_shared("--prompts", required=True)
    parser.add_shared(
        "--user", nargs="+", help="each writes on every prompt; default: the rows' user_id, or the population"
    )
    parser.add_shared("--users")
    parser.add_argument(
        "--mix",
        nargs="+",
        metavar="ID=WEIGHT",
        help="instead of --user: one writer whose reward is the weighted sum of theirs: weights 0.5 and 0.5 are the "
        "average of two users, 1 and 1 twice as strong",
    )
    parser.add_shared("--num_samples", default=1, help="texts of each user on each prompt (default 1)")
    parser.add_shared("--best_of")
    parser.add_shared("--output", help="JSONL file; default: readable texts on standard output")
    add_settings(parser)
    add_policy(parser)
    options = parser.parse(args)
    check_best_of(parser, options)
    if options.best_of is not None and options.num_samples > 1:
        parser.error(f"--best_of chooses one text, got --num_samples {options.num_samples}")
    if options.mix and (options.user or options.best_of):
        parser.error("--mix writes with one mixture of users: leave out --user, and --policy with --best_of")
    if options.output and Path(options.output).is_dir():
        parser.error(f"--output: expected a file, got the folder {options.output!r}")

    from plm.backbones import device
    from plm.checkpoint import load_method
    from plm.cli.writing import policy_of, progress_bar, write_rows
    from plm.recipe.prompts import read_prompts, with_users
    from plm.sampling import UserTexts, write_texts

    mix = mix_weights(options.mix or [])
    writers = [" ".join(options.mix)] if options.mix else options.user
    prompts, users = with_users(read_prompts(options.prompts, per_user=writers is None), writers, options.prompts)
    texts = UserTexts(
        load_method(options.ckpt_path, device(), options.users),
        prompts,
        users,
        settings=settings_of(options),
        num_samples=options.num_samples,
        mix=mix,
        policy=None if options.best_of is None else policy_of(options),
        best_of=options.best_of or 1,
    )
    is_file = options.output and (Path(options.output).is_file() or not Path(options.output).exists())
    with progress_bar("writing", texts.num_texts) as on_progress:
        if is_file:
            write_texts(texts, Path(options.output), on_progress)
            rows = []
        else:
            rows = texts.rows(0, len(prompts), on_progress)
    if is_file:
        print(f"{counted(len(prompts), 'row')} written to {options.output}", file=sys.stderr)
    elif options.output:  # a pipe
        write_rows(rows, options.output)
    else:
        sys.stdout.write("\n".join(_readable(prompt.text, row) for prompt, row in zip(prompts, rows, strict=True)))


def mix_weights(mix: list[str]) -> dict[str, float]:
    """Read the parts ``ID=WEIGHT`` of a mixture.

    Raises:
        ValueError: If a user is named twice, or a weight is no finite number.
    """
    weights: dict[str, float] = {}
    for part in mix:
        user, _, weight = part.rpartition("=")
        if user in weights:
            raise ValueError(f"--mix: expected every user once, got {user!r} again in {part!r}; add up the weights")
        try:
            weights[user] = float(weight)
        except ValueError:
            raise ValueError(f"--mix: expected ID=WEIGHT with a number, got {part!r}") from None
        if not math.isfinite(weights[user]):
            raise ValueError(f"--mix: expected ID=WEIGHT with a finite number, got {part!r}")
    return weights


def _readable(prompt: str, row: dict[str, Any]) -> str:
    """Prompt and texts for the terminal."""
    shown = prompt if len(prompt) <= _SHOWN else "..." + prompt[-_SHOWN:]
    writer = row["user_id"] or "population"
    rewards = [f" ({reward:.3f})" for reward in row.get("rewards", [])] or [""] * len(row["responses"])
    texts = [f"[{writer}]{reward} {text.strip()}\n" for text, reward in zip(row["responses"], rewards, strict=True)]
    return f"{shown}\n{''.join(texts)}"


def sample(args: list[str]) -> None:
    """Write the file, or what is missing of it.

    Raises:
        ValueError: If the policy or the prompts cannot be read, or the file was written with other settings.
    """
    parser = OptionParser(
        prog="plm sample",
        description="N responses to each prompt from a policy. Output rows: the prompt's with responses, a list. The\n"
        "file grows while texts are written; the same command goes on where it was killed. Processes that share the\n"
        "work get --shard 1/4 to --shard 4/4 and write samples-1of4.jsonl to samples-4of4.jsonl. A text depends on\n"
        "policy, prompt and seed alone: however the work is shared, the responses are the same. With --policy_url the\n"
        "seed is the server's to heed.",
    )
    parser.add_shared("--prompts", required=True)
    parser.add_shared("--num_samples", required=True, help="responses to each prompt")
    parser.add_shared("--output", required=True, help="JSONL file")
    parser.add_shared("--shard", help="the I-th of K equal shares of the prompts")
    add_settings(parser)
    add_policy(parser)
    options = parser.parse(args)
    if options.policy is None and options.policy_url is None:
        parser.error("--policy MODEL or --policy_url URL: who writes?")
    check_policy(parser, options)

    from plm.cli.writing import policy_of, progress_bar
    from plm.recipe.prompts import read_prompts
    from plm.sampling import prompts_of_share, write_samples

    prompts, output = prompts_of_share(read_prompts(options.prompts), options.shard), Path(options.output)
    policy = policy_of(options)
    with progress_bar("sampling", len(prompts) * options.num_samples) as on_progress:
        num_written = write_samples(
            policy,
            prompts,
            output,
            num_samples=options.num_samples,
            settings=settings_of(options),
            on_progress=on_progress,
        )
    print(f"{num_written} prompts written, {len(prompts) - num_written} were there already: {output}")
