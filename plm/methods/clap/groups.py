"""Groups the responses of a batch of pairs by prompt: CLaP learns from a prompt with all its responses.

Axes: B pairs, R distinct texts, G prompts, N responses of a prompt (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plm.types import Tokens


class PromptGroups(NamedTuple):
    """Distinct texts, those of one prompt side by side."""

    tokens: Tokens
    """R texts."""
    group: Tensor
    """``(R,)`` int64 prompt of each."""
    place: Tensor
    """``(R,)`` int64 place of each among those of its prompt."""
    mask: Tensor
    """``(G, N)`` bool, True = a response."""

    @property
    def row(self) -> Tensor:
        """``(G, N)`` int64 text at each place; 0 under the padding."""
        return self.padded(torch.arange(len(self.group), device=self.group.device))

    def padded(self, values: Tensor) -> Tensor:
        """``(R, ...)`` by prompt: ``(G, N, ...)``, zero under the padding."""
        out = values.new_zeros(*self.mask.shape, *values.shape[1:])
        out[self.group, self.place] = values
        return out

    def parts(self, max_tokens: int) -> list[PromptGroups]:
        """Whole prompts, as many together as have ``max_tokens`` tokens when every response meets every latent."""
        count, width = self.mask.sum(-1), self.tokens.input_ids.shape[1]
        cost, first = (count * count * width).tolist(), (count.cumsum(0) - count).tolist()
        parts, start, total = [], 0, 0
        for number, tokens in enumerate(cost):
            if number > start and total + tokens > max_tokens:
                parts.append(self._slice(start, number, first[start], first[number]))
                start, total = number, 0
            total += tokens
        return [*parts, self._slice(start, len(cost), first[start], len(self.group))]

    def _slice(self, start: int, end: int, first: int, last: int) -> PromptGroups:
        mask = self.mask[start:end]
        tokens = self.tokens.map(lambda value: value[first:last]).trimmed()
        return PromptGroups(tokens, self.group[first:last] - start, self.place[first:last], mask[:, mask.any(0)])


def group_by_prompt(tokens: Tokens) -> PromptGroups:
    """Group texts by the tokens of their prompts, a repeated text once; prompts in the order of their first text."""
    prompts: dict[tuple[int, ...], list[int]] = {}
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    parts = zip(*(value.tolist() for value in tokens[:3]), strict=True)
    for row, (ids, attended, completion) in enumerate(parts):
        kept = [(token, response) for token, real, response in zip(ids, attended, completion, strict=True) if real]
        prompt = tuple(token for token, response in kept if not response)
        text = prompt, tuple(token for token, response in kept if response)
        if text not in seen:
            seen.add(text)
            prompts.setdefault(prompt, []).append(row)
    device = tokens.input_ids.device
    sizes = torch.tensor([len(rows) for rows in prompts.values()], device=device)
    rows = torch.tensor([row for rows in prompts.values() for row in rows], device=device)
    group = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    place = torch.arange(len(rows), device=device) - (sizes.cumsum(0) - sizes)[group]
    mask = torch.arange(int(sizes.max()), device=device) < sizes[:, None]
    return PromptGroups(tokens.take(rows).trimmed()._replace(ref_logps=None), group, place, mask)
