"""LoRA-DPO for weight vectors: each is a simulated user whose reward is the weighted sum, all trained together.

Axes: V weight vectors, R objectives, X prompts, C candidates of a prompt (padded), P numbers of one adapter, N pairs.
"""

from __future__ import annotations

import tempfile

import lightning as L
import numpy as np
import torch
from torch import Tensor

from plm.arrays import Float64Array
from plm.backbones import CausalLM
from plm.data.datamodule import PreferenceDataModule
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource
from plm.data.sources.population import CandidatePool, best_and_worst
from plm.messages import Problems
from plm.methods.lora_dpo import LoRADPO


class LoRADPOFit:
    """How policies for weight vectors are trained, see `plm.methods.lora_dpo.LoRADPO`.

    Args:
        beta: Strength of the pull to the unaligned policy.
        rank: Rank of an adapter.
        alpha: An adapter's term is scaled by ``alpha / rank``.
        lr: Learning rate.
        epochs: Passes over the pairs.
        pairs_per_step: Pairs of a policy in one of its steps.
        seed: Of fresh adapters and of the order of pairs.
    """

    def __init__(
        self,
        beta: float = 0.3,
        rank: int = 8,
        alpha: float = 16.0,
        lr: float = 1e-3,
        epochs: int = 4,
        pairs_per_step: int = 8,
        seed: int = 0,
    ) -> None:
        self.beta, self.rank, self.alpha, self.lr = beta, rank, alpha, lr
        self.epochs, self.pairs_per_step, self.seed = epochs, pairs_per_step, seed
        problems = Problems("policies.fit.")
        problems.at_least(1, rank=rank, epochs=epochs, pairs_per_step=pairs_per_step)
        problems.positive(beta=beta, alpha=alpha, lr=lr)
        problems.check()


class WeightedPairs(PairSource):
    """The pairs of `weighted_pairs` as a source.

    Args:
        table: The pairs.
    """

    def __init__(self, table: PairTable) -> None:
        self.table = table

    @property
    def name(self) -> str:
        """A short name for logs."""
        return "weighted"

    def load(self) -> PairTable:
        """Return the table."""
        return self.table


def weighted_pairs(pool: CandidatePool, weights: Float64Array) -> PairTable:
    """Pair the best with the worst candidate of each prompt by each weight vector, ``(V, R)``; a tie gives no pair.

    Users are named by the row of their weights; a user who finds all candidates of every prompt alike is left out.

    Args:
        pool: Candidates with their objectives.
        weights: Of the users.
    """
    num, shown = len(weights), np.tile(np.arange(len(pool.prompts)), (len(weights), 1))
    best, worst = best_and_worst(pool.scores, weights, shown).reshape(-1, 2).T
    user, prompt = np.repeat(np.arange(num), shown.shape[1]), shown.ravel()
    kept = best >= 0
    user, prompt, best, worst = (column[kept] for column in (user, prompt, best, worst))
    return pair_table(
        [f"{row:06d}" for row in range(num)],  # tables sort users by id
        pool.prompts,
        pool.responses,
        user=user,
        prompt=prompt,
        chosen=pool.candidates[prompt, best],
        rejected=pool.candidates[prompt, worst],
        row_split=np.zeros(len(user), dtype=np.int64),
        user_split=np.zeros(len(user), dtype=np.int64),
    )


def train_adapters(
    pool: CandidatePool, weights: Float64Array, backbone: CausalLM, fit: LoRADPOFit, cache_dir: str
) -> Tensor:
    """Train an adapter for each weight vector, rows over one frozen network: ``(V, R)`` -> ``(V, P)``.

    Weights by which all candidates of every prompt are worth the same have no pairs; nothing is better for them than
    the unaligned policy, and their adapter is one that changes nothing.

    Args:
        pool: Candidates that the simulated users compare.
        weights: Of the simulated users.
        backbone: The language model.
        fit: How they are trained.
        cache_dir: Folder of the cache of reference log-probabilities.
    """
    table = weighted_pairs(pool, weights)
    rows = [int(user) for user in table.user_ids]  # those with pairs
    method = LoRADPO(
        num_users=len(rows),
        feature_dim=backbone.feature_dim,
        backbone=backbone.spec(),
        mode="per_user",
        rank=fit.rank,
        alpha=fit.alpha,
        beta=fit.beta,
        lr=fit.lr,
        seed=fit.seed,
    )
    if rows:
        data = PreferenceDataModule(
            WeightedPairs(table),
            backbone,
            cache_dir,
            unseen_users=0.0,
            val_rows=0.0,
            test_rows=0.0,
            split_seed=fit.seed,
            batch_size=len(rows) * fit.pairs_per_step,
            pairs_per_user=fit.pairs_per_step,
            shots=[],
            reference_logps=True,
        )
        _fit(method, data, fit)
    else:
        method.configure_model()
    adapters = method.fresh.detach().cpu().repeat(len(weights), 1)
    adapters[rows] = method.adapters.detach().cpu()
    return adapters


def _fit(method: LoRADPO, data: PreferenceDataModule, fit: LoRADPOFit) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=fit.epochs,
            devices=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        with torch.random.fork_rng():
            torch.manual_seed(fit.seed)
            trainer.fit(method, datamodule=data)
