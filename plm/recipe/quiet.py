"""Leave out what Lightning reports about its own internals, while a recipe runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_QUIET = (  # about loaders of ready batches and Lightning's own internals: nothing a user of plm can act on
    ".*does not have many workers.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*Your `IterableDataset` has `__len__` defined.*",
    ".*The dirpath has changed from.*",
    ".*treespec, LeafSpec.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*FSDP2-wrapped module .* returned a view tensor.*",
    ".*(Checkpoint|Experiment logs) directory .* exists and is not empty.*",
)


_LOGGERS = ("lightning.pytorch", "lightning.fabric")


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore these warnings, and what Lightning logs of seeds, devices and files, within the block; blocks may nest."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    is_outermost = _is_no_tip not in tips.filters
    tips.addFilter(_is_no_tip)
    _set_levels(dict.fromkeys(_LOGGERS, logging.WARNING))
    try:
        with warnings.catch_warnings():
            for message in _QUIET:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        if is_outermost:
            tips.removeFilter(_is_no_tip)
        _set_levels(levels)


def speak() -> None:
    """Let Lightning log again what it does, all but its tips, until the block of `quiet` ends."""
    _set_levels(dict.fromkeys(_LOGGERS, logging.INFO))


def _set_levels(levels: dict[str, int]) -> None:
    """Set the least level of every logger that is shown."""
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _is_no_tip(record: logging.LogRecord) -> bool:
    """Keep a line of the log that gives no advice."""
    return "Tip:" not in record.getMessage()
