"""PersonalizationMethod: the protocol every method follows. No maths lives here."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, final

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.method.accumulation import AccumulatedSteps
from plm.method.arguments import given_arguments
from plm.method.conditioning import Conditioning
from plm.method.loaded import LoadedMethod
from plm.method.population import load_validation_pairs, tuned_population
from plm.method.reading import without_pairs
from plm.method.strangers import with_evidence
from plm.types import Context, PreferenceBatch, ResumableBatches, Tokens, UserId, UserState, id_text

CHECKPOINT_KEY = "plm"
"""Where a checkpoint keeps what is not a weight: class path, format version, seen user ids."""


class PersonalizationMethod(AccumulatedSteps, LoadedMethod, ABC):
    """A preference model that knows each of its users.

    A subclass writes ``loss``, ``_score``, ``_adapt``, ``user_states`` and ``population_state``; steps, logging, guards
    and checkpoints are written here once. Rewards are comparable within one user only.

    Args:
        num_users: Number of seen users; linked from the data in recipes.
        feature_dim: Width D of the features; linked from the data in recipes.
        backbone: What makes the features, as ``{class_path, init_args}``; linked from the data, kept in the checkpoint
            so that a loaded method can score text.
        lr: Learning rate of the shared parameters.
        conditioning: What is done to features before the method sees them: none; centre = less the mean training
            response; standardise = also divided by the root mean square training difference, number by number; whiten
            = also by the root of the shrunk covariance of training differences. Acts on features only.
    """

    uses_context: ClassVar[bool] = False
    user_tables: tuple[str, ...] = ()
    """Names of parameters and buffers with one row per seen user: copied by user id when a checkpoint is loaded."""
    search_space: ClassVar[dict[str, list[Any]]] = {}
    """Argument -> values to try: the grid that ``plm leaderboard --budget`` draws from. A subclass inherits it."""

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None = None,
        lr: float = 1e-3,
        conditioning: Conditioning = "centre",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._condition(conditioning, feature_dim)
        self.num_users = num_users
        self.lr = lr
        self.user_ids: list[str] = [str(index) for index in range(num_users)]
        self._num_train_pairs: int | None = None

    # ------------------------------------------------------------------ what a method writes
    @abstractmethod
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return ``"loss"`` (a scalar to minimise) plus scalars to log.

        What a method writes reads conditioned features, see `FeatureConditioning`; what users call takes raw ones.

        ``"count"`` is not logged: ``()`` of how many terms, on all processes, the loss is the mean, where these are not
        the pairs. Batches of an accumulated step weigh by it, so that the step is that of one batch.
        """

    @abstractmethod
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Reward of each response for the user in the same row: ``(B, D), U=B -> (B,)``.

        With `reads_prompts` there is a third argument, ``prompt_features``: ``(B, D)`` of the prompts alone.
        """

    def _score_rows(self, responses: Tensor | Tokens, users: UserState, rows: Tensor, **prompts: Any) -> Tensor:
        """Score for the user in row ``rows[i]``; overridden where states are too large to copy for each response."""
        return self._score(responses, users.take(rows), **prompts)

    def _margin(self, batch: PreferenceBatch, users: UserState) -> Tensor:
        """Reward of chosen minus reward of rejected for the user in the same row: ``(B,)``."""
        prompts = self._prompt_option(batch.prompt)
        return self._score(batch.chosen, users, **prompts) - self._score(batch.rejected, users, **prompts)

    @abstractmethod
    def _adapt(self, context: Context) -> UserState:
        """States of unseen users from their pairs alone; called with gradients enabled and inputs cloned."""

    @abstractmethod
    def user_states(self, user_index: Tensor) -> UserState:
        """States of seen users: ``(B,)`` -> leading axis B."""

    @abstractmethod
    def population_state(self, num_users: int) -> UserState:
        """The state at zero shots: the same finite prior for everybody."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; default: everything trainable at ``lr``."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": self.lr}]

    def refresh_users(self) -> None:
        """Bring what is solved rather than trained up to date; called before every validation of a fit and at its end.

        ``train_pass`` and ``val_pass`` give the pairs.
        """

    def report(self) -> dict[str, float]:
        """Return numbers about the fitted method for ``metrics.json``, such as signs of collapse; nan = unknown."""
        return {}

    def read_tokens(self, tokens: Tokens) -> Tensor | Tokens:
        """Turn the tokens of texts into what scoring and adapting read; by default they read tokens."""
        return tokens

    @property
    def reads_prompts(self) -> bool:
        """Whether ``_score`` takes ``prompt_features``, as batches carry them with ``data.prompt_features: true``."""
        return False

    @property
    def num_train_pairs(self) -> int:
        """Number of training pairs, on all processes; what a prior weighs as one of in the mean of a loss.

        Raises:
            RuntimeError: Before a fit has counted them. By then it has measured the features, too: steps without both
                would train to nonsense.
        """
        if self._num_train_pairs is None:
            raise RuntimeError(
                f"{type(self).__name__}: expected a loss inside of a fit, which measures features and counts pairs "
                "first, got a loop of its own; take plm.fit, or lightning.Trainer().fit(method, datamodule=data)"
            )
        return self._num_train_pairs

    @num_train_pairs.setter
    def num_train_pairs(self, num_pairs: int) -> None:
        self._num_train_pairs = num_pairs

    def __repr__(self) -> str:
        """The arguments that are no defaults, and of a loaded method what it reads and whom it knows."""
        parts = [f"{type(self).__name__}({', '.join(given_arguments(type(self), self.hparams))})"]
        parts += [] if self.encode is None else [f"reads texts by {type(self.encode.backbone).__name__}"]
        return ", ".join(parts if self.find_users is None else [*parts, f"knows {self.users!r}"])

    # ------------------------------------------------------------------ what users call
    @final
    def adapt(self, context: Context) -> UserState:
        """Fit the states of unseen users with all shared weights fixed; the module is left as it was.

        Args:
            context: Support pairs of U users, padded; a user without pairs gets the population state, and a pair of
                weight 0 is as if it were not there, but for ``num_pairs``.

        Returns:
            Detached states, one row per user of ``context``, in order.
        """
        if isinstance(context.chosen, Tensor):
            self._check_width(context.chosen)
        was_training = self.training
        self.eval()
        try:
            # trainer.test runs under inference mode, whose tensors can never enter autograd: leave it and clone.
            with torch.inference_mode(False), torch.enable_grad():
                weightless = context.mask & (context.weight <= 0)
                states = self._adapt(self._conditioned_context(without_pairs(context, weightless))).detach()
                states = with_evidence(states, self.least_pairs.clamp_min(1), self.population_state)
                return states._replace(num_pairs=states.num_pairs + weightless.sum(-1))
        finally:
            self.train(was_training)

    @final
    def score(
        self,
        responses: Tensor | Tokens | Sequence[str],
        users: UserState | None = None,
        *,
        rows: Tensor | None = None,
        user_id: UserId | Sequence[UserId] | None = None,
        prompts: str | Sequence[str] = "",
        prompt_features: Tensor | Tokens | None = None,
    ) -> Tensor:
        """Reward of each response for its user.

        Args:
            responses: Features ``(B, D)``, tokens, or a list of texts (then the method must come from ``load_method``,
                which attaches the encoder).
            users: States with one row per response, or with ``rows``; instead of ``user_id``.
            rows: ``(B,)`` int64, the row of ``users`` of each response.
            user_id: One id for all responses or one each; an unknown id gets the population reward and a warning.
            prompts: The prompt of each text, or one for all.
            prompt_features: ``(B, D)`` of the prompts alone, or their tokens, for a method that reads them.

        Returns:
            ``(B,)`` rewards, comparable within one user only.

        Raises:
            ValueError: If the arguments do not fit each other, or texts or ids are given to a method that was not
                loaded by ``load_method``.
        """
        with self.one_thread():
            if isinstance(responses, str) or (users is not None and user_id is not None):
                raise ValueError("score takes a list of texts (got one string) and either users or user_id (not both)")
            num_responses = responses.num_rows if isinstance(responses, Tokens) else len(responses)
            if not isinstance(responses, Tensor | Tokens):
                encoder, texts = self.text_encoder, list(responses)
                prompts = [prompts] * num_responses if isinstance(prompts, str) else list(prompts)
                if not all(isinstance(text, str) for text in texts) or len(prompts) != num_responses:
                    got = f"{len(prompts)} prompts and {texts[:3]!r}"
                    raise ValueError(f"expected texts with one prompt each, got {got}")
                responses = encoder(prompts, texts)
                prompt_features = self.encode_prompts(prompts) if self.encode_prompts else None
            if user_id is not None:
                one = isinstance(user_id, str | Integral)
                ids = [id_text(name) for name in ([user_id] * num_responses if one else user_id)]  # type: ignore[union-attr]
                row_of = {name: row for row, name in enumerate(dict.fromkeys(ids))}
                rows = torch.tensor([row_of[name] for name in ids], dtype=torch.long)
                users = self.known_users(list(row_of))
            if users is None:
                users, rows = self.population_state(1), torch.zeros(num_responses, dtype=torch.long)
            num_rows = users.num_users if rows is None else len(rows)
            if num_rows != num_responses:
                raise ValueError(f"expected one user per response, got {num_rows} for {num_responses} responses")
            if isinstance(responses, Tensor):
                self._check_width(responses)
            read = self.conditioning(responses) if isinstance(responses, Tensor) else responses
            if isinstance(prompt_features, Tensor):
                prompt_features = self.conditioning.prompts(prompt_features)
            prompt_option = self._prompt_option(prompt_features)
            if rows is None:
                return self._score(read, users, **prompt_option)
            return self._score_rows(read, users, rows.to(users.num_pairs.device), **prompt_option)

    def _prompt_option(self, prompt_features: Tensor | Tokens | None) -> dict[str, Any]:
        """The third argument of ``_score``, where it takes one."""
        return {"prompt_features": prompt_features} if self.reads_prompts else {}

    @final
    def margin(self, batch: PreferenceBatch, users: UserState | None = None) -> Tensor:
        """Reward of chosen minus reward of rejected, ``(B,)``; ``users`` default to those of the batch."""
        return self._margin(self.conditioned(batch), self.batch_states(batch) if users is None else users)

    @final
    def batch_states(self, batch: PreferenceBatch) -> UserState:
        """States in row order: adapted where the batch carries a context, else looked up."""
        if batch.context is not None and batch.context_row is not None:
            return self.adapt(batch.context).take(batch.context_row)
        return self.user_states(batch.user_index)

    # ------------------------------------------------------------------ Lightning
    def setup(self, stage: str) -> None:
        """Take user ids and the reference head from the datamodule and check that its view and the strategy fit.

        Raises:
            ValueError: If they do not.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "trainer.strategy: expected ddp or {trainer: fsdp2}, got DeepSpeed, whose checkpoints are folders that "
                "no other command could read"
            )
        if self.device_mesh is not None and type(self).configure_model is L.LightningModule.configure_model:
            raise ValueError(
                f"trainer.strategy: {type(self).__name__} trains no language model that could be shared out; take ddp"
            )
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if data.view != self.view:
            fix = "; set data.backbone to a plm.backbones.CausalLM" if self.view == "tokens" else ""
            raise ValueError(f"{type(self).__name__} reads {self.view!r} batches, the data give {data.view!r}{fix}")
        if len(data.user_ids) == self.num_users:
            self.user_ids = list(data.user_ids)
        if data.reference_head is not None:
            self.reference.copy_(data.reference_head)
        if self.view == "features" and str(self.trainer.precision) not in ("32-true", "bf16-mixed", "16-mixed"):
            raise ValueError(
                f"trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got {self.trainer.precision!r}; "
                "the solvers of feature methods need float32"
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """Measure, draw and keep users as ``plm fit`` does, in a trainer that nobody has told to measure.

        Returns:
            `PreferenceMetrics`, `FewShotCurve` and, where checkpoints are written, `SaveUserStates`; nothing where the
            trainer has the first of them, or the data do not name their evaluation loaders. One that is there stays.
        """
        from plm.callbacks import FewShotCurve, PreferenceMetrics, SaveUserStates

        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        told = any(isinstance(callback, PreferenceMetrics) for callback in callbacks)
        names_loaders = hasattr(getattr(self.trainer, "datamodule", None), "eval_names")
        if told or not names_loaders:
            return []
        kinds = (PreferenceMetrics, FewShotCurve, *([SaveUserStates] if self.trainer.checkpoint_callback else []))
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in callbacks)]

    def on_fit_start(self) -> None:
        """Keep what made the features, for the checkpoint, where the constructor was not told.

        Under DDP, leave buffers alone: rows of users belong to the process that holds their pairs.
        """
        data = getattr(self.trainer, "datamodule", None)
        if self.hparams.get("backbone") is None and data is not None:
            self.hparams["backbone"] = getattr(data, "backbone_spec", None)
        if isinstance(self.trainer.model, torch.nn.parallel.DistributedDataParallel):
            self.trainer.model.broadcast_buffers = False

    def on_train_start(self) -> None:
        """Count the training pairs; measure what conditions features, and the root mean square of their differences."""
        self._conditioned = None
        load_validation_pairs(self.trainer)
        if self.view != "latents" and self.trainer.global_step == 0:
            self.conditioning.reset()
            self.num_train_pairs, scale = self.conditioning.measure(self.train_pass(), self.sum_over_processes)
            self.feature_scale.fill_(scale or 1.0)
            if self.view == "features":
                sizes = (self.feature_dim, self.feature_scale, self.num_train_pairs)
                fit = tuned_population(self.train_pass, self.val_pass, *sizes, self.sum_over_processes)
                self.bradley_terry.copy_(fit.direction)
                self.bradley_terry_ridge.fill_(fit.ridge)
                self.before_first_step()
        else:
            count = self.reference.new_tensor(float(sum(batch.num_pairs for batch in self.train_pass()))).double()
            self.num_train_pairs = int(self.sum_over_processes(count))
        self.resume_epoch()

    def before_first_step(self) -> None:
        """Choose how strangers will be served, see `plm.method.strangers`, and start from ``bradley_terry``."""

    def resume_epoch(self) -> None:
        """Let the loader skip what a resumed fit has read of its epoch; called when training starts.

        Lightning does so itself only where nobody has asked for the length of the fit before, as schedules do.
        """
        loader = self.trainer.train_dataloader
        if isinstance(loader, ResumableBatches):
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            loader.skip(progress.processed)

    def train_pass(self) -> Iterator[PreferenceBatch]:
        """Every training pair of this process once; a user's pairs are never spread over batches."""
        loader = self.trainer.train_dataloader
        return self._pass(loader.whole_users() if isinstance(loader, ResumableBatches) else loader)

    def val_pass(self) -> Iterator[PreferenceBatch]:
        """Every validation pair of this process once."""
        for loader in self.trainer.val_dataloaders or []:
            yield from self._pass(loader)

    def _pass(self, loader: Iterable[PreferenceBatch] | None) -> Iterator[PreferenceBatch]:
        for batch in loader or []:
            yield self.conditioned(self.trainer.strategy.batch_to_device(batch, self.device))

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        """Let a fit end with a validation, wherever in or between epochs its epochs, steps or time run out."""
        trainer = self.trainer
        is_last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        is_last |= 0 <= trainer.max_steps <= trainer.global_step
        if is_last or (trainer.should_stop and trainer.fit_loop._can_stop_early):
            trainer.should_stop = True  # Lightning validates at this batch, where the epoch is one that is validated
            trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch and 1

    def on_validation_epoch_start(self) -> None:
        """Refresh before the validation of a fit."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.refresh_users()

    def on_train_end(self) -> None:
        """Refresh once more, for a fit without validation."""
        self.refresh_users()
        self._conditioned = None

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the facts of ``evaluate``; callbacks turn them into metrics."""
        return self.evaluate(batch)

    test_step = predict_step = validation_step

    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Margins ``(B,)`` of the personal model and, where users have states and outside the curve, of its controls.

        ``flipped_margin`` is that of users adapted on reversed labels, on features, where adapting is cheap.
        """
        states_of: Callable[[Tensor], UserState]
        if batch.context is not None and batch.context_row is not None:
            states_of, row, other_row = self.adapt(batch.context).take, batch.context_row, batch.other_row
        else:
            states_of, row, other_row = self.user_states, batch.user_index, batch.other_index
        states, other_states = states_of(row), None if other_row is None else states_of(other_row)
        read = self.conditioned(batch)
        facts = {"margin": self._margin(read, states)}
        if not states.tensors:
            return facts
        if other_states is not None:
            facts["other_margin"] = self._margin(read, other_states)
        if batch.num_shots is not None:
            return facts
        facts["population_margin"] = self._margin(read, self.population_state(batch.num_pairs))
        if self.bradley_terry.any():
            facts["bradley_terry_margin"] = read.difference.to(self.bradley_terry.dtype) @ self.bradley_terry
        if batch.context is not None and self.view == "features":
            reverse = batch.context._replace(chosen=batch.context.rejected, rejected=batch.context.chosen)
            facts["flipped_margin"] = self._margin(read, self.adapt(reverse).take(row))
        return facts

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over ``param_groups()``."""
        return torch.optim.Adam(self.param_groups(), lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the class path, the seen user ids and the names of their tables beside the weights."""
        class_path = f"{type(self).__module__}.{type(self).__qualname__}"
        users = {"user_ids": list(self.user_ids), "user_tables": list(self.user_tables)}
        checkpoint[CHECKPOINT_KEY] = {"class_path": class_path, **users}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Copy rows of user tables by user id, never by position."""
        saved: list[str] | None = checkpoint.get(CHECKPOINT_KEY, {}).get("user_ids")
        if saved is None or saved == self.user_ids or not self.user_tables:
            return
        row_of = {user_id: row for row, user_id in enumerate(saved)}
        here = [row for row, user_id in enumerate(self.user_ids) if user_id in row_of]
        there = [row_of[self.user_ids[row]] for row in here]
        if len(here) < self.num_users:
            missing = self.num_users - len(here)
            warnings.warn(f"{missing} of {self.num_users} users are not in the checkpoint: prior state", stacklevel=2)
        state, saved_state = self.state_dict(), checkpoint["state_dict"]
        for name in self.user_tables:
            rows = state[name].clone()
            prior = self.prior_row(name, saved_state)
            if prior is not None:
                rows[:] = prior.to(rows)
            rows[here] = saved_state[name][there].to(rows)
            saved_state[name] = rows

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """Row of a user table for a user a checkpoint does not know; None = as initialised."""
        return None
