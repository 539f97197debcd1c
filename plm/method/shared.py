"""SharedMethod: a method that serves everybody alike."""

from __future__ import annotations

import torch
from torch import Tensor

from plm.method import PersonalizationMethod
from plm.types import Context, UserState


class SharedMethod(PersonalizationMethod):
    """A method to which nothing is personal: everybody has the population state, an empty one by default.

    As a mixin it stands before the other bases of a class.
    """

    def user_states(self, user_index: Tensor) -> UserState:
        """The population state, for nothing is learned about users."""
        return self.population_state(len(user_index))

    def population_state(self, num_users: int) -> UserState:
        """States without tensors."""
        return UserState({}, torch.zeros(num_users, dtype=torch.long, device=self.device))

    def _adapt(self, context: Context) -> UserState:
        """The population state, for nothing is learned from pairs."""
        return self.population_state(context.num_users)._replace(num_pairs=context.mask.sum(-1))
