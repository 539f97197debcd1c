"""GPO: a small transformer reads a user's pairs in context and predicts what else the user likes.

Paper: Zhao, Dang, Grover, "Group Preference Optimization: Few-Shot Alignment of Large Language Models" (arXiv
    2310.11523), a transformer neural process over answers of groups to survey questions.
Reference code: jamqd/Group-Preference-Optimization (nothing is taken from it).
Deviations: pairs instead of shares of answers. Each support pair is two tokens, of its chosen and its rejected
    response, each of which knows the other by the middle of both; the likelihood is Bradley-Terry's, on pairs that
    share no response with the context. The reward is added to the tuned Bradley-Terry model; an empty context is
    trained as well, and a learned null token stands for it; layers normalise first; validation pairs choose how much
    the context counts. The feed-forward network has twice the width of the tokens (the code: 128 at a width of 128),
    responses are projected to the width before an embedder of two linear layers (four), the head is one linear layer
    (two, which also give a standard deviation), and contexts and targets have at most 16 pairs of a user (10 to 100
    questions). How others ran the method on pairs is not published.

Axes: N pairs or responses, U users, M most pairs of a context, C = 2 M tokens of a context, L layers, H heads, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from plm.distributed import pair_weights, summed, world_size
from plm.functional import bt_losses, flatten_context, held_out_losses, per_user_sum, targets, unit_mean_per_user
from plm.messages import Problems
from plm.method import PersonalizationMethod
from plm.method.episodes import (
    Arranged,
    arrange,
    draw_episodes,
    pairs_that_count,
    places,
    rank_within_user,
    shuffling_keys,
)
from plm.method.strangers import least_harmful_scale
from plm.optimizer import rate_factor, with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Candidates for what the context's part of the reward is multiplied by, chosen on validation pairs."""

WARM_UP = 0.03
"""Share of the steps in which the learning rate rises."""


class Memory(NamedTuple):
    """What a context says to each layer: all that targets see of it."""

    keys: Tensor
    """``(U, L, C, W)``."""
    values: Tensor
    """``(U, L, C, W)``."""
    length: Tensor
    """``(U,)`` int64, how many tokens there are."""


class Layer(nn.Module):
    """A layer before which is normalised, whose queries see the context and a learned null token, nothing else.

    Args:
        width: Width W.
        heads: Number H of heads.
        dropout: Share of numbers left out of each branch in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.null_key, self.null_value = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def remembered(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context: ``(U, C, W)`` -> the same twice."""
        normed = self.norm(tokens)
        return self.key(normed), self.value(normed)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """``(U, N, W)`` tokens, ``(U, C, W)`` keys and values of which ``(U, C)`` bool are there -> ``(U, N, W)``."""
        rows, width = len(keys), keys.shape[-1]
        nulls = (value.expand(rows, 1, width) for value in (self.null_key, self.null_value))
        keys, values = (torch.cat([null, value], 1) for null, value in zip(nulls, (keys, values), strict=True))
        seen = torch.cat([seen.new_ones(rows, 1), seen], 1)
        query, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.norm(tokens)), keys, values)
        )
        logits = (query @ keys.mT / math.sqrt(query.shape[-1])).masked_fill(~seen[:, None, None], -math.inf)
        read = (torch.softmax(logits, -1) @ values).transpose(1, 2).flatten(-2)
        tokens = tokens + self.dropout(self.out(read))
        moved: Tensor = tokens + self.dropout(self.network(self.second_norm(tokens)))
        return moved


class Reader(nn.Module):
    """The transformer: pairs of a context to its memory, responses and a memory to rewards.

    Args:
        feature_dim: Width D.
        width: Width W.
        layers: Number L of layers.
        heads: Number H of heads.
        dropout: Share of numbers left out in training.
    """

    def __init__(self, feature_dim: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(feature_dim, width, bias=False)
        self.embed = nn.Sequential(nn.Linear(2 * width + 1, width), nn.ReLU(), nn.Linear(width, width))
        self.target = nn.Parameter(torch.zeros(width))
        self.layers: Sequence[Layer] = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def remember(self, chosen: Tensor, rejected: Tensor, target: Tensor, mask: Tensor) -> Memory:
        """``(U, M, D)`` features of pairs, ``(U, M)`` probability that chosen wins, ``(U, M)`` which are there."""
        sides = self.project(chosen), self.project(rejected)
        middle, label = (sides[0] + sides[1]) / 2, (2 * target - 1)[..., None]
        parts = [torch.cat([side, middle, sign * label], -1) for side, sign in zip(sides, (1, -1), strict=True)]
        tokens, seen = self.embed(torch.cat(parts, 1)), torch.cat([mask, mask], 1)
        keys, values = [], []
        for layer in self.layers:
            key, value = layer.remembered(tokens)
            tokens = layer(tokens, key, value, seen)
            keys.append(key * seen[..., None])
            values.append(value * seen[..., None])
        return Memory(torch.stack(keys, 1), torch.stack(values, 1), 2 * mask.sum(-1))

    def rewards(self, responses: Tensor, memory: Memory) -> Tensor:
        """``(U, N, D)`` features of responses of the users of the memory -> ``(U, N)``."""
        side = self.project(responses)
        tokens = self.embed(torch.cat([side, side, torch.zeros_like(side[..., :1])], -1)) + self.target
        half = memory.keys.shape[2] // 2
        place = torch.arange(half, device=side.device).repeat(2)
        seen = 2 * place < memory.length[:, None]  # the chosen responses of all pairs, then the rejected ones
        for number, layer in enumerate(self.layers):
            tokens = layer(tokens, memory.keys[:, number], memory.values[:, number], seen)
        return self.head(self.norm(tokens))[..., 0]  # type: ignore[no-any-return]


class GPO(PersonalizationMethod):
    """Bradley-Terry plus a transformer that reads the user's pairs as tokens; adapting is one forward pass.

    Args:
        width: Width W of the tokens.
        layers: Number L of layers.
        heads: Number H of heads.
        max_context: Most pairs M of a context; of users with more, as many are read as in training, by their content.
        num_targets: Most pairs of a user that a training step predicts.
        dropout: Share of numbers left out of each branch in training.
        weight_decay: AdamW's.
        lr: Learning rate; rises, then falls along a cosine.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("keys", "values", "length", "num_pairs")
    search_space: ClassVar[dict[str, list[Any]]] = {
        "width": [32, 64, 128],
        "layers": [2, 4],
        "max_context": [8, 16, 32],
        "lr": [0.0003, 0.001, 0.003],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        max_context: int = 16,
        num_targets: int = 16,
        dropout: float = 0.1,
        weight_decay: float = 0.01,
        lr: float = 1e-3,
        **options: Any,
    ) -> None:
        problems = Problems("model.")
        problems.integers(1, width=width, layers=layers, heads=heads, max_context=max_context, num_targets=num_targets)
        problems.shares(dropout=dropout)
        problems.numbers(weight_decay=weight_decay, lr=lr)
        problems.check()
        problems.say(
            f"model.heads: expected a divisor of model.width = {width}, got {heads!r}", when=width % heads != 0
        )
        problems.check()
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.max_context, self.num_targets, self.weight_decay = max_context, num_targets, weight_decay
        self.keys: Tensor
        self.values: Tensor
        self.length: Tensor
        self.num_pairs: Tensor
        self.scale: Tensor
        self.reader = Reader(feature_dim, width, layers, heads, dropout)
        empty = torch.zeros(num_users, layers, 2 * max_context, width, dtype=torch.float16)
        self.register_buffer("keys", empty)
        self.register_buffer("values", empty.clone())
        self.register_buffer("length", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))
        self._batch: tuple[PreferenceBatch, Arranged] | None = None  # the last training batch

    # ------------------------------------------------------------------ shared by training and use
    def _scaled(self, features: Tensor) -> Tensor:
        """Features in units in which a difference has about unit variance per number."""
        return features * (self.feature_dim**0.5 / self.feature_scale)  # type: ignore[no-any-return]

    def _padded(self, values: Tensor, user: Tensor, place: Tensor, num_users: int, most: int) -> Tensor:
        """Rows ``(N, ...)`` of users at places of their own -> ``(U, most, ...)``, zeros elsewhere."""
        out = values.new_zeros(num_users, most, *values.shape[1:])
        out[user, place] = values
        return out

    def _remember(self, pairs: tuple[Tensor, Tensor, Tensor], user: Tensor, place: Tensor, num_users: int) -> Memory:
        """Memory of the first M of the pairs of each user: chosen and rejected ``(N, D)``, target ``(N,)``."""
        kept = place < self.max_context
        user, place = user[kept], place[kept]
        chosen, rejected, target = (
            self._padded(value[kept], user, place, num_users, self.max_context) for value in pairs
        )
        mask = self._padded(torch.ones_like(user, dtype=torch.bool), user, place, num_users, self.max_context)
        memory: Memory = self.reader.remember(self._scaled(chosen), self._scaled(rejected), target, mask)
        return memory

    def _stored(
        self, pairs: tuple[Tensor, Tensor, Tensor], weight: Tensor, user: Tensor, num_users: int
    ) -> dict[str, Tensor]:
        """States of users: pairs that weigh something, in an order of their content alone, whoever won."""
        counts = weight > 0
        chosen, rejected, target = (value[counts] for value in pairs)
        place = rank_within_user(user[counts], shuffling_keys(chosen - rejected, self.feature_scale))
        memory = self._remember((chosen, rejected, target), user[counts], place, num_users)
        return {"keys": memory.keys.half(), "values": memory.values.half(), "length": memory.length}

    def _parts(self, responses: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Reward of the population and what the context adds to it: ``(B, D)``, B states -> ``(B,)`` each."""
        context = Memory(tensors["keys"].to(responses), tensors["values"].to(responses), tensors["length"])
        empty = Memory(context.keys[:, :, :0], context.values[:, :, :0], context.length)
        scaled = self._scaled(responses)[:, None]
        population, personal = (self.reader.rewards(scaled, memory)[:, 0] for memory in (empty, context))
        added = torch.where(context.length > 0, personal - population, 0.0)
        return responses @ self.bradley_terry + population, added

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the Bradley-Terry loss of pairs that share no response with the context of their user.

        A user with targets counts as much as all the user's pairs of the batch do, however many are drawn.
        """
        batch, user, nodes = self._arranged(batch)
        num_users, (chosen, rejected) = int(user.max()) + 1, batch.features
        context, rows = draw_episodes(user, nodes, "response", 0, self.max_context, self.num_targets)
        target, of_row = targets(batch.tie).to(chosen), user[rows]
        pairs = chosen[context], rejected[context], target[context]
        memory = self._remember(pairs, user[context], places(user[context]), num_users)
        place = places(of_row)
        rewards = [
            self.reader.rewards(
                self._padded(self._scaled(side[rows]), of_row, place, num_users, self.num_targets), memory
            )
            for side in (chosen, rejected)
        ]
        margin = (rewards[0] - rewards[1])[of_row, place] + (chosen - rejected)[rows] @ self.bradley_terry
        weight = unit_mean_per_user(batch.weight[rows], of_row, num_users)
        count = per_user_sum((weight > 0).to(weight), of_row, num_users)
        share = per_user_sum(pair_weights(batch.weight), user, num_users) * (count > 0)  # of a user in the loss
        losses = (share / count.clamp_min(1))[of_row] * weight * bt_losses(margin, target[rows])
        total = summed(share.sum()) / world_size()  # so that the mean over processes is the mean over all users
        return {"loss": losses.sum() / total.clamp_min(1e-12), "count": total * world_size()}

    def _arranged(self, batch: PreferenceBatch) -> Arranged:
        """The pairs in an order of their own content, once while the same batch comes again."""
        if self._batch is None or self._batch[0] is not batch:
            self._batch = (batch, arrange(pairs_that_count(batch), with_nodes=True))
        return self._batch[1]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, whose learning rate rises and then falls along a cosine."""
        optimizer = torch.optim.AdamW(self.param_groups(), weight_decay=self.weight_decay)
        total = torch.tensor(float(self.trainer.estimated_stepping_batches))
        return with_decay(
            optimizer, float(total), lambda step: float(rate_factor("cosine", WARM_UP, torch.tensor(step), total))
        )

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Read the training pairs of all seen users, and choose on validation pairs how much the context counts.

        It counts for nothing where no scale has a gain larger than its error.
        """
        was_training = self.training
        self.eval()
        tables = [torch.zeros_like(self.get_buffer(name)) for name in self.user_tables]
        for batch in self.train_pass():
            users, user = torch.unique(batch.user_index, return_inverse=True)
            pairs = (*batch.features, targets(batch.tie).to(batch.weight))
            stored = (*self._stored(pairs, batch.weight, user, len(users)).values(), torch.bincount(user))
            for table, value in zip(tables, stored, strict=True):
                table[users] = value
        for name, table in zip(self.user_tables, tables, strict=True):
            self.get_buffer(name).copy_(self.sum_over_processes(table))
        losses = torch.zeros(len(SCALES), self.num_users, dtype=torch.float64, device=self.device)
        for batch in self.val_pass():
            tensors = self.user_states(batch.user_index).tensors
            (base, added), (other, less) = (self._parts(side, tensors) for side in batch.features)
            for row, number in enumerate(SCALES):
                losses[row] += held_out_losses(base - other + number * (added - less), batch, self.num_users)
        self.scale.fill_(least_harmful_scale(SCALES, self.sum_over_processes(losses)))
        self.train(was_training)

    def report(self) -> dict[str, float]:
        """``scale``: of what the context adds, 0 = unused."""
        return {"scale": float(self.scale)}

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        population, added = self._parts(responses, users.tensors)
        return population + self.scale * added

    @torch.no_grad()
    def _adapt(self, context: Context) -> UserState:
        """One forward pass over the pairs."""
        _, target, weight, user = flatten_context(context)
        tensors = self._stored((*context.pairs.features, target), weight, user, context.num_users)
        return UserState(tensors, context.mask.sum(-1))

    def user_states(self, user_index: Tensor) -> UserState:
        """Memories of the training pairs of seen users, as last refreshed."""
        names = ("keys", "values", "length")
        return UserState({name: self.get_buffer(name)[user_index] for name in names}, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The empty context."""
        like = {name: self.get_buffer(name) for name in ("keys", "values", "length")}
        tensors = {name: value.new_zeros(num_users, *value.shape[1:]) for name, value in like.items()}
        return UserState(tensors, torch.zeros(num_users, dtype=torch.long, device=self.device))
