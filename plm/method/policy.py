"""PolicyMethod: what methods that write text share. No preference maths lives here.

Axes: B texts, T tokens, G groups of texts, P numbers of one adapter, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.backbones import TextWriter
from plm.distributed import summed
from plm.functional import SequenceLogps, response_logps
from plm.messages import Problems
from plm.method import CHECKPOINT_KEY
from plm.method.abilities import Writer
from plm.method.network import NetworkMethod
from plm.optimizer import Schedule, rate_factor, with_decay
from plm.types import Tokens, UserState


class PolicyMethod(NetworkMethod, Writer):
    """A preference model that is a language model, or steers one: it reads tokens and writes text.

    A subclass adds its own parameters in ``build``, see `NetworkMethod`.

    Args:
        weight_decay: Decoupled weight decay of AdamW.
        warmup: Share of all steps in which the learning rate rises from zero.
        schedule: How it goes on: constant, or falling to zero along a line or a cosine.
        **options: Arguments of `NetworkMethod`.
    """

    def __init__(
        self,
        *,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        problems = Problems("model.")
        problems.shares(warmup=warmup)
        problems.check()
        self.weight_decay, self.warmup, self.schedule = weight_decay, warmup, schedule
        self.num_tokens: Tensor | int = 0

    # ------------------------------------------------------------------ what a method writes
    def writing(self, users: UserState, prompts: Sequence[str]) -> TextWriter:
        """A batch of texts to be written, one for each row of ``users``, whose prompts are given in ``start``.

        Args:
            users: B states.
            prompts: The prompts as texts, for policies that a prompt steers by more than its tokens.
        """
        return self.policy.write()

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep how many tokens have been read."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["num_tokens"] = int(self.num_tokens)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also go on counting tokens."""
        self.num_tokens = checkpoint.get(CHECKPOINT_KEY, {}).get("num_tokens", 0)
        super().on_load_checkpoint(checkpoint)

    # ------------------------------------------------------------------ reading
    def logps(self, tokens: Tokens, *adapters: Tensor, packing: bool = False) -> SequenceLogps:
        """Log-probabilities of the responses of B texts, read with ``adapters``, see `LoRA.use`."""
        with self.policy.adapted(*adapters):
            hidden, token, row = (self.policy.packed_completions if packing else self.policy.completions)(tokens)
            return response_logps(self.policy.token_logps(hidden, token)[0], row, tokens.num_rows)

    @torch.no_grad()
    def total_logps(self, tokens: Tokens) -> Tensor:
        """Log-probability ``(B,)`` of B responses under the language model as it is, without adapters."""
        return self.in_chunks(tokens, lambda part, rows: self.logps(part).total)

    def count_tokens(self, *texts: Tokens) -> Tensor:
        """``()`` how many tokens training has read so far, on all processes, with those of one more batch."""
        new = torch.stack([tokens.attention_mask.sum() for tokens in texts]).sum()
        self.num_tokens = summed(new) + self.num_tokens  # stays on the device: nobody waits for it
        return self.num_tokens.float()

    # ------------------------------------------------------------------ Lightning
    def on_train_start(self) -> None:
        """Go on where a resumed fit stopped; a policy has no feature scale to measure."""
        self.resume_epoch()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over ``param_groups()`` with the schedule."""
        optimizer = torch.optim.AdamW(self.param_groups(), lr=self.lr, weight_decay=self.weight_decay)
        return self.with_schedule(optimizer)

    def with_schedule(
        self, optimizer: torch.optim.Optimizer, has_schedule: Sequence[bool] | None = None
    ) -> OptimizerLRScheduler:
        """An optimizer whose learning rate warms up and falls over the steps of the fit.

        Args:
            optimizer: The optimizer.
            has_schedule: For every parameter group, whether the optimizer has a schedule of its own; None = none has.
        """
        total = self.num_steps
        factors = [
            (lambda step: 1.0)
            if is_constant
            else (lambda step: float(rate_factor(self.schedule, self.warmup, torch.tensor(step), torch.tensor(total))))
            for is_constant in has_schedule or [False] * len(optimizer.param_groups)
        ]
        return with_decay(optimizer, total, factors)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the fit.

        Raises:
            ValueError: If it has no end, and the schedule needs one.
        """
        total = self.trainer.estimated_stepping_batches
        if math.isfinite(total):
            return int(total)
        if self.schedule != "constant" or self.warmup:
            raise ValueError(
                f"model.schedule {self.schedule!r} with model.warmup {self.warmup!r} needs to know the end of the fit; "
                "set trainer.max_epochs or trainer.max_steps, or schedule constant and warmup 0"
            )
        return 0
