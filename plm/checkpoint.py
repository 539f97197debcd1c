"""Load the checkpoint of any method, of plm or of another package, ready to score text and, for a policy, to write."""

from __future__ import annotations

import inspect
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from plm.adapting import RecentFeatures, adapt_user, distinct_pairs
from plm.backbones import Backbone, TokenBackbone, TooLong
from plm.data.values import parsed, plain_prompt, short
from plm.messages import to_text
from plm.method import CHECKPOINT_KEY, PersonalizationMethod, constructor_arguments
from plm.types import Tokens, UserState
from plm.users import UserStore, shared_hash, store_path

NOBODY = ""
"""Stands for each erased user in a checkpoint, whose tables keep their sizes; it is no id."""


def read_checkpoint(path: str | Path, map_location: str | torch.device = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint written by a plm method, without running code from it; with ``mmap`` no weights are read yet.

    A checkpoint or a model's folder that it names by an absolute path and that is gone is looked for beside it.

    Raises:
        ValueError: If there is no such file, or another program wrote it.
    """
    if not Path(path).is_file():
        best = Path(path) / "checkpoints" / "best.ckpt"
        state = "which does not exist"
        if best.is_file():
            state = f"a folder; its checkpoint is {str(best)!r}"
        elif Path(path).is_dir():
            state = "a folder without checkpoints/best.ckpt"
        raise ValueError(f"expected a checkpoint file, got {str(path)!r}, {state}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can fail in any way
        lines = str(error).splitlines()
        reason = "it is no archive that torch writes, or a part of one"
        if zipfile.is_zipfile(path):
            unsafe = "it holds more than tensors and plain values, or is damaged"
            reason = unsafe if isinstance(error, UnpicklingError) or not lines else lines[0]
        raise ValueError(f"expected a checkpoint of plm, but {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise ValueError(f"expected a checkpoint of plm, but {str(path)!r} has no {CHECKPOINT_KEY!r} entry")
    _check_layout(path, checkpoint)
    for spec in ("backbone", "latents"):
        _find_beside(checkpoint.get("hyper_parameters", {}).get(spec), Path(path).parent)
    return checkpoint


def training_reading(path: str | Path) -> dict[str, Any]:
    """How the pairs were read that a checkpoint was trained on: arguments of ``plm.read_pairs``, most often none.

    Raises:
        ValueError: If there is no such file, or another program wrote it.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    reading: dict[str, Any] = checkpoint.get("PreferenceDataModule", {}).get("reading", {})
    return reading


def _check_layout(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Raise where an entry of a checkpoint is of another kind than plm writes."""
    metadata, hparams = checkpoint[CHECKPOINT_KEY], checkpoint.get("hyper_parameters", {})
    ids = metadata.get("user_ids") if isinstance(metadata, dict) else None
    names = [name for name in ids if name != NOBODY] if isinstance(ids, list) else []
    wrong = {
        f"{CHECKPOINT_KEY} (class_path: text, user_ids: texts)": not isinstance(metadata, dict)
        or not isinstance(metadata.get("class_path"), str)
        or not isinstance(ids, list)
        or not all(isinstance(name, str) for name in ids)
        or len(set(names)) != len(names),
        "hyper_parameters (a mapping)": not isinstance(hparams, dict),
        "state_dict (a mapping)": not isinstance(checkpoint.get("state_dict"), dict),
        "PreferenceDataModule.reading (columns, winner, attributes, layout)": not _is_reading(
            checkpoint.get("PreferenceDataModule", {})
        ),
    }
    for entry in (entry for entry, holds in wrong.items() if holds):
        raise ValueError(f"expected a checkpoint of plm, but {str(path)!r} has no valid entry {entry}; it is damaged")
    for name in ("backbone", "latents"):
        spec = hparams.get(name)
        arguments = spec.get("init_args", {}) if isinstance(spec, dict) else {}
        if spec is not None and not (isinstance(spec, dict) and isinstance(arguments, dict)):
            raise ValueError(
                f"expected {name} of {str(path)!r} as class_path and init_args, got {spec!r}; it is damaged"
            )


def _is_reading(data: Any) -> bool:
    """Whether a checkpoint says in order how pairs are read, or nothing of it."""
    reading = data.get("reading", {}) if isinstance(data, dict) else None
    return isinstance(reading, dict) and reading.keys() <= {"columns", "winner", "attributes", "layout"}


def find_class(class_path: str) -> type[PersonalizationMethod]:
    """Import the class of a method by its full path, as checkpoints keep it.

    Raises:
        ValueError: If it cannot be imported or is not a method.
    """
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot import the method {class_path!r} ({error}); install the package that defines it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, PersonalizationMethod)):
        raise ValueError(f"expected a subclass of PersonalizationMethod, got {class_path!r}, which is {cls!r}")
    return cls


class PairsNotKeptError(ValueError):
    """Pairs cannot be added to those that a user was learned from."""


class KnownUsers:
    """The users a loaded method knows: those of its store, which are read when they are asked for.

    The trained users are in the store too. Who is not there is unknown, also where the checkpoint was trained on them:
    a deleted user stays unknown to every copy of the checkpoint.

    Args:
        method: The loaded method.
        place: File or URL of its `UserStore`; need not exist.

    Raises:
        ValueError: If the store belongs to other shared weights.
    """

    def __init__(self, method: PersonalizationMethod, place: str | Path) -> None:
        self.method = method
        self.store = UserStore(place, shared_hash(method.state_dict(), method.user_tables))
        self.lock = RLock()
        """Held while the model works, whose parts may be used by one thread at a time."""

    def lookup(self, user_ids: Sequence[str | None]) -> tuple[UserState, Tensor]:
        """States of B users, the population state where the user is unknown, and ``(B,)`` bool, True = known."""
        stored, known = self.store.get(user_ids)
        with torch.no_grad():
            population = self.method.population_state(len(user_ids))
        if not known.any():
            return population, known

        def pick(state: Tensor, default: Tensor) -> Tensor:
            is_known = known.to(default.device).reshape(-1, *[1] * (default.dim() - 1))
            return torch.where(is_known, state.to(default), default)

        tensors = {name: pick(stored.tensors[name], value) for name, value in population.tensors.items()}
        return UserState(tensors, pick(stored.num_pairs, population.num_pairs)), known

    def learn(self, user_id: str, pairs: Sequence[Pair], anew: bool = False, must_exist: bool = False) -> int:
        """Learn a user from pairs, see ``PersonalizationMethod.learn``."""
        added = [_as_dict(pair) for pair in pairs]
        since: int | None = None  # what came before an erasure is not stored after it
        while True:  # until nobody else has changed the user meanwhile
            known, kept, num_erasures = self.store.snapshot(user_id)
            since = num_erasures if since is None else since
            if known is None and must_exist:
                return 0
            if known is not None and not anew and not kept and known.num_pairs:
                raise PairsNotKeptError(
                    f"user {user_id!r} was learned from {known.num_pairs} pairs that were not kept, so these cannot be "
                    "added to them; give anew to learn the user from these pairs alone"
                )
            learned = distinct_pairs(added if anew else [*kept, *added])
            with self.lock:
                state = adapt_user(self.method, user_id, learned)
            versions = {user_id: 0 if known is None else known.version}
            if self.store.add([user_id], state, pairs={user_id: learned}, since=since, versions=versions):
                return int(state.num_pairs[0])
            if not self.store.there_since([user_id], since):
                return 0

    def unlearn(self, user_id: str, version: int) -> bool:
        """Fit a user to all kept pairs but the last; without another pair the user gets the population state.

        Args:
            user_id: Whose last pair.
            version: Of the user whose last pair it is; nothing happens if there is another version by now.

        Returns:
            Whether it happened.

        Raises:
            PairsNotKeptError: If no pair of the user was kept.
        """
        known, kept, since = self.store.snapshot(user_id)
        if known is None or known.version != version:
            return False
        if not kept:
            raise PairsNotKeptError(f"no pair of user {user_id!r} was kept, so the last one cannot be taken back")
        *before, _ = kept
        with self.lock, torch.no_grad():
            state = adapt_user(self.method, user_id, before) if before else self.method.population_state(1)
        return bool(self.store.add([user_id], state, pairs={user_id: before}, since=since, versions={user_id: version}))

    def __call__(self, user_ids: Sequence[str]) -> UserState:
        """States of B users by id; an unknown id gets the population state, with one warning for all of them."""
        state, known = self.lookup(user_ids)
        unknown = list(dict.fromkeys(i for i, is_known in zip(user_ids, known.tolist(), strict=True) if not is_known))
        if unknown:
            shown = ", ".join(repr(user_id) for user_id in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            warnings.warn(f"unknown users are treated as the population: {shown} ({len(unknown)} in all)", stacklevel=3)
        return state


Pair = tuple[str, str, str] | Mapping[str, Any]
"""Prompt, chosen and rejected response; or a dict of these with ``tie`` and ``weight``."""


def _as_dict(pair: Pair) -> dict[str, Any]:
    """A pair with names, which are checked: a misspelt one would be ignored."""
    if not isinstance(pair, Mapping):
        if isinstance(pair, str) or len(pair) != 3:
            raise ValueError(f"expected pairs (prompt, chosen, rejected), got {short(pair)}")
        return dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))
    unknown = sorted(set(pair) - {"prompt", "chosen", "rejected", "tie", "weight"})
    if unknown:
        raise ValueError(f"expected pairs of prompt, chosen, rejected, tie and weight, got the keys {unknown}")
    return dict(pair)


class TextEncoder:
    """Turns texts into features, or tokens, by the backbone of a checkpoint, which is loaded on first use.

    Args:
        method: The loaded method; what it reads goes to its device.
        spec: ``{class_path, init_args}`` of its backbone.
    """

    def __init__(self, method: PersonalizationMethod, spec: dict[str, Any] | None) -> None:
        self.method = method
        self.spec = spec

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone itself."""
        if not self.spec:
            raise ValueError("the checkpoint names no backbone: give features (B, D), not texts")
        return Backbone.from_spec(self.spec)

    @cached_property
    def recent(self) -> RecentFeatures:
        """The same with a memory, for one thread at a time; its rows may differ in the last digits, as padding does."""
        return RecentFeatures(self)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> Tensor | Tokens:
        """Features ``(B, D)``, or tokens, of B responses to B prompts.

        Raises:
            ValueError: For a text with half of a character, or a prompt that leaves no room for a response, with the
                number of its row.
        """
        try:
            "".join([*prompts, *texts]).encode()
        except UnicodeEncodeError:  # only then is every row looked at
            for row, pair in enumerate(zip(prompts, texts, strict=True), start=1):
                parsed(f"row {row} of {len(texts)}", pair, lambda both: [to_text(text) for text in both])
        if not texts and self.method.view == "features":
            return self.method.reference.new_zeros(0, self.method.feature_dim)
        try:
            return self._on_device(self.backbone.represent(prompts, texts))
        except TooLong as error:
            raise ValueError(f"row {list(prompts).index(error.prompt) + 1} of {len(prompts)}: {error}") from error

    def prompts(self, prompts: Sequence[str]) -> Tensor | Tokens | None:
        """B prompts alone, features or tokens as ``data.prompt_features`` gives; None if the method reads none."""
        if not self.method.reads_prompts:
            return None
        reader = self.backbone.prompt_backbone
        if isinstance(reader, TokenBackbone):
            return self._on_device(reader.represent_prompts(prompts))
        if not prompts:
            return self.method.reference.new_zeros(0, reader.feature_dim)
        return self._on_device(reader.represent([""] * len(prompts), [plain_prompt(text) for text in prompts]))

    def _on_device(self, read: Tensor | Tokens) -> Tensor | Tokens:
        """Move inputs to the device of the method, and read tokens as it does."""
        read = read.to(self.method.device)
        return self.method.read_tokens(read) if isinstance(read, Tokens) else read


def store_users(method: PersonalizationMethod, path: str | Path) -> None:
    """Write the users a method was trained on to the store beside its checkpoint, as a fit does for its best one."""
    with torch.no_grad():
        states = method.user_states(torch.arange(len(method.user_ids), device=method.device))
    UserStore.begin(store_path(path), shared_hash(method.state_dict(), method.user_tables), method.user_ids, states)


def load_method(
    path: str | Path, map_location: str | torch.device = "cpu", users: str | Path | None = None
) -> PersonalizationMethod:
    """Load a trained method, of plm or of any installed package.

    The checkpoint is read with ``weights_only=True``; all that runs by its word is the import of the class it names.
    Its users are those of the store beside it, ``<stem>.users.db``; without a store it knows nobody.

    Args:
        path: A checkpoint written by ``plm fit``.
        map_location: Device of the loaded weights.
        users: Another place of the store: a file, or ``postgresql+psycopg://...``.

    Returns:
        The method in eval mode, able to score texts: ``load_method(path).score(texts, user_id="anna")``.

    Raises:
        ValueError: If the file is not such a checkpoint, its class is missing, its weights do not fit the class, or the
            store belongs to other weights.
    """
    checkpoint = read_checkpoint(path, map_location)
    metadata = checkpoint[CHECKPOINT_KEY]
    cls = find_class(metadata["class_path"])
    hparams = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if not key.startswith("_")}
    # linked values and those a method hands to its bases are written even where the class has no such parameter
    bases = [base for base in cls.__mro__[1:] if issubclass(base, PersonalizationMethod)]
    passed_on = {name for base in bases for name in inspect.signature(base).parameters} | {"prompt_dim"}
    accepted = constructor_arguments(cls)
    hparams = {key: value for key, value in hparams.items() if key in accepted or key not in passed_on}
    try:
        method = cls(**hparams)
        method.user_ids = list(metadata["user_ids"])
        method.configure_model()
        method.on_load_checkpoint(checkpoint)
        method.load_state_dict(checkpoint["state_dict"], strict=method.strict_loading)
        if len(method.user_ids) not in (0, method.num_users):
            raise KeyError(f"{len(method.user_ids)} user ids for {method.num_users} users")
    except (TypeError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{str(path)!r} does not fit the installed {metadata['class_path']}: {reason}; "
            "load it with the version that wrote it"
        ) from error
    method.to(map_location).eval().requires_grad_(False)
    encoder = TextEncoder(method, checkpoint.get("hyper_parameters", {}).get("backbone"))
    method.encode, method.encode_prompts = encoder, encoder.prompts
    method.find_users = KnownUsers(method, store_path(path) if users is None else users)
    return method


def _find_beside(spec: dict[str, Any] | None, folder: Path) -> None:
    """Point a spec at the file of the same name in ``folder``, where the one that its backbone reads is gone.

    A relative ``model`` is left alone: it may be an id on a hub.
    """
    arguments = (spec or {}).get("init_args", {})
    for name in ("checkpoint", "model"):
        named = arguments.get(name)
        if not isinstance(named, str) or Path(named).exists() or (name == "model" and not Path(named).is_absolute()):
            continue
        beside = (folder / Path(named).name).absolute()
        if beside.is_file() if name == "checkpoint" else beside.is_dir():
            arguments[name] = str(beside)
