"""LoRe: low-rank rewards, our estimator and the published one."""

from plm.methods.lore.model import LoRe
from plm.methods.lore.published import PublishedLoRe

__all__ = ["LoRe", "PublishedLoRe"]
