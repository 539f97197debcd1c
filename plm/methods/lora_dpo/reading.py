"""Both responses of pairs, read by a policy and by its reference.

Axes: B pairs or texts, P numbers of one adapter, K bases, n response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plm.backbones import Policy, Prefix, PrefixShape, TokenFacts
from plm.functional import SequenceLogps, response_logps
from plm.methods.lora_dpo.adapters import Owned
from plm.methods.lora_dpo.options import LossOptions
from plm.methods.lora_dpo.pairs import PairLogps, pair_totals, wpo_weights
from plm.types import Tokens


class Side(NamedTuple):
    """One response of every pair as a policy reads it."""

    logps: SequenceLogps
    facts: TokenFacts | None


class PairReader:
    """Reads pairs with a policy and with its reference.

    Args:
        policy: The policy.
        reference: Gives its reference.
        loss_reference: Gives the reference of the loss.
        options: What the losses need.
        shape: What a prefix looks like; None where adapters steer the policy.
        share_prompts: Whether the prompt of a pair is read once.
        in_chunks: Reads a number of each text, see `plm.method.network.NetworkMethod.in_chunks`.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Callable[[], Policy],
        loss_reference: Callable[[], Policy],
        options: LossOptions,
        shape: PrefixShape | None,
        *,
        share_prompts: bool,
        in_chunks: Callable[[Tokens, Callable[[Tokens, Tensor], Tensor]], Tensor],
    ) -> None:
        self.policy, self.reference, self.loss_reference = policy, reference, loss_reference
        self.options, self.shape = options, shape
        self.share_prompts, self.in_chunks = share_prompts, in_chunks

    def steering(self, owned: Sequence[Owned], num_rows: int) -> tuple[list[Tensor], Prefix | None]:
        """What a forward pass of ``num_rows`` texts takes: adapters, or a prefix."""
        flat = [adapters.groups() for adapters in owned]
        return (flat, None) if self.shape is None or not flat else ([], self.shape.prefix(flat[0], num_rows))

    # ------------------------------------------------------------------ pairs
    def sides(
        self, policy: Policy, owned: Sequence[Owned], chosen: Tokens, rejected: Tokens, *, with_facts: bool = False
    ) -> tuple[Side, Side]:
        """Both responses of B pairs, chosen and rejected, as ``policy`` reads them with the sum of adapters."""
        num_pairs, num_chosen = chosen.num_rows, int(chosen.completion_mask.sum())
        if not self.share_prompts:
            owned = [adapters.twice() for adapters in owned]
        adapters, prefix = self.steering(owned, num_pairs if self.share_prompts else 2 * num_pairs)
        with policy.adapted(*adapters):
            if self.share_prompts:
                hidden, token, row = policy.shared_completions(chosen, rejected, prefix)
            else:
                hidden, token, row = policy.completions(Tokens.cat([chosen, rejected]), prefix)
            logps, facts = policy.token_logps(hidden, token, with_facts=with_facts)
        total, length, _, _ = response_logps(logps, row, 2 * num_pairs)

        def side(pairs: slice, tokens: slice) -> Side:
            sums = SequenceLogps(total[pairs], length[pairs], logps[tokens], row[tokens] - pairs.start)
            return Side(sums, None if facts is None else TokenFacts(*(fact[tokens] for fact in facts)))

        return (
            side(slice(0, num_pairs), slice(0, num_chosen)),
            side(slice(num_pairs, 2 * num_pairs), slice(num_chosen, len(row))),
        )

    @torch.no_grad()
    def reference_totals(self, chosen: Tokens, rejected: Tokens) -> tuple[Tensor, Tensor]:
        """Log-probabilities of B pairs under the reference of the loss: brought by the data, or read."""
        if self.options.ld_alpha is None and chosen.ref_logps is not None and rejected.ref_logps is not None:
            return chosen.ref_logps, rejected.ref_logps
        first, second = self.sides(self.loss_reference(), (), chosen, rejected)
        return pair_totals(first.logps, second.logps, self.options.ld_alpha)

    def pairs(
        self, owned: Sequence[Owned], chosen: Tokens, rejected: Tokens, group: Tensor | None, *, with_facts: bool
    ) -> tuple[PairLogps, list[TokenFacts]]:
        """Log-probabilities of B pairs under policy and reference, and facts about both sides where asked for."""
        reference = self.reference_totals(chosen, rejected)
        with_facts |= self.options.use_weighting
        first, second = self.sides(self.policy, owned, chosen, rejected, with_facts=with_facts)
        weight = None
        if first.facts is not None and second.facts is not None and self.options.use_weighting:
            weight = wpo_weights(first.logps, second.logps, first.facts.log_sum_sq, second.facts.log_sum_sq)
        logps = PairLogps(
            *pair_totals(first.logps, second.logps, self.options.ld_alpha),
            *reference,
            first.logps.length,
            second.logps.length,
            chosen_nll=-first.logps.total,
            rejected_nll=-second.logps.total,
            group=group,
            wpo_weight=weight,
        )
        return logps, [side.facts for side in (first, second) if side.facts is not None]

    def mixed_pairs(self, bases: Tensor, weights: Tensor, chosen: Tokens, rejected: Tokens, group: Tensor) -> PairLogps:
        """Log-probabilities of B pairs under ``bases`` ``(K, P)``, mixed by weights ``(B, K)``."""
        reference = self.reference_totals(chosen, rejected)
        totals = []
        for base in torch.split(bases, 1):
            first, second = self.sides(self.policy, [Owned(base)], chosen, rejected)
            summed = pair_totals(first.logps, second.logps, self.options.ld_alpha)
            totals.append(torch.stack([*summed, -first.logps.total, -second.logps.total]))
        mixed_chosen, mixed_rejected, chosen_nll, rejected_nll = (torch.stack(totals, -1) * weights).sum(-1).unbind(0)
        lengths = first.logps.length, second.logps.length
        return PairLogps(mixed_chosen, mixed_rejected, *reference, *lengths, chosen_nll, rejected_nll, group)

    # ------------------------------------------------------------------ single responses
    @torch.no_grad()
    def with_reference(self, tokens: Tokens) -> Tokens:
        """Texts with their log-probability under the reference, read where the data bring none."""
        if tokens.ref_logps is not None:
            return tokens
        return tokens._replace(ref_logps=self._totals(self.reference(), (), tokens))

    @torch.no_grad()
    def rewards(self, owned: Sequence[Owned], tokens: Tokens) -> Tensor:
        """``beta`` times the log-ratio of policy to reference of B responses: ``(B,)``."""
        reference = self.with_reference(tokens).ref_logps
        assert reference is not None
        return self.options.beta * (self._totals(self.policy, owned, tokens) - reference)

    @torch.no_grad()
    def base_rewards(self, bases: Tensor, tokens: Tokens) -> Tensor:
        """Rewards of B responses under each of ``bases`` ``(K, P)``: ``(B, K)``."""
        tokens = self.with_reference(tokens)
        return torch.stack([self.rewards([Owned(base)], tokens) for base in torch.split(bases, 1)], -1)

    def _totals(self, policy: Policy, owned: Sequence[Owned], tokens: Tokens) -> Tensor:
        """Log-probabilities ``(B,)`` of responses as ``policy`` reads them with the sum of adapters."""

        def read(part: Tokens, rows: Tensor) -> Tensor:
            adapters, prefix = self.steering([adapters.take(rows) for adapters in owned], len(rows))
            with policy.adapted(*adapters):
                hidden, token, row = policy.completions(part, prefix)
                return response_logps(policy.token_logps(hidden, token)[0], row, len(rows)).total

        return self.in_chunks(tokens, read)
