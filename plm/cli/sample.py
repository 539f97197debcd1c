"""``plm sample``: many responses of a policy to each prompt, for use by later stages."""

from __future__ import annotations

from pathlib import Path

from plm.cli.options import OptionParser, add_policy, add_settings, check_policy, settings_of


def run(args: list[str]) -> None:
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
