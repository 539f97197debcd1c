"""Batches that a test has made, as a trainer takes them."""

from __future__ import annotations

from collections.abc import Iterator

from plm.types import PreferenceBatch


class Loader:
    """Ready batches; a list of them Lightning would take for several loaders."""

    def __init__(self, batches: list[PreferenceBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return iter(self.batches)
