"""What a method can do once `plm.load_method` has given it its language model and its users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from plm.types import Tokens, UserId, id_text

if TYPE_CHECKING:
    from plm.checkpoint import KnownUsers, Pair, TextEncoder
    from plm.users import Receipt, UserStore


class LoadedMethod:
    """Texts, user ids and learning users: what every method has, and only a loaded one can use."""

    encode: TextEncoder | None = None
    encode_prompts: Callable[[Sequence[str]], Tensor | Tokens | None] | None = None
    find_users: KnownUsers | None = None

    def one_thread(self) -> AbstractContextManager[object]:
        """Held while the model of a loaded method works, so that threads may share it."""
        return nullcontext() if self.find_users is None else self.find_users.lock

    def learn(self, user_id: UserId, pairs: Sequence[Pair], anew: bool = False, must_exist: bool = False) -> int:
        """Learn a user from what the user prefers, and store state and pairs; durable when the call returns.

        Later pairs are added to those before: the state is fitted to all of them. Threads and processes may call it at
        once; a user who is deleted meanwhile stays deleted.

        Args:
            user_id: Who; a new user or one who was learned so before.
            pairs: ``(prompt, chosen, rejected)`` each, or dicts of these with ``tie`` and ``weight``.
            anew: Forget what was known of the user before.
            must_exist: Add nobody: somebody may still be asked who was deleted.

        Returns:
            How many pairs the state was fitted on; 0 if the user was deleted meanwhile, or is not there and must be.

        Raises:
            ValueError: If a pair is malformed, or the pairs behind the user's state were not kept, as of trained users.
        """
        return self.known_users.learn(id_text(user_id), pairs, anew, must_exist)

    def forget(self, user_id: UserId) -> Receipt:
        """Delete a user from the store; a user who is not there is no error."""
        return self.known_users.store.delete([id_text(user_id)])[0]

    @property
    def users(self) -> UserStore:
        """The store of users: ``"anna" in method.users``, ``len(method.users)``, ``method.users.ids``."""
        return self.known_users.store

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder of texts into what the method reads.

        Raises:
            ValueError: If the method was not loaded by ``load_method``.
        """
        if self.encode is None:
            raise ValueError(f"{type(self).__name__} has no encoder of texts; load it with plm.load_method(path)")
        return self.encode

    @property
    def known_users(self) -> KnownUsers:
        """The users in the store beside the checkpoint.

        Raises:
            ValueError: If the method was not loaded by ``load_method``.
        """
        if self.find_users is None:
            raise ValueError(f"{type(self).__name__} knows no user ids; load it with plm.load_method(path)")
        return self.find_users
