"""How PAL serves users: the weights of seen users are solved, and the spread of both kinds of users is chosen.

Axes: N pairs, U users, K prototypes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.functional import MAX_CELLS, bt_losses, per_user_sum, targets, unit_mean_per_user
from plm.method import PersonalizationMethod
from plm.method.strangers import NO_SPREAD, least_harmful, meet_strangers
from plm.methods.pal.geometry import Cache, Distinct, Geometry, as_double, cache_of, cells_of_pair, distinct_pairs
from plm.methods.pal.users import MAX_STEPS, Prior, Solvable, solve_around, solve_table, table_prior
from plm.types import PreferenceBatch, Tokens

PRIOR_SCALES = (NO_SPREAD, 0.1, 0.25, 0.5, 0.75, 1.0, 1.4)
"""Candidates for the spread of users around the population, in units of the spread that training learned."""


class SolvedUsers(PersonalizationMethod):
    """A method whose users are logits over prototypes, solved from their pairs or trained as a table."""

    kept_as: str
    partition: bool
    num_prototypes: int
    geometry: Geometry
    logits: Tensor
    precision: Tensor
    num_pairs: Tensor
    prior_centre: Tensor
    prior_scale: Tensor
    _train_pairs: tuple[Tensor, Distinct] | None

    @abstractmethod
    def _weights(self, logits: Tensor) -> Tensor:
        """Logits ``(..., K)`` -> weights on the simplex."""

    @abstractmethod
    def _logit_margins(self, cache: Cache, logits: Tensor) -> Tensor:
        """Margins ``(N,)`` for the logits of each pair's user ``(N, K)``."""

    @abstractmethod
    def _prompts(self, prompt: Tensor | Tokens | None, num_rows: int) -> Tensor | None:
        """Prompts ``(B, D)`` for a method that reads them."""

    @abstractmethod
    def _cache(self, pairs: Distinct) -> Cache:
        """Compute what margins need of pairs."""

    @property
    def _prior(self) -> Prior:
        """The prior of users without pairs."""
        return Prior(self.prior_centre, self.prior_scale)

    def refresh_users(self) -> None:
        """Solve the weights of seen users, or take stock of their table.

        With ``users: posterior`` the spread of users is the one with the lowest validation loss: the training pairs
        overstate it, because prototypes have been fitted to these very users; its centre is where seen users are at
        that spread. With a table, the mean and the spread of its rows become the prior of unseen users.
        """
        self._train_pairs, was_training = None, self.training
        self.eval()  # no dropout
        # validation runs under inference mode, whose tensors can never enter autograd: leave it and clone
        with torch.inference_mode(False), torch.no_grad():
            train = [self._solvable(batch) for batch in self.train_pass()]
            self.num_pairs.copy_(self._count(train))
            if isinstance(self.logits, torch.nn.Parameter):
                logits, prior = self.logits.detach(), table_prior(self.logits.detach(), self.num_pairs, self._prior)
                self.prior_centre.copy_(prior.centre)
                self.prior_scale.copy_(prior.scale)
                self.precision.copy_(self._solve(train, prior, logits, num_steps=0)[1])
            else:
                self._choose_scale(train)
        self.train(was_training)

    def _solvable(self, batch: PreferenceBatch) -> Solvable:
        """Prepare the pairs of a batch for the solver."""
        prompt = self._prompts(batch.prompt, batch.num_pairs)
        cache = self._cache(distinct_pairs(*batch.features, prompt))
        weight = batch.weight.clone()
        return Solvable(cache, targets(batch.tie).to(weight), weight, batch.user_index.clone())

    def _count(self, pairs: list[Solvable]) -> Tensor:
        """Pairs of every user, of all processes: ``(U,)``."""
        rows = torch.cat([self.num_pairs[:0], *(part.row for part in pairs)])
        return self.sum_over_processes(torch.bincount(rows, minlength=self.num_users))

    def _choose_scale(self, train: list[Solvable]) -> None:
        """Solve all seen users under each candidate spread, around its own centre; keep the least harmful.

        Unseen users are adapted with the cross-fitted spread where there is one, around the centre that belongs to it.
        """
        val = [self._solvable(batch) for batch in self.val_pass()]
        scales = PRIOR_SCALES if val else (1.0,)
        candidates = _Candidates()
        priors = []
        logits, prior = torch.zeros_like(self.logits).double(), Prior(self.prior_centre.double(), self.prior_scale)
        for number in scales:
            prior = prior._replace(scale=logits.new_tensor(number))
            logits, precision, prior = self._solve_around(train, prior, logits, self.num_pairs > 0)
            own = prior.centre.expand_as(logits) if number == NO_SPREAD else logits
            priors.append(prior)
            losses = self.sum_over_processes(self._val_losses(val, own))
            candidates.add(losses, (own.to(self.logits), precision.to(self.precision)))
        best, (own, precision) = candidates.choose()
        self.logits.copy_(own)
        self.precision.copy_(precision)
        if self.stranger_scale >= 0:
            best = int((self.stranger_scale - self.stranger_scale.new_tensor(scales)).abs().argmin())
        self.prior_centre.copy_(priors[best].centre)
        self.prior_scale.copy_(priors[best].scale)
        without_pairs = self.num_pairs == 0
        self.logits[without_pairs] = self.prior_centre
        self.precision[without_pairs] = torch.eye(self.num_prototypes, device=self.device) / self.prior_scale.square()

    def _val_losses(self, val: list[Solvable], logits: Tensor) -> Tensor:
        """Summed loss of the validation pairs of every user with logits ``(U, K)``: ``(U,)``."""
        losses = torch.zeros(self.num_users, dtype=torch.float64, device=self.device)
        for pairs in val:
            served = self._served(self._weights(logits), self.num_pairs)[pairs.row]
            margins = self.geometry.margins(as_double(pairs.cache), served.double())
            loss = pairs.weight * bt_losses(margins, pairs.target)
            losses += per_user_sum(loss.double(), pairs.row, self.num_users)
        return losses

    def before_first_step(self) -> None:
        """Cross-fit the spread that unseen users are adapted with."""
        if self.kept_as == "posterior":
            meet_strangers(self, self.prior_scale, PRIOR_SCALES, self._place_centre)

    def _place_centre(self, batches: Iterable[PreferenceBatch]) -> None:
        """Set the prior's centre to where the users of these pairs are at the spread that training learned."""
        train = [self._solvable(batch) for batch in batches]
        has_pairs = self._count(train) > 0
        prior, start = Prior(self.prior_centre.double(), torch.ones_like(self.prior_scale)), self.logits.double()
        self.prior_centre.copy_(self._solve_around(train, prior, start, has_pairs)[2].centre)

    def _solve_around(
        self, train: list[Solvable], prior: Prior, start: Tensor, has_pairs: Tensor
    ) -> tuple[Tensor, Tensor, Prior]:
        """`solve_around` of the pairs of all processes."""
        evidence = partial(self._evidence, train)
        return solve_around(partial(self._solve, train), evidence, prior, start, has_pairs)

    def _evidence(self, train: list[Solvable], prior: Prior, logits: Tensor, precision: Tensor) -> float:
        """Log-evidence of the pairs of all processes, by Laplace's approximation around logits ``(U, K)``.

        That is ``-sum_n weight_n bt(z_n) - |v|^2 / 2 - log det(H) / 2`` of every user, with v and H the deviation from
        the prior's centre and the precision in units of its spread (MacKay 2003, section 28.1), and the logarithm of
        the centre's own density N(0, 1), see `centre_step`, without its constant.
        """
        found = torch.zeros((), dtype=torch.float64, device=self.device)
        for pairs in train:
            weight = unit_mean_per_user(pairs.weight, pairs.row, self.num_users)
            num_rows = MAX_CELLS // cells_of_pair(pairs.cache) + 1
            for rows in torch.split(torch.arange(len(weight), device=self.device), num_rows):
                cache = as_double(cache_of(pairs.cache, rows))
                margins = self._logit_margins(cache, logits.double()[pairs.row[rows]])
                found -= (weight[rows] * bt_losses(margins, pairs.target[rows])).sum()
        if self.global_rank == 0:  # of what all processes have, one counts, so that their sums agree to the bit
            deviation, unit = (logits - prior.centre) / prior.scale, precision.double() * prior.scale.double() ** 2
            found -= deviation.double().square().sum() / 2 + torch.linalg.slogdet(unit)[1].sum() / 2
            found -= prior.centre.double().square().sum() / 2
        return float(self.sum_over_processes(found))

    def _solve(
        self, train: list[Solvable], prior: Prior, start: Tensor, num_steps: int = MAX_STEPS
    ) -> tuple[Tensor, Tensor]:
        """`solve_table` over all processes, each of which adds its own users; the prior for users without pairs."""
        solved = solve_table(self._logit_margins, train, prior, start, num_steps)
        logits, precision, has_pairs = (self.sum_over_processes(value) for value in solved)
        without_pairs = has_pairs[:, None] == 0
        eye = torch.eye(self.num_prototypes, device=self.device) / prior.scale**2
        return torch.where(without_pairs, prior.centre, logits), torch.where(without_pairs[..., None], eye, precision)

    def _served(self, weights: Tensor, num_pairs: Tensor) -> Tensor:
        """Weights ``(U, K)`` that users are served with; with ``partition`` one-hot for users with pairs."""
        if not self.partition:
            return weights
        one_hot = F.one_hot(weights.argmax(-1), self.num_prototypes).to(weights)
        return torch.where(num_pairs[:, None] > 0, one_hot, weights)


class _Candidates:
    """Solutions of all users at one candidate after another, of which those are held that may still be chosen."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._solved: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, losses: Tensor, solution: tuple[Tensor, Tensor]) -> None:
        """Take the next candidate.

        Args:
            losses: ``(U,)`` summed loss of the held-out pairs of every user, of all processes; 0 where there is none.
            solution: What was solved.
        """
        number = len(self._losses)
        self._losses.append(losses)
        lowest = int(self._judged().sum(-1).argmin())
        self._solved[number] = solution
        self._solved = {index: one for index, one in self._solved.items() if index in (0, lowest)}

    def choose(self) -> tuple[int, tuple[Tensor, Tensor]]:
        """The least harmful candidate, the first where nobody has held-out pairs, and its solution."""
        judged = self._judged()
        best = least_harmful(judged) if judged.shape[1] else 0
        return best, self._solved[best]

    def _judged(self) -> Tensor:
        """Losses ``(C, U)`` of the users who have held-out pairs."""
        losses = torch.stack(self._losses)
        return losses[:, losses[0] > 0]
