"""Every method that reads tokens passes the contract, in every mode it has."""

from __future__ import annotations

from typing import Any

from plm.method import PersonalizationMethod
from plm.methods.clap import CLaP
from plm.methods.lora_dpo import LoRADPO
from plm.methods.sft import SFT
from plm.testing import TokenContract, tiny_causal_lm


class TestSFT(TokenContract):
    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return SFT(num_users=num_users, feature_dim=feature_dim, backbone=tiny_causal_lm().spec(), lr=1e-2, warmup=0.0)


class TestSFTPacked(TokenContract):
    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        common: dict[str, Any] = {"lr": 1e-2, "warmup": 0.0, "packing": True}
        return SFT(num_users=num_users, feature_dim=feature_dim, backbone=tiny_causal_lm().spec(), **common)


class TestLoRADPO(TokenContract):
    options: dict[str, Any] = {}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        common: dict[str, Any] = {"lr": 1e-2, "warmup": 0.0, "adapt_steps": 3, "rank": 2, "alpha": 4}
        return LoRADPO(
            num_users=num_users, feature_dim=feature_dim, backbone=tiny_causal_lm().spec(), **{**common, **self.options}
        )


class TestLoRADPOPerUser(TestLoRADPO):
    options = {"mode": "per_user"}  # noqa: RUF012


class TestLoRADPOSharedAndUser(TestLoRADPO):
    options = {"mode": "shared_and_user", "share_prompts": False}  # noqa: RUF012


class TestLoRADPOBasis(TestLoRADPO):
    options = {"mode": "basis", "num_bases": 2}  # noqa: RUF012


class TestLoRADPOPrefix(TestLoRADPO):
    options = {"adapter": "prefix", "num_virtual_tokens": 2}  # noqa: RUF012


class TestLoRADPOPrefixPerUser(TestLoRADPO):
    options = {"adapter": "prefix", "mode": "per_user", "share_prompts": False, "num_virtual_tokens": 2}  # noqa: RUF012


class TestLoRADPOFull(TestLoRADPO):
    options = {"adapter": "full", "lr": 1e-3, "loss_type": ["ipo", "sft"]}  # noqa: RUF012


class TestCLaP(TokenContract):
    num_users = 3
    options: dict[str, Any] = {}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        common: dict[str, Any] = {"lr": 1e-2, "warmup": 0.0, "latent_dim": 4, "num_queries": 2, "num_virtual_tokens": 2}
        small: dict[str, Any] = {"encoder_layers": 1, "num_negatives": 2, "kl_draws": 2}
        return CLaP(num_users, feature_dim, tiny_causal_lm().spec(), **{**common, **small, **self.options})


class TestCLaPUnfrozen(TestCLaP):
    options = {  # noqa: RUF012
        "unfreeze": True,
        "placement": "prefix",
        "gated": True,
        "kl": "joint",
        "gradient_checkpointing": True,
    }
