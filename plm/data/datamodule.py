"""PreferenceDataModule: a source, a split, features and loaders wired together for Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from torch import Tensor

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.backbones import Backbone, CausalLM, ReferenceLogps, RemoteEncoder, TokenBackbone
from plm.data.agreement import Repeats, majority, repeated_comparisons
from plm.data.collate import (
    EpochPlace,
    EvalBatches,
    FeaturedPairs,
    SupportDraws,
    TrainBatches,
    split_weights,
)
from plm.data.encoding import CachedReader, drop_unreadable, encode_pairs, fill_cache, with_reference_logps
from plm.data.keys import content_keys
from plm.data.rows import TokenRows
from plm.data.schema import PairTable
from plm.data.shards import FeatureDtype
from plm.data.sources import PairSource
from plm.data.splits import (
    LEFT_OUT,
    SEEN,
    TEST,
    TRAIN,
    UNSEEN,
    VAL,
    GroupBy,
    ShotUnit,
    Splits,
    dialogue_keys,
    nested_supports,
    shuffled_users,
    split_pairs,
    user_circle,
    write_splits,
)
from plm.data.token_batches import TokenBatches
from plm.messages import Problems
from plm.types import PreferenceBatch

if TYPE_CHECKING:
    from plm.data.features import Engine, Filled

DEFAULT_SHOTS = (0, 1, 2, 4, 8, 16, 32)
TOKEN_BATCH_SIZE = 16


class PreferenceDataModule(L.LightningDataModule):
    """Preference pairs of many users as feature batches, split into seen and unseen users and train, val and test rows.

    Args:
        source: Where the pairs come from.
        backbone: What turns texts into features.
        cache_dir: Folder of the feature cache.
        feature_dtype: Precision in which features are cached; float16 takes half of the disk and of mapped memory.
        group_by: What stays on one side of a user's split: dialogue, prompt, response or pair; auto picks by the data.
        unseen_users: Share of users held out, where the source does not say who is.
        val_rows: Share of a seen user's training pairs used for validation, where the source names none.
        test_rows: Share of every user's pairs used for the test, where the source names none.
        split_seed: Seed of the split, the few-shot draws, the other-user control and the shuffling.
        batch_size: About how many pairs per training batch and process; null = the whole split as one batch, the
            fastest on features, and 16 on tokens. Batches of features are whole users.
        pairs_per_user: Tokens only: a training batch holds this many pairs of every user in it, for methods that train
            a part of their own for each; null = pairs of similar length, of any users.
        prompts_per_batch: Tokens only: a training batch holds all pairs of this many prompts, for methods that hold
            responses to one prompt against each other; null = as above.
        macro: Whether every user weighs the same in training, whatever the number of pairs.
        shots: Support sizes of the few-shot curve; an empty list leaves it out.
        shot_unit: What they count: pairs, or dialogues, each with all its pairs.
        repeats: How many random draws of the support the few-shot curve averages.
        max_support: Most pairs an unseen user is adapted on, drawn at random; null = all.
        shuffle_users: Permute the users over the pairs of each part of the split: the control without personal signal.
        prompt_features: Whether batches carry features, or tokens, of the prompts alone.
        reference_logps: Tokens only: whether the log-probability of every response under the untrained model is
            computed once and cached, so that training never runs the reference; not under mixed precision.
    """

    def __init__(
        self,
        source: PairSource,
        backbone: Backbone,
        cache_dir: str = "~/.cache/plm",
        feature_dtype: FeatureDtype = "float32",
        group_by: GroupBy = "auto",
        unseen_users: float = 0.2,
        val_rows: float = 0.15,
        test_rows: float = 0.3,
        split_seed: int = 0,
        batch_size: int | None = None,
        pairs_per_user: int | None = None,
        prompts_per_batch: int | None = None,
        macro: bool = True,
        shots: Sequence[int] = DEFAULT_SHOTS,
        shot_unit: ShotUnit = "pair",
        repeats: int = 5,
        max_support: int | None = None,
        shuffle_users: bool = False,
        prompt_features: bool = False,
        reference_logps: bool = False,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more processes than users to evaluate
        self.source, self.backbone, self.cache_dir, self.feature_dtype = source, backbone, cache_dir, feature_dtype
        self.group_by, self.split_seed, self.macro = group_by, split_seed, macro
        self.unseen_users, self.val_rows, self.test_rows = unseen_users, val_rows, test_rows
        self.batch_size, self.pairs_per_user, self.prompts_per_batch = batch_size, pairs_per_user, prompts_per_batch
        self.shots, self.shot_unit, self.repeats, self.max_support = list(shots), shot_unit, repeats, max_support
        self.shuffle_users, self.prompt_features, self.reference_logps = shuffle_users, prompt_features, reference_logps
        self._on_device: tuple[PreferenceBatch, PreferenceBatch] | None = None
        self._tokens: TokenRows | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        """Raise one error about the kinds of source and backbone, and one about all arguments that are out of range."""
        problems = Problems("data.")
        if not isinstance(self.source, PairSource):
            advice = "; for files: plm.data.sources.pairs.PairFiles(path)"
            problems.add("source", "an object of a class of plm.data.sources", self.source, advice)
        if not isinstance(self.backbone, Backbone):
            advice = "; without a download: plm.backbones.HashingBackbone()"
            problems.add("backbone", "an object of a class of plm.backbones", self.backbone, advice)
        problems.check()
        problems.shares(unseen_users=self.unseen_users, val_rows=self.val_rows, test_rows=self.test_rows)
        grouped = {"pairs_per_user": self.pairs_per_user, "prompts_per_batch": self.prompts_per_batch}
        problems.integers(1, batch_size=self.batch_size, **grouped, max_support=self.max_support, repeats=self.repeats)
        if any(shots < 0 for shots in self.shots) or sorted(set(self.shots)) != self.shots:
            problems.add("shots", "increasing numbers >= 0", self.shots)
        problems.choices(group_by=(self.group_by, get_args(GroupBy)), shot_unit=(self.shot_unit, get_args(ShotUnit)))
        if self.shot_unit == "dialogue" and self.max_support is not None:
            problems.add("max_support", "null with shot_unit dialogue, which it would cut", self.max_support)
        given = f"{type(self.backbone).__name__} gives {self.view}; remove it, or set data.backbone to a CausalLM"
        for name, value in grouped.items():
            if self.view != "tokens":
                problems.say(f"data.{name}: has an effect on tokens only, and {given}", when=bool(value))
        if not isinstance(self.backbone, CausalLM):
            problems.say(f"data.reference_logps: a CausalLM has some, and {given}", when=self.reference_logps)
        problems.say(
            "data.pairs_per_user, data.prompts_per_batch: expected one of them at most, got both",
            when=None not in grouped.values(),
        )
        problems.check()

    # ------------------------------------------------------------------ what is read lazily, once
    @cached_property
    def _split_table(self) -> tuple[PairTable, Splits]:
        table = self.source.load()
        if isinstance(self.backbone, TokenBackbone):
            self.backbone.prepare(prompt + text for prompt, text in table.texts())
        table, self._tokens = drop_unreadable(table, self.backbone)
        splits = self._split(table, self.split_seed)
        if self.shot_unit == "dialogue":
            dialogue_keys(table)  # raises where no pair has a dialogue
        if not (splits.user_split == SEEN).any():
            raise ValueError(f"expected users to train on, got none seen with a training pair in {self.source.name}")
        if self.shuffle_users:
            table = replace(table, user=shuffled_users(table, splits, self.split_seed))
        return table, splits

    def _split(self, table: PairTable, seed: int) -> Splits:
        return split_pairs(
            table,
            group_by=self.group_by,
            unseen_users=self.unseen_users,
            val_rows=self.val_rows,
            test_rows=self.test_rows,
            seed=seed,
        )

    def next_splits(self, count: int) -> list[Splits]:
        """This split of the pairs and those of the next seeds, ``count`` in all.

        Raises:
            ValueError: If two of them hold out the same, as where the corpus says who is on which side.
        """
        found = [self.splits, *(self._split(self.table, self.split_seed + step) for step in range(1, count))]
        sides = {(split.user_split.tobytes(), (split.stage == TEST).tobytes()) for split in found}
        if len(sides) < count:
            raise ValueError(
                f"expected {count} splits with tests of their own, got {len(sides)}: {self.source.name} says itself "
                "who and what is held out; for fits by several seeds there is --seeds"
            )
        return found

    @property
    def table(self) -> PairTable:
        """All pairs; with ``shuffle_users``, of permuted users."""
        return self._split_table[0]

    @property
    def splits(self) -> Splits:
        """The part of the split that every user and every pair belongs to."""
        return self._split_table[1]

    @cached_property
    def _data(self) -> FeaturedPairs:
        user_index = np.full(self.table.num_users, -1, dtype=np.int64)
        seen = self._users(SEEN)
        user_index[seen] = np.arange(len(seen))
        tokens = self._tokens
        if self.reference_logps:
            assert tokens is not None and isinstance(self.backbone, CausalLM)  # checked by the constructor
            tokens = with_reference_logps(tokens, self.table, self.backbone, self.cache_dir)
        reader = None if self.view == "tokens" else CachedReader(self.backbone, self.cache_dir, self.feature_dtype)
        options: dict[str, Any] = {"user_index": user_index, "prompt_features": self.prompt_features, "tokens": tokens}
        return encode_pairs(self.table, self.backbone, reader, **options)

    # ------------------------------------------------------------------ what methods, callbacks and commands read
    @property
    def view(self) -> Literal["features", "tokens", "latents"]:
        """What batches hold, as the backbone makes it."""
        return self.backbone.view

    @property
    def num_users(self) -> int:
        """Number of seen users: rows of the training table."""
        return len(self._users(SEEN))

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.backbone.feature_dim

    @property
    def prompt_dim(self) -> int:
        """Width F of the prompt features; 0 where batches carry none."""
        return self.backbone.prompt_backbone.feature_dim if self.prompt_features and self.view != "tokens" else 0

    @property
    def backbone_spec(self) -> dict[str, Any]:
        """What rebuilds the backbone: ``{class_path, init_args}``."""
        return self.backbone.spec()

    @property
    def reference_head(self) -> Tensor | None:
        """``(D,)`` the reward model's own direction, None where the backbone has none."""
        return self.backbone.reference_head

    @property
    def user_ids(self) -> list[str]:
        """Seen users in the order of ``user_index``."""
        return [self.table.user_ids[row] for row in self._users(SEEN)]

    @property
    def all_user_ids(self) -> list[str]:
        """All users in the order of ``user_row``."""
        return self.table.user_ids

    @property
    def split_hash(self) -> str:
        """The sha256 of the assignment of pairs."""
        return self.splits.hash

    def eval_names(self, stage: Literal["validate", "test", "predict"]) -> list[str]:
        """Names of the evaluation loaders in order: of ``seen``, ``unseen`` and ``few_shot`` those that have pairs."""
        if stage == "validate":
            return ["seen"] if len(self._rows(SEEN, VAL)) else []
        names = ["seen"] if len(self._rows(SEEN, TEST)) else []
        if len(self._rows(UNSEEN, TEST)):
            names += ["unseen"] if stage == "predict" or not self.shots else ["unseen", "few_shot"]
        return names

    @property
    def num_judged_validation_pairs(self) -> int:
        """Number of validation pairs that are not ties."""
        return int((~self.table.tie[self._rows(SEEN, VAL)]).sum())

    def summary(self) -> dict[str, int | str]:
        """Counts for logs."""
        splits, dropped = self.splits, self.table.dropped
        return {
            "source": self.source.name,
            "group_by": splits.group_by,
            "split_hash": splits.hash,
            "users_seen": self.num_users,
            "users_unseen": len(self._users(UNSEEN)),
            "users_left_out": len(self._users(LEFT_OUT)),
            "pairs_train": len(self._rows(SEEN, TRAIN)),
            "pairs_val": len(self._rows(SEEN, VAL)),
            "pairs_test": len(self._rows(SEEN, TEST)),
            "pairs_support": len(self._rows(UNSEEN, TRAIN)),
            "pairs_query": len(self._rows(UNSEEN, TEST)),
            "pairs_left_out": int((splits.stage == LEFT_OUT).sum()),
            "dropped_crossing": splits.num_crossing,
            "dropped_duplicates": dropped.get("duplicates", 0),
            "dropped_too_long": dropped.get("too_long", 0),
            "dropped_other_user_split": dropped.get("other_user_split", 0),
            "prompts": len(np.unique(self.table.prompt)),
            "items": len(self.table.items),
        }

    def majority_pairs(self, name: str) -> tuple[Float64Array, IntArray, BoolArray]:
        """Margins of the `majority` for the test pairs of ``seen`` or ``unseen`` users, their user rows, and ties."""
        rows = self._rows(SEEN if name == "seen" else UNSEEN, TEST)
        return majority(self.table, self.splits)[rows], self.table.user[rows], self.table.tie[rows]

    @property
    def repeated_comparisons(self) -> Repeats | None:
        """How often users agreed with themselves; None where users were shuffled."""
        return None if self.shuffle_users else repeated_comparisons(self.table)

    def save_splits(self, path: str | Path) -> None:
        """Write the split as JSON, with the arguments that made it; see `write_splits`."""
        names = ("split_seed", "unseen_users", "val_rows", "test_rows", "shuffle_users")
        metadata = {**{name: getattr(self, name) for name in names}, **self.summary()}
        write_splits(path, self.splits, self.table.user_ids, metadata)

    def fill_cache(
        self, share: tuple[int, int] = (1, 1), server: RemoteEncoder | None = None, engine: Engine | None = None
    ) -> dict[str, Filled]:
        """Encode what a fit reads through the cache and is not there yet; features are not held in memory.

        Args:
            share: ``(i, n)``, the i-th of n equal shares of the texts: see `FeatureCache.fill`.
            server: What encodes in the place of the backbone.
            engine: What has other processes encode, such as `plm.data.ray_workers.encode_by_ray`.

        Returns:
            What was done to features of ``responses``, ``prompts`` and ``reference`` log-probabilities, where a fit
            reads them.

        Raises:
            ValueError: If the data cannot be read, a fit reads nothing through the cache, or the server fails.
        """
        return fill_cache(
            self.table,
            self.backbone,
            self.cache_dir,
            share,
            prompt_features=self.prompt_features,
            reference_logps=self.reference_logps,
            server=server,
            engine=engine,
            dtype=self.feature_dtype,
        )

    # ------------------------------------------------------------------ Lightning
    def prepare_data(self) -> None:
        """Fill the feature cache; one process per node does it."""
        if self.reference_logps and self.trainer is not None:
            ReferenceLogps.check_precision(str(self.trainer.precision))
        _ = self._data

    def setup(self, stage: str) -> None:
        """Read pairs and features."""
        _ = self._data

    def teardown(self, stage: str) -> None:
        """Free the training batch on the device."""
        self._on_device = None

    def train_dataloader(self) -> TrainBatches | TokenBatches:
        """Training pairs of seen users."""
        rows = self._rows(SEEN, TRAIN)
        weight = split_weights(self.table, rows, self.macro)
        if self.view == "tokens":
            return TokenBatches(
                self._data,
                rows,
                weight,
                self.batch_size or TOKEN_BATCH_SIZE,
                self.pairs_per_user,
                self.split_seed,
                content_keys(self.table).user,
                self._place,
                self.prompts_per_batch,
            )
        return TrainBatches(self._data, rows, weight, self.batch_size, self.split_seed, self._place)

    def val_dataloader(self) -> list[EvalBatches]:
        """Validation pairs of seen users; every process needs some, or its peers would wait for it."""
        rows = self._rows(SEEN, VAL)
        by_pair, world_size = self.view == "tokens", self._place().world_size
        count = len(rows) if by_pair else len(np.unique(self.table.user[rows]))
        if 0 < count < world_size:
            what = "a validation pair" if by_pair else "validation pairs of a user"
            raise ValueError(f"expected {what} for each of {world_size} processes, got {count}")
        return [self._eval_loader(name, VAL) for name in self.eval_names("validate")]

    def test_dataloader(self) -> list[EvalBatches]:
        """Test pairs of seen users, query pairs of unseen users, and the few-shot curve."""
        return [self._eval_loader(name, TEST) for name in self.eval_names("test")]

    def predict_dataloader(self) -> list[EvalBatches]:
        """Test pairs of seen users and query pairs of unseen users."""
        return [self._eval_loader(name, TEST) for name in self.eval_names("predict")]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device; the whole-split batch is copied once and kept."""
        if self._on_device is not None and self._on_device[0] is batch and self._on_device[1].weight.device == device:
            return self._on_device[1]
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self.trainer is not None and self.trainer.training and self.batch_size is None:
            self._on_device = (batch, moved)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Remember in checkpoints which split was trained on, and how files of pairs like these are read."""
        split = {"split_hash": self.split_hash, "shuffle_users": self.shuffle_users}
        return {**split, "reading": self.source.reading}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn when a checkpoint meets another split: what is tested here may have been trained on."""
        if any(state_dict[name] != getattr(self, name) for name in ("split_hash", "shuffle_users")):
            warnings.warn(
                f"the checkpoint was trained on the split {state_dict['split_hash'][:12]}, the data give "
                f"{self.split_hash[:12]}: pairs tested here may have been trained on",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ helpers
    def _users(self, split: int) -> IntArray:
        return np.flatnonzero(self.splits.user_split == split)

    def _rows(self, user_split: int, stage: int) -> IntArray:
        return np.flatnonzero((self.splits.user_split[self.table.user] == user_split) & (self.splits.stage == stage))

    def _place(self) -> EpochPlace:
        trainer = self.trainer
        place = (0, 1, 0) if trainer is None else (trainer.global_rank, trainer.world_size, trainer.current_epoch)
        return EpochPlace(*place)

    def _eval_loader(self, name: str, stage: int) -> EvalBatches:
        table, keys = self.table, content_keys(self.table)
        rows = self._rows(SEEN if name == "seen" else UNSEEN, stage)
        users = self._users(SEEN) if name == "seen" else np.unique(table.user[rows])
        circle = users[user_circle(keys.user[users], self.split_seed)]
        support = None
        if name != "seen":
            pool = self._rows(UNSEEN, TRAIN)
            pool = nested_supports(pool, table.user[pool], keys.pair[pool], self.max_support, 0, self.split_seed)
            curve = [(shots, repeat) for repeat in range(self.repeats) for shots in self.shots]
            draws: Sequence[tuple[int | None, int]] = curve if name == "few_shot" else [(None, 0)]
            dialogues = dialogue_keys(table)[pool] if name == "few_shot" and self.shot_unit == "dialogue" else None
            support = SupportDraws(pool, keys.pair[pool], draws, self.split_seed, dialogues)
        weight = split_weights(table, rows, self.macro, evaluation=True)
        return EvalBatches(self._data, rows, weight, circle, support, name == "few_shot", self._place)
