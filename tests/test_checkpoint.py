from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from plm.backbones import HashingBackbone
from plm.checkpoint import find_class, load_method, store_users
from plm.method import PersonalizationMethod
from plm.types import Context, PreferenceBatch, Tokens, UserState
from plm.users import store_path

DIM = 16
TEXTS = ["a long walk", "tea and toast", "no", "Ein Satz über nichts"]


class TableMethod(PersonalizationMethod):
    """One shared direction plus a row per user."""

    view = "features"
    user_tables = ("rows",)

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None = None,
        lr: float = 0.1,
        scale: float = 1.0,
    ) -> None:
        super().__init__(num_users, feature_dim, backbone, lr)
        self.scale = scale
        self.direction = torch.nn.Parameter(torch.linspace(-1, 1, feature_dim))
        self.rows = torch.nn.Parameter(torch.arange(num_users * feature_dim).reshape(num_users, feature_dim) / 7)

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        return {"loss": -torch.nn.functional.logsigmoid(self.margin(batch)).mean()}

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        assert isinstance(responses, Tensor)
        return self.scale * (responses * (self.direction + users.tensors["rows"])).sum(-1)

    def _adapt(self, context: Context) -> UserState:
        total = ((context.chosen - context.rejected) * context.mask[..., None]).sum(1)
        return UserState({"rows": total}, context.mask.sum(1))

    def user_states(self, user_index: Tensor) -> UserState:
        return UserState({"rows": self.rows[user_index]}, torch.full_like(user_index, 5))

    def population_state(self, num_users: int) -> UserState:
        return UserState({"rows": self.rows.new_zeros(num_users, self.feature_dim)}, torch.zeros(num_users).long())


class NoLinks(TableMethod):
    """A method that knows its own sizes."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(3, DIM, HashingBackbone(dim=DIM).spec(), lr)


def save(method: PersonalizationMethod, path: Path, change: dict[str, Any] | None = None) -> Path:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=path.parent)
    trainer.strategy.connect(method)
    trainer.save_checkpoint(path)
    store_users(method, path)
    if change:
        torch.save({**torch.load(path, weights_only=True), **change}, path)
    return path


@pytest.fixture
def method() -> TableMethod:
    made = TableMethod(3, DIM, HashingBackbone(dim=DIM).spec(), scale=0.3)
    made.user_ids = ["anna", "ben", "cleo"]
    return made


def test_rewards_survive_bit_for_bit(method: TableMethod, tmp_path: Path) -> None:
    loaded = load_method(save(method, tmp_path / "m.ckpt"))
    features = HashingBackbone(dim=DIM).encode(TEXTS)
    for row, user_id in enumerate(method.user_ids):
        before = method.score(features, method.user_states(torch.full((len(TEXTS),), row)))
        assert torch.equal(loaded.score(TEXTS, user_id=user_id), before)
        assert torch.equal(loaded.score(features, loaded.user_states(torch.full((len(TEXTS),), row))), before)
    assert not loaded.training and loaded.user_ids == method.user_ids


def test_adapted_users_are_found_and_unknown_ones_get_the_population(method: TableMethod, tmp_path: Path) -> None:
    path = save(method, tmp_path / "m.ckpt")
    store = load_method(path).find_users.store  # type: ignore[union-attr]
    store.add(["dora", "ben"], UserState({"rows": torch.ones(2, DIM)}, torch.tensor([2, 2])))
    store.delete(["cleo"])
    loaded = load_method(path)
    features = HashingBackbone(dim=DIM).encode(TEXTS)
    population = method.score(features)
    ones = method.score(features, UserState({"rows": torch.ones(4, DIM)}, torch.ones(4).long()))
    assert torch.equal(loaded.score(TEXTS, user_id=["dora", "ben", "dora", "ben"]), ones)  # the newer row of ben counts
    with pytest.warns(UserWarning, match=r"as the population: 'cleo', 'zoe' \(2 in all\)"):
        rewards = loaded.score(TEXTS, user_id=["cleo", "zoe", "cleo", "dora"])
    assert torch.equal(rewards, torch.cat([population[:3], ones[3:]]))


def test_a_store_of_other_weights_is_refused(method: TableMethod, tmp_path: Path) -> None:
    path = save(method, tmp_path / "m.ckpt")
    before = store_path(path).rename(tmp_path / "before.db")
    with torch.no_grad():
        method.rows += 1  # user rows do not count
    load_method(save(method, path), users=before)
    with torch.no_grad():
        method.direction += 1
    save(method, path)
    before.rename(store_path(path))
    with pytest.raises(ValueError, match="belongs to other shared weights"):
        load_method(path)


def test_hyper_parameters_as_the_command_writes_them(tmp_path: Path) -> None:
    made = NoLinks(lr=0.5)
    written = {
        "_class_path": "x.Y",
        "_instantiator": "z",
        "lr": 0.5,
        "num_users": 3,
        "feature_dim": DIM,
        "backbone": HashingBackbone(dim=DIM).spec(),
    }
    loaded = load_method(save(made, tmp_path / "m.ckpt", {"hyper_parameters": written}))
    assert isinstance(loaded, NoLinks) and loaded.lr == 0.5
    assert torch.equal(loaded.score(TEXTS), made.score(HashingBackbone(dim=DIM).encode(TEXTS)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plm": {"class_path": "nowhere.Method", "user_ids": []}}, "cannot import the method 'nowhere.Method'"),
        ({"plm": {"class_path": "plm.method.Missing", "user_ids": []}}, "has no attribute 'Missing'"),
        ({"plm": {"class_path": "pathlib.Path", "user_ids": []}}, "expected a subclass of PersonalizationMethod"),
        ({"hyper_parameters": {"num_users": 3, "feature_dim": 8}}, "does not fit the installed .*size mismatch"),
        ({"hyper_parameters": {"num_users": 3, "feature_dim": DIM, "gone": 1}}, "unexpected keyword argument 'gone'"),
        ({"state_dict": {}}, "Missing key"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(
    method: TableMethod, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = save(method, tmp_path / "m.ckpt", change)
    with pytest.raises(ValueError, match=message):
        load_method(path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["PLM_TEST_BOMB"],)


def test_foreign_files_are_refused_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLM_TEST_BOMB", str(tmp_path / "exploded"))
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").touch()
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({"plm": Bomb()}, tmp_path / "bomb.ckpt")
    for name, message in {
        "text.ckpt": "cannot be read",
        "empty.ckpt": "cannot be read",
        "bomb.ckpt": "cannot be read",
        "other.ckpt": "has no 'plm' entry",
        "missing.ckpt": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_method(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_texts_need_a_backbone_and_features_the_right_width(tmp_path: Path) -> None:
    loaded = load_method(save(TableMethod(3, DIM), tmp_path / "m.ckpt"))
    with pytest.raises(ValueError, match="names no backbone"):
        loaded.score(TEXTS)
    with pytest.raises(ValueError, match="features of width 16, got 3"):
        loaded.score(torch.zeros(1, 3))


def test_find_class_takes_a_path_to_a_method() -> None:
    assert find_class(f"{__name__}.TableMethod") is TableMethod
    with pytest.raises(ValueError, match="cannot import"):
        find_class("LoRe")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("plm", None, "no valid entry plm"),
        ("PreferenceDataModule", {"reading": ["a"]}, "no valid entry PreferenceDataModule.reading"),
        ("PreferenceDataModule", {"reading": {"path": "x"}}, "no valid entry PreferenceDataModule.reading"),
        ("plm", {"class_path": None, "user_ids": ["a"]}, "no valid entry plm"),
        ("plm", {"class_path": "x.Y", "user_ids": [["a"]]}, "no valid entry plm"),
        ("plm", {"class_path": "x.Y", "user_ids": ["a", "a"]}, "no valid entry plm"),
        ("hyper_parameters", ["lr"], "no valid entry hyper_parameters"),
        ("state_dict", [1], "no valid entry state_dict"),
        (
            "hyper_parameters",
            {"backbone": "minilm"},
            "expected backbone of .* as class_path.*, got 'minilm'",
        ),
        ("hyper_parameters", {"backbone": {"init_args": 3}}, "expected backbone of .* as class_path and init_args"),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, entry: str, value: Any, message: str) -> None:
    path = save(NoLinks(), tmp_path / "x.ckpt", {entry: value})
    with pytest.raises(ValueError, match=message):
        load_method(path)


def test_users_that_do_not_fit_the_table_are_refused(tmp_path: Path) -> None:
    path = save(NoLinks(), tmp_path / "x.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["plm"]["user_ids"].pop()
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="2 user ids for 3 users"):
        load_method(path)
