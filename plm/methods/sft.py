"""SFT: a language model is trained on the responses that users preferred. One policy for everybody.

Paper: Ouyang et al. 2022, arXiv 2203.02155, section 3.5: the first stage before preferences are learned.
Deviations: as a preference model, the reward of a response is its log-probability, so that its accuracy stands beside
that of the other methods; users have no state.

Axes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plm.backbones import Policy
from plm.distributed import pair_weights, summed, world_size
from plm.method.abilities import Exporter
from plm.method.policy import PolicyMethod
from plm.method.shared import SharedMethod
from plm.optimizer import Schedule
from plm.types import PreferenceBatch, Tokens, UserState


class SFT(SharedMethod, PolicyMethod, Exporter):
    """Maximum likelihood on preferred responses: the baseline policy, and where preference methods start.

    All weights are trained. The trained model is a folder that transformers loads: ``plm export`` writes it, and so
    does the end of a fit where ``save_to`` names one.

    Args:
        lr: Learning rate; a network that knows nothing yet takes a hundred times as much.
        weight_decay: Decoupled weight decay of AdamW.
        warmup: Share of all steps in which the learning rate rises from zero.
        schedule: How it goes on: constant, or falling to zero along a line or a cosine.
        packing: Whether short texts of a batch share rows in training, instead of being padded to the longest.
        save_to: Folder for the trained model, for later stages; null = none.
        **options: Arguments of `NetworkMethod`.
    """

    def __init__(
        self,
        *,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        packing: bool = False,
        save_to: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, **options)
        self.packing, self.save_to = packing, save_to
        self._nats = torch.zeros(2, dtype=torch.float64)
        """Nats of the preferred responses evaluated so far, and how many tokens they have."""

    def build(self, policy: Policy) -> None:
        """Train every weight."""
        policy.network.requires_grad_(True)

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Mean negative log-likelihood per token of the preferred responses, in nats."""
        chosen, _ = batch.tokens
        logps = self.logps(chosen, packing=self.packing)
        weight = pair_weights(batch.weight)[logps.row]
        total = summed(weight.sum()) / world_size()  # so that the mean over processes is the mean over all tokens
        loss = -(weight * logps.token).sum() / total.clamp(min=torch.finfo(weight.dtype).tiny)
        return {"loss": loss, "num_tokens": self.count_tokens(chosen), "count": total * world_size()}

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Log-probability of each response."""
        assert isinstance(responses, Tokens)
        return self.total_logps(responses)

    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Margins ``(B,)``, the same for every user, so computed once; count nats for ``report``."""
        chosen, rejected = batch.tokens
        users = self.population_state(batch.num_pairs)
        logps = self._score(chosen, users)
        margin = logps - self._score(rejected, users)
        num_tokens = chosen.completion_mask.sum()
        self._nats += torch.stack([-logps.sum().double(), num_tokens.double()]).cpu()
        return {"margin": margin}

    def on_validation_epoch_start(self) -> None:
        """Count nats from zero."""
        super().on_validation_epoch_start()
        self._nats.zero_()

    def on_test_epoch_start(self) -> None:
        """Count nats from zero."""
        self._nats.zero_()

    def report(self) -> dict[str, float]:
        """``nats_per_token``: mean negative log-likelihood of the preferred responses that were last evaluated."""
        nats, num_tokens = self.sum_over_processes(self._nats.to(self.device)).tolist()
        return {"nats_per_token": nats / num_tokens if num_tokens else float("nan")}

    def on_fit_end(self) -> None:
        """Write the best checkpoint as a model where ``save_to`` says."""
        if self.save_to is None:
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best and Path(best).is_file():
            self.load_weights(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
        self.export(self.save_to)

    def export(self, folder: str | Path, user: UserState | None = None) -> None:
        """Write the model and its tokenizer as a Hugging Face folder; it is the same for every user."""
        self.policy.save(folder)
