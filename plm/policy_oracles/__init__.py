"""Oracles of PALM whose policies write: mixtures of single-objective adapters; LoRA-DPO or Latent DPO by weights."""

from __future__ import annotations

from plm.policy_oracles.latents import LatentFit, LatentPortfolio, pool_means, solve_latents
from plm.policy_oracles.measured import MixedPolicies, PolicyOracle, TrainedPolicies, written
from plm.policy_oracles.training import LoRADPOFit, train_adapters, weighted_pairs

__all__ = [
    "LatentFit",
    "LatentPortfolio",
    "LoRADPOFit",
    "MixedPolicies",
    "PolicyOracle",
    "TrainedPolicies",
    "pool_means",
    "solve_latents",
    "train_adapters",
    "weighted_pairs",
    "written",
]
