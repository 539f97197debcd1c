"""``plm features`` and ``cache``: features of texts, encoded without a fit, listed and removed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from plm.cli.options import OptionParser, check_encoder, check_engine, integer, split_overrides
from plm.messages import counted, nearest

if TYPE_CHECKING:
    from plm.data.cache import CachedFeatures

_CONCURRENCY = 16
"""Requests to a server at once."""
_UNTRAINED = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
"""Nothing is trained here: the devices of the recipe need not be."""
_ACTIONS = ("list", "clear")
_DAY = 24 * 60 * 60


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


def cache(args: list[str]) -> None:
    """List or clear the cache.

    Raises:
        ValueError: If there is no such folder or backbone, or nobody is there to be asked.
    """
    parser = OptionParser(
        prog="plm cache",
        description="list: the features of texts that are kept on this machine: backbone, texts, dimensions, size and\n"
        "last use; the default\n"
        "clear [BACKBONE]: remove those of one backbone, by its name or that of its folder, or of all. They are only\n"
        "a copy: what is needed again is encoded again. Nothing is removed that plm has not written, and fits that\n"
        "run meanwhile go on.",
    )
    parser.add_argument("action", nargs="?", default="list", metavar="list|clear")
    parser.add_argument("backbone", nargs="?", metavar="BACKBONE")
    parser.add_argument("--older_than", type=integer(0), metavar="DAYS", help="clear: only what was not used so long")
    parser.add_argument("--yes", action="store_true", help="clear: do not ask")
    parser.add_argument(
        "--cache_dir", default="~/.cache/plm", metavar="DIR", help="data.cache_dir of the recipe (default: %(default)s)"
    )
    options = parser.parse(args)
    if options.action not in _ACTIONS:
        parser.error(f"no action {options.action!r}{nearest(options.action, _ACTIONS)}")
    if options.action == "list" and (options.backbone or options.older_than is not None or options.yes):
        parser.error("a backbone, --older_than and --yes go with clear")

    from plm.data.cache import cached_features, chosen, clear

    entries = cached_features(options.cache_dir)
    if options.action == "list":
        _show(entries, options.cache_dir)
        return
    before = float("inf") if options.older_than is None else time.time() - options.older_than * _DAY
    entries = chosen(entries, options.backbone, before)
    if not entries:
        print("nothing to clear")
        return
    _show(entries, options.cache_dir)
    if not options.yes and not _agreed():
        print("nothing was removed")
        return
    print(f"{_size(clear(entries))} freed")


def _agreed() -> bool:
    """Whether somebody at the terminal says yes.

    Raises:
        ValueError: If there is no terminal.
    """
    if not sys.stdin.isatty():
        raise ValueError("expected --yes, as no terminal is there to ask whether these features may be removed")
    return input("remove them? [y/N] ").strip().lower() in ("y", "yes")


def _show(entries: Sequence[CachedFeatures], place: str) -> None:
    """Print a table of what is cached."""
    from rich.table import Table
    from rich.text import Text

    from plm.evaluation.terminal import print_parts

    if not entries:
        print(f"no features in {place}")
        return
    table = Table("backbone", "folder", box=None)
    for head in ("texts", "dimensions", "size", "last use"):
        table.add_column(head, justify="right")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_use))
        numbers = (f"{entry.num_texts:,}", f"{entry.feature_dim:,}", _size(entry.num_bytes), used)
        table.add_row(*map(Text, (entry.name, entry.folder.name, *numbers)))
    total = sum(entry.num_bytes for entry in entries)
    print_parts(table, f"{_size(total)} in {place}")


def _size(num_bytes: int) -> str:
    """Bytes with a unit: ``1.5 MB`` is 1,500,000."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.95 or unit == "TB":
            break
        size /= 1000
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
