"""Where pairs come from: a source turns a corpus into a validated table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pkgutil import iter_modules
from typing import Any, ClassVar, Literal

from plm.arrays import Float64Array
from plm.data.schema import PairTable

SURE = 1e-3
"""Temperature that stands for people who never err, whose log-odds would be infinite."""


class PairSource(ABC):
    """A corpus of preference pairs; the constructor is cheap, ``load`` reads."""

    checked_on: ClassVar[Literal["corpus", "schema"]] = "corpus"
    """What the reader has been tested on: the data themselves, or only small files with the columns of the corpus."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for logs."""

    @abstractmethod
    def load(self) -> PairTable:
        """Read and validate the pairs."""

    @property
    def reading(self) -> dict[str, Any]:
        """How files of pairs are read, as arguments of ``plm.read_pairs``, where it is asked to read them otherwise."""
        return {}

    def planted_log_odds(self) -> Float64Array | None:
        """``(N,)`` log-odds that users pick as they did in each pair of ``load``; None where no utility is planted."""
        return None


def numbered(kind: str, count: int) -> list[str]:
    """Names of so many users, with as many digits each.

    Example:
        >>> numbered("user", 11)[::10]
        ['user-00', 'user-10']
    """
    digits = len(str(count - 1))
    return [f"{kind}-{number:0{digits}d}" for number in range(count)]


def source_modules() -> list[str]:
    """Names of the modules here; once they are imported, recipes may use the short names of their classes."""
    return [module.name for module in iter_modules(__path__, f"{__name__}.")]
