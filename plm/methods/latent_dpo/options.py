"""Options of Latent DPO: each one's default, range and meaning, and which do not fit together."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import get_args

from plm.messages import Problems
from plm.methods.latent_dpo.families import FamilyName, Variance
from plm.methods.latent_dpo.rules import SAMPLED, RuleName


@dataclass(frozen=True)
class Options:
    """How users are learned, and how they write.

    Args:
        family: vector = one policy for all prompts; linear, mlp = of the prompt's features; full = an encoder of the
            prompt's tokens for every user, as published; it needs ``prompts: tokens`` of the backbone.
        hidden_dim: Hidden width of an mlp.
        variance: unit = 1; free = learned; fixed_entropy = learned, with the entropy of the prior.
        rule: What a pair teaches. closed_form = expected loss of posterior draws without drawing; direct = the same,
            drawn; evidence = latents of a pool whose reward differs most, as published; all_pairs = all latents of the
            pool, ordered; topk = the best quarter against the worst; soft = all, with soft labels; expectation = the
            expected latent reward itself; newton = posterior means, solved exactly.
        beta: Strength of the KL term that DPO implies.
        kl_coef: Weight of the KL to the prior in nats. Hard labels have no finite optimum without it and leave the
            region the decoder was trained on.
        num_samples: Latents drawn per source.
        evidence_ratio: Share of the unordered pairs of latents that evidence keeps.
        marginal: Whether every latent dimension is a problem of its own.
        batch_size: Most pairs of a user in a step.
        num_steps: Steps of a user; 0 = one pass over the user's pairs.
        warmup: Share of a user's steps over which the learning rate rises.
        weight_decay: AdamW's.
        patience: Validations without improvement after which a user stops; users are served by their best policy. 0 =
            users are served by their last policy.
        lr: Learning rate.
        latent_temperature: What the standard deviation of a policy is multiplied by when a user writes, or the
            population, each text from a draw of its own; 0 = the mean, as published.
        max_latent_norm: Longest latent to write from in units of sqrt(Z), beyond which the model that writes was not
            trained; null = no bound.
    """

    family: FamilyName = "mlp"
    hidden_dim: int = 128
    variance: Variance = "unit"
    rule: RuleName = "closed_form"
    beta: float = 0.1
    kl_coef: float = 0.01
    num_samples: int = 16
    evidence_ratio: float = 0.5
    marginal: bool = False
    batch_size: int = 64
    num_steps: int = 200
    warmup: float = 0.0
    weight_decay: float = 0.0
    patience: int = 0
    lr: float = 1e-3
    latent_temperature: float = 1.0
    max_latent_norm: float | None = None

    @property
    def pairs_per_step(self) -> int:
        """Most pairs of a user in a step; an exact solution reads all."""
        return sys.maxsize if self.rule == "newton" else self.batch_size

    def problems(self) -> Problems:
        """What is out of range, contradicts something else, or does nothing beside the others."""
        problems = Problems("model.")
        problems.integers(1, hidden_dim=self.hidden_dim, num_samples=self.num_samples, batch_size=self.batch_size)
        problems.integers(0, num_steps=self.num_steps, patience=self.patience)
        names = {"family": FamilyName, "variance": Variance, "rule": RuleName}
        problems.choices(**{name: (getattr(self, name), get_args(valid)) for name, valid in names.items()})
        problems.numbers(kl_coef=self.kl_coef, weight_decay=self.weight_decay, lr=self.lr)
        problems.numbers(latent_temperature=self.latent_temperature)
        problems.positive(beta=self.beta, max_latent_norm=self.max_latent_norm)
        if not 0 < self.evidence_ratio <= 1:
            problems.add("evidence_ratio", "a share in (0, 1]", self.evidence_ratio)
        if not 0 <= self.warmup <= 1:
            problems.add("warmup", "a share in [0, 1]", self.warmup)
        if self.rule == "newton":
            for name, value in {"family": "vector", "variance": "unit"}.items():
                if getattr(self, name) != value:
                    problems.add(name, f"{value} with model.rule newton", getattr(self, name))
            if self.kl_coef == 0:
                problems.add("kl_coef", "a number > 0 with model.rule newton, whose ridge it is", 0)
        stepped = ("batch_size", "num_steps", "warmup", "weight_decay", "patience", "lr")
        needs = {
            "hidden_dim": ("model.family mlp", self.family == "mlp"),
            "num_samples": ("a model.rule that samples", self.rule in SAMPLED),
            "evidence_ratio": ("model.rule evidence", self.rule == "evidence"),
            "marginal": ("a model.rule that samples", self.rule in SAMPLED),
            **{name: ("another model.rule than newton", self.rule != "newton") for name in stepped},
        }
        defaults = {field.name: field.default for field in fields(self)}
        for name, (what, acts) in needs.items():
            value = getattr(self, name)
            problems.say(
                f"model.{name} acts only with {what}, got {value!r}", when=not acts and value != defaults[name]
            )
        return problems
