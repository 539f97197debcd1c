"""Types that cross the borders of modules: tokens, contexts, user states and batches.

Axes: B pairs in a batch, T tokens, U users, S support pairs of one user (padded), D feature width.

Batches are NamedTuples because Lightning refuses frozen dataclasses and pinned memory ignores dataclasses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

UserId = str | int
"""Who: a text, or an integer, which is stored as its digits."""


def id_text(user_id: object) -> str:
    """An id as it is stored.

    Raises:
        ValueError: If it is neither a text nor an integer.
    """
    if isinstance(user_id, bool) or not isinstance(user_id, str | Integral):
        raise ValueError(f"expected the id of a user as a text or an integer, got {user_id!r}")
    return str(user_id)


class Tokens(NamedTuple):
    """Token ids of rendered (prompt, response) texts."""

    input_ids: Tensor
    """``(B, T)`` int64."""
    attention_mask: Tensor
    """``(B, T)`` bool, True = a real token."""
    completion_mask: Tensor
    """``(B, T)`` bool, True = a token of the response."""
    ref_logps: Tensor | None = None
    """``(B,)`` summed log-probability of the response under the reference policy, where the data bring it."""

    @property
    def num_rows(self) -> int:
        """Number of texts, B."""
        return self.input_ids.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply a function to every tensor."""
        ref_logps = None if self.ref_logps is None else change(self.ref_logps)
        return Tokens(change(self.input_ids), change(self.attention_mask), change(self.completion_mask), ref_logps)

    def to(self, device: torch.device) -> Tokens:
        """The same texts on a device."""
        return self.map(lambda value: value.to(device))

    def take(self, rows: Tensor) -> Tokens:
        """Gather texts: ``(n,)`` int64 rows, or a mask ``(B,)``."""
        return self.map(lambda value: value[rows])

    def trimmed(self) -> Tokens:
        """Leave out columns that are padding in every row."""
        used = self.attention_mask.flatten(0, -2).any(0)
        return Tokens(
            self.input_ids[..., used], self.attention_mask[..., used], self.completion_mask[..., used], self.ref_logps
        )

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Stack texts, padding the shorter batches on the right."""
        width = max(part.input_ids.shape[1] for part in parts)

        def stack(values: Sequence[Tensor]) -> Tensor:
            return torch.cat([torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values])

        refs = [part.ref_logps for part in parts if part.ref_logps is not None]
        return Tokens(
            stack([part.input_ids for part in parts]),
            stack([part.attention_mask for part in parts]),
            stack([part.completion_mask for part in parts]),
            torch.cat(refs) if len(refs) == len(parts) else None,
        )


def take_rows(values: Tensor | Tokens | None, rows: Tensor) -> Tensor | Tokens | None:
    """Gather features or tokens: int64 rows of any shape, or a mask; None stays None."""
    return _mapped(values, lambda value: value[rows])


def _mapped(values: Tensor | Tokens | None, change: Callable[[Tensor], Tensor]) -> Tensor | Tokens | None:
    """Change features, or every tensor of tokens; None stays None."""
    return values.map(change) if isinstance(values, Tokens) else None if values is None else change(values)


def _features(chosen: Tensor | Tokens, rejected: Tensor | Tokens) -> tuple[Tensor, Tensor]:
    """Both sides of pairs as features, or an error that says what to set."""
    if isinstance(chosen, Tensor) and isinstance(rejected, Tensor):
        return chosen, rejected
    raise ValueError("expected pairs of features, got tokens; set data.backbone to one that gives features")


def _tokens(chosen: Tensor | Tokens, rejected: Tensor | Tokens) -> tuple[Tokens, Tokens]:
    """Both sides of pairs as tokens, or an error that says what to set."""
    if isinstance(chosen, Tokens) and isinstance(rejected, Tokens):
        return chosen, rejected
    raise ValueError("expected pairs of tokens, got features; set data.backbone to a plm.backbones.CausalLM")


class Context(NamedTuple):
    """The pairs from which unseen users are adapted, padded to the longest user."""

    chosen: Tensor | Tokens
    """``(U, S, D)`` features of the preferred responses, or tokens ``(U, S, T)``; padding rows hold zeros."""
    rejected: Tensor | Tokens
    """The same for the other responses."""
    mask: Tensor
    """``(U, S)`` bool, True = a real pair."""
    weight: Tensor
    """``(U, S)`` non-negative pair weights; 1 where the corpus gives none."""
    prompt: Tensor | Tokens | None = None
    """``(U, S, D)`` features of the prompts, or their tokens, for methods that read them."""
    tie: Tensor | None = None
    """``(U, S)`` bool, True = the user found both responses equally good."""

    @property
    def num_users(self) -> int:
        """Number of users, U."""
        return self.mask.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Context:
        """Apply a function to every tensor, those of tokens too."""
        parts: list[Any] = [_mapped(value, change) for value in self]
        return Context(*parts)

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of both responses, for a method whose view is ``features`` or ``latents``.

        Raises:
            ValueError: If the pairs hold tokens.
        """
        return _features(self.chosen, self.rejected)

    @property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """Tokens of both responses, for a method whose view is ``tokens``.

        Raises:
            ValueError: If the pairs hold features.
        """
        return _tokens(self.chosen, self.rejected)

    @property
    def pairs(self) -> PreferenceBatch:
        """The real pairs as a flat batch, user by user; ``user_index`` holds rows of this context."""
        sides: Any = (take_rows(side, self.mask) for side in (self.chosen, self.rejected, self.prompt))
        tie = torch.zeros_like(self.mask) if self.tie is None else self.tie
        chosen, rejected, prompt = sides
        user = self.mask.nonzero()[:, 0]
        return PreferenceBatch(chosen, rejected, user, self.weight[self.mask], tie[self.mask], prompt)

    @property
    def difference(self) -> Tensor:
        """Features of the preferred response less those of the other: ``(U, S, D)``.

        Raises:
            ValueError: If the pairs hold tokens.
        """
        chosen, rejected = self.features
        return chosen - rejected


POSTERIORS = (("mean", "log_var"), ("weights", "precision"), ("weights", "log_precision"))
"""Tensors of a user's state that are a posterior: where it is, and how wide."""


class UserState(NamedTuple):
    """What a method knows about U users: named tensors with a leading user axis."""

    tensors: dict[str, Tensor]
    """name -> ``(U, ...)``; empty for a method without a personal part."""
    num_pairs: Tensor
    """``(U,)`` int64, how many pairs the state was fitted on; 0 for the population."""

    @property
    def num_users(self) -> int:
        """Number of users, U."""
        return self.num_pairs.shape[0]

    def take(self, rows: Tensor) -> UserState:
        """Gather rows: ``(B,)`` int64 -> a state whose leading axis is B."""
        return UserState({name: value[rows] for name, value in self.tensors.items()}, self.num_pairs[rows])

    def detach(self) -> UserState:
        """Cut every tensor from the autograd graph."""
        return UserState({name: value.detach() for name, value in self.tensors.items()}, self.num_pairs.detach())

    def to(self, device: torch.device | str) -> UserState:
        """Move every tensor to ``device``."""
        return UserState({name: value.to(device) for name, value in self.tensors.items()}, self.num_pairs.to(device))

    @staticmethod
    def cat(states: Sequence[UserState]) -> UserState:
        """Stack the users of several states of one method."""
        names = states[0].tensors
        return UserState(
            {name: torch.cat([state.tensors[name] for state in states]) for name in names},
            torch.cat([state.num_pairs for state in states]),
        )


class PreferenceBatch(NamedTuple):
    """B preference pairs, each with the user who stated it."""

    chosen: Tensor | Tokens
    """``(B, D)`` features, or tokens, of the preferred response together with its prompt."""
    rejected: Tensor | Tokens
    """The same for the other response."""
    user_index: Tensor
    """``(B,)`` int64 row of a *seen* user in the training table, -1 if unseen."""
    weight: Tensor
    """``(B,)`` loss weights, of mean one over the whole split."""
    tie: Tensor
    """``(B,)`` bool, True = the user found both responses equally good."""
    prompt: Tensor | Tokens | None = None
    """``(B, D)`` features of the prompt alone, only when the datamodule is asked for them."""
    chosen_score: Tensor | None = None
    """``(B,)`` graded score of the preferred response where the corpus has one, else nan."""
    rejected_score: Tensor | None = None
    """``(B,)`` graded score of the other response."""
    user_row: Tensor | None = None
    """``(B,)`` int64 row among *all* users of the datamodule, seen or not: the key of per-user metrics."""
    context: Context | None = None
    """Support pairs of the unseen users of this batch (and of their other-user controls)."""
    context_row: Tensor | None = None
    """``(B,)`` int64 row inside ``context``."""
    other_index: Tensor | None = None
    """``(B,)`` int64 row of a random other seen user, for the other-user control."""
    other_row: Tensor | None = None
    """``(B,)`` int64 row inside ``context`` of a random other unseen user."""
    num_shots: Tensor | None = None
    """``(B,)`` int64, requested support pairs per user: set on batches of the few-shot curve only."""
    repeat: Tensor | None = None
    """``(B,)`` int64, which random draw of the support this is: set with ``num_shots``."""
    pair_row: Tensor | None = None
    """``(B,)`` int64 row of the datamodule's table: set with ``user_row``."""

    @property
    def num_pairs(self) -> int:
        """Number of pairs, B."""
        return self.user_index.shape[0]

    def take(self, rows: Tensor) -> PreferenceBatch:
        """Gather pairs, beside the same context: ``(n,)`` int64 rows, or a mask ``(B,)``."""
        fields: dict[str, Any] = {
            name: take_rows(value, rows) for name, value in self._asdict().items() if name != "context"
        }
        return self._replace(**fields)

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of both responses, for a method whose view is ``features`` or ``latents``.

        Raises:
            ValueError: If the pairs hold tokens.
        """
        return _features(self.chosen, self.rejected)

    @property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """Tokens of both responses, for a method whose view is ``tokens``.

        Raises:
            ValueError: If the pairs hold features.
        """
        return _tokens(self.chosen, self.rejected)

    @property
    def difference(self) -> Tensor:
        """Features of the preferred response less those of the other: ``(B, D)``.

        Raises:
            ValueError: If the pairs hold tokens.
        """
        chosen, rejected = self.features
        return chosen - rejected


class ResumableBatches(ABC):
    """A loader of ready training batches; a fit can be resumed in the middle of an epoch."""

    _skipped = 0

    @abstractmethod
    def __iter__(self) -> Iterator[PreferenceBatch]:
        """The batches of one epoch."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch on every process."""

    def skip(self, num_batches: int) -> None:
        """Skip the first ``num_batches`` of the next epoch, modulo its length."""
        self._skipped = num_batches % len(self)

    def whole_users(self) -> Iterable[PreferenceBatch]:
        """Every training pair of this process once, a user's in one batch; each user belongs to one process."""
        return self

    def take_skipped(self) -> int:
        """How many batches the epoch that begins now skips; the one after it is whole."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Empty: the trainer counts the batches, but Lightning resumes within an epoch only where there is a state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing, see ``state_dict``."""
        return
