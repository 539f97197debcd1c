"""``plm label``: what people would say of sampled responses, as pairs or as scores."""

from __future__ import annotations

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Write pairs, or scores.

    Raises:
        ValueError: If a file cannot be read, or the rewards are malformed.
    """
    parser = OptionParser(
        prog="plm label",
        description="Pairs of people who compare the responses that plm sample wrote, the same that a recipe over\n"
        "SampledPairs makes. Output rows: user_id, prompt, chosen, rejected, chosen_score, rejected_score, row_split.\n"
        "--scores writes the samples instead, each with scores: name of a reward -> one number per response.",
    )
    parser.add_argument("--samples", required=True, nargs="+", metavar="FILE", help="JSONL: prompt and responses")
    parser.add_shared("--rewards")
    parser.add_shared("--ckpt_path", help="instead of --rewards: let users of this checkpoint compare")
    parser.add_shared("--user", nargs="+", help="users of the checkpoint who compare; default: the population")
    parser.add_argument("--scores", action="store_true", help="write scores, not pairs")
    parser.add_shared("--output", required=True, help="JSONL file")
    options = parser.parse(args)
    if (options.rewards is None) == (options.ckpt_path is None):
        parser.error("give either --rewards or --ckpt_path")
    if options.user and not options.ckpt_path:
        parser.error("--user goes with --ckpt_path")

    from plm.cli.writing import write_rows
    from plm.judging.labels import pair_rows, score_rows, users_as_rewards
    from plm.judging.tastes import build, read_tastes

    if options.rewards is not None:
        source = read_tastes(options.rewards, options.samples)
    else:
        source = build({"rewards": users_as_rewards(options.ckpt_path, options.user)}, options.samples)
    rows = list(score_rows(source) if options.scores else pair_rows(source.load()))
    write_rows(rows, options.output, "scored prompt" if options.scores else "pair")
