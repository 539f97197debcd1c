"""Projectors: small MLPs from features to the preference space, written as the strings of the published configs.

Axes: C copies of one architecture, N rows, D input width, E output width.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GRAMMAR = "identity or mlp{n}-{relu|gelu|linear}-dropout{digits}[-residual][-batchnorm][-nobias]"
_PATTERN = re.compile(r"mlp(\d+)-(relu|gelu|linear)-dropout(\d+)(-residual)?(-batchnorm)?(-nobias)?")


class ProjectorSpec(NamedTuple):
    """What a projector string says."""

    num_hidden: int
    """Hidden layers, all of the output width; -1 for identity."""
    activation: str
    dropout: float
    residual: bool
    batchnorm: bool
    bias: bool

    @property
    def is_affine(self) -> bool:
        """Whether the map is affine once trained, so that it commutes with mixing on the simplex."""
        return self.num_hidden < 1 or self.activation == "linear"


def parse_projector(text: str, where: str = "model.projector") -> ProjectorSpec:
    """Read a projector string; digits of dropout are decimals after "0.".

    Args:
        text: The string.
        where: Config key, for the message.

    Raises:
        ValueError: If the whole string does not follow the grammar.

    >>> parse_projector("mlp2-gelu-dropout05-residual")
    ProjectorSpec(num_hidden=2, activation='gelu', dropout=0.05, residual=True, batchnorm=False, bias=True)
    """
    if text == "identity":
        return ProjectorSpec(-1, "linear", 0.0, False, False, False)
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{where}: expected {GRAMMAR}, got {text!r}; for example 'mlp2-relu-dropout0-residual'")
    layers, activation, dropout, residual, batchnorm, nobias = match.groups()
    return ProjectorSpec(
        int(layers), activation, float(f"0.{dropout}"), residual is not None, batchnorm is not None, nobias is None
    )


class Projectors(torch.nn.Module):
    """C projectors of one architecture as batched products: ``(N, D)`` -> ``(C, N, E)``.

    A block is Linear, BatchNorm, Dropout, activation; after ``num_hidden`` blocks comes one more Linear. Weights start
    as those of ``torch.nn.Linear``.

    Args:
        text: The projector string.
        in_dim: Width D.
        out_dim: Width E; identity and residual need E = D.
        copies: Number of projectors C.
        where: Config key, for messages.

    Raises:
        ValueError: If the string is malformed or needs equal widths.
    """

    def __init__(self, text: str, in_dim: int, out_dim: int, copies: int = 1, where: str = "model.projector") -> None:
        super().__init__()
        self.spec = parse_projector(text, where)
        if in_dim != out_dim and (self.spec.residual or self.spec.num_hidden < 0):
            raise ValueError(
                f"{where}: {text!r} needs as many outputs as inputs, got {in_dim} -> {out_dim}; leave model.dim out"
            )
        widths = [(in_dim if layer == 0 else out_dim) for layer in range(self.spec.num_hidden + 1)]
        bounds = [1 / math.sqrt(width) for width in widths]
        self.copies = copies
        self.weights = torch.nn.ParameterList(
            [torch.empty(copies, width, out_dim).uniform_(-b, b) for width, b in zip(widths, bounds, strict=True)]
        )
        self.biases = torch.nn.ParameterList(
            [torch.empty(copies, 1, out_dim).uniform_(-b, b) for b in bounds] if self.spec.bias else []
        )
        hidden = self.spec.num_hidden if self.spec.batchnorm else 0
        self.norms = torch.nn.ModuleList([torch.nn.BatchNorm1d(copies * out_dim) for _ in range(hidden)])

    def forward(self, rows: Tensor, running: bool = False) -> Tensor:
        """Project rows by every copy.

        Args:
            rows: ``(N, D)``.
            running: Whether batch normalisation uses its running statistics also in training, and leaves them alone:
                for prototypes, whose own statistics mean nothing.

        Returns:
            ``(C, N, E)``.
        """
        out = rows.expand(self.copies, *rows.shape)
        for layer, weight in enumerate(self.weights):
            out = out @ weight
            if self.spec.bias:
                out = out + self.biases[layer]
            if layer == self.spec.num_hidden:
                break
            if self.spec.batchnorm:
                out = self._normalise(out, layer, running)
            out = F.dropout(out, self.spec.dropout, self.training)
            out = F.relu(out) if self.spec.activation == "relu" else out
            out = F.gelu(out) if self.spec.activation == "gelu" else out
        return out + rows if self.spec.residual else out

    def _normalise(self, out: Tensor, layer: int, running: bool) -> Tensor:
        """Batch normalisation of each output of each copy: ``(C, N, E)`` -> the same."""
        norm = self.norms[layer]
        flat = out.transpose(0, 1).flatten(1)  # (N, C * E)
        if running or len(flat) < 2:
            assert isinstance(norm, torch.nn.BatchNorm1d)
            flat = F.batch_norm(flat, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            flat = norm(flat)
        return flat.view(out.shape[1], self.copies, -1).transpose(0, 1)
