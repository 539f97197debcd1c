"""What a package with a method of its own needs to test it: planted users, a tiny backbone and the contract.

A test module subclasses `MethodContract`, names the class ``Test...`` and writes one factory::

    class TestMine(MethodContract):
        def make(self, num_users, feature_dim):
            return Mine(num_users, feature_dim, lr=0.1)

A method that reads tokens subclasses `TokenContract` and gives ``backbone=tiny_causal_lm().spec()``.
"""

from __future__ import annotations

from plm.testing.checks import assert_same
from plm.testing.contract import MethodContract, quiet_trainer, saved
from plm.testing.planted import Batches, PlantedData, TinyBackbone
from plm.testing.texts import PlantedTexts, TokenContract, tiny_causal_lm

__all__ = [
    "Batches",
    "MethodContract",
    "PlantedData",
    "PlantedTexts",
    "TinyBackbone",
    "TokenContract",
    "assert_same",
    "quiet_trainer",
    "saved",
    "tiny_causal_lm",
]
