"""Where pairs come from: a source turns a corpus into a validated table."""

from __future__ import annotations

from abc import ABC, abstractmethod

from plm.data.schema import PairTable


class PairSource(ABC):
    """A corpus of preference pairs; the constructor is cheap, ``load`` reads."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for logs."""

    @abstractmethod
    def load(self) -> PairTable:
        """Read and validate the pairs."""
