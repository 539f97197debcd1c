"""Losses of DPO against the papers' formulas, pair by pair in plain Python floats, and against closed forms."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from plm.backbones import TokenFacts, token_facts
from plm.functional import SequenceLogps
from plm.methods.lora_dpo import adapters, adapting, losses, pairs
from plm.methods.lora_dpo.losses import DIVERGENCES, LOSSES, labelled_losses, preference_losses
from plm.methods.lora_dpo.metrics import reward_metrics, token_metrics
from plm.methods.lora_dpo.options import REVERSE_KL_ONLY, SMOOTHED, SORTING, Divergence, LossOptions, LossType
from plm.methods.lora_dpo.pairs import PairLogps, pair_totals, wpo_weights
from tests.logps import sequence_logps

BETA, SMOOTHING, TAU, COEF = 0.3, 0.15, 0.4, 0.25
CHOSEN = (-9.0, -4.5, -12.25, -7.0, -3.125, -20.0)
REJECTED = (-11.0, -4.0, -10.0, -15.5, -2.5, -14.0)
REF_CHOSEN = (-10.5, -4.75, -9.0, -8.0, -3.5, -16.0)
REF_REJECTED = (-9.75, -6.0, -11.5, -13.0, -2.0, -15.0)
CHOSEN_LENGTH = (4, 2, 5, 3, 1, 9)
REJECTED_LENGTH = (5, 2, 4, 7, 1, 6)
COUNT = len(CHOSEN)


def table(**more: Any) -> PairLogps:
    numbers = (torch.tensor(column, dtype=torch.float64) for column in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED))
    return PairLogps(*numbers, torch.tensor(CHOSEN_LENGTH), torch.tensor(REJECTED_LENGTH), **more)


def options_of(name: LossType, **more: Any) -> LossOptions:
    given = {"beta": BETA, "label_smoothing": SMOOTHING if name in SMOOTHED else 0.0, **more}
    return LossOptions((name,), **given, discopop_tau=TAU if name == "discopop" else LossOptions.discopop_tau)


def chance(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_chance(x: float) -> float:
    return math.log(chance(x))


# ---------------------------------------------------------------------- the formulas of the papers
def smoothed(x: float) -> float:
    return -(1 - SMOOTHING) * log_chance(x) - SMOOTHING * log_chance(-x)


def written_exo(m: float) -> float:
    return sum(q * (math.log(q) - math.log(p)) for q, p in ((chance(m), 1 - SMOOTHING), (chance(-m), SMOOTHING)))


def written_discopop(m: float) -> float:
    gate = chance(m / TAU)
    return (1 - gate) * -log_chance(m) + gate * math.exp(-m)


OF_MARGIN: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda m: -log_chance(m),
    "hinge": lambda m: max(0.0, 1 - m),
    "conservative": smoothed,
    "robust": lambda m: (-(1 - SMOOTHING) * log_chance(m) + SMOOTHING * log_chance(-m)) / (1 - 2 * SMOOTHING),
    "exo_pair": written_exo,
    "discopop": written_discopop,
}
"""Losses of ``m = beta * (s_w - s_l)``."""

OF_MEAN_SCORES: dict[str, Callable[[float, float], float]] = {
    "ipo": lambda w, ell: (w - ell - 1 / (2 * BETA)) ** 2,
    "sigmoid_norm": lambda w, ell: -log_chance(BETA * w - BETA * ell),
}
"""Losses of scores divided by lengths."""

OF_RATIOS: dict[str, Callable[[float, float], float]] = {
    "nca_pair": lambda w, ell: -log_chance(BETA * w) - 0.5 * log_chance(-BETA * w) - 0.5 * log_chance(-BETA * ell),
    "bco_pair": lambda w, ell: -log_chance(BETA * w) - log_chance(-BETA * ell),
    "sppo_hard": lambda w, ell: (w - 1 / (2 * BETA)) ** 2 + (ell + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda w, ell: 1 - chance(BETA * w) + chance(BETA * ell),
    "apo_down": lambda w, ell: chance(BETA * w) + 1 - chance(BETA * (w - ell)),
}
"""Losses of the two log-ratios."""

WRITTEN_DIVERGENCES: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda u: u,
    "forward_kl": lambda u: 1 - 1 / math.exp(u),
    "js_divergence": lambda u: math.log(2 * math.exp(u) / (1 + math.exp(u))),
    "alpha_divergence": lambda u: (math.exp(u) ** (COEF - 1) - 1) / (COEF - 1),
}
"""f'(t) at log t."""


def written(name: str, divergence: str = "reverse_kl") -> list[float]:
    """Every pair's loss, read off the tables above."""
    derivative = WRITTEN_DIVERGENCES[divergence]
    found = []
    for w, ell, w0, l0, w_len, l_len in zip(
        CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, strict=True
    ):
        if name in OF_MARGIN:
            found.append(OF_MARGIN[name](BETA * (derivative(w - w0) - derivative(ell - l0))))
        elif name in OF_MEAN_SCORES:
            found.append(OF_MEAN_SCORES[name](derivative(w - w0) / w_len, derivative(ell - l0) / l_len))
        else:
            found.append(OF_RATIOS[name](w - w0, ell - l0))
    return found


@pytest.mark.parametrize("name", [*OF_MARGIN, *OF_MEAN_SCORES, *OF_RATIOS])
def test_a_pair_costs_what_the_paper_says(name: LossType) -> None:
    options = options_of(name)
    assert options.problems() == []
    assert preference_losses(table(), options).tolist() == pytest.approx(written(name), abs=1e-10)


@pytest.mark.parametrize("divergence", [name for name in WRITTEN_DIVERGENCES if name != "reverse_kl"])
@pytest.mark.parametrize("name", [*OF_MARGIN, *OF_MEAN_SCORES])
def test_a_divergence_changes_the_scores(name: LossType, divergence: Divergence) -> None:
    options = options_of(name, f_divergence_type=divergence)
    if divergence == "alpha_divergence":
        options = replace(options, f_alpha_divergence_coef=COEF)
    assert options.problems() == []
    assert preference_losses(table(), options).tolist() == pytest.approx(written(name, divergence), abs=1e-10)


def test_every_name_has_a_function_and_every_function_a_test() -> None:
    assert set(LOSSES) == set(get_args(LossType)) == {*OF_MARGIN, *OF_MEAN_SCORES, *OF_RATIOS, *SORTING, "sft"}
    assert set(DIVERGENCES) == set(get_args(Divergence)) == set(WRITTEN_DIVERGENCES)
    assert REVERSE_KL_ONLY == {*OF_RATIOS, *SORTING}


def test_a_policy_that_is_its_reference_costs_the_constant_of_the_loss() -> None:
    """Closed forms at log-ratios 0."""
    same = table()._replace(ref_chosen=table().chosen, ref_rejected=table().rejected)
    expected: dict[LossType, float] = {
        "sigmoid": math.log(2),
        "sigmoid_norm": math.log(2),
        "conservative": math.log(2),
        "robust": math.log(2),
        "hinge": 1.0,
        "ipo": 1 / (4 * BETA**2),
        "exo_pair": -math.log(2) - 0.5 * math.log(SMOOTHING * (1 - SMOOTHING)),
        "discopop": 0.5 * math.log(2) + 0.5,
        "nca_pair": 2 * math.log(2),
        "bco_pair": 2 * math.log(2),
        "sppo_hard": 1 / (2 * BETA**2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "aot": math.log(2),
    }
    for name, value in expected.items():
        assert preference_losses(same, options_of(name)).tolist() == pytest.approx([value] * COUNT, abs=1e-12), name


def test_alpha_divergence_contains_both_directions_of_kl() -> None:
    ratio = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for coef, name in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        options = LossOptions(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coef)
        found = DIVERGENCES["alpha_divergence"](ratio, options)
        assert found.tolist() == pytest.approx([WRITTEN_DIVERGENCES[name](u) for u in ratio.tolist()], abs=1e-12)


def test_terms_are_weighted_and_added() -> None:
    options = LossOptions(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.5), beta=BETA)
    mean_length = sum(CHOSEN_LENGTH) / COUNT
    expected = [
        0.8 * one + 0.2 * two - 1.5 * logps / mean_length
        for one, two, logps in zip(written("sigmoid"), written("bco_pair"), CHOSEN, strict=True)
    ]
    assert preference_losses(table(), options).tolist() == pytest.approx(expected, abs=1e-10)
    unweighted = preference_losses(table(), replace(options, loss_weights=None))
    assert unweighted.tolist() == preference_losses(table(), replace(options, loss_weights=(1.0, 1.0, 1.0))).tolist()


def test_conservative_is_the_expected_loss_and_robust_undoes_flipped_labels() -> None:
    """Robust DPO: its mean over flips at the assumed rate is the clean loss (arXiv 2403.00409)."""
    one = table()
    swapped = one._replace(
        chosen=one.rejected, rejected=one.chosen, ref_chosen=one.ref_rejected, ref_rejected=one.ref_chosen
    )
    clean, flipped = (preference_losses(side, options_of("sigmoid")) for side in (table(), swapped))
    conservative = preference_losses(table(), options_of("conservative"))
    assert torch.allclose(conservative, (1 - SMOOTHING) * clean + SMOOTHING * flipped, atol=1e-12)
    robust, robust_flipped = (preference_losses(side, options_of("robust")) for side in (table(), swapped))
    assert torch.allclose((1 - SMOOTHING) * robust + SMOOTHING * robust_flipped, clean, atol=1e-12)


def test_bco_shifts_both_rewards() -> None:
    shift = torch.linspace(-1, 1, COUNT, dtype=torch.float64)
    expected = [
        -log_chance(BETA * (w - w0) - d) - log_chance(-(BETA * (ell - l0) - d))
        for w, ell, w0, l0, d in zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, shift.tolist(), strict=True)
    ]
    assert preference_losses(table(reward_shift=shift), options_of("bco_pair")).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------- losses of a group
GROUP = torch.tensor([3, 0, 3, 0, 0, 3])


def rows(of: PairLogps, keep: Tensor) -> PairLogps:
    return PairLogps(*(None if value is None else value[keep] for value in of))  # type: ignore[arg-type]


def written_aot(name: str, keep: list[int]) -> list[float]:
    """Losses of the pairs ``keep`` alone, by sorting lists; the k-th smallest is credited to the pair that has it."""
    if name == "aot":
        upper, lower = [CHOSEN[i] - REJECTED[i] for i in keep], [REF_CHOSEN[i] - REF_REJECTED[i] for i in keep]
    else:
        upper, lower = [CHOSEN[i] - REF_CHOSEN[i] for i in keep], [REJECTED[i] - REF_REJECTED[i] for i in keep]
    return [smoothed(BETA * (value - sorted(lower)[sorted(upper).index(value)])) for value in upper]


@pytest.mark.parametrize("name", sorted(SORTING))
def test_aot_holds_sorted_values_against_each_other(name: LossType) -> None:
    found = preference_losses(table(), options_of(name)).tolist()
    assert found == pytest.approx(written_aot(name, list(range(COUNT))), abs=1e-10)


@pytest.mark.parametrize("name", [*sorted(SORTING), "sft"])
def test_a_group_costs_what_it_costs_alone(name: LossType) -> None:
    """So that users who train in one batch train as if each trained alone."""
    together = preference_losses(table(group=GROUP), options_of(name))
    for value in (0, 3):
        keep = GROUP == value
        assert torch.allclose(together[keep], preference_losses(rows(table(), keep), options_of(name)), atol=1e-12)
        if name in SORTING:
            assert together[keep].tolist() == pytest.approx(written_aot(name, keep.nonzero()[:, 0].tolist()))
    assert not torch.allclose(together, preference_losses(table(), options_of(name)))


def test_sft_is_the_mean_over_all_chosen_tokens() -> None:
    assert preference_losses(table(), options_of("sft")).mean().item() == pytest.approx(
        -sum(CHOSEN) / sum(CHOSEN_LENGTH), abs=1e-12
    )
    plain = torch.arange(1.0, COUNT + 1).double()  # what sft reads where the other losses read discounted sums
    found = preference_losses(table(chosen_nll=plain), options_of("sft")).mean().item()
    assert found == pytest.approx(21 / sum(CHOSEN_LENGTH), abs=1e-12)


@pytest.mark.parametrize("name", [*sorted(SORTING), "sft", "sigmoid", "ipo"])
@pytest.mark.parametrize("group", [None, GROUP])
def test_a_tie_is_the_mean_of_both_orders_of_the_ties_alone(name: LossType, group: Tensor | None) -> None:
    """Each order written out as a batch of its own, in which the other pairs stay as they are."""
    tie = torch.tensor([True, False, False, True, False, True])
    groups = [list(range(COUNT))] if group is None else [(group == value).nonzero()[:, 0].tolist() for value in (0, 3)]
    orders = []
    for turned in (False, True):

        def both(one: Sequence[float], two: Sequence[float], turned: bool = turned) -> list[list[float]]:
            pairs = [(b, a) if turned and tie[row] else (a, b) for row, (a, b) in enumerate(zip(one, two, strict=True))]
            return [list(side) for side in zip(*pairs, strict=True)]

        (win, lose), (ref_win, ref_lose) = both(CHOSEN, REJECTED), both(REF_CHOSEN, REF_REJECTED)
        win_length, lose_length = both(CHOSEN_LENGTH, REJECTED_LENGTH)
        costs = [0.0] * COUNT
        for keep in groups:
            upper, lower = [win[i] - ref_win[i] for i in keep], [lose[i] - ref_lose[i] for i in keep]
            if name == "aot":
                upper, lower = [win[i] - lose[i] for i in keep], [ref_win[i] - ref_lose[i] for i in keep]
            for place, i in enumerate(keep):
                ratios = win[i] - ref_win[i], lose[i] - ref_lose[i]
                costs[i] = {
                    "sft": -win[i] * len(keep) / sum(win_length[j] for j in keep),
                    "sigmoid": -log_chance(BETA * (ratios[0] - ratios[1])),
                    "ipo": (ratios[0] / win_length[i] - ratios[1] / lose_length[i] - 0.5 / BETA) ** 2,
                }.get(name, smoothed(BETA * (upper[place] - sorted(lower)[sorted(upper).index(upper[place])])))
        orders.append(costs)
    expected = [(one + two) / 2 for one, two in zip(*orders, strict=True)]
    nll = {"chosen_nll": -table().chosen, "rejected_nll": -table().rejected}
    found = labelled_losses(table(group=group, **nll), tie, options_of(name))
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


def test_gradients_reach_the_policy_and_equal_differences() -> None:
    """All losses in float64, sorted ones too."""
    for name in get_args(LossType):
        for group in (None, GROUP):

            def total(chosen: Tensor, rejected: Tensor, name: LossType = name, group: Tensor | None = group) -> Tensor:
                changed = table(group=group)._replace(chosen=chosen, rejected=rejected)
                return preference_losses(changed, options_of(name)).sum()

            inputs = [value.clone().requires_grad_() for value in (table().chosen, table().rejected)]
            assert torch.autograd.gradcheck(total, inputs), name


@pytest.mark.parametrize("far", [-1e4, -300.0, 300.0, 1e4])
def test_losses_and_gradients_stay_finite_far_out(far: float) -> None:
    """In float32: exponentials neither overflow nor meet a zero as 0 * inf."""
    cases = [options_of(name) for name in get_args(LossType)]
    cases += [LossOptions(f_divergence_type=divergence) for divergence in get_args(Divergence)]
    for options in cases:
        chosen = torch.full((2,), far, requires_grad=True)
        zero, length = torch.zeros(2), torch.tensor([3, 4])
        value = preference_losses(PairLogps(chosen, -chosen, zero, zero, length, length), options)
        (slope,) = torch.autograd.grad(value.sum(), chosen)
        assert value.isfinite().all() and slope.isfinite().all(), options


# ---------------------------------------------------------------------- from tokens to pairs
def listed(rows: list[list[float]], order: list[int] | None = None) -> SequenceLogps:
    """Token log-probabilities per response, listed response by response or in a mixed ``order`` of rows."""
    flat = [(row, value) for row, values in enumerate(rows) for value in values]
    if order is not None:
        streams = [iter(values) for values in rows]
        flat = [(row, next(streams[row])) for row in order]
    row, token = (torch.tensor(column) for column in zip(*flat, strict=True))
    total = torch.tensor([math.fsum(values) for values in rows]).double()
    return SequenceLogps(total, torch.tensor([len(values) for values in rows]), token.double(), row)


SHORT = [[-1.0, -2.0], [-0.5, -0.25, -4.0]]
LONG = [[-3.0, -1.5, -7.0, -2.0], [-6.0]]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, None])
def test_ld_dpo_discounts_the_tail_of_the_longer_response(alpha: float | None) -> None:
    weight = 1.0 if alpha is None else alpha
    chosen, rejected = pair_totals(listed(SHORT), listed(LONG), alpha)
    assert chosen.tolist() == pytest.approx([-3.0, -0.5 - weight * 4.25])
    assert rejected.tolist() == pytest.approx([-4.5 - weight * 9.0, -6.0])


def test_tokens_of_several_responses_may_be_listed_in_any_order_of_rows() -> None:
    mixed = listed(LONG, order=[0, 1, 0, 0, 0])
    assert [value.tolist() for value in pair_totals(listed(SHORT), mixed, 0.3)] == [
        pytest.approx(value.tolist()) for value in pair_totals(listed(SHORT), listed(LONG), 0.3)
    ]


def test_wpo_weights_are_geometric_means_of_aligned_probabilities() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, row = torch.tensor([1, 0, 6, 3, 2]), torch.tensor([0, 0, 1, 1, 1])
    chances = logits.softmax(-1)
    aligned = [float(p[t] / (p * p).sum()) for p, t in zip(chances, token.tolist(), strict=True)]
    first, second = math.sqrt(aligned[0] * aligned[1]), (aligned[2] * aligned[3] * aligned[4]) ** (1 / 3)
    side = sequence_logps(logits, token, row, 2)
    log_sum_sq = token_facts(logits, token).log_sum_sq
    assert wpo_weights(side, side, log_sum_sq, log_sum_sq).tolist() == pytest.approx([first**2, second**2])
    uniform = sequence_logps(torch.zeros(5, 7), token, row, 2)
    flat = token_facts(torch.zeros(5, 7), token).log_sum_sq
    assert wpo_weights(uniform, uniform, flat, flat).tolist() == pytest.approx([1.0, 1.0])


def test_wpo_weights_multiply_each_pairs_loss() -> None:
    weight = torch.arange(COUNT).double()
    options = LossOptions(("sigmoid", "hinge"), beta=BETA, use_weighting=True)
    plain = preference_losses(table(), replace(options, use_weighting=False))
    assert torch.allclose(preference_losses(table(wpo_weight=weight), options), weight * plain)


# ---------------------------------------------------------------------- metrics
def test_rewards_are_scaled_log_ratios_and_a_tie_is_not_accurate() -> None:
    tied = table()._replace(rejected=table().chosen, ref_rejected=table().ref_chosen)
    assert reward_metrics(tied, BETA)["rewards/accuracies"] == 0
    found = {name: value.item() for name, value in reward_metrics(table(), BETA).items()}
    wins = [BETA * (w - w0) for w, w0 in zip(CHOSEN, REF_CHOSEN, strict=True)]
    fails = [BETA * (ell - l0) for ell, l0 in zip(REJECTED, REF_REJECTED, strict=True)]
    assert found == pytest.approx(
        {
            "rewards/chosen": sum(wins) / COUNT,
            "rewards/rejected": sum(fails) / COUNT,
            "rewards/accuracies": sum(w > ell for w, ell in zip(wins, fails, strict=True)) / COUNT,
            "rewards/margins": (sum(wins) - sum(fails)) / COUNT,
            "logps/chosen": sum(CHOSEN) / COUNT,
            "logps/rejected": sum(REJECTED) / COUNT,
        }
    )


def test_token_metrics_are_means_over_response_tokens() -> None:
    chosen = token_facts(torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]), torch.tensor([1, 0]))
    rejected = token_facts(torch.tensor([[3.0, 3.0, -6.0]]), torch.tensor([0]))
    assert chosen.entropy[0].item() == pytest.approx(math.log(3))
    found = token_metrics(chosen, rejected, torch.tensor(17))
    assert found["entropy"].item() == pytest.approx(torch.cat([chosen.entropy, rejected.entropy]).mean().item())
    assert found["mean_token_accuracy"].item() == 0.5
    assert found["logits/chosen"].item() == pytest.approx(1.5)
    assert found["logits/rejected"].item() == pytest.approx(0.0)
    assert found["num_tokens"].item() == 17
    none = TokenFacts(*(torch.zeros(0) for _ in range(4)))
    assert all(value.item() == 0 for value in token_metrics(none, none, torch.tensor(0)).values())


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (losses, pairs, adapters, adapting):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted >= 1


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": ("sigmod",)}, "model.loss_type: expected one of sigmoid, .* did you mean 'sigmoid'"),
        ({"loss_type": ()}, "at least one loss"),
        ({"f_divergence_type": "js"}, "model.f_divergence_type: expected one of reverse_kl, .* got 'js'"),
        ({"f_divergence_type": "forwardkl"}, "did you mean 'forward_kl'"),
        ({"label_smoothing": 0.1}, "label_smoothing acts only on .*'conservative'"),
        ({"loss_type": ("robust",), "label_smoothing": 0.5}, r"label_smoothing: expected .* \[0, 0.5\), got 0.5"),
        ({"loss_type": ("exo_pair",)}, "a number > 0 for exo_pair.*0.001"),
        ({"beta": 0.0}, "model.beta: expected a number > 0, got 0.0"),
        ({"beta": math.nan}, "model.beta: expected a number > 0, got nan"),
        ({"loss_type": ("discopop",), "discopop_tau": -1.0}, "model.discopop_tau: expected a number > 0"),
        ({"discopop_tau": 0.1}, "discopop_tau acts only on discopop"),
        ({"loss_weights": (1.0, 2.0)}, r"loss_weights: expected one weight for each of sigmoid, got \[1.0, 2.0\]"),
        ({"ld_alpha": 1.5}, r"ld_alpha: expected a number in \[0, 1\] or null, got 1.5"),
        ({"f_alpha_divergence_coef": 0.3}, "acts only with model.f_divergence_type alpha_divergence"),
        ({"loss_type": ("apo_zero", "sft"), "f_divergence_type": "js_divergence"}, "reverse_kl with apo_zero, got"),
        ({"loss_type": ("aot",), "use_weighting": True}, "use_weighting: expected false with aot"),
    ],
)
def test_what_does_not_fit_is_said(given: dict[str, Any], message: str) -> None:
    (problem,) = LossOptions(**given).problems()
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_all_problems_are_said_at_once() -> None:
    bad = LossOptions(("sigmoid",), loss_weights=(), beta=-1.0, label_smoothing=0.7, ld_alpha=-0.1)
    assert len(bad.problems()) == 5
