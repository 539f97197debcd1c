"""Log-probabilities of both responses of every pair, under policy and reference: what losses are computed from.

Axes: B pairs; n tokens of B responses, as `plm.functional.SequenceLogps` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.functional import SequenceLogps
from plm.method.episodes import places


class PairLogps(NamedTuple):
    """Summed log-probabilities of B pairs in nats, and what single losses need besides."""

    chosen: Tensor
    """``(B,)`` of the preferred response under the policy, see `pair_totals`."""
    rejected: Tensor
    """``(B,)`` of the other response."""
    ref_chosen: Tensor
    """``(B,)`` of the preferred response under the reference, summed in the same way."""
    ref_rejected: Tensor
    """``(B,)`` of the other response."""
    chosen_length: Tensor
    """``(B,)`` int64, tokens of the preferred response: for ipo, sigmoid_norm and sft."""
    rejected_length: Tensor
    """``(B,)`` int64, tokens of the other response."""
    chosen_nll: Tensor | None = None
    """``(B,)`` minus the plain sum over the preferred response, for sft; only needed where ``chosen`` is not plain."""
    rejected_nll: Tensor | None = None
    """``(B,)`` of the other response, for sft on pairs labelled as ties."""
    group: Tensor | None = None
    """``(B,)`` int64, equal for pairs of one user: aot sorts and sft averages within a group; None = one group."""
    mean_length: Tensor | None = None
    """``()`` tokens of a preferred response in the mean over all processes, for sft of one group; None = of these."""
    reward_shift: Tensor | None = None
    """``()`` or ``(B,)`` delta of bco_pair, the caller's running mean of both rewards; None = 0, as in TRL."""
    wpo_weight: Tensor | None = None
    """``(B,)`` WPO weight of each pair, see `wpo_weights`; None = unweighted."""

    @classmethod
    def cat(cls, parts: Sequence[PairLogps]) -> PairLogps:
        """The pairs of several, in order; each has or lacks the same as the others."""
        values: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        return cls(*values)

    def of_policy(self) -> dict[str, Tensor]:
        """What depends on the policy and is differentiated, by name."""
        values = {name: getattr(self, name) for name in ("chosen", "rejected", "chosen_nll", "rejected_nll")}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def chosen_ratio(self) -> Tensor:
        """``(B,)`` log of policy over reference for the preferred response."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """``(B,)`` log of policy over reference for the other response."""
        return self.rejected - self.ref_rejected


def pair_totals(chosen: SequenceLogps, rejected: SequenceLogps, ld_alpha: float | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of both responses of each pair, ``(B,)`` each, with verbose tails counted ``ld_alpha`` times.

    LD-DPO (Liu et al., arXiv 2409.06411): tokens past the length of the shorter response count ``ld_alpha``,
    the others one, so that length alone moves the loss less. Policy and reference must be summed in the same way.

    Args:
        chosen: The preferred responses.
        rejected: The other responses.
        ld_alpha: Between 0, tails do not count, and 1, the plain sum; None = the plain sum.

    >>> one = SequenceLogps(torch.tensor([-1.0]), torch.tensor([1]), torch.tensor([-1.0]), torch.tensor([0]))
    >>> two = SequenceLogps(torch.tensor([-6.0]), torch.tensor([2]), torch.tensor([-2.0, -4.0]), torch.tensor([0, 0]))
    >>> pair_totals(one, two, ld_alpha=0.5)
    (tensor([-1.]), tensor([-4.]))
    """
    if ld_alpha is None:
        return chosen.total, rejected.total
    shared = torch.minimum(chosen.length, rejected.length)
    return _discounted(chosen, shared, ld_alpha), _discounted(rejected, shared, ld_alpha)


def _discounted(response: SequenceLogps, shared: Tensor, ld_alpha: float) -> Tensor:
    """Sum of each response with weight ``ld_alpha`` for tokens after the first ``shared``: ``(B,)``."""
    in_tail = places(response.row) >= shared[response.row]
    tail = torch.zeros_like(response.total).index_add(0, response.row, response.token * in_tail)
    return response.total - (1 - ld_alpha) * tail


@torch.no_grad()
def wpo_weights(
    chosen: SequenceLogps, rejected: SequenceLogps, chosen_log_sum_sq: Tensor, rejected_log_sum_sq: Tensor
) -> Tensor:
    """Weigh each pair by how likely the policy itself would write it: ``(B,)``, without gradient.

    WPO (Zhou et al., arXiv 2406.11827, eq 2 with sampled alignment): the geometric mean over a response's tokens of
    ``p(token) / sum_v p(v)^2``, multiplied over both responses. It is 1 for a uniform policy.

    Args:
        chosen: The preferred responses under the policy.
        rejected: The other responses.
        chosen_log_sum_sq: ``(n,)`` of `plm.backbones.TokenFacts` for the tokens of ``chosen``.
        rejected_log_sum_sq: The same for ``rejected``.
    """
    log_weight = torch.zeros_like(chosen.total)
    for side, log_sum_sq in ((chosen, chosen_log_sum_sq), (rejected, rejected_log_sum_sq)):
        aligned = torch.zeros_like(side.total).index_add(0, side.row, side.token - log_sum_sq)
        log_weight = log_weight + aligned / side.length.clamp_min(1)
    return log_weight.exp()
