"""The store of user states: what is known about each user, kept beside a checkpoint instead of inside it.

A user is a row. Adding, exporting or deleting one never touches the shared weights.

Axes: U users, B looked-up users.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plm.atomic import replace, whole_file, write_text
from plm.types import UserState

_INDEX = "index.json"
_FORMAT = 1


def shared_hash(state_dict: Mapping[str, Tensor], user_tables: Iterable[str] = ()) -> str:
    """SHA-256 of a method's shared part: every tensor of its state dict but the tables with one row per seen user.

    Args:
        state_dict: Name -> tensor, as ``method.state_dict()`` or a checkpoint's ``"state_dict"``.
        user_tables: Names left out, ``method.user_tables``.

    Returns:
        64 hexadecimal digits; equal for equal names, dtypes, shapes and bits.
    """
    digest = hashlib.sha256()
    for name in sorted(set(state_dict) - set(user_tables)):
        value = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def store_path(checkpoint: str | Path) -> Path:
    """Where the users of a checkpoint live: ``runs/best.ckpt`` -> ``runs/best.users``."""
    return Path(checkpoint).with_suffix(".users")


class UserStore:
    """Maps a user id to a row of named tensors.

    On disk a folder with one safetensors file, read memory-mapped, and ``index.json``, which names that file and is
    replaced last: a reader or a killed writer never sees half of a change.

    Args:
        shared_hash: Hash of the shared part the states belong to, see `shared_hash`.
        user_ids: Distinct ids, in row order.
        state: Their states; None for an empty store.
    """

    def __init__(self, shared_hash: str, user_ids: Sequence[str] = (), state: UserState | None = None) -> None:
        self.shared_hash = shared_hash
        self._state = state if state is not None else UserState({}, torch.zeros(0, dtype=torch.long))
        self._row_of = {user_id: row for row, user_id in enumerate(user_ids)}
        if len(self._row_of) != len(user_ids) or len(user_ids) != self._state.num_users:
            raise ValueError(
                f"expected one state per distinct user id, got {len(user_ids)} ids ({len(self._row_of)} distinct) "
                f"and {self._state.num_users} states"
            )

    @classmethod
    def empty(cls, shared_hash: str) -> UserStore:
        """A store without users."""
        return cls(shared_hash)

    # ------------------------------------------------------------------ disk
    @classmethod
    def load(cls, path: str | Path) -> UserStore:
        """Read a store; its tensors are memory-mapped.

        Raises:
            ValueError: If ``path`` is not a store, or is damaged.
        """
        path = Path(path)
        try:
            index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
            if index["format"] != _FORMAT:
                raise ValueError(f"user store {path} has format {index['format']!r}, expected {_FORMAT}; update plm")
            tensors = load_file(path / index["tensors"])
            num_pairs = tensors.pop("num_pairs")
            named = {name.removeprefix("state."): value for name, value in tensors.items()}
            return cls(index["shared_hash"], index["user_ids"], UserState(named, num_pairs))
        except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"expected a user store (a folder with {_INDEX}) at {path}, got {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the store to the folder ``path``, replacing what is there in one step."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        name = f"users-{uuid.uuid4().hex[:12]}.safetensors"
        tensors = {f"state.{key}": value for key, value in self._state.tensors.items()}
        tensors["num_pairs"] = self._state.num_pairs
        # safetensors refuses views that share memory, hence the clones
        temporary = path / f"users-{uuid.uuid4().hex[:12]}.part"
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, temporary)
        replace(temporary, path / name)
        index = {"format": _FORMAT, "shared_hash": self.shared_hash, "tensors": name, "user_ids": self.ids}
        write_text(path / _INDEX, json.dumps(index))
        for old in path.glob("users-*"):  # the former rows, and what a killed writer left behind
            if old.name != name:
                old.unlink(missing_ok=True)

    # ------------------------------------------------------------------ rows
    @property
    def ids(self) -> list[str]:
        """User ids in row order."""
        return list(self._row_of)

    def __len__(self) -> int:
        """Number of users."""
        return len(self._row_of)

    def __contains__(self, user_id: object) -> bool:
        """Whether the user has a row."""
        return user_id in self._row_of

    def get(self, user_ids: Sequence[str | None]) -> tuple[UserState, Tensor]:
        """Look users up.

        Args:
            user_ids: B ids, known or not, repeated or not; None is a user without an id, unknown.

        Returns:
            States with leading axis B, and ``(B,)`` bool, True = known; the rows of unknown users hold zeros.
        """
        rows = torch.tensor([-1 if user_id is None else self._row_of.get(user_id, -1) for user_id in user_ids]).long()
        known = rows >= 0

        def gather(value: Tensor) -> Tensor:
            out = value.new_zeros((len(rows), *value.shape[1:]))
            out[known] = value[rows[known]]
            return out

        tensors = {name: gather(value) for name, value in self._state.tensors.items()}
        return UserState(tensors, gather(self._state.num_pairs)), known

    def add(self, user_ids: Sequence[str], state: UserState) -> None:
        """Write one row per user: a known user's row is replaced, a new user's appended.

        Args:
            user_ids: U distinct ids.
            state: Their states, of the same method as those already stored.

        Raises:
            ValueError: If ids and states do not fit each other or the rows already there.
        """
        new = UserStore(self.shared_hash, list(user_ids), state.detach().to("cpu"))  # checks ids against states
        if not len(self):
            self._state, self._row_of = new._state, new._row_of
            return
        here = {name: tuple(value.shape[1:]) for name, value in self._state.tensors.items()}
        there = {name: tuple(value.shape[1:]) for name, value in new._state.tensors.items()}
        if here != there:
            raise ValueError(f"expected user states with rows of {here}, got {there}; they belong to another method")
        kept = self._take([user_id for user_id in self._row_of if user_id not in new._row_of])
        self._state = UserState.cat([kept._state, new._state])
        self._row_of = {user_id: row for row, user_id in enumerate([*kept._row_of, *new._row_of])}

    def delete(self, user_ids: Sequence[str]) -> None:
        """Remove rows.

        Raises:
            ValueError: If an id is not stored; then nothing is removed.
        """
        gone = set(self._known(user_ids))
        kept = self._take([user_id for user_id in self._row_of if user_id not in gone])
        self._state, self._row_of = kept._state, kept._row_of

    def export(self, user_ids: Sequence[str], path: str | Path) -> None:
        """Write the rows of some users as readable JSONL: one object per user with its pair count and tensors.

        Raises:
            ValueError: If an id is not stored.
        """
        ids = self._known(user_ids)
        state = self._take(ids)._state
        rows = {name: value.tolist() for name, value in state.tensors.items()}
        with whole_file(path, "w") as file:
            for row, (user_id, num_pairs) in enumerate(zip(ids, state.num_pairs.tolist(), strict=True)):
                tensors = {name: values[row] for name, values in rows.items()}
                file.write(json.dumps({"user_id": user_id, "num_pairs": num_pairs, "state": tensors}) + "\n")

    def _known(self, user_ids: Sequence[str]) -> list[str]:
        """The ids themselves, once each, or an error naming the unknown ones."""
        unknown = [user_id for user_id in user_ids if user_id not in self._row_of]
        if unknown:
            raise ValueError(f"expected ids of the {len(self)} stored users, got unknown {unknown[:5]!r}")
        return list(dict.fromkeys(user_ids))

    def _take(self, user_ids: list[str]) -> UserStore:
        """A store of some rows."""
        rows = torch.tensor([self._row_of[user_id] for user_id in user_ids], dtype=torch.long)
        return UserStore(self.shared_hash, user_ids, self._state.take(rows))
