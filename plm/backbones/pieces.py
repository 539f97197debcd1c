"""Pieces of a language model that a method trains copies of: its first layers, and what makes its keys and values.

Axes: B texts, T tokens, L layers, H key heads, p virtual tokens, d key width, D width.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from plm.backbones.attention import Prefix
    from plm.backbones.policy import Policy


def first_layers(policy: Policy, num_layers: int) -> Any:
    """A copy, in float32, of the network's embeddings, first layers and final norm, called as `Policy.decoder` is.

    Raises:
        ValueError: If the network has fewer layers, or quantized ones.
    """
    base, config = policy.decoder, copy.deepcopy(policy.decoder.config)
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(
            f"model.encoder_layers: expected 1 to {config.num_hidden_layers}, the layers of "
            f"{type(policy.network).__name__}, got {num_layers!r}"
        )
    if policy.backbone.quantization is not None:
        raise ValueError(
            "layers of a quantized network cannot be copied; set data.backbone.init_args.quantization null"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]
    part = type(base)(config)
    weights = base.state_dict()
    part.load_state_dict({name: weights[name] for name in part.state_dict()})
    return part.float().requires_grad_(True)


def word_moments(embeddings: Any) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean ``(D,)`` of the vectors of words, on the CPU, as they enter the first layer."""
    scale = float(getattr(embeddings, "embed_scale", 1.0))  # of Gemma
    spread, centre = torch.std_mean(embeddings.weight.detach().float(), 0)
    return scale * spread.cpu(), scale * centre.cpu()


class KeyValueMaker(nn.Module):
    """Makes keys and values as every layer does, with copies of its input norm, W_K and W_V.

    Norms are trained; the two maps are, where asked for. Known are layers like GPT-2's and like Llama's: rotary or
    learned positions, few heads for keys, biases, and norms of keys.

    Args:
        policy: The network whose layers are copied.
        train_maps: Whether W_K and W_V are trained; if not, they are those of the network.

    Raises:
        ValueError: If the network makes keys and values in another way.
    """

    def __init__(self, policy: Policy, train_maps: bool) -> None:
        super().__init__()
        network = policy.network
        base = policy.decoder
        name = type(network).__name__
        refusal = f"{name} makes keys and values in a way that is not known here; take a model like GPT-2 or Llama"
        try:
            layers = base.h if hasattr(base, "h") else base.layers
            parts = [_layer_parts(layer) for layer in layers]
            self.key_width = int(_attention(layers[0]).head_dim)
        except AttributeError as error:
            raise ValueError(f"{refusal} ({error})") from error
        self.norms = nn.ModuleList([copy.deepcopy(norm).float().requires_grad_(True) for norm, *_ in parts])
        self.keys = nn.ModuleList([key for _, key, _, _ in parts]).requires_grad_(train_maps)
        self.values = nn.ModuleList([value for _, _, value, _ in parts]).requires_grad_(train_maps)
        self.key_norms = nn.ModuleList([norm for *_, norm in parts]).requires_grad_(train_maps)
        if train_maps:
            self.float()
        self._rotary = [base.rotary_emb] if hasattr(base, "rotary_emb") else []  # a list: no module of this one
        self._turns: list[tuple[str, ...]] = [()] * len(layers)  # what the rotary module is told of each layer
        if self._rotary and "layer_type" in inspect.signature(base.rotary_emb.forward).parameters:
            self._turns = [(kind,) for kind in base.config.layer_types]
        self._check(policy, refusal)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.norms)

    def forward(self, hidden: Tensor, start: Tensor) -> Prefix:
        """Keys and values of virtual tokens.

        Args:
            hidden: ``(B, L, p, D)`` what enters the layers, before their input norms.
            start: ``(B,)`` int64 position of the first of the p tokens.

        Returns:
            ``(B, H, p, d)`` keys and values of every layer, in float32 or what the maps compute in.
        """
        position = start[:, None] + torch.arange(hidden.shape[2], device=hidden.device)
        turns = {
            told: tuple(part.float()[:, None] for part in rotary(hidden.float(), position, *told))
            for rotary in self._rotary
            for told in set(self._turns)
        }
        pairs = []
        for layer in range(self.num_layers):
            normed = self.norms[layer](hidden[:, layer].float())
            key, value = (self._heads(maps[layer], normed) for maps in (self.keys, self.values))
            key = self.key_norms[layer](key)
            turn = turns.get(self._turns[layer])
            pairs.append((key if turn is None else _turned(key, *turn).to(key.dtype), value))
        return pairs

    def _heads(self, mapping: nn.Module, normed: Tensor) -> Tensor:
        """``(B, p, D)`` -> ``(B, H, p, d)``."""
        flat = mapping(normed.to(next(mapping.parameters()).dtype))
        return flat.view(*flat.shape[:2], -1, self.key_width).transpose(1, 2)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _check(self, policy: Policy, refusal: str) -> None:
        """Raise unless the network's own hidden states give the keys and values that it caches."""
        ids = torch.tensor([[1, 2, 3]], device=policy.device)
        out = policy.decoder(input_ids=ids, use_cache=True, output_hidden_states=True)
        hidden = torch.stack(out.hidden_states[: self.num_layers], 1)  # (1, L, 3, D)
        pairs = self(hidden, torch.zeros(1, dtype=torch.long, device=policy.device))
        tolerance = 1e-4 if policy.dtype == torch.float32 else 5e-2
        for pair, cached in zip(pairs, out.cache.layers, strict=True):
            for value, expected in zip(pair, (cached.keys, cached.values), strict=True):
                bound = tolerance * expected.abs().max().clamp(min=1)
                if value.shape != expected.shape or (value - expected).abs().max() > bound:
                    raise ValueError(refusal)


def _attention(layer: Any) -> Any:
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


def _layer_parts(layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Input norm, copies of W_K and W_V, and of the norm of keys, of one layer."""
    attention = _attention(layer)
    if hasattr(attention, "c_attn"):  # GPT-2: one matrix (D, 3D) for queries, keys and values
        weight, bias = attention.c_attn.weight.detach(), attention.c_attn.bias.detach()
        maps = []
        for part in (1, 2):
            mapping = nn.Linear(weight.shape[0], attention.embed_dim, device="meta")
            place = slice(part * attention.embed_dim, (part + 1) * attention.embed_dim)
            mapping.weight = nn.Parameter(weight[:, place].T.clone())
            mapping.bias = nn.Parameter(bias[place].clone())
            maps.append(mapping)
        return layer.ln_1, maps[0], maps[1], nn.Identity()
    key_norm = copy.deepcopy(attention.k_norm) if hasattr(attention, "k_norm") else nn.Identity()
    return layer.input_layernorm, copy.deepcopy(attention.k_proj), copy.deepcopy(attention.v_proj), key_norm


def _turned(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys ``(B, H, p, d)`` turned by rotary angles ``(B, 1, p, r)``; what is wider than r stays as it is."""
    width = cos.shape[-1]
    turning, rest = key[..., :width].float(), key[..., width:]
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(rest.dtype), rest], -1)
