"""A policy: the frozen network of a `CausalLM`, how likely it finds responses, and a batch of texts being written.

Axes: B texts, T tokens, n response tokens of all texts, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from plm.atomic import replace
from plm.backbones.attention import Prefix, attention_bias, attention_window, decoder_of, filled_cache
from plm.backbones.causal_lm import CausalLM
from plm.backbones.checkpointing import run_blocks_again
from plm.backbones.head import TokenFacts, token_logps
from plm.backbones.lora import LoRA, TargetModules
from plm.backbones.packing import pack_pairs, pack_texts
from plm.distributed import is_first
from plm.types import Tokens


class TextWriter(Protocol):
    """A batch of texts being written, one token at a time."""

    def start(self, prompts: Tokens) -> Tensor:
        """Read the prompts, padded on the left; logits ``(B, V)`` of the first token."""

    def step(self, token: Tensor) -> Tensor:
        """Write one token ``(B,)`` to every text; logits ``(B, V)`` of the next."""

    def take(self, rows: Tensor) -> None:
        """Go on with ``(n,)`` int64 rows of the B texts: without finished ones, or with one repeated."""


class Completions(NamedTuple):
    """The n response tokens of a batch and the hidden states that predict them."""

    hidden: Tensor
    """``(n, D)`` last hidden state at the place before each token."""
    token: Tensor
    """``(n,)`` int64."""
    row: Tensor
    """``(n,)`` int64, the text of each token."""


class Policy(nn.Module):
    """A causal language model as methods use it.

    Args:
        backbone: What is loaded.
        gradient_checkpointing: Whether blocks are run again in the backward pass instead of kept in memory.
    """

    def __init__(self, backbone: CausalLM, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        network: Any = backbone.load()
        self.network = network
        self.window = attention_window(network.config)
        self.lora: LoRA | None = None
        if gradient_checkpointing:
            run_blocks_again(network, self._checkpoint_contexts)
        self._head_is_whole = self._takes_masks = False
        self._sharded: list[Any] = []  # inner modules first
        self.train()

    def train(self, mode: bool = True) -> Policy:
        """Set the mode, but leave the network in eval mode, so that policy and reference are one network."""
        super().train(mode)
        self.network.eval()
        if self.lora is not None:
            self.lora.is_training = mode
        for module in self.network.modules():
            if getattr(module, "gradient_checkpointing", False):  # blocks that are run again only when they train
                module.training = mode
        return self

    @property
    def decoder(self) -> Any:
        """What reads token ids: the network below its output embedding, without what it has for images."""
        return decoder_of(self.network)

    @property
    def width(self) -> int:
        """Width D of the hidden states."""
        return int(self.decoder.config.hidden_size)

    def check_room(self, num_more: int) -> None:
        """Check that every layer looks at all of the longest text and at ``num_more`` tokens that are no words.

        Raises:
            ValueError: If it does not.
        """
        if self.window is not None and self.backbone.max_tokens + num_more > self.window:
            raise ValueError(
                f"data.backbone.init_args.max_length: expected at most {self.window - num_more}, as layers of "
                f"{type(self.network).__name__} look at no more than {self.window} tokens and {num_more} are the "
                f"method's own, got texts of up to {self.backbone.max_tokens}"
            )

    def _checkpoint_contexts(self) -> tuple[Any, Any]:
        return (nullcontext(), nullcontext()) if self.lora is None else self.lora.checkpoint_contexts()

    def add_lora(
        self, rank: int, alpha: float, target_modules: TargetModules, *, use_rslora: bool = False, dropout: float = 0.0
    ) -> LoRA:
        """Make the network adaptable; see `LoRA`."""
        self.lora = LoRA(self.network, rank, alpha, target_modules, use_rslora=use_rslora, dropout=dropout)
        self.lora.is_training = self.training
        return self.lora

    def shard(self, device_type: str) -> None:
        """Share out the weights over all processes (FSDP2), but for the output embedding: it is used outside of a call.

        Args:
            device_type: Kind of device of the processes.

        Raises:
            ValueError: If the weights are quantized.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if self.backbone.quantization is not None:
            raise ValueError(
                f"{self.backbone.quantization} weights cannot be shared out over processes; set "
                "data.backbone.init_args.quantization to null, or train with strategy ddp"
            )
        base, kinds = self.decoder, set(self.network._no_split_modules or [])
        mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
        whole = set(self.network.get_output_embeddings().parameters())
        self._sharded = [module for module in base.modules() if type(module).__name__ in kinds and module is not base]
        self._sharded.append(base)
        for module in self._sharded:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)

    def gather(self) -> None:
        """Keep all weights on every process until `scatter`, so that each may read on its own."""
        for module in self._sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()

    def scatter(self) -> None:
        """Undo `gather`."""
        for module in self._sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()

    def whole_state(self) -> dict[str, Any]:
        """Weights of the network on the CPU, brought together where processes share them; all of them call this."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.network, options=options)

    def save(self, folder: str | Path) -> None:
        """Write network and tokenizer as a Hugging Face folder, replacing what is there in one step.

        Where processes share the weights, all of them call this; the first writes.
        """
        state = self.whole_state() if self._sharded else None
        if not is_first():
            return
        folder = Path(folder)
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        ends = self.end_tokens
        self.network.generation_config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
        self.network.save_pretrained(str(part), state_dict=state)
        self.backbone.tokenizer.save_pretrained(str(part))
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            replace(folder, old)
            replace(part, folder)
            shutil.rmtree(old)
        else:
            replace(part, folder)

    def adapted(self, *adapters: Tensor) -> AbstractContextManager[None]:
        """Context in which the network is adapted, see `LoRA.use`."""
        return nullcontext() if self.lora is None else self.lora.use(*adapters)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the hidden states."""
        return next(self.network.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device  # type: ignore[no-any-return]

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a text: the tokenizer's, the chat template's, and what the model's generation config names."""
        named = self.network.generation_config.eos_token_id
        lm = self.backbone
        ids = [lm.tokenizer.eos_token_id, lm.closing_token, *(named if isinstance(named, list) else [named])]
        return sorted({int(token) for token in ids if token is not None})

    # ------------------------------------------------------------------ reading
    def hidden(self, tokens: Tokens, prefix: Prefix | None = None) -> Tensor:
        """Last hidden states ``(B, T, D)``; padding may be on either side."""
        mask = tokens.attention_mask
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return self._run(tokens.input_ids, mask, position, prefix)

    def _run(self, ids: Tensor, attended: Tensor, position: Tensor, prefix: Prefix | None) -> Tensor:
        cache, mask = None, attended.long()
        if prefix is not None:
            cache, length = filled_cache(prefix), prefix[0][0].shape[2]
            mask = self.mask(torch.cat([attended.new_ones(len(attended), length), attended], 1), ids.shape[1])
            position = position + length
        return self.decoder(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=mask, position_ids=position, cache=cache, use_cache=False
        ).last_hidden_state

    def mask(self, attended: Tensor, num_now: int, bias: Tensor | None = None) -> Tensor:
        """Mask for reading beside virtual tokens, see `check_room`.

        Networks with windows count them in columns, with the padding between virtual tokens and a text; their mask
        is written out instead, unless the kernel takes none and leaves padding out.

        Args:
            attended: ``(B, S + T)`` bool, True = no padding.
            num_now: T, the tokens that are read now.
            bias: ``(S + T,)`` added to attention scores.
        """
        if bias is None and (self.window is None or "flash" in self.decoder.config._attn_implementation):
            return attended.long()
        return attention_bias(attended, num_now, self.dtype, bias)

    def completions(self, tokens: Tokens, prefix: Prefix | None = None) -> Completions:
        """Response tokens of every text with the hidden states that predict them."""
        hidden = self.hidden(tokens, prefix)
        row, column = tokens.completion_mask.nonzero(as_tuple=True)
        return Completions(hidden[row, column - 1], tokens.input_ids[row, column], row)

    def shared_completions(self, chosen: Tokens, rejected: Tokens, prefix: Prefix | None = None) -> Completions:
        """As `completions`, for both responses of B pairs; the prompt of a pair is read once.

        A pair is one text, prompt, chosen, rejected, in which no response sees the other and both stand at the places
        they have alone. Rows 0..B-1 of the result are chosen, B..2B-1 rejected. Where such a text is longer than a
        window of the network's attention, which takes no mask of ours, both responses are read apart instead.
        """
        if not self._takes_masks:
            self._check_masks()
        if self.window is not None:
            length = chosen.attention_mask.sum(-1) + rejected.completion_mask.sum(-1)
            virtual = 0 if prefix is None else prefix[0][0].shape[2]
            if int(length.max()) + virtual > self.window:
                first, second = (self.completions(side, prefix) for side in (chosen, rejected))
                second = second._replace(row=second.row + chosen.num_rows)
                return Completions(*map(torch.cat, zip(first, second, strict=True)))
        return self._shared(chosen, rejected, prefix)

    def _shared(self, chosen: Tokens, rejected: Tokens, prefix: Prefix | None) -> Completions:
        packed, mask, position, source, column, row = pack_pairs(chosen, rejected)
        cache = None
        if prefix is not None:
            cache, length = filled_cache(prefix), prefix[0][0].shape[2]
            mask = torch.cat([mask.new_ones(*mask.shape[:2], length), mask], 2)
            position = position + length
        hidden = self._masked(packed, mask, position, cache)
        pair = row % len(packed)
        return Completions(hidden[pair, source], packed[pair, column], row)

    def packed_completions(self, tokens: Tokens) -> Completions:
        """As `completions`, with several texts in a row, which see themselves alone and stand at their own places.

        Texts longer than a window of the network's attention, which takes no mask of ours, are read apart instead.
        """
        if not self._takes_masks:
            self._check_masks()
        if self.window is not None and int(tokens.attention_mask.sum(-1).max()) > self.window:
            return self.completions(tokens)
        packed = pack_texts(tokens)
        hidden = self._masked(packed.input_ids, packed.mask, packed.position, None)
        text, _ = tokens.completion_mask.nonzero(as_tuple=True)
        return Completions(hidden[packed.row, packed.column - 1], packed.input_ids[packed.row, packed.column], text)

    def _masked(self, ids: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Tensor:
        """Last hidden states ``(B, T, D)`` of rows whose tokens may look at what ``mask`` ``(B, T, S + T)`` says."""
        bias = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        bias.masked_fill_(~mask, torch.finfo(self.dtype).min)
        return self.decoder(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=bias[:, None], position_ids=position, cache=cache, use_cache=False
        ).last_hidden_state

    @torch.no_grad()
    def _check_masks(self) -> None:
        """Raise unless the network reads a small pair in one text as it reads its responses apart."""
        kernel = self.decoder.config._attn_implementation
        row = torch.arange(1, 7, device=self.device)[None]
        response = row > 3
        first = Tokens(row, torch.ones_like(response), response)
        second = first._replace(input_ids=torch.where(response, row + 6, row))
        difference, size = float("inf"), 1.0
        if "flash" not in kernel:  # these kernels take no mask
            with self.adapted(), torch.compiler.set_stance("force_eager"):
                apart = torch.cat([self.completions(side).hidden for side in (first, second)]).float()
                together = self._shared(first, second, None).hidden.float()
            difference, size = float((apart - together).abs().max()), float(apart.abs().max())
        is_exact = self.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        if difference > (1e-4 if is_exact else 5e-2) * max(size, 1.0):
            raise ValueError(
                f"{type(self.network).__name__} with attention {kernel!r} cannot read both responses of a pair after "
                "one prompt, nor several texts in one row; set model.share_prompts to false, and model.packing"
            )
        self._takes_masks = True

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores ``(..., V)`` of last hidden states ``(..., D)``.

        Raises:
            ValueError: If the network does something else to them than its output embedding.
        """
        return self._head(hidden)  # type: ignore[no-any-return]

    def token_logps(
        self, hidden: Tensor, token: Tensor, *, with_facts: bool = False
    ) -> tuple[Tensor, TokenFacts | None]:
        """Log-probabilities ``(n,)`` of the tokens after hidden states ``(n, D)``, see `plm.backbones.head`."""
        return token_logps(self._head, hidden, token, with_facts=with_facts)

    @property
    def _head(self) -> nn.Module:
        """The output embedding, after a check that nothing follows it."""
        if not self._head_is_whole:
            with self.adapted(), torch.compiler.set_stance("force_eager"):
                self._check_head()
        return self.network.get_output_embeddings()  # type: ignore[no-any-return]

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.tensor([[1, 2, 3]], device=self.device)
        whole = self.network(input_ids=ids, use_cache=False).logits.float()
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        embedded = self.network.get_output_embeddings()(hidden).float()
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        if (whole - embedded).abs().max() > tolerance * whole.abs().max().clamp(min=1):
            raise ValueError(
                f"{type(self.network).__name__} scales or bounds its logits after the output embedding; "
                "such models are not supported"
            )
        self._head_is_whole = True

    # ------------------------------------------------------------------ writing
    def write(self, *adapters: Tensor, prefix: Prefix | None = None) -> Writing:
        """Begin a batch of texts that are written with ``adapters``, see `LoRA.use`, after ``prefix``."""
        return Writing(self, adapters, prefix)


class Writing:
    """One batch of texts being written, token by token, from a key/value cache.

    Args:
        policy: The network that writes.
        adapters: ``(G, P)`` each, of G equal groups of texts; may be empty.
        prefix: Virtual tokens before every text, or None.
    """

    def __init__(self, policy: Policy, adapters: Sequence[Tensor], prefix: Prefix | None) -> None:
        self.policy, self.adapters, self.prefix = policy, adapters, prefix
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._offset = 0

    @torch.no_grad()
    def start(self, prompts: Tokens) -> Tensor:
        """Read the prompts, padded on the left; logits ``(B, V)`` of the first token."""
        from transformers import DynamicCache

        mask = prompts.attention_mask
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if self.prefix is None:
            self._cache = DynamicCache(config=self.policy.network.config)
        else:
            self._cache, self._offset = filled_cache(self.prefix), self.prefix[0][0].shape[2]
        self._mask = torch.cat([mask.new_ones(len(mask), self._offset), mask], 1)
        return self._next(prompts.input_ids, position + self._offset)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Write one token ``(B,)`` to every text; logits ``(B, V)`` of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], 1)
        position = self._mask.long().sum(-1, keepdim=True) - 1
        return self._next(token[:, None], position)

    def take(self, rows: Tensor) -> None:
        """Go on with ``(n,)`` int64 rows of the B texts: without finished ones, or with one repeated."""
        self._cache.batch_select_indices(rows)
        size = len(self._mask)
        self.adapters = [a if len(a) == 1 else a.repeat_interleave(size // len(a), 0)[rows] for a in self.adapters]
        self._mask = self._mask[rows]

    def _next(self, ids: Tensor, position: Tensor) -> Tensor:
        mask = self._mask.long() if self.prefix is None else self.policy.mask(self._mask, ids.shape[1])
        with self.policy.adapted(*self.adapters):
            hidden = self.policy.decoder(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                cache=self._cache,
                use_cache=True,
            ).last_hidden_state
            return self.policy.logits(hidden[:, -1]).float()
