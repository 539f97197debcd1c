"""The shared part of PAL: where items and prototypes lie, and how close an item is to a mixture of prototypes.

Axes: B pairs in a batch, N pairs, I distinct responses, M distinct prompts, D feature width, E preference dims, K
prototypes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.method.episodes import content_keys
from plm.methods.pal.heads import head_reward, logit_scale, start_logit_scale
from plm.methods.pal.projectors import Projectors

UserLearner = Literal["Pw", "f(Pw)", "f(P)w", "|f(P)|w"]


class Distinct(NamedTuple):
    """Pairs as rows of their distinct responses: each is projected once, however many pairs it is in."""

    responses: Tensor
    """``(I, D)`` distinct responses (with their prompts, where there are prompts)."""
    chosen: Tensor
    """``(N,)`` rows of ``responses``."""
    rejected: Tensor
    """``(N,)`` rows of ``responses``."""
    prompts: Tensor | None
    """``(M, D)`` distinct prompts, or None."""
    prompt: Tensor | None
    """``(I,)`` rows of ``prompts``."""


class InnerProducts(NamedTuple):
    """All that rewards need where the ideal point is a mixture of prototype points u_k."""

    chosen: Tensor
    """``(N, K)`` <e, u_k> of the chosen responses."""
    rejected: Tensor
    """``(N, K)`` the same of the others."""
    chosen_square: Tensor
    """``(N,)`` |e|^2."""
    rejected_square: Tensor
    """``(N,)``."""
    gram: Tensor
    """``(K, K)``, or ``(N, K, K)`` where prototypes depend on the prompt: <u_k, u_l>."""
    base: Tensor
    """``(N,)`` the part of the margin that is the same for everybody."""


class Points(NamedTuple):
    """The projected responses themselves, where the ideal point is a nonlinear function of the mixture."""

    chosen: Tensor
    """``(N, E)``."""
    rejected: Tensor
    """``(N, E)``."""
    base: Tensor
    """``(N,)``."""


Cache = InnerProducts | Points


def as_double(cache: Cache) -> Cache:
    """Convert to float64, for the solvers."""
    return type(cache)(*(value.double() for value in cache))


def cache_of(cache: Cache, rows: Tensor) -> Cache:
    """What margins need of the pairs at ``rows`` ``(n,)``."""
    return cache._replace(
        **{name: value[rows] for name, value in cache._asdict().items() if name != "gram" or value.dim() == 3}
    )


def cells_of_pair(cache: Cache) -> int:
    """Numbers that a cache holds of one pair, at least one."""
    return max(1, sum(value[:1].numel() for value in cache))


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows and where each row went: ``(N, D)`` -> ``(I, D)``, ``(N,)``, with ``distinct[index] == rows``.

    Rows are told apart by their `content_keys`; the result is exact, because all rows are kept apart if two share a key
    without being equal.
    """
    keys, index = torch.unique(content_keys(rows), return_inverse=True)
    first = torch.empty_like(keys, dtype=torch.long)
    first[index] = torch.arange(len(rows), device=rows.device)
    distinct = rows[first]
    if len(distinct) < len(rows) and torch.equal(distinct[index], rows):
        return distinct, index
    return rows, torch.arange(len(rows), device=rows.device)


def distinct_pairs(chosen: Tensor, rejected: Tensor, prompt: Tensor | None) -> Distinct:
    """Index pairs ``(N, D)`` by their distinct responses, and those by their distinct prompts."""
    num_pairs = len(chosen)
    both = torch.cat([chosen, rejected])  # (2N, D)
    if prompt is None:
        responses, index = distinct_rows(both)
        return Distinct(responses, index[:num_pairs], index[num_pairs:], None, None)
    width = chosen.shape[1]
    rows, index = distinct_rows(torch.cat([both, prompt.repeat(2, 1)], 1))
    prompts, row = distinct_rows(rows[:, width:])
    return Distinct(rows[:, :width], index[:num_pairs], index[num_pairs:], prompts, row)


class Geometry(torch.nn.Module):
    """Projectors, prototypes and the head: rewards as functions of features and weights.

    Features come in units of their own scale. See `plm.methods.pal.PAL` for the choices.

    Args:
        feature_dim: Width D of the features.
        num_prototypes: Number of prototypes K.
        variant: A or B.
        user_learner: How weights and prototypes make the ideal point.
        head: Reward of an item for an ideal point.
        projector: Map f of the features.
        user_projector: Map of the prompt for each prototype, for variant B.
        dim: Width E; None = D.
        unit: What the differences of the prototypes from their mean are multiplied by.
    """

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int,
        variant: str,
        user_learner: str,
        head: str,
        projector: str,
        user_projector: str | None,
        dim: int | None,
        unit: float,
    ) -> None:
        super().__init__()
        self.num_prototypes, self.user_learner, self.head, self.unit = num_prototypes, user_learner, head, unit
        width = feature_dim if dim is None else dim
        self.projector = Projectors(projector, feature_dim, width)
        self.user_projectors: Projectors | None = None
        self.prototypes: torch.nn.Parameter | None = None
        if variant == "B":
            where = "model.user_projector"
            self.user_projectors = Projectors(user_projector or projector, feature_dim, width, num_prototypes, where)
        else:
            start = torch.randn(num_prototypes, width if user_learner == "Pw" else feature_dim)
            self.prototypes = torch.nn.Parameter(F.normalize(start, dim=-1))
        self.logit_scale = torch.nn.Parameter(start_logit_scale(), head in ("angle", "dist_logistic"))

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Parameters by the name of their group."""
        return {
            "projector": list(self.projector.parameters()),
            "user_projectors": [] if self.user_projectors is None else list(self.user_projectors.parameters()),
            "prototypes": [] if self.prototypes is None else [self.prototypes],
            "logit_scale": [self.logit_scale],
        }

    @property
    def is_mixture(self) -> bool:
        """Whether ideal points are mixtures of points: weights sum to one, so an affine f commutes with mixing."""
        return self.user_learner != "f(Pw)" or self.projector.spec.is_affine

    def items(self, responses: Tensor) -> Tensor:
        """Responses as points of the preference space: ``(I, D)`` -> ``(I, E)``."""
        return _project(self.projector, responses)[0]

    def raw_points(self) -> Tensor:
        """``(K, D or E)`` prototypes before the projection (variant A)."""
        assert self.prototypes is not None
        mean = self.prototypes.mean(0)
        return mean + self.unit * (self.prototypes - mean)

    def prototype_squares(self) -> tuple[Tensor | float, Tensor | float]:
        """Squared length of twice the mean prototype, and summed over the deviations from it; zeros for variant B."""
        if self.prototypes is None:
            return 0.0, 0.0
        mean = self.prototypes.mean(0)
        return (2 * mean).square().sum(), (self.prototypes - mean).square().sum()

    def points(self) -> Tensor:
        """``(K, E)`` prototypes as points of the preference space (variant A)."""
        points = self.raw_points()
        if self.user_learner != "Pw":
            points = _project(self.projector, points, running=True)[0]
        return F.normalize(points, dim=-1) if self.user_learner == "|f(P)|w" else points

    def points_at(self, prompts: Tensor) -> Tensor:
        """Prototypes at each prompt (variant B): ``(M, D)`` -> ``(M, K, E)``."""
        assert self.user_projectors is not None
        points = _project(self.user_projectors, prompts).transpose(0, 1)
        return F.normalize(points, dim=-1) if self.user_learner == "|f(P)|w" else points

    def mixed_points(self, weights: Tensor) -> Tensor:
        """Ideal points ``(N, E)`` of weights ``(N, K)`` that are mixed before the projection."""
        return _project(self.projector, weights @ self.raw_points().to(weights), running=True)[0]

    def cache(self, pairs: Distinct, base: Tensor) -> Cache:
        """Project every distinct response and prompt once; what is left of a pair are a few numbers.

        Args:
            pairs: The pairs, in units of the features' own scale.
            base: ``(I,)`` rewards that are the same for everybody.
        """
        items = self.items(pairs.responses)  # (I, E)
        shared = base[pairs.chosen] - base[pairs.rejected]
        if not self.is_mixture:
            return Points(items[pairs.chosen], items[pairs.rejected], shared)
        if pairs.prompts is None:
            points = self.points()
            inner, gram = items @ points.T, points @ points.T
        else:
            assert pairs.prompt is not None
            at = self.points_at(pairs.prompts)
            gram = at @ at.mT  # (M, K, K)
            if len(at) == 1:
                inner, gram = items @ at[0].T, gram[0]
            else:
                inner = torch.einsum("ie,ike->ik", items, at[pairs.prompt])
                gram = gram[pairs.prompt[pairs.chosen]]
        square = items.square().sum(-1)
        return InnerProducts(
            inner[pairs.chosen], inner[pairs.rejected], square[pairs.chosen], square[pairs.rejected], gram, shared
        )

    def rewards(self, cache: Cache, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Closeness of both responses to the ideal points of weights ``(N, K)``: ``(N,)`` each."""
        if isinstance(cache, Points):
            points = self.mixed_points(weights)
            chosen, rejected = (cache.chosen * points).sum(-1), (cache.rejected * points).sum(-1)
            squares = cache.chosen.square().sum(-1), cache.rejected.square().sum(-1)
        else:
            chosen, rejected = (cache.chosen * weights).sum(-1), (cache.rejected * weights).sum(-1)
            squares = cache.chosen_square, cache.rejected_square
        length, size = self.lengths(cache, weights)
        scale = logit_scale(self.logit_scale)
        return (
            head_reward(self.head, chosen, squares[0], length, size, scale),
            head_reward(self.head, rejected, squares[1], length, size, scale),
        )

    def margins(self, cache: Cache, weights: Tensor) -> Tensor:
        """Reward of chosen minus that of rejected, for the weights of each pair's user: ``(N, K)`` -> ``(N,)``."""
        chosen, rejected = self.rewards(cache, weights)
        return cache.base + chosen - rejected

    def lengths(self, cache: Cache, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Squared length ``(N,)`` of the ideal points of weights ``(N, K)``, and the mean one of the prototypes."""
        if isinstance(cache, Points):
            square = self.mixed_points(weights).square().sum(-1)
            return square, square
        if cache.gram.dim() == 2:
            square = ((weights @ cache.gram) * weights).sum(-1)
        else:
            square = torch.einsum("nj,njk,nk->n", weights, cache.gram, weights)
        return square.clamp_min(0), cache.gram.diagonal(dim1=-2, dim2=-1).mean(-1)


def _project(net: Projectors, rows: Tensor, running: bool = False) -> Tensor:
    """``(N, D)`` -> ``(C, N, E)`` in the precision of ``rows``, whatever that of the weights."""
    if all(value.dtype == rows.dtype for value in net.parameters()):
        out: Tensor = net(rows, running)
        return out
    state = {
        name: value.to(rows.dtype) if value.is_floating_point() else value
        for name, value in [*net.named_parameters(), *net.named_buffers()]
    }
    out = torch.func.functional_call(net, state, (rows, running))
    return out
