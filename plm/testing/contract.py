"""MethodContract: what holds for every method, ours or a third party's, as tests to inherit.

Nothing here needs pytest: the tests are plain methods with plain asserts.

Axes: U users, S pairs of one user, B pairs in a batch, D feature width.
"""

from __future__ import annotations

import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from plm.checkpoint import load_method, store_users
from plm.method import PersonalizationMethod
from plm.method.abilities import Explainable
from plm.testing.checks import assert_same, equal, must_fail
from plm.testing.planted import PlantedData, TinyBackbone
from plm.types import Context
from plm.users import UserStore, shared_hash


def quiet_trainer(folder: str | Path, **options: Any) -> L.Trainer:
    """A CPU trainer that writes nothing but what is asked for; ``options`` go to ``lightning.Trainer``."""
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": folder,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


@contextmanager
def saved(method: PersonalizationMethod, change: Callable[[dict[str, Any]], None] | None = None) -> Iterator[Path]:
    """The checkpoint of a method and its users in a folder that lasts as long as the block.

    Args:
        method: The method.
        change: Edits the checkpoint before it is written.

    Yields:
        Its path.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "method.ckpt"
        trainer = quiet_trainer(folder)
        trainer.strategy.connect(method)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        if change is not None:
            change(checkpoint)
        torch.save(checkpoint, path)
        store_users(method, path)
        yield path


class _Losses(L.Callback):
    """Remembers the loss of every training batch; whatever is random in it is drawn alike for all."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(0)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


class _Outputs(L.Callback):
    """Remembers what the test steps return."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.inference: list[bool] = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.steps.append({name: value.clone() for name, value in outputs.items()})
        self.inference.append(torch.is_inference_mode_enabled())


class MethodContract(ABC):
    """What holds for every method; subclass it in a test module and write ``make``.

    Attributes of the class are sizes a subclass may change. ``data`` gives the planted users; a method that reads other
    than features returns a datamodule of its own there, with the same attributes.
    """

    num_users: ClassVar[int] = 12
    feature_dim: ClassVar[int] = 8
    fit_epochs: ClassVar[int] = 20
    company_tolerance: ClassVar[float] = 1e-5
    """How far, relative to one plus its size, rounding may move a state when other users share the batch."""
    ignores: ClassVar[Literal["what a pair shares", "a constant", "nothing"]] = "what a pair shares"
    """What may be added to features: rewards linear in them ignore all that both responses of a pair share, others that
    are conditioned a constant, published models nothing."""
    order_matters: ClassVar[bool] = False
    """Whether users are drawn by their place, so that another order of them is another fit, as in published models."""
    units_matter: ClassVar[bool] = False
    """Whether rewards are in the units of the features, as in methods that neither condition nor scale them."""
    is_fitted: ClassVar[bool] = True
    """Whether a fit trains it and tunes a Bradley-Terry model beside it; portfolios are installed."""
    rounding: ClassVar[float] = 1e-3
    """How far, relative to one plus its size, a margin may move when the same sums are added up in another order."""
    _fitted: ClassVar[PersonalizationMethod]
    _margins_on_grid: ClassVar[Tensor]

    @abstractmethod
    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        """A new, small, untrained method."""

    def data(self) -> PlantedData:
        """Planted users to train and evaluate on."""
        return PlantedData(self.num_users, feature_dim=self.feature_dim)

    def fit(self, data: PlantedData, *callbacks: L.Callback, epochs: int | None = None) -> PersonalizationMethod:
        """Train a new method by ``lightning.Trainer``, validated once, and return it without its trainer."""
        torch.manual_seed(0)
        length = dict.fromkeys(("max_epochs", "check_val_every_n_epoch"), epochs or self.fit_epochs)
        method = self.make(data.num_users, data.feature_dim)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(folder, callbacks=list(callbacks), **length).fit(method, datamodule=data)
        method.trainer = None
        return method

    def fitted(self) -> PersonalizationMethod:
        """A method trained on ``data()``, once for all tests of a class: do not change it."""
        if "_fitted" not in type(self).__dict__:
            type(self)._fitted = self.fit(self.data())
        return self._fitted.eval()

    def context(self) -> Context:
        """Support of unseen users with ties, weights, padding, and one user without any pair."""
        context = self.data().context
        count = torch.arange(context.num_users)[:, None] * 2  # 0, 2, 4, ... pairs
        mask = torch.arange(context.mask.shape[1]) < count
        weight = torch.linspace(0.5, 2.0, mask.numel()).view(mask.shape)
        tie = torch.arange(mask.numel()).view(mask.shape) % 5 == 0
        hidden = context.map(lambda value: value * mask.view(*mask.shape, *[1] * (value.dim() - 2)))
        return hidden._replace(weight=weight * mask, tie=tie & mask)

    # ------------------------------------------------------------------ adapt
    def test_adapt_leaves_no_mark(self) -> None:
        """Weights, gradients, training mode, random state and the context itself are what they were."""
        method, context = self.fitted(), self.context()
        before = {name: value.clone() for name, value in method.state_dict().items()}
        grads = [(p.requires_grad, p.grad is None) for p in method.parameters()]
        copies = context.map(torch.clone)
        random = torch.get_rng_state()
        for training in (True, False):
            method.train(training)
            method.adapt(context)
            assert method.training is training, "adapt must restore the training mode"
        for name, value in method.state_dict().items():
            assert torch.equal(value, before[name]), f"adapt changed {name!r}"
        assert [(p.requires_grad, p.grad is None) for p in method.parameters()] == grads, "adapt left gradients"
        for name, copy, value in zip(context._fields, copies, context, strict=True):
            assert equal(copy, value), f"adapt changed context.{name}"
        assert torch.equal(torch.get_rng_state(), random), "adapt drew from the global random state; seed per user"

    def test_adapt_returns_detached_finite_rows(self) -> None:
        """One row per user, in order, with its number of pairs."""
        context = self.context()
        state = self.fitted().adapt(context)
        assert torch.equal(state.num_pairs, context.mask.sum(-1)), "num_pairs must count the real pairs of each user"
        for name, value in state.tensors.items():
            assert len(value) == context.num_users, f"{name!r} has {len(value)} rows for {context.num_users} users"
            assert not value.requires_grad and value.isfinite().all(), f"{name!r} must be finite and detached"

    def test_adapt_is_deterministic(self) -> None:
        """The same pairs give the same bits, whatever the global seed."""
        method, context = self.fitted(), self.context()
        torch.manual_seed(1)
        first = method.adapt(context)
        torch.manual_seed(2)
        assert_same(first, method.adapt(context))

    def test_a_user_alone_equals_the_same_user_in_the_crowd(self) -> None:
        """Neither the company, nor its order, nor the order of the pairs, nor padding matters."""
        method, context = self.fitted(), self.context()
        crowd = method.adapt(context)
        for row in range(context.num_users):
            size = max(int(context.mask[row].sum()), 1)
            alone = context.map(lambda value, row=row, size=size: value[row : row + 1, :size])  # type: ignore[misc]
            assert_same(
                method.adapt(alone), crowd.take(torch.tensor([row])), self.company_tolerance, f"user {row} alone"
            )
        users = torch.arange(context.num_users).flip(0)
        reordered = context.map(lambda value: value[users])
        assert_same(method.adapt(reordered), crowd.take(users), self.company_tolerance, "other users' order")
        assert_same(
            method.adapt(context.map(lambda value: value.flip(1))),
            crowd,
            self.company_tolerance,
            "other pairs' order",
        )
        padded = context.map(lambda value: torch.cat([value, torch.zeros_like(value)], 1))
        assert_same(method.adapt(padded), crowd, self.company_tolerance, "more padding")

    def test_a_pair_of_weight_zero_is_as_if_it_were_not_there(self) -> None:
        """Neither its features nor its label nor that there is one more matter; ``num_pairs`` alone counts it."""
        method, context = self.fitted(), self.context()
        place = torch.arange(context.mask.shape[1]) % 3 == 1
        weightless = context._replace(weight=torch.where(place, 0.0, context.weight))
        without = context._replace(weight=weightless.weight, mask=context.mask & ~place)
        count = context.mask.sum(-1)
        first, second = (method.adapt(one)._replace(num_pairs=count) for one in (weightless, without))
        assert_same(first, second, self.company_tolerance, "a pair of weight 0")

    def test_zero_shots_is_the_population(self) -> None:
        """A user without pairs has the population state, which is one for everybody."""
        method, context = self.fitted(), self.context()
        with torch.no_grad():
            population = method.population_state(context.num_users).detach()
            assert_same(population, method.population_state(1).take(torch.zeros(context.num_users).long()))
        nobody = context.map(torch.zeros_like)
        assert_same(method.adapt(nobody), population, 1e-6, "zero shots")
        without = (context.mask.sum(-1) == 0).nonzero()[:, 0]
        assert_same(method.adapt(context).take(without), population.take(without), 1e-6, "zero shots in a crowd")

    def test_adapt_and_evaluate_work_inside_the_trainer(self) -> None:
        """``trainer.test`` runs under inference mode, where autograd is off; the margins are those outside."""
        method, data, outputs = self.fitted(), self.data(), _Outputs()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = quiet_trainer(folder, callbacks=[outputs])
            trainer.test(method, datamodule=data, verbose=False)
        method.trainer = None
        assert len(outputs.steps) == 2 and all(outputs.inference), "expected two steps under inference mode"
        for facts, batch in zip(outputs.steps, (data.test_batch, data.unseen_batch), strict=True):
            with torch.no_grad():
                expected = method.evaluate(batch)
            names = {"margin"}
            if method.user_states(torch.zeros(1, dtype=torch.long)).tensors:
                names |= {"population_margin", "other_margin"}
                names |= {"bradley_terry_margin"} if method.view == "features" and self.is_fitted else set()
                names |= {"flipped_margin"} if method.view == "features" and batch.context is not None else set()
            assert facts.keys() == expected.keys() == names, f"facts {sorted(facts)}, expected {sorted(names)}"
            for name, value in expected.items():
                assert value.shape == (batch.num_pairs,), f"{name!r} has the shape {tuple(value.shape)}"
                assert torch.allclose(facts[name], value, atol=1e-6), f"{name!r} differs under inference mode"

    # ------------------------------------------------------------------ rewards
    def test_margin_changes_sign_when_the_pair_is_swapped(self) -> None:
        """Chosen and rejected are treated alike."""
        method, data = self.fitted(), self.data()
        for batch in (data.test_batch, data.unseen_batch):
            with torch.no_grad():
                margin = method.margin(batch)
                swapped = method.margin(batch._replace(chosen=batch.rejected, rejected=batch.chosen))
            assert margin.isfinite().all(), "margins must be finite"
            assert torch.allclose(margin, -swapped, atol=1e-5), "a swapped pair must have the opposite margin"

    def test_what_is_judged_is_what_is_served(self) -> None:
        """The margin of a pair is the score of chosen less the score of rejected."""
        method, data = self.fitted(), self.data()
        if method.view != "features":
            return
        for batch in (data.test_batch, data.unseen_batch):
            with torch.no_grad():
                users = method.batch_states(batch)
                sides = [method.score(side, users, prompt_features=batch.prompt) for side in batch.features]
                margin = method.margin(batch, users)
            assert torch.allclose(margin, sides[0] - sides[1], atol=1e-5), "margin is not the difference of scores"

    def test_score_is_finite_and_refuses_other_features(self) -> None:
        """One finite reward per response for seen users, unseen users and the population."""
        method, data = self.fitted(), self.data()
        responses = data.test_batch.chosen
        unseen = method.adapt(data.context).take(torch.arange(data.test_batch.num_pairs) % data.context.num_users)
        with torch.no_grad():
            for users in (None, method.user_states(data.test_batch.user_index), unseen):
                reward = method.score(responses, users, prompt_features=data.test_batch.prompt)
                assert reward.shape == (data.test_batch.num_pairs,), f"rewards of shape {tuple(reward.shape)}"
                assert reward.isfinite().all(), "rewards must be finite"
        if isinstance(responses, Tensor):
            must_fail(lambda: method.score(torch.zeros(1, self.feature_dim + 1)), str(self.feature_dim))
        must_fail(lambda: method.score(responses, method.population_state(1)), "one user per response")

    def test_weights_say_all_of_a_user(self) -> None:
        """Users made from the weights of others get their rewards."""
        method, batch = self.fitted(), self.data().test_batch
        if not (isinstance(method, Explainable) and method.has_weights):
            return
        with torch.no_grad():
            users = method.user_states(batch.user_index)
            same = method.with_weights(method.basis_weights(users))
            first, second = (method.score(batch.chosen, some, prompt_features=batch.prompt) for some in (users, same))
        assert torch.allclose(first, second, atol=1e-5), "rewards differ where weights do not"

    # ------------------------------------------------------------------ training
    def test_one_step_lowers_the_loss(self) -> None:
        """On the same planted users; a method with nothing to train is excused."""
        losses = _Losses()
        method = self.fit(self.data(), losses)  # as long as usual: schedules stretch over the whole fit
        assert all(torch.isfinite(torch.tensor(losses.values))), f"losses {losses.values}"
        if any(p.requires_grad for p in method.parameters()):
            assert losses.values[1] < losses.values[0], f"losses of the first two steps: {losses.values}"

    def test_training_is_deterministic(self) -> None:
        """The same seed gives the same bits."""
        first, second = (self.fit(self.data(), epochs=3).state_dict() for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name!r} differs between two runs of one seed"

    # ------------------------------------------------------------------ features
    def test_what_both_responses_share_changes_nothing(self) -> None:
        """A constant vector on all features, and a random one on both responses of each pair, move no accuracy."""
        if self.make(2, self.feature_dim).view != "features" or self.ignores == "nothing":
            return
        draw = torch.Generator().manual_seed(1)

        def steps(*shape: int) -> Tensor:  # 4 times as long as a difference, in steps that keep sums exact
            return (4 * torch.randn(*shape, generator=draw) * 64).round() / 64

        constant = steps(self.feature_dim)

        def move(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
            shared = constant + steps(*chosen.shape) * (self.ignores == "what a pair shares")
            return chosen + shared, rejected + shared

        data = self._on_grid()
        data.change(move)
        moved = self._margins(self.fit(data, epochs=5), data)
        plain, other = ((margins > 0).double().mean(-1) for margins in (self._grid_margins(), moved))
        assert (plain - other).abs().max() <= 0.003, f"{self.ignores} moves accuracies from {plain} to {other}"

    def test_units_names_and_order_of_users_change_nothing(self) -> None:
        """Features times 1,024 and users renamed and in the opposite order: the same margins up to rounding."""
        if self.make(2, self.feature_dim).view != "features" or not self.is_fitted:
            return
        data = self._on_grid()
        if not self.units_matter:
            data.change(lambda chosen, rejected: (1024 * chosen, 1024 * rejected))
        if data.reference_head is not None and not self.units_matter:
            data.reference_head = data.reference_head / 1024
        if not self.order_matters:
            data.reverse_users()
        margins, other = self._grid_margins(), self._margins(self.fit(data, epochs=5), data)
        apart = ((margins - other).abs() / (1 + margins.abs())).max()
        assert apart <= self.rounding, f"margins differ by {apart:.1e}: set rounding, order_matters or units_matter"

    def _grid_margins(self) -> Tensor:
        """Margins of a method trained for 5 epochs on the data on the grid, once for both tests."""
        if "_margins_on_grid" not in type(self).__dict__:
            data = self._on_grid()
            type(self)._margins_on_grid = self._margins(self.fit(data, epochs=5), data)
        return self._margins_on_grid

    def _on_grid(self) -> PlantedData:
        """The data, rounded so that differences and sums of features keep every bit."""
        data = self.data()
        data.change(lambda chosen, rejected: ((chosen * 1024).round() / 1024, (rejected * 1024).round() / 1024))
        return data

    def _margins(self, method: PersonalizationMethod, data: PlantedData) -> Tensor:
        """Personal and population margins of all test pairs: ``(2, N)``; the same where nobody has a state."""
        with torch.no_grad():
            facts = [method.eval().evaluate(batch) for batch in (data.test_batch, data.unseen_batch)]
        names = ("margin", "population_margin")
        return torch.stack([torch.cat([fact.get(name, fact["margin"]) for fact in facts]) for name in names])

    # ------------------------------------------------------------------ checkpoints and users
    def test_a_loaded_method_gives_the_same_margins(self) -> None:
        """Bit for bit, for seen and unseen users, by index, by id and from text."""
        method, data = self.fitted(), self.data()
        spec = TinyBackbone(self.feature_dim).spec()
        change = {"backbone": spec} if method.view == "features" else {}
        with saved(method, lambda checkpoint: checkpoint["hyper_parameters"].update(change)) as path:
            loaded = load_method(path)
            assert type(loaded) is type(method) and loaded.user_ids == data.user_ids, "another class or other users"
            assert not loaded.training, "a loaded method is in eval mode"
            for batch in (data.test_batch, data.unseen_batch):
                with torch.no_grad():
                    assert torch.equal(method.margin(batch), loaded.margin(batch)), "margins changed"
            if method.view == "features":
                texts = ["a walk", "tea and toast", "no"]
                with torch.no_grad():
                    users = method.user_states(torch.full((3,), 1))
                    expected = method.score(TinyBackbone(self.feature_dim).encode(texts), users)
                assert torch.equal(loaded.score(texts, user_id=data.user_ids[1]), expected), "rewards of texts changed"

    def test_rows_of_users_are_copied_by_id(self) -> None:
        """A table in another order, with a user the checkpoint lacks and without some it has."""
        method, data = self.fitted(), self.data()
        ids = ["newcomer", *reversed(data.user_ids[2:])]
        other = self.make(len(ids), self.feature_dim)
        other.configure_model()
        other.user_ids = ids
        with saved(method) as path, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint = torch.load(path, weights_only=True)
            other.on_load_checkpoint(checkpoint)
            other.load_state_dict(checkpoint["state_dict"], strict=other.strict_loading)
        if method.user_tables:
            warned = [str(warning.message) for warning in caught]
            assert any(f"1 of {len(ids)} users" in text for text in warned), "no warning about the missing user"
        here = torch.arange(1, len(ids))
        there = torch.tensor([data.user_ids.index(user_id) for user_id in ids[1:]])
        with torch.no_grad():
            assert_same(other.eval().user_states(here), method.user_states(there), what="rows by id")
            newcomer = other.user_states(torch.zeros(1, dtype=torch.long))
        assert all(value.isfinite().all() for value in newcomer.tensors.values()), "the newcomer's state is not finite"

    def test_states_round_trip_through_the_store(self) -> None:
        """Saved, loaded and looked up by id in another order: the same bits and the same rewards."""
        method, data = self.fitted(), self.data()
        state = method.adapt(data.context)
        ids = data.all_user_ids[data.num_users :]
        with tempfile.TemporaryDirectory() as folder:
            weights_hash = shared_hash(method.state_dict(), method.user_tables)
            UserStore(Path(folder) / "users.db", weights_hash).add(ids, state)
            found, known = UserStore(Path(folder) / "users.db").get(ids[::-1])
        assert known.all(), "stored users were not found"
        backwards = torch.arange(len(ids)).flip(0)
        assert_same(found, state.take(backwards))
        batch = data.unseen_batch
        assert batch.context_row is not None, "the unseen batch needs context_row"
        with torch.no_grad():
            stored = method.margin(batch, found.take(backwards[batch.context_row]))
            expected = method.margin(batch, state.take(batch.context_row))
        assert torch.equal(stored, expected), "margins of stored states differ"
