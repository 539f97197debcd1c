"""Losses of preference optimisation on log-probabilities of pairs: one short function per paper.

Every loss is one number per pair, ``(B,)``, whose mean over the batch is what the paper minimises, so that callers may
weigh pairs and sum them by user. Four of them are not functions of the pair alone: aot and aot_unpaired compare sorted
batches and sft averages over tokens, all within the groups of `PairLogps.group`; bco_pair reads a running mean.

Notation: w and l are the chosen and the rejected response, u = log t = log policy(y) - log reference(y), and the reward
is beta * f'(t), with f of the divergence that ties policy to reference; the usual one, reverse KL, gives beta * u.

Axes: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.functional import bt_losses
from plm.methods.lora_dpo.options import Divergence, LossOptions, LossType
from plm.methods.lora_dpo.pairs import PairLogps

MAX_EXPONENT = 80.0
"""Exponents of a divergence end here, since e^80 is still finite in float32; TRL bounds those of alpha_divergence."""


def preference_losses(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Weighted sum of the losses of each pair: ``(B,)``.

    Args:
        pairs: Log-probabilities of the batch.
        options: Without `LossOptions.problems`.

    >>> zero, one = torch.zeros(1), torch.ones(1, dtype=torch.long)
    >>> preference_losses(PairLogps(zero, zero, zero, zero, one, one), LossOptions(("sigmoid", "hinge"), (2.0, 0.5)))
    tensor([1.8863])
    """
    weights = options.loss_weights or (1.0,) * len(options.loss_type)
    terms = [weight * LOSSES[name](pairs, options) for name, weight in zip(options.loss_type, weights, strict=True)]
    total = torch.stack(terms).sum(0)
    if options.use_weighting:
        assert pairs.wpo_weight is not None
        total = total * pairs.wpo_weight
    return total


def labelled_losses(pairs: PairLogps, tie: Tensor, options: LossOptions) -> Tensor:
    """`preference_losses` of each pair, ``(B,)``, where a tie has no order: the mean of both orders of all ties.

    A pair that is no tie keeps its order, so that losses of a group hold a tie against the same others in both.

    Args:
        pairs: Log-probabilities of the batch.
        tie: ``(B,)`` bool.
        options: Without `LossOptions.problems`.
    """
    losses = preference_losses(pairs, options)
    chosen_nll, rejected_nll = pairs.chosen_nll, pairs.rejected_nll
    swapped = pairs._replace(
        chosen=torch.where(tie, pairs.rejected, pairs.chosen),
        rejected=torch.where(tie, pairs.chosen, pairs.rejected),
        ref_chosen=torch.where(tie, pairs.ref_rejected, pairs.ref_chosen),
        ref_rejected=torch.where(tie, pairs.ref_chosen, pairs.ref_rejected),
        chosen_length=torch.where(tie, pairs.rejected_length, pairs.chosen_length),
        rejected_length=torch.where(tie, pairs.chosen_length, pairs.rejected_length),
        chosen_nll=None if chosen_nll is None or rejected_nll is None else torch.where(tie, rejected_nll, chosen_nll),
    )
    return (losses + preference_losses(swapped, options)) / 2


# ------------------------------------------------------------------ divergences: u -> f'(e^u)
def reverse_kl(ratio: Tensor, options: LossOptions) -> Tensor:
    """``u``: the divergence of DPO (Rafailov et al., arXiv 2305.18290); f'(t) = log t + 1 without its constant."""
    return ratio


def alpha_divergence(ratio: Tensor, options: LossOptions) -> Tensor:
    """``(t^(a-1) - 1) / (a-1)`` of f-DPO (Wang et al., arXiv 2309.16240), whose alpha is ``1 - a``."""
    return _power(ratio, options.f_alpha_divergence_coef - 1)


def forward_kl(ratio: Tensor, options: LossOptions) -> Tensor:
    """``1 - 1/t`` (f-DPO, with the constant of the alpha-divergence that it is the limit of)."""
    return _power(ratio, -1.0)


def js_divergence(ratio: Tensor, options: LossOptions) -> Tensor:
    """``log 2t/(1+t)`` (f-DPO)."""
    return math.log(2) + F.logsigmoid(ratio)


def _power(ratio: Tensor, power: float) -> Tensor:
    """``(e^(power * u) - 1) / power``, or its limit ``u``."""
    if abs(power) < 1e-6:
        return ratio
    return torch.expm1((power * ratio).clamp_max(MAX_EXPONENT)) / power


DIVERGENCES: dict[Divergence, Callable[[Tensor, LossOptions], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


# ------------------------------------------------------------------ losses of the difference of both rewards
def _rewards(pairs: PairLogps, options: LossOptions) -> tuple[Tensor, Tensor]:
    """``beta * f'`` of both responses, up to a constant of the prompt (f-DPO): ``(B,)`` each."""
    score = DIVERGENCES[options.f_divergence_type]
    return options.beta * score(pairs.chosen_ratio, options), options.beta * score(pairs.rejected_ratio, options)


def _margin(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Reward of chosen minus reward of rejected: ``(B,)``."""
    chosen, rejected = _rewards(pairs, options)
    return chosen - rejected


def _mean_margin(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Margin of the rewards per token of each response: ``(B,)``."""
    chosen, rejected = _rewards(pairs, options)
    return chosen / pairs.chosen_length.clamp_min(1) - rejected / pairs.rejected_length.clamp_min(1)


def _logistic(margin: Tensor, target: float = 1.0) -> Tensor:
    """``-target * log sigmoid(margin) - (1 - target) * log sigmoid(-margin)``: ``(B,)``."""
    return bt_losses(margin, torch.full_like(margin, target))


def sigmoid(pairs: PairLogps, options: LossOptions) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, eq 7): the logistic loss of the margin."""
    return _logistic(_margin(pairs, options))


def sigmoid_norm(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Length-normalised DPO (Lambert et al., Tulu 3, arXiv 2411.15124): rewards per token."""
    return _logistic(_mean_margin(pairs, options))


def conservative(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"): cross-entropy with smoothed labels."""
    return _logistic(_margin(pairs, options), 1 - options.label_smoothing)


def robust(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Robust DPO (Ray Chowdhury et al., arXiv 2403.00409): unbiased if labels are flipped at this rate.

    ``((1 - e) l(m) - e l(-m)) / (1 - 2e)`` with the logistic l is the logistic loss of a target above one.
    """
    smoothing = options.label_smoothing
    return _logistic(_margin(pairs, options), (1 - smoothing) / (1 - 2 * smoothing))


def hinge(pairs: PairLogps, options: LossOptions) -> Tensor:
    """RSO (Liu et al., arXiv 2309.06657), SLiC's hinge (arXiv 2305.10425) on the reward: ``max(0, 1 - margin)``."""
    return F.relu(1 - _margin(pairs, options))


def ipo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, eq 17), tau = beta: ``(h - 1 / (2 tau))^2``.

    h is the difference of log-ratios per token, which is what the authors ran; the paper writes sums.
    """
    return (_mean_margin(pairs, options) / options.beta - 0.5 / options.beta).square()


def exo_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    """EXO with two responses (Ji et al., arXiv 2402.00856, eq 16): reverse KL from policy to smoothed label."""
    margin, smoothing = _margin(pairs, options), options.label_smoothing
    win, lose = F.logsigmoid(margin), F.logsigmoid(-margin)
    return win.exp() * (win - math.log1p(-smoothing)) + lose.exp() * (lose - math.log(smoothing))


def discopop(pairs: PairLogps, options: LossOptions) -> Tensor:
    """DiscoPOP (Lu et al., arXiv 2406.08414, eq 5): ``(1 - g) * logistic + g * e^-margin``, g = sigmoid(margin/tau).

    The exponential is multiplied by its share before it is taken, so that it does not overflow where g vanishes.
    """
    margin = _margin(pairs, options)
    gate = margin / options.discopop_tau
    return torch.sigmoid(-gate) * _logistic(margin) + torch.exp(F.logsigmoid(gate) - margin)


# ------------------------------------------------------------------ losses of each reward by itself
def nca_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    """NCA with two responses (Chen et al., arXiv 2402.05369): noise-contrastive on each reward."""
    chosen, rejected = _rewards(pairs, options)
    return _logistic(chosen) + 0.5 * _logistic(-chosen) + 0.5 * _logistic(-rejected)


def bco_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    """BCO on pairs (Jung et al., arXiv 2404.04656): a classifier of good and bad on shifted rewards."""
    chosen, rejected = _rewards(pairs, options)
    if pairs.reward_shift is not None:
        chosen, rejected = chosen - pairs.reward_shift, rejected - pairs.reward_shift
    return _logistic(chosen) + _logistic(-rejected)


def sppo_hard(pairs: PairLogps, options: LossOptions) -> Tensor:
    """SPPO (Wu et al., arXiv 2405.00675, eq 4.7), win probabilities 1 and 0, 1 / eta = beta."""
    target = 0.5 / options.beta
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


def apo_zero(pairs: PairLogps, options: LossOptions) -> Tensor:
    """APO-zero (D'Oosterlinck et al., arXiv 2408.06266, eq 7): chosen up, rejected down."""
    chosen, rejected = _rewards(pairs, options)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: PairLogps, options: LossOptions) -> Tensor:
    """APO-down (the same, eq 8): both down, rejected more, for chosen responses below the policy's own."""
    chosen, rejected = _rewards(pairs, options)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


# ------------------------------------------------------------------ losses of a group of pairs
def aot(pairs: PairLogps, options: LossOptions) -> Tensor:
    """AOT on pairs (Melnyk et al., arXiv 2406.05882): the policy's margins shall dominate the reference's.

    The k-th smallest ``log pi(w) - log pi(l)`` of a group is held against the k-th smallest of the reference, and the
    loss is credited to the pair that has it under the policy.
    """
    margin = options.beta * _quantile_gap(pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected, pairs)
    return _logistic(margin, 1 - options.label_smoothing)


def aot_unpaired(pairs: PairLogps, options: LossOptions) -> Tensor:
    """AOT without pairing (the same): log-ratios of chosen responses shall dominate those of rejected ones."""
    margin = options.beta * _quantile_gap(pairs.chosen_ratio, pairs.rejected_ratio, pairs)
    return _logistic(margin, 1 - options.label_smoothing)


def sft(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Cross-entropy of chosen responses, whose mean over a group is the mean over all its tokens."""
    nll = -pairs.chosen if pairs.chosen_nll is None else pairs.chosen_nll
    length = pairs.chosen_length.to(nll)
    if pairs.group is None:
        mean = length.mean() if pairs.mean_length is None else pairs.mean_length.to(nll)
        return nll / mean.clamp_min(torch.finfo(nll.dtype).tiny)
    same = (pairs.group[:, None] == pairs.group).to(nll)  # (B, B)
    mean_length = same @ length / same.sum(-1)
    return nll / mean_length.clamp_min(torch.finfo(nll.dtype).tiny)


def _quantile_gap(upper: Tensor, lower: Tensor, pairs: PairLogps) -> Tensor:
    """k-th smallest of ``upper`` minus k-th smallest of ``lower`` in each group, at the k-th of ``upper``: ``(B,)``."""
    by_upper, by_lower = _sorted_rows(upper, pairs.group), _sorted_rows(lower, pairs.group)
    return torch.empty_like(upper).scatter(0, by_upper, upper[by_upper] - lower[by_lower])


def _sorted_rows(values: Tensor, group: Tensor | None) -> Tensor:
    """Rows in ascending order of group, and within a group of value: ``(B,)``."""
    order = torch.argsort(values.detach())
    return order if group is None else order[torch.argsort(group[order], stable=True)]


LOSSES: dict[LossType, Callable[[PairLogps, LossOptions], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "conservative": conservative,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sft": sft,
}
