"""NetworkMethod: what methods with a language model of their own share: loading, checkpoints, processes.

Axes: B texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from plm.backbones import Backbone, CausalLM, Policy, batches_by_length
from plm.distributed import average_gradients, clip_gradients, summed, world_size
from plm.method import CHECKPOINT_KEY, PersonalizationMethod
from plm.types import Tokens


class NetworkMethod(PersonalizationMethod):
    """A method that reads tokens with a language model of its own.

    The network is loaded by ``configure_model``, frozen unless a subclass says otherwise in ``build``; what is frozen
    of it is in no checkpoint. As a mixin it stands before the class whose constructor takes the other arguments.

    Args:
        backbone: The `CausalLM`, as ``{class_path, init_args}``; linked from the data.
        gradient_checkpointing: Whether blocks are run again in the backward pass instead of kept in memory.
        compile_network: Whether the network is compiled by torch.compile.
        batch_tokens: Most tokens that are read at once outside training.
        **options: Arguments of the class that comes next.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "tokens"

    def __init__(
        self,
        *,
        backbone: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile_network: bool = False,
        batch_tokens: int = 16384,
        **options: Any,
    ) -> None:
        super().__init__(backbone=backbone, **options)
        if backbone is None:
            raise ValueError(f"{type(self).__name__} needs a language model: set data.backbone to a CausalLM")
        self.strict_loading = False  # frozen weights are in no checkpoint
        self.gradient_checkpointing, self.compile_network = gradient_checkpointing, compile_network
        self.batch_tokens = batch_tokens
        self._spec: dict[str, Any] = backbone
        self._frozen: frozenset[str] = frozenset()

    # ------------------------------------------------------------------ what a method writes
    def build(self, policy: Policy) -> None:
        """Add the method's own parameters to the freshly loaded network."""

    # ------------------------------------------------------------------ the network
    policy: Policy

    @property
    def causal_lm(self) -> CausalLM:
        """The backbone."""
        return self.policy.backbone

    def configure_model(self) -> None:
        """Load the network, once, and shard it where the strategy says how."""
        if "policy" in self._modules:
            return
        lm = Backbone.from_spec(self._spec)
        if not isinstance(lm, CausalLM):
            raise ValueError(
                f"{type(self).__name__} needs data.backbone to be a plm.backbones.CausalLM, got {type(lm).__name__}"
            )
        before = {name for name, _ in self.named_parameters()}
        self.policy = Policy(lm, self.gradient_checkpointing)
        self.build(self.policy)
        if any(value.requires_grad for value in self.policy.parameters()):
            self.policy.float()  # a step is smaller than what half precision tells apart
        named = self.named_parameters(remove_duplicate=False)  # tied weights have two names
        self._frozen = frozenset(name for name, value in named if not value.requires_grad and name not in before)
        self._frozen |= {name for name, _ in self.policy.named_buffers(prefix="policy")}
        if self.compile_network:
            self.policy.decoder.compile(dynamic=True)  # the network around it is never called
        if self.device_mesh is not None:
            self.policy.shard(self.device_mesh.device_type)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Leave out the frozen weights, which the backbone brings."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self._frozen:
            state.pop(prefix + name, None)
        return state  # type: ignore[no-any-return]

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take the weights of a checkpoint's ``state_dict``, on every process, sharded or not."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(self, state, options=StateDictOptions(full_state_dict=True, strict=False))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep which language model the weights belong to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["base_model"] = self.causal_lm.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuse weights that belong to another language model.

        Raises:
            ValueError: If they do.
        """
        saved, current = checkpoint.get(CHECKPOINT_KEY, {}).get("base_model"), self.causal_lm.fingerprint()
        if saved not in (None, current):
            raise ValueError(
                f"the checkpoint was trained over another language model ({saved}) than {self.causal_lm.model!r} is "
                f"now ({current}): weights, config or tokenizer differ; set data.backbone.init_args.model to that model"
            )
        super().on_load_checkpoint(checkpoint)

    # ------------------------------------------------------------------ reading
    def chunks(self, tokens: Tokens) -> list[Tensor]:
        """Rows of texts of similar length, at most ``batch_tokens`` at a time."""
        length = tokens.attention_mask.sum(-1).clamp(min=1)
        return [
            torch.tensor(rows, device=length.device) for rows in batches_by_length(length.tolist(), self.batch_tokens)
        ]

    def in_chunks(self, tokens: Tokens, read: Callable[[Tokens, Tensor], Tensor]) -> Tensor:
        """A number of each of B texts, ``(B,)``: ``read`` gives those of a chunk, from its texts and their rows."""
        out = torch.zeros(tokens.num_rows, device=tokens.input_ids.device)
        for rows in self.chunks(tokens):
            out[rows] = read(tokens.take(rows).trimmed(), rows)
        return out

    # ------------------------------------------------------------------ several processes
    def setup(self, stage: str) -> None:
        """Also refuse what a language model cannot be trained with here.

        Raises:
            ValueError: For a precision or a strategy that does not fit.
        """
        super().setup(stage)
        precision, strategy = str(self.trainer.precision), self.trainer.strategy
        dtype = self._spec.get("init_args", {}).get("dtype", "float32")
        if precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise ValueError(
                f"trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got {precision!r}; adapters stay in "
                "float32, the precision of the language model is data.backbone.init_args.dtype"
            )
        if dtype == "float16" and (strategy.root_device.type == "cpu" or precision == "bf16-mixed"):
            raise ValueError(
                f"data.backbone.init_args.dtype: expected float32 or bfloat16 with trainer.precision {precision!r} on "
                f"{strategy.root_device.type}, got 'float16'"
            )
        if isinstance(strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy: got FSDP, which cannot share out frozen and trained weights together; "
                "take {trainer: fsdp2}"
            )
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            raise ValueError(
                "trainer.strategy.init_args.save_distributed_checkpoint: expected false, got true: a checkpoint is one "
                "file, which any number of processes can read"
            )

    @property
    def _trains_tables(self) -> bool:
        """Whether users have trained tables, of which a batch touches few rows; DDP refuses their sparse gradients."""
        return any(isinstance(getattr(self, name), torch.nn.Parameter) for name in self.user_tables)

    def on_fit_start(self) -> None:
        """Take the method out of DDP where gradients may be sparse, which `on_before_optimizer_step` averages."""
        super().on_fit_start()
        for optimizer in self.trainer.optimizers:  # a resumed fit loads their states, for which they take a step
            self._take_one_by_one(optimizer)
        strategy = self.trainer.strategy
        if self._trains_tables and isinstance(strategy.model, torch.nn.parallel.DistributedDataParallel):
            strategy.model = self

    def logged(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of every scalar over the processes."""
        means = summed(torch.stack([value.detach().float() for value in scalars.values()])) / world_size()
        return dict(zip(scalars, means, strict=True))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients that nobody else does: what is not sharded by a sharding strategy, or is sparse."""
        if self.device_mesh is not None or self._trains_tables:
            average_gradients(self.parameters())
        self._take_one_by_one(optimizer)  # loaded states bring the choice of the processes that saved them

    def _take_one_by_one(self, optimizer: torch.optim.Optimizer) -> None:
        """Several parameters in one call, as on a GPU, cannot be sharded and whole ones together."""
        if self.device_mesh is not None:
            for group in optimizer.param_groups:
                group["foreach"] = False

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, and under a sharding strategy, too."""
        if self.device_mesh is None or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            clip_gradients(self.parameters(), gradient_clip_val, gradient_clip_algorithm or "norm")

    def networks(self) -> list[Policy]:
        """The language models that may be shared out over processes."""
        return [self.policy]

    def on_validation_start(self) -> None:
        """Under a sharding strategy, bring networks together: processes evaluate different numbers of batches."""
        for network in self.networks():
            network.gather()

    def on_validation_end(self) -> None:
        """Share out the networks again."""
        for network in self.networks():
            network.scatter()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
