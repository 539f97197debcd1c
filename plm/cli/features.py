"""``plm features``: what a fit reads of its texts, encoded into the cache without a fit."""

from __future__ import annotations

from functools import partial

from plm.cli.options import OptionParser, check_encoder, check_engine, split_overrides
from plm.messages import counted

_CONCURRENCY = 16
"""Requests to a server at once."""
_UNTRAINED = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
"""Nothing is trained here: the devices of the recipe need not be."""


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
    parser.add_shared(
        "--engine",
        help="ray: workers of Ray encode, here or on the cluster that RAY_ADDRESS names, where all see the cache; it "
        "needs pip install 'plm[ray]' (default local: this process)",
    )
    parser.add_shared("--workers", help="of Ray (default: one for each GPU, or each CPU but one)")
    own, overrides = split_overrides(args)
    options = parser.parse(own)
    check_encoder(parser, options)
    if options.engine == "ray" and options.encoder_url is not None:
        parser.error("--encoder_url and --engine ray are two ways to encode; give one of them")
    check_engine(parser, options)

    from plm.backbones import RemoteEncoder
    from plm.data.ray_workers import encode_by_ray
    from plm.recipe.fit import RecipeReader, run_recipe

    recipe = [part for file in options.config for part in ("--config", file)]
    data = run_recipe(
        ["fit", *recipe, *(f"--{override}" for override in overrides), *_UNTRAINED], RecipeReader
    ).datamodule
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
    engine = partial(encode_by_ray, workers=options.workers) if options.engine == "ray" else None
    print(f"{counted(data.table.num_pairs, 'pair')} of {counted(data.table.num_users, 'user')} from {data.source.name}")
    index, count = options.shard
    for name, filled in data.fill_cache(options.shard, server, engine).items():
        part = f", {filled.num_of_share:,} in shard {index}/{count}" if count > 1 else ""
        cached = filled.num_of_share - filled.num_encoded
        print(
            f"{name}: {filled.num_texts:,} distinct texts{part}: {cached:,} were cached, {filled.num_encoded:,} encoded"
        )
        print(f"  {filled.folder}")
