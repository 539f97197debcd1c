"""Measure what a run costs: parameters, seconds of the fit and milliseconds per adapted user."""

from __future__ import annotations

import math
import time
from typing import Any, cast

import lightning as L
import torch

from plm.atomic import write_json
from plm.callbacks import run_dir
from plm.types import POSTERIORS, PreferenceBatch, UserState

UNCERTAINTY = {width for _, width in POSTERIORS}
"""Tensors of a state that hold the uncertainty of the others: no parameters."""


class RunFacts(L.Callback):
    """Adds to ``facts.json`` of a fit: class, parameters, the best monitored value and the time to adapt a user.

    The time is that of one call for all unseen users who fit into a batch, divided by their number; the faster of two.
    """

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what is known without a test."""
        method = cast(Any, pl_module)
        best = getattr(trainer.checkpoint_callback, "best_model_score", None)
        with torch.no_grad():
            states = method.user_states(torch.arange(method.num_users, device=method.device))
        per_user = state_size(states, method.population_state(method.num_users))
        tables = set(method.user_tables)
        trained = sum(p.numel() for name, p in method.named_parameters() if p.requires_grad and name not in tables)
        self._facts = {
            "class_path": f"{type(method).__module__}.{type(method).__qualname__}",
            "num_users": method.num_users,
            "shared_parameters": trained,
            "parameters_per_user": per_user,
            "parameters": trained + per_user * method.num_users,
            "val_value": math.nan if best is None else float(best),
        }
        self._write(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the adaptation of unseen users."""
        data = cast(Any, trainer).datamodule
        names = data.eval_names("test")
        if "unseen" not in names:
            return
        batch: PreferenceBatch = next(iter(data.test_dataloader()[names.index("unseen")]))
        if batch.context is None:
            return
        context = batch.context.map(lambda value: value.to(pl_module.device))
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            cast(Any, pl_module).adapt(context)
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        self._facts["adapt_ms"] = 1000 * min(seconds) / context.num_users
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            write_json(run_dir(trainer) / "facts.json", self._facts, merge=True)


def state_size(states: UserState, population: UserState) -> int:
    """Count the numbers in a user's state, uncertainties left out; none where every state is the population's."""
    values = {name: value for name, value in states.tensors.items() if name not in UNCERTAINTY}
    if all(torch.equal(value, population.tensors[name]) for name, value in values.items()):
        return 0
    return sum(value[0].numel() for value in values.values())
