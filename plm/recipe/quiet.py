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


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore these warnings and Lightning's tips within the block, which may stand inside another one."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    is_outermost = _is_no_tip not in logger.filters
    logger.addFilter(_is_no_tip)
    try:
        with warnings.catch_warnings():
            for message in _QUIET:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        if is_outermost:
            logger.removeFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    """Keep a line of the log that gives no advice."""
    return "Tip:" not in record.getMessage()
