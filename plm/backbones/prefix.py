"""Learned keys and values before every text (P-Tuning v2, Liu et al. 2021, arXiv 2110.07602; Li & Liang 2021).

Axes: B texts, G groups of B / G texts, P numbers of one prefix, L layers, H key heads, p virtual tokens, d their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from plm.backbones.attention import Prefix
from plm.backbones.policy import Policy


class PrefixShape:
    """Keys and values of virtual tokens as one flat row, in the order layer, key or value, head, token, width.

    Args:
        policy: The network they are for.
        num_virtual_tokens: How many virtual tokens.

    Raises:
        ValueError: If there are none, the network keeps keys of different shapes, or layers do not see all of a text.
    """

    def __init__(self, policy: Policy, num_virtual_tokens: int) -> None:
        if num_virtual_tokens < 1:
            raise ValueError(f"model.num_virtual_tokens: expected at least 1, got {num_virtual_tokens!r}")
        policy.check_room(num_virtual_tokens)
        ids = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
        with torch.no_grad():
            cache = policy.decoder(input_ids=ids, use_cache=True).cache
        shapes = {tuple(layer.keys.shape[1::2]) for layer in cache.layers}
        if len(shapes) > 1:
            raise ValueError(
                f"{type(policy.network).__name__} has layers whose keys differ in shape; set model.adapter to lora"
            )
        heads, width = shapes.pop()
        self.policy = policy
        self.shape = (len(cache.layers), 2, heads, num_virtual_tokens, width)
        self.num_parameters = 2 * len(cache.layers) * heads * num_virtual_tokens * width

    def start(self, seed: int) -> Tensor:
        """``(P,)`` small random keys and values on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return 0.02 * torch.randn(self.num_parameters, generator=generator, device=generator.device)

    def prefix(self, flat: Tensor, num_rows: int) -> Prefix:
        """Flat prefixes ``(G, P)`` of G equal groups of B texts as keys and values ``(B, H, p, d)`` per layer."""
        rows = flat.to(self.policy.dtype).view(len(flat), *self.shape).repeat_interleave(num_rows // len(flat), 0)
        return [(keys, values) for keys, values in (layer.unbind(1) for layer in rows.unbind(1))]

    def mean(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The prefix ``(P,)`` whose keys and values are the weighted sum of those of ``(U, P)``, by ``(U,)``."""
        return weight.to(rows) @ rows

    def save(self, rows: Sequence[Tensor], folder: str | Path, base: str) -> None:
        """Write the one prefix ``(P,)`` of ``rows`` as a PEFT folder, which ``PeftModel.from_pretrained`` loads.

        Args:
            rows: The prefix.
            folder: Where to write.
            base: Name or folder of the network, kept in the folder's config.
        """
        from peft import PrefixTuningConfig

        (row,) = rows
        layers, _, heads, num_virtual_tokens, width = self.shape
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=num_virtual_tokens,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * width,
            num_transformer_submodules=1,
            base_model_name_or_path=base,
            inference_mode=True,
        )
        embedding = row.detach().float().cpu().view(self.shape).permute(3, 0, 1, 2, 4).reshape(num_virtual_tokens, -1)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"prompt_embeddings": embedding.contiguous()}, folder / "adapter_model.safetensors")
        config.save_pretrained(str(folder))
