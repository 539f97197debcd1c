"""Blocks of a network that run again in the backward pass, also where they read after keys and values of their own.

Axes: B texts, S tokens read before, T tokens read now, H key heads, d key width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_blocks_again(network: nn.Module, contexts: Callable[[], tuple[Any, Any]]) -> None:
    """Let blocks keep their inputs alone, and run again in the backward pass; in training, see `Policy.train`.

    transformers would take the cache of keys and values away from them, which a second run would fill once more. Here
    a second run finds it as the first one did.

    Args:
        network: What has the blocks.
        contexts: Gives the contexts of the first and of the second run.

    Raises:
        ValueError: If its blocks cannot be told apart.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"model.gradient_checkpointing: expected false, as the blocks of {type(network).__name__} cannot be run "
            "again, got true"
        )
    for block in blocks:
        block.gradient_checkpointing = block._can_checkpoint_with_cache = True
        block._gradient_checkpointing_func = partial(_run, contexts)


def _run(contexts: Callable[[], tuple[Any, Any]], block: partial[Any], *args: Any) -> Any:
    """Run a block with a stand-in for its cache."""
    from transformers import Cache

    def stand_in(value: Any) -> Any:
        return _SameCache(value) if isinstance(value, Cache) else value

    keywords = {name: stand_in(value) for name, value in block.keywords.items()}
    again = partial(block.func, *block.args, **keywords)
    return checkpoint(again, *map(stand_in, args), use_reentrant=False, context_fn=contexts)


class _SameCache:
    """Stands for a cache that keeps everything: a block that runs again finds what it found when it ran first.

    Args:
        cache: Filled by the first run.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._found: dict[int, list[Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``(B, H, T, d)`` keys and values of a layer -> all of it ``(B, H, S + T, d)``."""
        if layer in self._found:
            keys, values = self._found[layer] or (key[:, :, :0], value[:, :, :0])
            return torch.cat([keys, key], -2), torch.cat([values, value], -2)
        is_filled = layer < len(self._cache.layers) and self._cache.layers[layer].get_seq_length()
        self._found[layer] = [self._cache.layers[layer].keys, self._cache.layers[layer].values] if is_filled else []
        return self._cache.update(key, value, layer, *args, **kwargs)  # type: ignore[no-any-return]
