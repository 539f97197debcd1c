"""Metrics logged for a batch of pairs, under the names of TRL's DPOTrainer.

Axes: B pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plm.backbones import TokenFacts
from plm.methods.lora_dpo.pairs import PairLogps


@torch.no_grad()
def reward_metrics(pairs: PairLogps, beta: float) -> dict[str, Tensor]:
    """Means over the batch; a reward is ``beta`` times the log-ratio, whatever the loss and the divergence.

    ``rewards/accuracies`` counts a pair only if the preferred reward is strictly higher.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    return {name: value.mean() for name, value in values.items()}


def token_metrics(chosen: TokenFacts, rejected: TokenFacts, num_tokens: Tensor) -> dict[str, Tensor]:
    """Means over the response tokens of the batch.

    Args:
        chosen: Facts about the tokens of the preferred responses.
        rejected: The same for the other responses.
        num_tokens: ``()`` tokens seen so far in training, prompts counted with either response.

    Returns:
        ``entropy`` over both responses, ``mean_token_accuracy`` over the preferred ones, ``logits/chosen``,
        ``logits/rejected`` and ``num_tokens``; 0 where there is no token.
    """
    return {
        "entropy": _mean(torch.cat([chosen.entropy, rejected.entropy])),
        "mean_token_accuracy": _mean(chosen.is_top.to(chosen.entropy)),
        "logits/chosen": _mean(chosen.mean_logits),
        "logits/rejected": _mean(rejected.mean_logits),
        "num_tokens": num_tokens,
    }


def _mean(values: Tensor) -> Tensor:
    """Mean, or 0 of nothing."""
    return values.sum() / max(len(values), 1)
