"""``plm features``: what a fit reads of its texts, encoded into the cache without a fit."""

from __future__ import annotations

from plm.cli.options import OptionParser, split_overrides


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
    own, overrides = split_overrides(args)
    options = parser.parse(own)

    from plm.recipe.fit import RecipeReader, run_recipe

    recipe = [part for file in options.config for part in ("--config", file)]
    data = run_recipe(["fit", *recipe, *(f"--{override}" for override in overrides)], RecipeReader).datamodule
    print(f"{data.table.num_pairs:,} pairs of {data.table.num_users:,} users from {data.source.name}")
    index, count = options.shard
    for name, filled in data.fill_cache(options.shard).items():
        part = f", {filled.num_of_share:,} in shard {index}/{count}" if count > 1 else ""
        cached = filled.num_of_share - filled.num_encoded
        print(
            f"{name}: {filled.num_texts:,} distinct texts{part}: {cached:,} were cached, {filled.num_encoded:,} encoded"
        )
        print(f"  {filled.folder}")
