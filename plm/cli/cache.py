"""``plm cache``: what features of texts are kept, and how they go."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plm.cli.options import OptionParser, integer
from plm.messages import nearest

if TYPE_CHECKING:
    from plm.data.cache import CachedFeatures

_ACTIONS = ("list", "clear")
_DAY = 24 * 60 * 60


def run(args: list[str]) -> None:
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
