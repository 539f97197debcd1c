"""LiveMethod: a method on features whose features are hidden states of a language model that is trained along.

Axes: B texts, T tokens, D width, U users, S support pairs of one user (padded), P numbers of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from plm.backbones import Policy, TargetModules
from plm.messages import Problems
from plm.method.network import NetworkMethod
from plm.types import Context, PreferenceBatch, Tokens, UserState

TrainBackbone = Literal["none", "lora", "full"]
BACKBONE_LR = {"none": 0.0, "lora": 2e-4, "full": 1e-5}
MAX_FLOATS = 2**28
"""Feature values that are remembered (1 GiB, in the memory of the processor)."""


class LiveMethod(NetworkMethod):
    """A mixin that turns a method on features into one on a live backbone; it stands before the class of that method.

    Wherever the method takes features it takes tokens, too. The feature of a text is the last hidden state at its last
    token, which is what a `plm.backbones.HFBackbone` caches of a causal language model with ``pooling: last``. A text
    that occurs several times in a batch is read once.

    Features are conditioned as they were before training.

    Args:
        train_backbone: What of the language model is trained: none, one low-rank adapter, or all weights.
        rank: Rank of the adapter.
        alpha: The adapter's term is scaled by ``alpha / rank``.
        target_modules: Linear maps that are adapted; ``all-linear``; null = what PEFT adapts in this architecture, else
            the maps of queries and values.
        backbone_lr: Learning rate of the language model; null = 2e-4 for an adapter, 1e-5 for all weights.
        **options: Arguments of `NetworkMethod` and of the class that comes next.
    """

    has_features: ClassVar[bool] = True

    def __init__(
        self,
        *,
        train_backbone: TrainBackbone = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: TargetModules = None,
        backbone_lr: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        problems = Problems("model.")
        problems.choices(train_backbone=(train_backbone, get_args(TrainBackbone)))
        problems.integers(1, rank=rank)
        problems.numbers(backbone_lr=backbone_lr)
        problems.check()
        self.train_backbone, self.rank, self.alpha, self.target_modules = train_backbone, rank, alpha, target_modules
        self.backbone_lr = BACKBONE_LR[train_backbone] if backbone_lr is None else backbone_lr
        self.adapter: torch.nn.Parameter | None = None
        self._read: dict[bytes, Tensor] = {}
        self._state_of_read: list[tuple[int, int]] = []

    def build(self, policy: Policy) -> None:
        """Add the adapter ``(1, P)``, or let all weights that features depend on be trained."""
        if self.train_backbone == "lora":
            lora = policy.add_lora(self.rank, self.alpha, self.target_modules)
            self.adapter = torch.nn.Parameter(lora.start(int(torch.randint(2**31, ())))[None])
        elif self.train_backbone == "full":
            policy.decoder.requires_grad_(True)

    def backbone_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of the language model that are trained; none before it is loaded."""
        if "policy" not in self._modules:
            return []
        return [p for p in self.policy.parameters() if p.requires_grad] if self.adapter is None else [self.adapter]

    # ------------------------------------------------------------------ reading
    def hidden(self, tokens: Tokens) -> Tensor:
        """Last hidden states ``(B, T, D)`` in float32."""
        with self.policy.adapted(*([] if self.adapter is None else [self.adapter])):
            return self.policy.hidden(tokens).float()

    def features(self, texts: Tensor | Tokens) -> Tensor:
        """Tokens ``(B, T)`` -> ``(B, D)``; features pass.

        Where the backbone is trained, in training, all texts are read in one call, with gradients; elsewhere without,
        and what has been read is remembered until the backbone changes.
        """
        if isinstance(texts, Tensor):
            return texts
        texts, row = distinct_texts(texts)
        changes = bool(self.backbone_parameters()) or self.device_mesh is not None  # shards are gathered by every call
        if self.training and torch.is_grad_enabled() and changes:
            return self._last(texts)[row]
        with torch.no_grad():
            return self._remembered(texts)[row]

    def _remembered(self, texts: Tokens) -> Tensor:
        """Features ``(I, D)`` of distinct texts, of which those are read that have not been before."""
        weights = self.policy.parameters() if self.adapter is None else [self.adapter]
        state = [(id(value), value._version) for value in weights]
        if state != self._state_of_read or len(self._read) * self.feature_dim > MAX_FLOATS:
            self._state_of_read, self._read = state, {}
        keys = [ids[mask].numpy().tobytes() for ids, mask in zip(*(value.cpu() for value in texts[:2]), strict=True)]
        new = torch.tensor([row for row, key in enumerate(keys) if key not in self._read], dtype=torch.long)
        for part in self.chunks(texts.take(new.to(texts.input_ids.device))):
            rows = new[part.cpu()]
            read = self._last(texts.take(rows.to(part)).trimmed()).cpu()
            self._read.update(zip([keys[row] for row in rows.tolist()], read, strict=True))
        features = [self._read[key] for key in keys]
        return torch.stack(features or [torch.empty(0)]).view(-1, self.feature_dim).to(texts.input_ids.device)

    def read_tokens(self, tokens: Tokens) -> Tensor:
        """Features ``(B, D)``."""
        return self.features(tokens)

    def _last(self, texts: Tokens) -> Tensor:
        """``(B, D)`` at the last real token of right- or left-padded texts."""
        hidden, mask = self.hidden(texts), texts.attention_mask
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        return hidden[torch.arange(len(hidden), device=mask.device), last]

    def featured(self, batch: PreferenceBatch) -> PreferenceBatch:
        """A batch with features in the place of tokens, those of its context, too."""
        chosen, rejected = self._sides(batch.chosen, batch.rejected)
        prompt = self.features(batch.prompt) if self.reads_prompts and batch.prompt is not None else None
        context = None if batch.context is None else self.featured_context(batch.context)
        return batch._replace(chosen=chosen, rejected=rejected, prompt=prompt, context=context)

    def featured_context(self, context: Context) -> Context:
        """Support pairs as features ``(U, S, D)``; padding pairs are not read."""
        mask = context.mask

        def padded(features: Tensor) -> Tensor:
            out = features.new_zeros(*mask.shape, features.shape[-1])
            out[mask] = features
            return out

        pairs = self.featured(context.pairs)
        chosen, rejected = map(padded, pairs.features)
        prompt = padded(pairs.prompt) if isinstance(pairs.prompt, Tensor) else None
        return context._replace(chosen=chosen, rejected=rejected, prompt=prompt)

    def _sides(self, chosen: Tensor | Tokens, rejected: Tensor | Tokens) -> tuple[Tensor, Tensor]:
        """Features of both responses of B pairs."""
        if not (isinstance(chosen, Tokens) and isinstance(rejected, Tokens)):
            return self.features(chosen), self.features(rejected)
        both = self.features(Tokens.cat([chosen, rejected]))
        return both[: chosen.num_rows], both[chosen.num_rows :]

    # ------------------------------------------------------------------ the method, on these features
    def _pass(self, loader: Iterable[PreferenceBatch] | None) -> Iterator[PreferenceBatch]:
        for batch in super()._pass(loader):
            with torch.no_grad():
                features = self.featured(batch)
            yield self.conditioned(features)

    def _read_batch(self, batch: PreferenceBatch) -> PreferenceBatch:
        """A batch of tokens as conditioned features; features, which the base has conditioned, pass."""
        return batch if isinstance(batch.chosen, Tensor) else self.conditioned(self.featured(batch))

    def _score(
        self, responses: Tensor | Tokens, users: UserState, prompt_features: Tensor | Tokens | None = None
    ) -> Tensor:
        if isinstance(prompt_features, Tokens):
            prompt_features = self.conditioning.prompts(self.features(prompt_features))
        if isinstance(responses, Tokens):
            responses = self.conditioning(self.features(responses))
        return super()._score(responses, users, **self._prompt_option(prompt_features))  # type: ignore[safe-super]

    def _margin(self, batch: PreferenceBatch, users: UserState) -> Tensor:
        return super()._margin(self._read_batch(batch), users)

    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Compute margins as every method does, but read each text only once."""
        return super().evaluate(self.featured(batch))

    # ------------------------------------------------------------------ Lightning
    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Forget what has been read: the versions of sharded weights do not show that they change."""
        if self.backbone_parameters():
            self._read.clear()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget what has been read."""
        super().on_load_checkpoint(checkpoint)
        self._read.clear()

    def on_train_start(self) -> None:
        """Measure the features as they are before training."""
        self.policy.gather()
        super().on_train_start()
        self.policy.scatter()

    def on_train_end(self) -> None:
        """Read all users once more."""
        self.policy.gather()
        super().on_train_end()
        self.policy.scatter()


def distinct_texts(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """Texts ``(I, T)`` that differ in what is attended to, and ``(B,)`` int64 which of them each text is.

    >>> ids = torch.tensor([[5, 6], [5, 7], [5, 9]])
    >>> texts, row = distinct_texts(Tokens(ids, ids < 7, ids < 7))
    >>> texts.num_rows, bool(row[1] == row[2]), bool(row[0] == row[1])
    (2, True, False)
    """
    codes = torch.where(tokens.attention_mask, tokens.input_ids + 1, 0)
    if not tokens.num_rows:
        return tokens, codes.new_zeros(0)
    row: Tensor = torch.unique(codes, dim=0, return_inverse=True)[1]
    first = torch.empty(int(row.max()) + 1, dtype=torch.long, device=row.device)
    first[row] = torch.arange(len(row), device=row.device)
    return tokens.take(first), row
