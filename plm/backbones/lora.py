"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of many users at once over one frozen network.

An adapter is one flat row of P numbers, all A and B matrices one after the other, so that the adapters of U users are a
matrix ``(U, P)``: rows to train together, gather, store and delete.

Axes: U adapters, P numbers of one adapter, B texts, G groups of B / G texts, T tokens, r rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plm.backbones.attention import decoder_of

TargetModules: TypeAlias = Sequence[str] | Literal["all-linear"] | None
ALL_LINEAR = "all-linear"
_QUERIES_AND_VALUES = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))
"""Names of the maps of queries and values, or of the one map that makes keys as well."""


class Place(NamedTuple):
    """A linear map that is adapted, and where its A and B stand in a flat adapter."""

    name: str
    width_in: int
    width_out: int
    start: int
    is_conv: bool
    """Whether it is a ``Conv1D`` of GPT-2, whose weight is transposed."""


class LoRA:
    """Adds ``scale * B A x`` to linear maps of a network: for every text of a batch by the adapter of its group.

    The adapters themselves are given from outside, by `use`; without them the network is untouched, bit for bit.

    Args:
        network: The frozen network of transformers; hooks are registered on it.
        rank: r.
        alpha: The scale is ``alpha / rank``.
        target_modules: Last parts of the names of the linear maps of the part that reads text; ``all-linear``, all of
            them; None, see `default_targets`. The output embedding is none of them: it reads single tokens, outside of
            a call of the network.
        use_rslora: The scale is ``alpha / sqrt(rank)`` instead (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
        dropout: Share of the inputs of A that are set to zero while `is_training`.

    Raises:
        ValueError: If the network has no such linear map.
    """

    def __init__(
        self,
        network: Any,
        rank: int,
        alpha: float,
        target_modules: TargetModules = None,
        *,
        use_rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"expected rank to be at least 1, got {rank!r}")
        self.rank, self.alpha, self.use_rslora, self.dropout = rank, alpha, use_rslora, dropout
        self.is_training = False
        maps = _linear_maps(network)
        names = sorted({name.rpartition(".")[2] for name in maps})
        if target_modules is None:
            self.target_modules = default_targets(network, names)
        else:
            self.target_modules = names if target_modules == ALL_LINEAR else list(target_modules)
        if not self.target_modules or not set(self.target_modules) <= set(names):
            raise ValueError(
                f"model.target_modules: expected names of linear maps of {type(network).__name__}, got "
                f"{self.target_modules!r}; it has {names}: name some of them, set {ALL_LINEAR} for all, or null for a "
                "default"
            )
        self.places: list[Place] = []
        self._active: tuple[Sequence[Tensor], ...] = ()
        start = 0
        for name, module in maps.items():
            if name.rpartition(".")[2] not in self.target_modules:
                continue
            place = Place(name, *_sizes(module), start, type(module).__name__ == "Conv1D")
            module.register_forward_hook(self._hook(len(self.places)))
            self.places.append(place)
            start += rank * (place.width_in + place.width_out)
        self.num_parameters = start
        self._pattern = _pattern(network, [place.name for place in self.places], self.target_modules)

    @property
    def scale(self) -> float:
        """Factor of the low-rank term."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def start(self, seed: int) -> Tensor:
        """``(P,)`` a fresh adapter on the CPU that changes nothing: A uniform as in PEFT, B zero.

        Every user starts from the same draw, so that an adapter does not depend on who is trained beside it.
        """
        generator = torch.Generator().manual_seed(seed)
        flat = torch.zeros(self.num_parameters, device=generator.device)  # also in the context of another device
        for place in self.places:
            bound = 1 / math.sqrt(place.width_in)  # kaiming_uniform with a = sqrt(5)
            size = self.rank * place.width_in
            flat[place.start : place.start + size].uniform_(-bound, bound, generator=generator)
        return flat

    def matrices(self, adapters: Tensor) -> list[Tensor]:
        """A ``(..., r, in)`` and B ``(..., out, r)`` of every linear map in turn, views of ``(..., P)``."""
        shapes = [
            shape for place in self.places for shape in ((self.rank, place.width_in), (place.width_out, self.rank))
        ]
        # one split, whose backward pass is one concatenation; a slice for each would add up as many (..., P) gradients
        parts = torch.split(adapters, [rows * columns for rows, columns in shapes], -1)
        return [part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]

    @contextmanager
    def use(self, *adapters: Tensor) -> Iterator[None]:
        """Adapt the network inside the context.

        Args:
            *adapters: ``(G, P)`` each; the B texts of a forward pass are G consecutive groups of equal size, each read
                with its adapter. The terms of several are added; none leaves the network as it is.
        """
        with self._using(tuple(self.matrices(flat) for flat in adapters)):
            yield

    @contextmanager
    def _using(self, active: tuple[Sequence[Tensor], ...]) -> Iterator[None]:
        before, self._active = self._active, active
        try:
            yield
        finally:
            self._active = before

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """Contexts of a checkpointed block: its second run, in the backward pass, sees the adapters of the first."""
        return self._using(self._active), self._using(self._active)

    def _hook(self, index: int) -> Any:
        def add(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for matrices in self._active:
                output = self._added(output, args[0], matrices[2 * index], matrices[2 * index + 1])
            return output

        return add

    def _added(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``output + scale * B A x``: ``(B, T, out)``, ``(B, T, in)``, A ``(G, r, in)``, B ``(G, out, r)``."""
        groups, dtype = len(a), output.dtype
        if self.is_training and self.dropout:
            x = F.dropout(x, self.dropout)
        low = torch.bmm(x.reshape(groups, -1, x.shape[-1]), a.to(x.dtype).transpose(1, 2))  # (G, B / G * T, r)
        whole = output.reshape(groups, -1, output.shape[-1])
        added = torch.baddbmm(whole, low.to(dtype), b.to(dtype).transpose(1, 2), alpha=self.scale)
        return added.view(output.shape)

    def weighed(self, adapters: Tensor, weight: Tensor) -> Tensor:
        """Adapters whose terms are ``weight`` times as large: ``(..., P)``, ``(...)`` -> ``(..., P)``."""
        factor = torch.ones(self.num_parameters, dtype=torch.bool, device=adapters.device)
        for place in self.places:
            factor[place.start : place.start + self.rank * place.width_in] = False  # all of it into B
        return torch.where(factor, adapters * weight[..., None], adapters)

    def mean(self, adapters: Tensor, weight: Tensor) -> Tensor:
        """The adapter ``(P,)`` whose term is as near as rank r comes to the weighted sum of the terms of U adapters.

        Of one linear map the sum is ``W = sum_u w_u B_u A_u = B A``, exactly, with ``B = [w_1 B_1, ..., w_U B_U]``
        ``(out, U r)`` and ``A`` the ``A_u`` one below the other ``(U r, in)``. With ``B = Q R`` and ``A^T = P S``,
        ``W = Q (R S^T) P^T``, where Q and P have orthonormal columns; hence the singular values of the small
        ``R S^T = X diag(s) Y^T`` are those of W, and its r largest give the nearest matrix of rank r in the Frobenius
        norm (Eckart & Young 1936): ``B = Q X_r diag(s_r)``, ``A = (P Y_r)^T``. The scale is common to all terms and
        stays outside. All of the size is in B, so that a zero sum is a fresh adapter, which can be trained further.

        Args:
            adapters: ``(U, P)``; the factors of one linear map at a time are copied, no term is ever written out.
            weight: ``(U,)``.
        """
        parts, matrices = [], self.matrices(adapters)
        for a, b in zip(matrices[::2], matrices[1::2], strict=True):
            wide = (weight.to(b)[:, None, None] * b).transpose(0, 1).flatten(1)  # (out, U r)
            left, left_small = torch.linalg.qr(wide)
            right, right_small = torch.linalg.qr(a.flatten(0, 1).T)  # (in, U r)
            x, size, y = torch.linalg.svd(left_small @ right_small.T, full_matrices=False)
            rank = min(self.rank, len(size))  # fewer than r where the map is narrower
            best_a, best_b = torch.zeros_like(a[0]), torch.zeros_like(b[0])
            best_a[:rank] = y[:rank] @ right.T
            best_b[:, :rank] = left @ (x * size)[:, :rank]
            parts += [best_a.flatten(), best_b.flatten()]
        return torch.cat(parts)

    # ------------------------------------------------------------------ PEFT folders
    def save(self, adapters: Sequence[Tensor], folder: str | Path, base: str) -> None:
        """Write the sum of adapters ``(P,)`` as a PEFT folder, which ``PeftModel.from_pretrained`` loads.

        The sum of n adapters of rank r is one of rank ``n r``: their matrices side by side, exact.

        Args:
            adapters: One or more adapters.
            folder: Where to write.
            base: Name or folder of the network, kept in the folder's config.
        """
        from peft import LoraConfig

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        matrices = [self.matrices(adapter.detach().float().cpu()) for adapter in adapters]
        for index, place in enumerate(self.places):
            tensors[f"base_model.model.{place.name}.lora_A.weight"] = torch.cat([m[2 * index] for m in matrices])
            tensors[f"base_model.model.{place.name}.lora_B.weight"] = torch.cat([m[2 * index + 1] for m in matrices], 1)
        rank = self.rank * len(adapters)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=cast(Any, self.scale * (math.sqrt(rank) if self.use_rslora else rank)),  # fractions are fine
            use_rslora=self.use_rslora,
            lora_dropout=self.dropout,
            target_modules=self._pattern,
            fan_in_fan_out=any(place.is_conv for place in self.places),
            base_model_name_or_path=base,
            inference_mode=True,
        )
        save_file(tensors, folder / "adapter_model.safetensors")
        config.save_pretrained(str(folder))

    def read(self, folder: str | Path) -> Tensor:
        """Read a PEFT folder as an adapter ``(P,)``.

        Raises:
            ValueError: If it is none, or of another rank, scale or set of linear maps.
        """
        try:
            config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"expected a PEFT folder, got {str(folder)!r}: {error}") from error
        rank = config.get("r")
        alpha = float(config.get("lora_alpha", 0)) * (math.sqrt(self.rank) if config.get("use_rslora") else 1)
        if rank != self.rank or not math.isclose(alpha, self.scale * self.rank):
            raise ValueError(
                f"expected an adapter of rank {self.rank} and alpha {self.scale * self.rank:g}, got {rank} and "
                f"{alpha:g} in {str(folder)!r}"
            )
        flat = torch.zeros(self.num_parameters)
        names = [f"base_model.model.{place.name}.lora_{letter}.weight" for place in self.places for letter in "AB"]
        wanted = dict(zip(names, self.matrices(flat), strict=True))
        if set(wanted) != set(tensors):
            odd = sorted(set(wanted) ^ set(tensors))[:3]
            raise ValueError(f"{str(folder)!r} adapts other linear maps than this method: {odd}")
        for name, matrix in wanted.items():
            if matrix.shape != tensors[name].shape:
                raise ValueError(
                    f"expected {name} of shape {tuple(matrix.shape)} in {str(folder)!r}, "
                    f"got {tuple(tensors[name].shape)}"
                )
            matrix.copy_(tensors[name])
        return flat


def default_targets(network: Any, names: Sequence[str]) -> list[str]:
    """What PEFT adapts in the architecture of a network; where it has no default, the maps of queries and values.

    Args:
        network: The network.
        names: Last parts of the names of its linear maps.

    Raises:
        ValueError: If neither is known.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    kind = decoder_of(network).config.model_type
    for targets in (TARGETS.get(kind), *_QUERIES_AND_VALUES):
        if isinstance(targets, list | tuple) and set(targets) <= set(names):
            return list(targets)
    raise ValueError(
        f"model.target_modules: no default is known for {kind!r}, got null; name linear maps to adapt, of "
        f"{list(names)}, or set {ALL_LINEAR}"
    )


def _linear_maps(network: Any) -> dict[str, Any]:
    """The linear maps that can be adapted by their names: those that read text, without the output embedding."""
    head, inside = network.get_output_embeddings(), set(decoder_of(network).modules())
    return {
        name: module
        for name, module in network.named_modules()
        if module in inside and module is not head and _is_linear(module)
    }


def _pattern(network: Any, adapted: Sequence[str], targets: Sequence[str]) -> list[str] | str:
    """What PEFT calls the maps: their last names; where other modules have the same, an expression for whole names."""
    everywhere = [name for name, _ in network.named_modules() if name.rpartition(".")[2] in targets]
    if everywhere == list(adapted):
        return list(targets)
    (prefix,) = (name for name, module in network.named_modules() if module is decoder_of(network))
    return rf"{re.escape(prefix)}\..*\.({'|'.join(map(re.escape, targets))})"


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear map whose output is a tensor, which is not so of Llama 4's routers."""
    if type(module).__name__.endswith("Router"):
        return False
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(module: Any) -> tuple[int, int]:
    """Input and output width of a linear map, quantised or not."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    return int(module.weight.shape[0]), int(module.weight.shape[1])  # Conv1D of GPT-2: weight (in, out)
