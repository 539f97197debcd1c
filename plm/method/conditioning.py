"""FeatureConditioning: what is done to features before a method sees them, measured on training pairs.

Axes: B pairs in a batch, N responses, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from plm.types import PreferenceBatch

Conditioning = Literal["none", "centre", "standardise", "whiten"]
CONDITIONINGS: tuple[str, ...] = get_args(Conditioning)
LEAST, MOST = 1e-15, 1e15
"""Features outside have squares and products outside float32."""
GRID = 2.0**-12
"""Means are rounded to this share of the features' scale: to the bit the same in whatever order pairs are added up."""


class FeatureStatistics(NamedTuple):
    """Sums over the training pairs, in float64."""

    num_pairs: Tensor
    """``()``."""
    response: Tensor
    """``(D,)`` of both responses of every pair."""
    prompt: Tensor
    """``(D,)`` of the prompts; zero where there are none."""
    square: Tensor
    """``(D,)`` of the squared differences, or ``(D, D)`` of their outer products."""
    fourth: Tensor
    """``()`` of the fourth powers of the lengths of the differences."""


def shrinkage(statistics: FeatureStatistics) -> float:
    """Share of the identity in the covariance of differences that is closest to the true one (Ledoit & Wolf 2004).

    With S the mean of the outer products ``x x'`` of N differences and ``m = tr(S) / D``, the best convex combination
    ``(1 - share) S + share m I`` in squared Frobenius norm has ``share = b / d`` with ``d = |S - m I|^2`` and
    ``b = min(d, 1/N^2 sum_n |x_n x_n' - S|^2)``, where ``sum_n |x_n x_n' - S|^2 = sum_n |x_n|^4 - N |S|^2``.
    """
    count = statistics.num_pairs
    covariance = statistics.square / count
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    apart = (covariance - covariance.trace() / len(covariance) * identity).square().sum()
    noise = (statistics.fourth / count - covariance.square().sum()) / count
    return float((noise / apart).clamp(0, 1)) if apart > 0 else 1.0


class FeatureConditioning(torch.nn.Module):
    """An affine map of features, the same for both responses of a pair: ``(x - mean) * factor``, or ``@ factor``.

    Args:
        kind: none = the features as they are; centre = less the mean training response; standardise = also divided by
            the root mean square of the training differences, number by number; whiten = also by the inverse square
            root of their covariance, shrunk to a multiple of the identity. What both responses of a pair share moves
            the mean alone, never a scale.
        feature_dim: Width D.
    """

    mean: Tensor
    prompt_mean: Tensor
    factor: Tensor

    def __init__(self, kind: Conditioning, feature_dim: int) -> None:
        super().__init__()
        self.kind: Conditioning = kind
        shape = {"standardise": (feature_dim,), "whiten": (feature_dim, feature_dim)}.get(kind, ())
        self.register_buffer("mean", torch.zeros(feature_dim), persistent=kind != "none")
        self.register_buffer("prompt_mean", torch.zeros(feature_dim), persistent=kind != "none")
        self.register_buffer("factor", torch.ones(shape), persistent=bool(shape))
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.mean.zero_()
        self.prompt_mean.zero_()
        self.factor.fill_(1.0) if self.factor.dim() < 2 else self.factor.copy_(torch.eye(len(self.factor)))

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(..., D)`` as a method reads them."""
        if self.kind == "none":
            return features
        centred = features - self.mean
        if self.kind == "centre":
            return centred
        read: Tensor = centred @ self.factor if self.kind == "whiten" else centred * self.factor
        return read

    def prompts(self, features: Tensor) -> Tensor:
        """Features ``(..., D)`` of prompts alone, less the mean training prompt; of another width as they are."""
        as_read = self.kind != "none" and features.shape[-1] == len(self.mean)
        return features - self.prompt_mean if as_read else features

    def direction(self, raw: Tensor) -> Tensor:
        """A direction ``(D,)`` whose product with raw features is a reward, as one for conditioned features."""
        if self.factor.dim() < 2:
            return raw / self.factor
        direction: Tensor = torch.linalg.solve(self.factor.double(), raw.double()).to(raw)
        return direction

    def raw_direction(self, read: Tensor) -> Tensor:
        """The way back: a direction ``(D,)`` for conditioned features as one for raw features."""
        return self.factor @ read if self.factor.dim() == 2 else self.factor * read

    @torch.no_grad()
    def measure(self, batches: Iterable[PreferenceBatch], total: Callable[[Tensor], Tensor]) -> tuple[int, float]:
        """Measure training pairs of raw features.

        Args:
            batches: Every training pair of this process once; of pairs of tokens only the number is counted.
            total: Sums a tensor over all processes.

        Returns:
            Number of training pairs and the root mean square length of their differences, conditioned; 0 where nothing
            differs.

        Raises:
            ValueError: If the features are too large or too small for float32.
        """
        width, wide = len(self.mean), self.kind == "whiten"
        zero = self.mean.new_zeros((), dtype=torch.float64)
        sums = FeatureStatistics(
            zero, zero.expand(width), zero.expand(width), zero.expand((width, width) if wide else width), zero
        )
        for batch in batches:
            part = _statistics(batch, sums, wide)
            sums = FeatureStatistics(*(first + second for first, second in zip(sums, part, strict=True)))
        sums = FeatureStatistics(*(total(value.contiguous()) for value in sums))
        num_pairs, diagonal = int(sums.num_pairs), sums.square.diagonal() if wide else sums.square
        scale = math.sqrt(max(float(diagonal.sum()), 0.0) / max(num_pairs, 1))
        if not scale:
            return num_pairs, 0.0
        check_scale(scale, float((sums.response / (2 * num_pairs)).abs().max()))
        if self.kind == "none":
            return num_pairs, scale
        step = 2.0 ** math.floor(math.log2(scale)) * GRID
        for mean, value, count in (
            (self.mean, sums.response, 2 * num_pairs),
            (self.prompt_mean, sums.prompt, num_pairs),
        ):
            mean.copy_((value / count / step).round() * step)
        if self.kind == "standardise":
            deviation = (sums.square / num_pairs).sqrt()
            self.factor.copy_(torch.where(deviation > 1e-6 * scale, 1 / deviation, 0.0))
            return num_pairs, math.sqrt(float((self.factor > 0).sum()))
        if self.kind == "whiten":
            share, covariance = shrinkage(sums), sums.square / num_pairs
            values, vectors = torch.linalg.eigh(covariance)
            shrunk = (1 - share) * values.clamp_min(0) + share * values.mean() + 1e-12 * scale**2
            self.factor.copy_((vectors / shrunk.sqrt()) @ vectors.T)
            return num_pairs, math.sqrt(float((values.clamp_min(0) / shrunk).sum()))
        return num_pairs, scale


def check_scale(scale: float, mean: float) -> None:
    """Refuse features whose squares float32 cannot hold.

    Args:
        scale: Root mean square length of a training difference.
        mean: Largest number of the mean response, without its sign.

    Raises:
        ValueError: If one is out of range, naming it and what to do.
    """
    if LEAST <= scale <= MOST and mean <= MOST:
        return
    what = "overflow" if max(scale, mean) > MOST or not math.isfinite(scale + mean) else "underflow"
    raise ValueError(
        f"features: expected differences of a length between {LEAST:g} and {MOST:g} and means below {MOST:g}, got a "
        f"root mean square difference of {scale:.3g} and a mean response with numbers up to {mean:.3g}: their squares "
        f"{what} in float32; multiply the features by a constant, such as 1 / {scale:.3g}"
    )


def _statistics(batch: PreferenceBatch, like: FeatureStatistics, wide: bool) -> FeatureStatistics:
    """Sums of one batch."""
    count = torch.full_like(like.num_pairs, batch.num_pairs)
    if not (isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)):
        return FeatureStatistics(count, *(torch.zeros_like(value) for value in like[1:]))
    response = batch.chosen.sum(0, dtype=torch.float64) + batch.rejected.sum(0, dtype=torch.float64)
    prompt = torch.zeros_like(like.prompt)
    if isinstance(batch.prompt, Tensor) and batch.prompt.shape[-1] == len(prompt):
        prompt = batch.prompt.sum(0, dtype=torch.float64)
    square, fourth = torch.zeros_like(like.square), torch.zeros_like(like.fourth)
    for start in range(0, batch.num_pairs, 2**14):  # bounds the memory of float64
        rows = slice(start, start + 2**14)
        difference = batch.chosen[rows].double() - batch.rejected[rows].double()
        square = square + (difference.T @ difference if wide else difference.square().sum(0))
        fourth = fourth + difference.square().sum(-1).square().sum()
    return FeatureStatistics(count, response, prompt, square, fourth)
