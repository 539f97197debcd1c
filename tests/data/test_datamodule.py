from __future__ import annotations

import json
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from plm.backbones import HashingBackbone, ReferenceLogps
from plm.data import encoding
from plm.data.collate import build_context
from plm.data.datamodule import PreferenceDataModule
from plm.data.encoding import CachedReader, encode_pairs
from plm.data.rows import FeatureRows, MappedRows
from plm.data.schema import PairTable
from plm.data.sources import PairSource
from plm.data.sources.pairs import PairFiles
from plm.data.sources.synthetic import SyntheticPairs
from plm.data.splits import SEEN, TEST, TRAIN, UNSEEN, VAL
from plm.testing import tiny_causal_lm
from plm.types import PreferenceBatch


class Counting(PairSource):
    """Counts how often it is read."""

    def __init__(self, source: PairSource) -> None:
        self.source, self.loads = source, 0

    @property
    def name(self) -> str:
        return self.source.name

    def load(self) -> PairTable:
        self.loads += 1
        return self.source.load()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(cache: str) -> Any:
    def make(source: PairSource | None = None, **options: Any) -> PreferenceDataModule:
        source = source or SyntheticPairs(num_users=30, pairs_per_user=20)
        return PreferenceDataModule(source, HashingBackbone(64), cache, **options)

    return make


class Tiny(L.LightningModule):
    """One direction; remembers what it was given."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.direction = torch.nn.Parameter(torch.zeros(dim))
        self.seen: dict[str, list[Any]] = {"train": [], "test": []}

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        assert isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)
        self.seen["train"].append(batch.chosen)
        margin = (batch.chosen - batch.rejected) @ self.direction
        return -(batch.weight * torch.nn.functional.logsigmoid(margin)).mean()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert batch.user_row is not None

    def test_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["test"].append((dataloader_idx, batch.num_pairs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(path: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=path, **{"enable_checkpointing": False, **quiet, **options})


def test_names_in_the_place_of_a_source_and_a_backbone_are_refused_at_once() -> None:
    unfit: Any = "export.csv", "hashing"
    with pytest.raises(ValueError) as raised:
        PreferenceDataModule(*unfit)
    source, backbone = str(raised.value).splitlines()
    assert source.startswith("data.source: expected") and "got 'export.csv'" in source and "PairFiles" in source
    assert backbone.startswith("data.backbone: expected") and "got 'hashing'" in backbone
    assert "plm.backbones.HashingBackbone()" in backbone


def test_construction_reads_nothing_and_sizes_read_once(make: Any, tmp_path: Path) -> None:
    source = Counting(SyntheticPairs(num_users=30, pairs_per_user=20))
    data = PreferenceDataModule(source, HashingBackbone(64), str(tmp_path / "cache"))
    assert source.loads == 0
    assert (data.num_users, data.feature_dim) == (24, 64)
    assert source.loads == 1 and not (tmp_path / "cache").exists()  # no text encoded yet
    data.setup("fit")
    assert source.loads == 1
    assert data.backbone_spec["init_args"]["dim"] == 64 and data.reference_head is None
    assert len(data.user_ids) == 24 and data.user_ids == sorted(data.user_ids)
    assert set(data.user_ids) < set(data.all_user_ids) and len(data.all_user_ids) == 30


def by_user(data: PreferenceDataModule) -> Any:
    """Training rows in the order of the whole-split batch."""
    rows = data._rows(SEEN, TRAIN)
    return rows[np.argsort(data.table.user[rows], kind="stable")]


def test_batches_hold_the_features_of_their_texts(make: Any) -> None:
    data = make()
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    rows = by_user(data)
    texts = data.table.texts()
    expected = data.backbone.encode([texts[item][1] for item in data.table.rejected[rows[:5]]])
    assert torch.allclose(batch.rejected[:5], expected)
    ids = [data.user_ids[index] for index in batch.user_index.tolist()]
    assert ids == [data.table.user_ids[user] for user in data.table.user[rows]]
    assert batch.weight.mean().item() == pytest.approx(1, abs=1e-5)


def test_loaders_cover_the_split(make: Any) -> None:
    data = make(shots=[0, 2], repeats=3)
    data.setup("test")
    assert data.eval_names("validate") == ["seen"] and data.eval_names("predict") == ["seen", "unseen"]
    assert data.eval_names("test") == ["seen", "unseen", "few_shot"]
    seen, unseen, few_shot = data.test_dataloader()
    counts = [sum(batch.num_pairs for batch in loader) for loader in (seen, unseen, few_shot)]
    query = len(data._rows(UNSEEN, TEST))
    assert counts == [len(data._rows(SEEN, TEST)), query, 6 * query]
    assert [(int(b.num_shots[0]), int(b.repeat[0])) for b in few_shot] == [(s, r) for r in range(3) for s in (0, 2)]
    (val,) = data.val_dataloader()
    assert sum(batch.num_pairs for batch in val) == len(data._rows(SEEN, VAL))


def test_shots_by_dialogues_hold_whole_dialogues(tmp_path: Path) -> None:
    rows = [
        {
            "user_id": f"u{user}",
            "prompt": f"{dialogue} {turn}",
            "chosen": f"good {user} {dialogue} {turn}",
            "rejected": "bad",
            "dialogue_id": f"{user}-{dialogue}",
        }
        for user in range(8)
        for dialogue in range(6)
        for turn in range(1 + dialogue % 3)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"unseen_users": 0.5, "shots": [0, 1, 2], "repeats": 2, "cache_dir": str(tmp_path)}
    data = PreferenceDataModule(PairFiles(str(file)), HashingBackbone(16), shot_unit="dialogue", **options)
    data.setup("test")
    pool = data._rows(UNSEEN, TRAIN)
    sizes = {
        user: np.unique(data.table.dialogue[pool[data.table.user[pool] == user]], return_counts=True)[1]
        for user in range(8)
    }
    found = set()
    for batch in data.test_dataloader()[2]:
        counts = batch.context.mask.sum(1)
        for user, row in zip(batch.user_row.tolist(), batch.context_row.tolist(), strict=True):
            shots, count = int(batch.num_shots[0]), int(counts[row])
            assert count in {sum(some) for some in combinations(sizes[user].tolist(), min(shots, len(sizes[user])))}
            found.add((shots, count))
    assert {shots for shots, _ in found} == {0, 1, 2} and len(found) > 3
    with pytest.raises(ValueError, match="max_support: expected null with shot_unit dialogue"):
        PreferenceDataModule(PairFiles(str(file)), HashingBackbone(16), shot_unit="dialogue", max_support=3)
    for row in rows:
        del row["dialogue_id"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"data\.shot_unit: expected dialogues in the data, got none"):
        PreferenceDataModule(PairFiles(str(file)), HashingBackbone(16), shot_unit="dialogue").setup("fit")


def test_absent_parts_are_left_out(make: Any) -> None:
    assert make(unseen_users=0).eval_names("test") == ["seen"]
    assert make(shots=[]).eval_names("test") == ["seen", "unseen"]
    assert make(val_rows=0).eval_names("validate") == [] == make(val_rows=0).val_dataloader()


def test_max_support_caps_every_unseen_user(make: Any) -> None:
    data = make(max_support=3)
    data.setup("test")
    (batch,) = list(data.test_dataloader()[1])
    assert batch.context.mask.sum(1).tolist() == [3] * 6


def test_prompt_features_are_those_of_the_prompt(make: Any) -> None:
    data = make(prompt_features=True)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    prompts = [data.table.prompts[row] for row in data.table.prompt[by_user(data)[:4]]]
    assert torch.allclose(batch.prompt[:4], data.backbone.encode(prompts))
    assert make().train_dataloader().data.prompts is None


def test_shuffled_users_keep_pairs_and_counts(make: Any) -> None:
    plain, shuffled = make(), make(shuffle_users=True)
    one, two = (next(iter(data.train_dataloader())) for data in (plain, shuffled))
    assert sorted(one.chosen.tolist()) == sorted(two.chosen.tolist()) and not torch.equal(one.chosen, two.chosen)
    assert torch.equal(one.user_index, two.user_index)  # in the order of the users, who keep their counts
    assert plain.split_hash == shuffled.split_hash


@pytest.mark.parametrize("batch_size", [None, 40])
def test_two_processes_share_out_the_users(make: Any, batch_size: int | None) -> None:
    data = make(batch_size=batch_size)
    (whole,) = list(make().train_dataloader())
    batches = []
    for rank in range(2):
        data.trainer = type("Stub", (), {"global_rank": rank, "world_size": 2, "current_epoch": 0})()
        batches.append(list(data.train_dataloader()))
    assert len(batches[0]) == len(batches[1]) == (1 if batch_size is None else -(-whole.num_pairs // 80))
    owners = [{user for batch in part for user in batch.user_index.tolist()} for part in batches]
    assert owners[0].isdisjoint(owners[1]) and owners[0] | owners[1] == set(range(data.num_users))
    parts = [batch for part in batches for batch in part]
    assert sorted(row for batch in parts for row in batch.rejected.tolist()) == sorted(whole.rejected.tolist())
    mean = torch.stack([(batch.weight[:, None] * batch.chosen).mean(0) for batch in parts]).mean(0)
    assert torch.allclose(mean, (whole.weight[:, None] * whole.chosen).mean(0), atol=1e-6)


def test_pairs_of_new_users_become_a_context(tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    rows = [("zoe", "good", "bad"), ("adam", "short", "a long one"), ("zoe", "fine", "poor")]
    path.write_text(
        "".join(json.dumps({"user_id": u, "prompt": "p", "chosen": c, "rejected": r}) + "\n" for u, c, r in rows)
    )
    backbone = HashingBackbone(64)
    data = encode_pairs(PairFiles(str(path)).load(), backbone, CachedReader(backbone, str(tmp_path / "cache")))
    context = build_context(data, np.arange(3), np.arange(2))
    assert data.table.user_ids == ["adam", "zoe"] and data.user_index.tolist() == [-1, -1]
    assert context.mask.tolist() == [[True, False], [True, True]]
    assert torch.allclose(context.chosen[1], backbone.encode(["good", "fine"]))


def test_sides_with_equal_features_are_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [("good", "bad"), ("a b", "b a")]  # hashed words have no order
    path.write_text(
        "".join(json.dumps({"user_id": "u", "prompt": "p", "chosen": c, "rejected": r}) + "\n" for c, r in rows)
    )
    backbone = HashingBackbone(64)
    with pytest.warns(UserWarning, match=r"1 of 2 pairs have the same features on both sides \(the first at .*:2\)"):
        encode_pairs(PairFiles(str(path)).load(), backbone, CachedReader(backbone, str(tmp_path / "cache")))


def test_saved_split_and_summary(make: Any, tmp_path: Path) -> None:
    data = make(split_seed=4)
    data.save_splits(tmp_path / "run" / "splits.json")
    saved = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert saved["hash"] == data.split_hash == make(split_seed=4).split_hash != make().split_hash
    assert (saved["split_seed"], saved["test_rows"], saved["dropped_crossing"]) == (4, 0.3, 0)
    assert saved["users"]["seen"] == data.user_ids and len(saved["users"]["unseen"]) == 6
    assert len(saved["pairs"]) == 600 and saved["pairs"].count("v") == saved["pairs_val"]
    summary = data.summary()
    parts = ("pairs_train", "pairs_val", "pairs_test", "pairs_support", "pairs_query", "pairs_left_out")
    assert sum(summary[part] for part in parts) == 600
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["splits.json"]


def test_bad_arguments_are_reported_together(make: Any) -> None:
    with pytest.raises(ValueError) as caught:
        make(val_rows=1.5, batch_size=0, repeats=0, shots=[4, 2], group_by="user")
    keys = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert keys == ["data.val_rows", "data.batch_size", "data.repeats", "data.shots", "data.group_by"]


def test_nobody_to_train_on(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b", "user_split": "unseen"}\n')
    with pytest.raises(ValueError, match="expected users to train on, got none seen"):
        _ = make(PairFiles(str(path))).num_users


def test_fit_and_test_with_lightning(make: Any, tmp_path: Path) -> None:
    data, model = make(shots=[0, 4], repeats=1), Tiny(64)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(__len__|num_workers|does not have many workers|sampler).*")
        trainer(tmp_path, max_epochs=2).fit(model, data)
        assert len(model.seen["train"]) == 2 and model.seen["train"][0] is model.seen["train"][1]
        trainer(tmp_path).test(model, data)
    assert [index for index, _ in model.seen["test"]] == [0, 1, 2, 2]


def test_small_batches_are_reordered_every_epoch(make: Any, tmp_path: Path) -> None:
    data, model = make(batch_size=64), Tiny(64)
    trainer(tmp_path, max_epochs=2).fit(model, data)
    half = len(model.seen["train"]) // 2
    first, second = torch.cat(model.seen["train"][:half]), torch.cat(model.seen["train"][half:])
    assert not torch.equal(first, second)
    assert torch.allclose(first.sum(0), second.sum(0), atol=1e-3)


def test_checkpoint_of_another_split_warns(make: Any, tmp_path: Path) -> None:
    model = Tiny(64)
    fitted = trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
    fitted.fit(model, make())
    path = str(tmp_path / "tiny.ckpt")
    fitted.save_checkpoint(path)
    with pytest.warns(UserWarning, match="pairs tested here may have been trained on"):
        trainer(tmp_path).test(model, make(split_seed=1), ckpt_path=path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained on.*")
        trainer(tmp_path).test(model, make(), ckpt_path=path)


def test_whole_batch_is_copied_to_the_device_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    batch = next(iter(data.train_dataloader()))
    data.trainer = type("Stub", (), {"training": True})()
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.chosen.device.type == "meta" and isinstance(moved, PreferenceBatch)
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0) is moved
    data.teardown("fit")
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0) is not moved
    data.trainer.training = False
    other = batch._replace(weight=batch.weight + 1)
    assert data.transfer_batch_to_device(other, torch.device("cpu"), 0).weight.device.type == "cpu"


@pytest.mark.parametrize("world", ["low_rank", "ideal_point", "conflicting_groups"])
def test_hashed_words_express_the_planted_attributes(make: Any, world: Any) -> None:
    """A linear map of the features recovers every attribute of held-out texts."""
    source = SyntheticPairs(world, num_users=60, pairs_per_user=40)
    data = PreferenceDataModule(source, HashingBackbone(512), make().cache_dir)
    features, attributes = np.asarray(data._data.items.features, np.float64), source.truth.attributes
    train = np.arange(len(features)) % 2 == 0
    gram = features[train].T @ features[train] + 1e-3 * np.eye(512)
    guess = features[~train] @ np.linalg.solve(gram, features[train].T @ attributes[train])
    correlation = [np.corrcoef(guess[:, a], attributes[~train, a])[0, 1] for a in range(attributes.shape[1])]
    assert min(correlation) > 0.9


# ---------------------------------------------------------------------- features that stay on the disk
@pytest.mark.parametrize("batch_size", [None, 40])
def test_batches_of_mapped_features_are_those_of_features_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    """Items that no pair refers to included; pairs of the same features on both sides are warned about."""

    rows = [(f"u{row % 5}", f"p{row}", f"tea {row}", f"no {row}") for row in range(90)]
    rows += [(f"u{row}", "same", "strong tea", "tea strong") for row in range(3)]
    names = ("user_id", "prompt", "chosen", "rejected")
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    )

    class Part(Counting):
        def load(self) -> PairTable:
            return self.source.load().take(np.arange(2, 93))  # keeps the items of the first two

    def batches(cache: str, kind: type) -> list[PreferenceBatch]:
        source = Part(PairFiles(str(tmp_path / "pairs.jsonl")))
        data = PreferenceDataModule(source, HashingBackbone(32), cache, batch_size=batch_size, prompt_features=True)
        with pytest.warns(
            UserWarning, match=r"3 of 91 pairs have the same features on both sides \(.*pairs.jsonl:91\)"
        ):
            data.setup("fit")
        items, table = data._data.items, data.table
        every = items.gather(np.arange(len(table.items)))
        assert type(items) is type(data._data.prompts) is kind and isinstance(every, Tensor)
        used = np.isin(np.arange(len(table.items)), [table.chosen, table.rejected])
        assert torch.equal(every.isnan().all(1), torch.from_numpy(~used)) and (~used).sum() == 4
        return [batch for loader in (data.train_dataloader(), *data.test_dataloader()) for batch in loader]

    monkeypatch.setattr("plm.data.features.SHARD_TEXTS", (16, 16))
    held = batches(str(tmp_path / "held"), FeatureRows)
    monkeypatch.setattr(encoding, "MOST_HELD", 0)
    for ours, theirs in zip(batches(str(tmp_path / "mapped"), MappedRows), held, strict=True):
        for name in ("chosen", "rejected", "prompt"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        if ours.context is not None:
            assert torch.equal(ours.context.chosen, theirs.context.chosen)


# ---------------------------------------------------------------------- filled without a fit
def test_a_filled_cache_holds_all_that_a_fit_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses and prompts alone; the features are those of a fit without it."""
    source, backbone = SyntheticPairs(num_users=20, pairs_per_user=10), HashingBackbone(64, include_prompt=True)
    data = PreferenceDataModule(source, backbone, str(tmp_path / "filled"), prompt_features=True)
    expected = PreferenceDataModule(source, backbone, str(tmp_path / "other"), prompt_features=True)
    table = data.table
    filled = [data.fill_cache((index, 2)) for index in (2, 1)]
    assert all(part.keys() == {"responses", "prompts"} for part in filled)
    items = np.unique(np.concatenate([table.chosen, table.rejected]))
    for name, count in (("responses", len(items)), ("prompts", len(np.unique(table.items[items, 0])))):
        assert {part[name].num_texts for part in filled} == {count}
        assert sum(part[name].num_encoded for part in filled) == count
    expected.setup("fit")
    monkeypatch.setattr(HashingBackbone, "encode", None)
    data.setup("fit")
    for ours, theirs in zip(data.train_dataloader(), expected.train_dataloader(), strict=True):
        for name in ("chosen", "rejected", "prompt"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_reference_logps_are_filled_and_tokens_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SyntheticPairs(num_users=3, pairs_per_user=4), tiny_causal_lm(), str(tmp_path)
    with pytest.raises(ValueError, match="features are cached, got FreshCausalLM, whose tokens are not"):
        PreferenceDataModule(*arguments).fill_cache()
    data = PreferenceDataModule(*arguments, reference_logps=True)
    assert data.fill_cache()["reference"].num_encoded == len(data.table.items)
    monkeypatch.setattr(ReferenceLogps, "encode", None)
    data.setup("fit")
