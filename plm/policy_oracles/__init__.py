"""Oracles of PALM whose policies write: mixtures of single-objective adapters, and LoRA-DPO for every weight vector."""

from __future__ import annotations

from plm.policy_oracles.measured import MixedPolicies, PolicyOracle, TrainedPolicies, written
from plm.policy_oracles.training import LoRADPOFit, train_adapters, weighted_pairs

__all__ = [
    "LoRADPOFit",
    "MixedPolicies",
    "PolicyOracle",
    "TrainedPolicies",
    "train_adapters",
    "weighted_pairs",
    "written",
]
