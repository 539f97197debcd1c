"""Choices that CLaP offers by name, and which of its options do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from plm.messages import Problems
from plm.methods.clap.adapter import Placement

KL = Literal["marginal", "joint", "ordinary"]


def check_options(options: Mapping[str, Any]) -> None:
    """Raise if options of `CLaP` are out of range or contradict each other.

    Raises:
        ValueError: With one line for each problem.
    """
    problems = Problems("model.")
    counts = ("latent_dim", "num_queries", "num_virtual_tokens", "encoder_layers", "kl_draws", "num_negatives")
    problems.integers(1, **{name: options[name] for name in counts})
    problems.numbers(**{name: options[name] for name in ("kl_weight", "contrast_weight", "lr")})
    if not problems.found and options["latent_dim"] % options["num_queries"]:
        share = f"a multiple of model.num_queries={options['num_queries']}, each of which speaks for its share"
        problems.add("latent_dim", share, options["latent_dim"])
    problems.choices(
        placement=(options["placement"], get_args(Placement)),
        kl=(options["kl"], get_args(KL)),
    )
    problems.check()
