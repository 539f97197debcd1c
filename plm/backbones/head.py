"""Log-probabilities of tokens under a language model, without its scores of the whole vocabulary in memory.

Axes: n tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CPU_BLOCK, GPU_BLOCK = 2**21, 2**26
"""Vocabulary scores that are in memory at once: 8 and 256 MiB of float32."""


class TokenFacts(NamedTuple):
    """Facts about the next-token distributions at n places; without gradient."""

    entropy: Tensor
    """``(n,)`` entropy of the next-token distribution in nats."""
    mean_logits: Tensor
    """``(n,)`` mean vocabulary score."""
    is_top: Tensor
    """``(n,)`` bool, whether the token that followed was the most likely one."""
    log_sum_sq: Tensor
    """``(n,)`` log of the summed squared probabilities: the chance that two draws agree."""


@torch.no_grad()
def token_facts(logits: Tensor, token: Tensor) -> TokenFacts:
    """Facts about next-token distributions: ``(n, V)`` logits in float32 at least, ``(n,)`` tokens that followed.

    >>> facts = token_facts(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    >>> [round(facts.entropy.item(), 4), round(facts.log_sum_sq.item(), 4)]  # ln 2, ln 1/2
    [0.6931, -0.6931]
    """
    return _facts(logits, _softmax(logits), token)


class _Softmax(NamedTuple):
    total: Tensor
    """``(n,)`` log-sum-exp."""
    chance: Tensor
    """``(n, V)``."""
    top: Tensor
    """``(n,)`` the most likely token."""


def _softmax(logits: Tensor) -> _Softmax:
    """Compute total, chances and top token in few passes over ``(n, V)``."""
    most, top = logits.max(-1, keepdim=True)
    chance = (logits - most).exp_()
    size = chance.sum(-1, keepdim=True)
    return _Softmax((most + size.log())[:, 0], chance.div_(size), top[:, 0])


def _facts(logits: Tensor, softmax: _Softmax, token: Tensor) -> TokenFacts:
    chance = softmax.chance
    return TokenFacts(
        entropy=softmax.total - torch.linalg.vecdot(chance, logits),
        mean_logits=logits.mean(-1),
        is_top=softmax.top == token,
        log_sum_sq=torch.linalg.vecdot(chance, chance).log(),
    )


def token_logps(
    head: nn.Module, hidden: Tensor, token: Tensor, *, with_facts: bool = False
) -> tuple[Tensor, TokenFacts | None]:
    """Log-probabilities ``(n,)`` of the tokens that followed, in nats and float32 at least, and facts if asked for.

    Scores ``(n, V)`` are in memory by blocks of tokens, and none is kept for the backward pass. With a frozen output
    embedding W the gradient of a log-probability is ``W[token] - p W``, which is made on the way forward; a trained one
    computes the scores of a block again.

    Args:
        head: The output embedding.
        hidden: ``(n, D)`` last hidden states before the tokens.
        token: ``(n,)`` int64, the tokens.
        with_facts: Whether facts are wanted, too.
    """
    if not isinstance(head, nn.Linear) or head.weight.requires_grad or head._forward_hooks:
        return _in_blocks(head, hidden, token, with_facts)
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    logps, *facts = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, token, wanted, with_facts
    )
    return logps, TokenFacts(*facts) if with_facts else None


def _block_size(device: torch.device, vocab_size: int) -> int:
    """Tokens whose scores are in memory at once."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // vocab_size)


def _in_blocks(head: Any, hidden: Tensor, token: Tensor, with_facts: bool) -> tuple[Tensor, TokenFacts | None]:
    """What `token_logps` gives, by autograd, which runs the head again in the backward pass."""

    def block(hidden: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        logits = _wide(head(hidden))
        logps = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
        return logps, *(token_facts(logits.detach(), token) if with_facts else ())

    size = _block_size(hidden.device, head.weight.shape[0])
    parts = [
        checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(torch.split(hidden, size), torch.split(token, size), strict=True)
    ]
    logps, *facts = (torch.cat(column) for column in zip(*parts, strict=True))
    return logps, TokenFacts(*facts) if with_facts else None


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _TokenLogps(torch.autograd.Function):
    """Blocks of tokens, one after the other, through a frozen output embedding."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, wanted: bool, with_facts: bool
    ) -> tuple[Tensor, ...]:
        """Log-probabilities and facts; where a gradient is wanted, that of every log-probability ``(n, D)``."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            weight = weight.to(torch.get_autocast_dtype(kind))  # once, not for every block
        size = _block_size(hidden.device, len(weight))
        parts: list[tuple[Tensor, ...]] = []
        slopes: list[Tensor] = []
        for start in range(0, max(len(token), 1), size):
            followed = token[start : start + size]
            scores = F.linear(hidden[start : start + size], weight, bias)
            logits = _wide(scores)
            score = logits.gather(-1, followed[:, None])[:, 0]
            if not (wanted or with_facts):
                parts.append((score - logits.logsumexp(-1),))
                continue
            softmax = _softmax(logits)
            parts.append((score - softmax.total, *(_facts(logits, softmax, followed) if with_facts else ())))
            if wanted:
                slopes.append((weight[followed] - softmax.chance.to(scores.dtype) @ weight).to(hidden.dtype))
        columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(*([torch.cat(slopes)] if wanted else []))
        ctx.mark_non_differentiable(*columns[1:])
        return columns

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the hidden states."""
        (slopes,) = ctx.saved_tensors
        return gradients[0][:, None].to(slopes.dtype) * slopes, None, None, None, None, None
