"""PAL's token loss as one expression, against a loop over examples and tokens; forward and backward.

python benchmarks/pal_loss.py [--pairs 32] [--window 400]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from plm.methods.pal.tokens import token_losses


def looped(margin: Tensor, window: Tensor) -> Tensor:
    """Cumulatively weighted logistic loss, one token after the other."""
    losses = []
    for row in range(len(margin)):
        places = window[row].nonzero()[:, 0].tolist()
        total = len(places) * (len(places) + 1) / 2
        tokens = [
            (rank + 1) / total * torch.nn.functional.softplus(-margin[row, place]) for rank, place in enumerate(places)
        ]
        losses.append(torch.stack(tokens).sum())
    return torch.stack(losses).mean()


def vectorised(margin: Tensor, window: Tensor) -> Tensor:
    return token_losses(margin, torch.ones(len(margin)), window, "cumulative", "logistic").mean()


def seconds(
    loss: Callable[[Tensor, Tensor], Tensor], margin: Tensor, window: Tensor, repeats: int
) -> tuple[float, Tensor]:
    """Best time of a forward and backward pass, and the gradient."""
    best = float("inf")
    for _ in range(repeats):
        margin.grad = None
        start = time.perf_counter()
        loss(margin, window).backward()
        best = min(best, time.perf_counter() - start)
    assert margin.grad is not None
    return best, margin.grad.clone()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--window", type=int, default=400)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    length = options.window + 112
    margin = torch.randn(options.pairs, length, requires_grad=True)
    start = torch.randint(0, 112, (options.pairs, 1))
    place = torch.arange(length)
    window = (place >= start) & (place < start + options.window)
    seconds(vectorised, margin, window, 3)  # warm up
    slow, slow_gradient = seconds(looped, margin, window, 2)
    fast, fast_gradient = seconds(vectorised, margin, window, 20)
    worst = (slow_gradient - fast_gradient).abs().max().item()
    assert worst < 1e-6, worst
    print(f"{options.pairs} pairs, window {options.window}: loop {slow * 1e3:.1f} ms, vectorised {fast * 1e3:.2f} ms")
    print(f"ratio {slow / fast:.0f}x, gradients differ by at most {worst:.1e}")


if __name__ == "__main__":
    main()
