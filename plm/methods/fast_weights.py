"""FastWeights: a user's pairs are written into a sum of key differences, which a new response reads; nothing is fitted.

Paper: Wang et al., "Using Context Is Not Enough" (P-TTT, 2026): ``W_u = W_0 + eta * sum_i v_i (k_i+ - k_i-)'``.
Reference code: none was found.
Deviations: keys and queries are linear maps of frozen features instead of states of a language model that is trained
    along, so that a user is K numbers; training predicts every pair from the user's other pairs exactly; the sum is
    divided by the number of pairs plus a learned constant; validation pairs choose how much of it is used. ``W_0`` is
    the tuned Bradley-Terry model, trained before: trained together, the sum would take over what all users want, and
    the global control would be too weak. How the paper's values depend on the pair, its learning rate and its layer are
    not known to us.

Axes: N pairs of several users, B responses, U users, D feature width, K key width, V numbers of one pair.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import bt_losses, flatten_context, held_out_losses, per_user_sum, targets, unit_mean_per_user
from plm.messages import Problems
from plm.method.episodes import arrange, response_ids
from plm.method.linear import LinearMethod
from plm.method.strangers import least_harmful_scale
from plm.optimizer import with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Candidates for what the personal part is multiplied by in use, chosen on validation pairs."""

START_PULL = 4.0
"""How many pairs the population counts for before training."""


class Siblings(NamedTuple):
    """Which pairs of a user share a response: these never predict each other."""

    nodes: Tensor
    """``(N, 2)`` int64, one number for each response of each user."""
    pair: Tensor
    """``(N,)`` int64, one number for each set of two responses of each user."""

    def sums(self, values: Tensor) -> Tensor:
        """Sum over all pairs of the same user that share a response with each pair, itself included: ``(N, V)``.

        Those with the left response, plus those with the right one, less those with both, which were counted twice.
        """
        left, right = self.nodes.unbind(-1)
        is_one = (left == right)[:, None]  # both sides are the same response
        count = int(self.nodes.max()) + 1
        by_node = per_user_sum(values, left, count).index_add(0, right, torch.where(is_one, 0.0, values))
        both = torch.where(is_one, by_node[left], per_user_sum(values, self.pair, int(self.pair.max()) + 1)[self.pair])
        return by_node[left] + (by_node[right] - both)


def siblings(chosen: Tensor, rejected: Tensor, user: Tensor) -> Siblings:
    """Find the pairs of a user that share a response: ``(N, D)``, ``(N, D)``, ``(N,)`` int64.

    >>> a, b, c, d = torch.eye(4)
    >>> found = siblings(torch.stack([a, b, c]), torch.stack([b, c, d]), torch.tensor([0, 0, 0]))
    >>> found.sums(torch.tensor([[1.0], [2.0], [4.0]])).tolist()
    [[3.0], [7.0], [6.0]]
    """
    responses = response_ids(chosen, rejected)
    _, nodes = torch.unique(user[:, None] * (responses.max() + 1) + responses, return_inverse=True)
    ends = nodes.sort(-1).values
    return Siblings(nodes, torch.unique(ends[:, 0] * (nodes.max() + 1) + ends[:, 1], return_inverse=True)[1])


class FastWeights(LinearMethod):
    """Bradley-Terry plus what a user's pairs wrote: ``w0 @ x + gain * (C x) @ s_u / (n_u + pull)``.

    ``s_u`` sums ``value * (A x_chosen - A x_rejected)`` over the n_u pairs of the user that are no ties: up to its
    length a step of gradient descent on the user's Bradley-Terry loss from zero, and with the features themselves as
    keys the nearest-mean classifier. Sums of pairs that weigh the same add up, and a pair is taken away exactly; pairs
    of unequal weights are read anew, since weights are divided by their mean within the user.

    Args:
        num_keys: Width K of keys and queries; null = the features themselves, nothing is learned but gain and pull.
        tied: Whether queries are keys, a symmetric kernel.
        value: What a pair counts: constant = 1; surprise = twice the probability that the population gives to the other
            response, a step of gradient descent from the population, which loses the law that reversed labels reverse
            the personal part.
        basis_ridge: Precision of the normal prior on keys and queries.
        lr: Learning rate, decaying linearly to zero.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("write", "evidence", "num_pairs")
    search_space: ClassVar[dict[str, list[Any]]] = {
        "num_keys": [16, 32, 64],
        "value": ["constant", "surprise"],
        "basis_ridge": [0.3, 1.0, 3.0],
        "lr": [0.003, 0.01, 0.03],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        num_keys: int | None = 32,
        tied: bool = True,
        value: Literal["constant", "surprise"] = "constant",
        basis_ridge: float = 1.0,
        lr: float = 0.01,
        **options: Any,
    ) -> None:
        problems = Problems("model.")
        problems.integers(1, num_keys=num_keys)
        problems.numbers(basis_ridge=basis_ridge, lr=lr)
        problems.choices(value=(value, ("constant", "surprise")))
        problems.say(
            "model.tied acts only with learned keys; model.num_keys null reads the features themselves",
            when=num_keys is None and not tied,
        )
        problems.check()
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.value, self.basis_ridge = value, basis_ridge
        width = feature_dim if num_keys is None else num_keys
        self.write: Tensor
        self.evidence: Tensor
        self.num_pairs: Tensor
        self.scale: Tensor
        start = torch.randn(feature_dim, width) / width**0.5
        self.keys = None if num_keys is None else torch.nn.Parameter(start)
        self.queries = None if num_keys is None or tied else torch.nn.Parameter(start.clone())
        self.log_gain = torch.nn.Parameter(torch.zeros(()))
        self.raw_pull = torch.nn.Parameter(torch.tensor(START_PULL).expm1().log())
        self.register_buffer("write", torch.zeros(num_users, width))
        self.register_buffer("evidence", torch.zeros(num_users))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))
        self._known: tuple[PreferenceBatch, tuple[PreferenceBatch, Tensor, Siblings]] | None = None

    # ------------------------------------------------------------------ shared by training and use
    def _key(self, features: Tensor) -> Tensor:
        """``(..., D)`` -> ``(..., K)``."""
        return (features if self.keys is None else features @ self.keys) / self.feature_scale

    def _query(self, features: Tensor) -> Tensor:
        """``(..., D)`` -> ``(..., K)``."""
        return self._key(features) if self.queries is None else features @ self.queries / self.feature_scale

    def _shared(self, features: Tensor) -> Tensor:
        """The population's reward, ``(..., D)`` -> ``(...)``."""
        return features @ self.bradley_terry

    def _personal(self, query: Tensor, write: Tensor, evidence: Tensor) -> Tensor:
        """What a query reads, ``(..., K)``, ``(..., K)``, ``(...)`` -> ``(...)``."""
        total = (evidence + F.softplus(self.raw_pull)).clamp_min(1e-12)
        return self.log_gain.exp() * (query * write).sum(-1) / total

    def _writes(self, difference: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """What each pair adds to its user, ``(N, K + 1)``: to the write, and to the number of pairs; a tie nothing."""
        weight = weight * (2 * target - 1)
        value = weight
        if self.value == "surprise":
            value = weight * 2 * torch.sigmoid(-self._shared(difference))
        return torch.cat([value[:, None] * self._key(difference), weight[:, None]], -1)

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the Bradley-Terry loss of every pair given the user's other pairs, plus the prior.

        A random share of each user's pairs is left out of what is read, so that few pairs are trained for as well.
        """
        batch, user, shared = self._arranged(batch)
        num_users, difference = int(user.max()) + 1, batch.difference
        target = targets(batch.tie).to(batch.weight)
        writes = self._writes(difference, target, unit_mean_per_user(batch.weight, user, num_users))
        kept = torch.rand(len(user), device=user.device) < torch.rand(num_users, device=user.device)[user]
        writes = writes * kept[:, None]
        others = per_user_sum(writes, user, num_users)[user] - shared.sums(writes)
        margin = self._shared(difference) + self._personal(self._query(difference), others[:, :-1], others[:, -1])
        nll = (batch.weight * bt_losses(margin, target)).mean()
        return {"loss": nll + self._penalty(), "nll": nll}

    def _arranged(self, batch: PreferenceBatch) -> tuple[PreferenceBatch, Tensor, Siblings]:
        """The pairs in an order of their own content, their users and siblings; once while the same batch comes."""
        if self._known is None or self._known[0] is not batch:
            arranged = arrange(batch, with_nodes=False)
            self._known = (batch, (*arranged[:2], siblings(*arranged.batch.features, arranged.user)))
        return self._known[1]

    def _penalty(self) -> Tensor:
        """The normal prior of keys and queries, divided by the number of pairs."""
        squares = [basis.square().sum() for basis in (self.keys, self.queries) if basis is not None]
        return 0.5 * self.basis_ridge * sum(squares, self.write.new_zeros(())) / self.num_train_pairs

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate decays linearly to zero."""
        return with_decay(torch.optim.Adam(self.param_groups()), self.trainer.estimated_stepping_batches)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Write all training pairs of the seen users, and choose on validation pairs how much of it is used.

        The personal part stays unused where no scale has a gain larger than its error.
        """
        total = torch.zeros(self.num_users, self.write.shape[1] + 1, device=self.device)
        count = torch.zeros_like(self.num_pairs)
        for batch in self.train_pass():
            weight = unit_mean_per_user(batch.weight, batch.user_index, self.num_users)
            writes = self._writes(batch.difference, targets(batch.tie).to(weight), weight)
            total += per_user_sum(writes, batch.user_index, self.num_users)
            count += torch.bincount(batch.user_index, minlength=self.num_users)
        total = self.sum_over_processes(total)
        self.write.copy_(total[:, :-1])
        self.evidence.copy_(total[:, -1])
        self.num_pairs.copy_(self.sum_over_processes(count))
        self.scale.fill_(least_harmful_scale(SCALES, self.sum_over_processes(self._val_losses())))

    def _val_losses(self) -> Tensor:
        """Summed loss of the validation pairs of every user at each scale: ``(C, U)``."""
        losses = torch.zeros(len(SCALES), self.num_users, dtype=torch.float64, device=self.device)
        for batch in self.val_pass():
            shared, query = self._shared(batch.difference), self._query(batch.difference)
            personal = self._personal(query, self.write[batch.user_index], self.evidence[batch.user_index])
            for row, number in enumerate(SCALES):
                losses[row] += held_out_losses(shared + number * personal, batch, self.num_users)
        return losses

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """``scale``: of the personal part, 0 = unused; ``pull``: the pairs that the population counts for."""
        return {"scale": float(self.scale), "pull": float(F.softplus(self.raw_pull))}

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        state = users.tensors
        personal = self._personal(self._query(responses), state["write"], state["evidence"])
        return self._shared(responses) + self.scale * personal

    def _adapt(self, context: Context) -> UserState:
        """Sum what the pairs write."""
        with torch.no_grad():
            difference, target, weight, user = flatten_context(context)
            total = per_user_sum(self._writes(difference, target, weight), user, context.num_users)
        return UserState({"write": total[:, :-1], "evidence": total[:, -1]}, context.mask.sum(-1))

    def user_states(self, user_index: Tensor) -> UserState:
        """What the training pairs of seen users wrote, as last refreshed."""
        tensors = {"write": self.write[user_index], "evidence": self.evidence[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """Nothing is written."""
        zeros = self.write.new_zeros(num_users, self.write.shape[1])
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        return UserState({"write": zeros, "evidence": self.evidence.new_zeros(num_users)}, num_pairs)
