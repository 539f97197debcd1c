"""What the contract's tests check states, contexts and errors with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plm.types import Tokens, UserState


def assert_same(first: UserState, second: UserState, tolerance: float = 0.0, what: str = "the states") -> None:
    """Fail unless two states of the same users agree, each number to ``tolerance * (1 + |number|)``."""
    assert first.tensors.keys() == second.tensors.keys(), f"{what}: {sorted(first.tensors)}, {sorted(second.tensors)}"
    assert torch.equal(first.num_pairs, second.num_pairs), f"{what}: num_pairs {first.num_pairs}, {second.num_pairs}"
    for name, value in first.tensors.items():
        other = second.tensors[name]
        assert value.shape == other.shape, f"{what}: {name!r} of shape {value.shape} against {other.shape}"
        difference = ((value - other).abs() / (1 + other.abs())).max().item() if value.numel() else 0.0
        assert difference <= tolerance, f"{what}: {name!r} differs by {difference:.2e}, more than {tolerance:.0e}"


def equal(value: Tensor | Tokens | None, other: Tensor | Tokens | None) -> bool:
    """Whether two values of a context are the same, bit for bit."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    if isinstance(value, Tokens) and isinstance(other, Tokens):
        return all(map(equal, value, other))
    return value is None and other is None


def must_fail(call: Callable[[], object], message: str) -> None:
    """Fail unless ``call`` raises a ValueError whose text holds ``message``."""
    try:
        call()
    except ValueError as error:
        assert message in str(error), f"expected {message!r} in the error, got {error}"
        return
    raise AssertionError(f"expected a ValueError about {message!r}, got none")
