"""``plm query`` and ``label``: which pairs to ask a user about, and what people would answer."""

from __future__ import annotations

import sys

from plm.cli.options import ROWS, OptionParser, integer

_NOTHING = 1e-6  # nats


def run(args: list[str]) -> None:
    """Choose pairs and write them as JSONL, the first to ask first.

    Raises:
        ValueError: If the checkpoint or a row cannot be read, or the method has no posterior of users.
    """
    parser = OptionParser(
        prog="plm query",
        description='Which pairs to ask a user about. Pool rows: {"prompt": ..., "responses": [..., ...]}, or a file\n'
        "of pairs, whose chosen and rejected stand for the two responses. Output rows: the pool's with user_id,\n"
        "information (nats that the answer adds about the user to the answers before it) and chance (that the user\n"
        "prefers the first). Add the answers to the user's pairs and run plm adapt. For an unknown user the pairs are\n"
        "those that would help most with a new user.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_shared("--user", required=True, help="whom to ask")
    parser.add_shared("--users")
    parser.add_shared("--pool", required=True, help=f"pairs to choose from: {ROWS}")
    parser.add_argument("--num_pairs", type=integer(1), default=5, metavar="N", help="pairs to choose (default 5)")
    parser.add_argument(
        "--num_draws", type=integer(2), default=256, metavar="M", help="draws from the user's posterior (default 256)"
    )
    parser.add_shared("--seed", help="seed of the draws (default 0)")
    parser.add_shared("--output", help="JSONL file; default: standard output")
    options = parser.parse(args)

    from plm.checkpoint import load_method
    from plm.cli.writing import with_results, write_rows
    from plm.querying import choose_queries, read_pool

    pool, num_rows = read_pool(options.pool)
    method = load_method(options.ckpt_path, users=options.users)
    state, known = method.known_users.lookup([options.user])
    queries = choose_queries(method, state, pool, options.num_pairs, num_draws=options.num_draws, seed=options.seed)
    output_rows = [
        with_results(pool[query.row].record, options.user, information=query.information, chance=query.chance)
        for query in queries
    ]
    write_rows(output_rows, options.output)
    if len(pool) < num_rows:
        print(f"{num_rows - len(pool)} of {num_rows} rows repeat a pair of the pool: asked once", file=sys.stderr)
    if queries[0].information < _NOTHING:
        print(
            f"no answer would tell anything about {options.user!r}: {type(method).__name__} is sure of the user, or "
            "treats all users alike",
            file=sys.stderr,
        )
    if not known.all():
        print(f"unknown user {options.user!r}: the pairs that tell most about a new user", file=sys.stderr)


def label(args: list[str]) -> None:
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
