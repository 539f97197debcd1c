"""``plm features``: what a fit reads of its texts, encoded into the cache without a fit."""

from __future__ import annotations

from plm.cli.options import OptionParser, check_encoder, split_overrides

_CONCURRENCY = 16
"""Requests to a server at once."""


def run(args: list[str]) -> None:
    """Fill the cache of a recipe.

    Raises:
        ValueError: If the recipe or its data cannot be read, or a text cannot be encoded.
    """
    parser = OptionParser(
        prog="plm features",
        description="Encode the texts of a recipe's pairs as plm fit would, and keep their features in its cache, so\n"
        "that the fit encodes nothing. Texts that are cached are not encoded again: a command that was killed goes\n"
        "on where it was. Processes that share the work get --shard 1/4 to --shard 4/4, in any order, at once or\n"
        "not; on machines without a shared disk, copy the files of the caches into one folder afterwards.\n"
        "Options of a recipe may follow, as for plm fit: --data.cache_dir DIR.",
    )
    parser.add_shared("--config", required=True, action="append", help="recipe; of several the later wins")
    parser.add_shared("--shard", help="the I-th of K equal shares of the texts, by their hashes (default: all)")
    parser.add_shared(
        "--encoder_url",
        help="texts are encoded by an OpenAI-compatible server, such as http://localhost:8000/v1, whose key, if it "
        "wants one, is the environment variable PLM_ENCODER_KEY; first its features are compared with those of the "
        "recipe's backbone, and the cache keeps how near they are",
    )
    parser.add_shared("--encoder_model")
    parser.add_shared("--encoder_unchecked", help="without that comparison, where the backbone cannot be loaded")
    own, overrides = split_overrides(args)
    options = parser.parse(own)
    check_encoder(parser, options)

    from plm.backbones import RemoteEncoder
    from plm.recipe.fit import RecipeReader, run_recipe

    recipe = [part for file in options.config for part in ("--config", file)]
    data = run_recipe(["fit", *recipe, *(f"--{override}" for override in overrides)], RecipeReader).datamodule
    server = None
    if options.encoder_url is not None:
        server = RemoteEncoder(
            data.backbone,
            data.feature_dim,
            options.encoder_url,
            options.encoder_model,
            options.encoder_unchecked,
            concurrency=_CONCURRENCY,
            quotes=True,
        )
    print(f"{data.table.num_pairs:,} pairs of {data.table.num_users:,} users from {data.source.name}")
    index, count = options.shard
    for name, filled in data.fill_cache(options.shard, server).items():
        part = f", {filled.num_of_share:,} in shard {index}/{count}" if count > 1 else ""
        cached = filled.num_of_share - filled.num_encoded
        print(
            f"{name}: {filled.num_texts:,} distinct texts{part}: {cached:,} were cached, {filled.num_encoded:,} encoded"
        )
        print(f"  {filled.folder}")
