"""Abilities of some methods besides scoring: base classes that a method names among its bases.

An ability is a fact about a class. Asking for it, by ``isinstance``, reads nothing and loads nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from plm.backbones import Policy, TextWriter
from plm.types import UserState


class Writer(ABC):
    """A method whose users write; every `plm.method.policy.PolicyMethod` is one."""

    if TYPE_CHECKING:  # an attribute of its own at run time: a property here would hide the module of that name

        @property
        def policy(self) -> Policy:
            """The language model that users write with."""

    @property
    def can_write(self) -> bool:
        """Whether the model to write with is known; nothing is loaded to tell."""
        return True

    @abstractmethod
    def writing(self, users: UserState, prompts: Sequence[str]) -> TextWriter:
        """A batch of texts to be written, one for each row of ``users``, whose prompts are given in ``start``.

        Args:
            users: B states.
            prompts: The prompts as texts, for policies that a prompt steers by more than its tokens.
        """


class LatentWriter(Writer):
    """A writer whose texts begin with a draw from their user's policy over latents, another for every text."""

    @abstractmethod
    def latent_states(self, users: UserState, rows: Tensor, prompts: Sequence[str], keys: Tensor) -> UserState:
        """B states that ``writing`` takes in the place of users.

        Args:
            users: States, each once.
            rows: ``(B,)`` row of each text's user.
            prompts: Of each text.
            keys: ``(B,)`` seeds of what is random in each text.
        """


class Mixable(ABC):
    """A method whose users can be mixed into others."""

    @abstractmethod
    def mixed(self, users: UserState, weights: Tensor) -> UserState:
        """States of U mixtures of A users by weights ``(U, A)``."""


class Exporter(ABC):
    """A method that can write the model of one user for software other than plm."""

    @abstractmethod
    def export(self, folder: str | Path, user: UserState) -> None:
        """Write the model of the one row of ``user`` into a folder that does not exist or is empty."""


class Explainable(ABC):
    """A method whose users are weights of K rewards that all users share, so that these tell what users differ in."""

    word_for_basis: ClassVar[str] = "basis"
    """What the paper calls one of the shared rewards."""

    if TYPE_CHECKING:  # every method has it

        @abstractmethod
        def population_state(self, num_users: int) -> UserState:
            """The state of a user without pairs."""

    @property
    def has_weights(self) -> bool:
        """Whether users have weights as the method is set; else they are all alike, or something else."""
        return True

    @property
    @abstractmethod
    def mixes(self) -> bool:
        """Whether a user's weights are shares, of sum one; else they are coordinates of any sign."""

    def basis_weights(self, users: UserState) -> Tensor:
        """The weights that users are served with, ``(U, K)``."""
        return users.tensors["weights"]

    def with_weights(self, weights: Tensor) -> UserState:
        """States of users with weights ``(U, K)``."""
        state = self.population_state(len(weights))
        return state._replace(tensors={**state.tensors, "weights": weights.to(state.tensors["weights"])})
