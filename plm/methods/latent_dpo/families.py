"""Families of latent policies: P numbers of a user -> p(z|x), for many users at once.

The numbers of a user are one flat row, so that every family is a table ``(U, P)`` to optimizers, user states and
stores. A family is initialised at the prior: what makes the outputs starts at zero.

Axes: U users, B prompts of each, F width of prompt features, H hidden width, O outputs of one user, P numbers of one
user, Z latent width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from plm.functional import LOG_VAR_BOUNDS
from plm.methods.latent_dpo.maths import Gaussian
from plm.methods.latent_dpo.noise import normals
from plm.types import Tokens

FamilyName = Literal["vector", "linear", "mlp", "full"]
Variance = Literal["free", "unit", "fixed_entropy"]


class Family(ABC):
    """Policies of one shape.

    Args:
        latent_dim: Latent width Z.
        prompt_dim: Width F of the prompt features.
        hidden_dim: Hidden width H of an mlp.
        variance: free = learned and clamped; unit = 1; fixed_entropy = learned up to a factor, so that the entropy is
            that of the prior.
    """

    reads_prompts: ClassVar[bool] = True

    def __init__(self, latent_dim: int, prompt_dim: int, hidden_dim: int, variance: Variance) -> None:
        self.latent_dim, self.prompt_dim, self.hidden_dim = latent_dim, prompt_dim, hidden_dim
        self.variance = variance
        self.out_dim = latent_dim if variance == "unit" else 2 * latent_dim

    @property
    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of a user's tensors, in the order of the row."""

    @abstractmethod
    def outputs(self, tensors: list[Tensor], prompts: Any) -> Tensor:
        """Tensors of U users and their prompts ``(U, B, F)`` -> ``(U, B, O)``, or ``(U, 1, O)`` without prompts.

        The prompts of `Full` are tokens ``(U, B, T)``.
        """

    @property
    def size(self) -> int:
        """Numbers per user, P."""
        return sum(math.prod(shape) for shape in self.shapes)

    def initial(self, seed: int) -> Tensor:
        """Numbers of a user without pairs, ``(P,)``: the policy is N(0, I) at every prompt."""
        return torch.zeros(self.size)

    def inputs(self, prompts: Tensor | Tokens | None) -> Tensor | Tokens | None:
        """What policies are given for prompts, if they read any.

        Features ``(..., F)`` but not tokens are divided by their root mean square, which differs widely between
        encoders.
        """
        return F.rms_norm(prompts, (self.prompt_dim,)) if isinstance(prompts, Tensor) and self.prompt_dim else prompts

    def split(self, table: Tensor) -> list[Tensor]:
        """The tensors of U users, which are views of their rows ``(U, P)``."""
        parts = torch.split(table, [math.prod(shape) for shape in self.shapes], dim=1)
        return [part.view(len(table), *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Rows ``(U, P)`` of what was `split`."""
        return torch.cat([value.flatten(1) for value in tensors], 1)

    def policy(self, tensors: list[Tensor], prompts: Tensor | Tokens | None) -> Gaussian:
        """Policies of U users: `split` rows, `inputs` ``(U, B, F)`` -> ``(U, B, Z)``, or ``(U, 1, Z)`` without."""
        if prompts is None or not self.prompt_dim:
            prompts = tensors[0].new_zeros(len(tensors[0]), 1, 0)
        out = self.outputs(tensors, prompts)
        if self.variance == "unit":
            return Gaussian(out, torch.zeros_like(out))
        mean, log_var = out.chunk(2, -1)
        if self.variance == "fixed_entropy":
            log_var = log_var - log_var.mean(-1, keepdim=True)
        return Gaussian(mean, log_var.clamp(*LOG_VAR_BOUNDS))


class Vector(Family):
    """One policy for all prompts."""

    reads_prompts = False

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The outputs themselves."""
        return [(self.out_dim,)]

    def outputs(self, tensors: list[Tensor], prompts: Any) -> Tensor:
        """``(U, 1, O)``."""
        return tensors[0][:, None]


class Linear(Family):
    """Outputs linear in the prompt."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Weights and bias."""
        return [(self.prompt_dim, self.out_dim), (1, self.out_dim)]

    def outputs(self, tensors: list[Tensor], prompts: Any) -> Tensor:
        """``(U, B, O)``."""
        weight, bias = tensors
        return torch.baddbmm(bias, prompts, weight)


class MLP(Family):
    """One hidden layer with SiLU."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Weights and bias of the two layers."""
        return [
            (self.prompt_dim, self.hidden_dim),
            (1, self.hidden_dim),
            (self.hidden_dim, self.out_dim),
            (1, self.out_dim),
        ]

    def initial(self, seed: int) -> Tensor:
        """Random weights of the first layer, the same for all users, so that users' networks can be averaged."""
        count = self.prompt_dim * self.hidden_dim
        first = normals(torch.tensor(seed), count) / max(self.prompt_dim, 1) ** 0.5
        return torch.cat([first, torch.zeros(self.size - count)])

    def outputs(self, tensors: list[Tensor], prompts: Any) -> Tensor:
        """``(U, B, O)``."""
        weight, bias, last_weight, last_bias = tensors
        return torch.baddbmm(last_bias, F.silu(torch.baddbmm(bias, prompts, weight)), last_weight)


class Full(Family):
    """An encoder for every user, as published: a copy of what makes latents reads the tokens of the prompt.

    A user has as many numbers as the encoder; users are run one after the other.

    Args:
        latent_dim: Latent width Z.
        prompt_dim: See `Family`.
        variance: See `Family`.
        encoder: Tokens ``(B, T)`` -> ``(B, 2Z)``, N(0, I) for all prompts; what is trained of it are the numbers of a
            user.
    """

    def __init__(self, latent_dim: int, prompt_dim: int, variance: Variance, encoder: nn.Module) -> None:
        super().__init__(latent_dim, prompt_dim, 0, variance)
        self.encoder = encoder
        self.trained = {name: value for name, value in encoder.named_parameters() if value.requires_grad}

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the encoder's parameters."""
        return [tuple(value.shape) for value in self.trained.values()]

    def initial(self, seed: int) -> Tensor:
        """The encoder as it is."""
        return torch.cat([value.detach().flatten() for value in self.trained.values()])

    def outputs(self, tensors: list[Tensor], prompts: Any) -> Tensor:
        """``(U, B, O)``."""
        encoder = self.encoder.to(prompts.input_ids.device)
        rows = []
        for row, parts in enumerate(zip(*tensors, strict=True)):
            weights, tokens = dict(zip(self.trained, parts, strict=True)), prompts.map(lambda value: value[row])  # noqa: B023
            rows.append(functional_call(encoder, weights, (tokens,)))
        return torch.stack(rows)[..., : self.out_dim]


FAMILIES: dict[FamilyName, type[Family]] = {"vector": Vector, "linear": Linear, "mlp": MLP}
"""Families that need only sizes to construct."""
