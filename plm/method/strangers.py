"""How users are served whom training does not see, chosen on seen users left out of fits of the shared weights.

Axes: C candidate scales, U users, B pairs in a batch, S pairs of one user (padded), D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.functional import Posterior, bt_losses, held_out_losses, per_user_sum, user_chunks
from plm.method.passes import kept
from plm.types import Context, PreferenceBatch, UserState

NO_SPREAD = 1e-3
"""The spread that stands for none: who is served with it is the population, to the bit."""
NUM_FOLDS = 3
NUM_STEPS = 60
"""Adam steps without a fold, at the learning rates of the method, which fall linearly to zero."""
MAX_USERS = 1_000
"""Users of one process who take part: enough to choose one number by."""
MIN_USERS = 24
"""With fewer no fold says anything about strangers, and the choice is that for seen users."""
SHOTS = (1, 2, 4, 8, 16)
"""Numbers of pairs from which a stranger may be served a state of their own."""
UNREACHED = 2**62
"""A number of pairs that nobody has: everybody is served the population."""


def meet_strangers(
    method: Any,
    scale: Tensor,
    candidates: Sequence[float],
    on_fit: Callable[[Iterable[PreferenceBatch]], None] = lambda batches: None,
) -> None:
    """Set ``stranger_scale`` and ``least_pairs`` of a method as `choose_for_strangers` says; it takes its arguments."""
    choice = choose_for_strangers(method, scale, candidates, on_fit) or StrangerChoice(-1.0, 0)
    method.stranger_scale.fill_(choice.scale)
    method.least_pairs.fill_(choice.least_pairs)


def with_evidence(states: UserState, least_pairs: Tensor, population_state: Callable[[int], UserState]) -> UserState:
    """The states, but those of users with fewer than ``least_pairs`` pairs are the population's."""
    few = states.num_pairs < least_pairs
    if not few.any():
        return states
    prior = population_state(states.num_users).detach().tensors
    tensors = {}
    for name, value in states.tensors.items():
        tensors[name] = value.clone()
        tensors[name][few] = prior[name][few].to(value)
    return UserState(tensors, states.num_pairs)


def chance_of_difference(
    posterior: Posterior, own: Tensor, population: Tensor, target: Tensor, weight: Tensor, user: Tensor
) -> Tensor:
    """Probability that a user differs from the population at all, where both are held to be equally likely at first.

    The spread that a population of seen users has need not be that of strangers: each has to show a difference. Of a
    stranger's deviation there are two models: it is zero, or it is standard normal, in units of the spread. With the
    mode v of the second, its precision H there and ``gain``, the log-likelihood of the user's pairs at v less that at
    zero, the second is by Laplace's approximation

        exp(gain - |v|^2 / 2 - log det(H) / 2)

    times as likely as the first (Kass & Raftery 1995, section 4.1). The mean of the deviation under both together is
    the chance of the second times v (spike and slab: Mitchell & Beauchamp 1988). Without pairs the chance is one half.

    Args:
        posterior: Of the deviations of U users, in units of the prior.
        own: ``(N,)`` margins of their pairs at the mode.
        population: ``(N,)`` margins at zero.
        target: ``(N,)`` probability that chosen wins.
        weight: ``(N,)``.
        user: ``(N,)`` int64.

    Returns:
        ``(U,)``, in the dtype of the mode.

    >>> one, user = torch.ones(1), torch.tensor([0])
    >>> chance_of_difference(Posterior(0 * one[None], one[None, None]), one, one, one, one, user).item()
    0.5
    """
    gains = weight * (bt_losses(population, target) - bt_losses(own, target))
    mean, log_det = posterior.mean.double(), torch.linalg.slogdet(posterior.precision.double())[1]
    odds = per_user_sum(gains.double(), user, len(mean)) - (mean.square().sum(-1) + log_det) / 2
    return torch.sigmoid(odds).to(posterior.mean)


class StrangerChoice(NamedTuple):
    """How users whom the shared weights do not know are served."""

    scale: float
    """The candidate with the lowest loss of strangers' held-out pairs, or the first, which is the population."""
    least_pairs: int
    """Users with fewer pairs are served the population, which does better than a state of their own by more than the
    error of the difference: `UNREACHED` where no scale has a held-out gain."""


def least_harmful(losses: Tensor) -> int:
    """Index of the best candidate ``(C, U)``, or 0 where its gain is no larger than its own error.

    Candidate 0 is the population; losses are summed over the held-out pairs of each user. The gain over it must exceed
    one standard error over users: what a single user's luck makes of it is no reason to treat users differently
    (Breiman et al. 1984, section 3.4.3).

    >>> least_harmful(torch.tensor([[1.0, 1.0, 1.0], [0.4, 0.5, 0.6]])), least_harmful(torch.tensor([[1.0], [0.4]]))
    (1, 0)
    >>> least_harmful(torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.1, 1.2]]))  # one user gains and two lose
    0
    """
    best = int(losses.sum(-1).argmin())
    gain = losses[0] - losses[best]
    error = gain.std() * len(gain) ** 0.5 if len(gain) > 1 else gain.new_tensor(torch.inf)
    return best if gain.sum() > error else 0


def least_harmful_scale(scales: Sequence[float], losses: Tensor) -> float:
    """The `least_harmful` of scales by the losses ``(C, U)`` of users' held-out pairs; 1 where nobody has any."""
    judged = losses[:, losses[0] > 0]
    return scales[least_harmful(judged)] if judged.shape[1] else 1.0


def choose_for_strangers(
    method: Any, scale: Tensor, candidates: Sequence[float], on_fit: Callable[[Iterable[PreferenceBatch]], None]
) -> StrangerChoice | None:
    """Cross-fit the spread of users over folds of the seen users.

    For each fold the shared weights are fitted to the pairs of everybody else, from where they are now; each user of
    the fold is then adapted on their own training pairs under every candidate, and judged by their validation pairs.
    Folds go by the content of pairs, so that neither names nor the order of users matter. The method is left as it was.
    The pairs of those who take part are held on the device meanwhile, and of everybody else a batch or two. Of several
    processes only the users take part whose training and validation pairs lie on the same one; where these are fewer
    than `MIN_USERS`, nothing is chosen.

    Args:
        method: The method, before its first step.
        scale: ``()`` the buffer of the method that holds the candidate.
        candidates: Scales, ascending; with the first everybody is the population.
        on_fit: Called with the training batches of a fit at its end, to bring up to date what is solved.

    Returns:
        The choice; None where fewer than `MIN_USERS` users have training and validation pairs.
    """
    fold, count = _folds(method)
    takes_part = fold >= 0
    if int(method.sum_over_processes(takes_part.sum())) < MIN_USERS:
        return None
    held = [_of(passes(), takes_part) for passes in (method.train_pass, method.val_pass)] if takes_part.any() else []
    before, was_training = _copy(method), method.training
    fits = []
    try:
        for number in range(NUM_FOLDS):
            method.train()
            _fit(method, fold != number, count, on_fit)
            fits.append(_copy(method))
            method.load_state_dict(before)
        method.eval()

        def losses(scales: Sequence[float], shots: int = UNREACHED) -> Tensor:
            """Summed loss of the held-out pairs of every user, ``(C, U)``, after at most so many pairs of their own."""
            found = torch.zeros(len(scales), method.num_users, dtype=torch.float64, device=method.device)
            for number, state in enumerate(fits):
                method.load_state_dict(state)
                everybody = (fold == number).nonzero()[:, 0]
                if not len(everybody):
                    continue
                pairs, held_out = (pairs.take(fold[pairs.user_index] == number) for pairs in held)
                row_of = torch.searchsorted(everybody, pairs.user_index)
                for chunk in user_chunks(row_of, len(everybody), 2 * method.feature_dim):
                    users = everybody[chunk.users]
                    support = _context(pairs.take(chunk.rows), users, shots)
                    judged = held_out.take(torch.isin(held_out.user_index, users))
                    for row, value in enumerate(scales):
                        scale.fill_(value)
                        found[row] += _losses(method, method._adapt(support), judged, users)
            total: Tensor = method.sum_over_processes(found)
            return total[:, total[0] > 0]

        with torch.no_grad():
            of_all = losses(candidates)
            best = least_harmful(of_all)
            if best == 0:
                return StrangerChoice(candidates[0], UNREACHED)
            few = {shots: losses([candidates[best]], shots)[0] for shots in SHOTS}
            harmful = [shots for shots, of_few in few.items() if least_harmful(torch.stack([of_few, of_all[0]]))]
            return StrangerChoice(candidates[best], max(harmful, default=-1) + 1)
    finally:
        method.load_state_dict(before)
        method.train(was_training)


def _copy(method: Any) -> dict[str, Tensor]:
    """The weights and buffers as they are now."""
    return {name: value.clone() for name, value in method.state_dict().items()}


def _folds(method: Any) -> tuple[Tensor, Tensor]:
    """``(U,)`` fold of every user, -1 for those who do not take part, and ``(U,)`` numbers of training pairs.

    Users go into the folds in turn, in the order of the summed squares of their differences.
    """
    key, has_val = torch.zeros(2, method.num_users, dtype=torch.float64, device=method.device)
    count = torch.zeros_like(key, dtype=torch.long)
    for batch in method.train_pass():
        key += per_user_sum(batch.difference.double().square().sum(-1), batch.user_index, len(key))
        count += torch.bincount(batch.user_index, minlength=len(key))
    for batch in method.val_pass():
        has_val[batch.user_index] = 1.0
    users = ((key > 0) & (has_val > 0)).nonzero()[:, 0]
    users = users[torch.argsort(key[users], stable=True)]
    users = users[:: -(-len(users) // MAX_USERS) or 1]
    fold = torch.full_like(key, -1, dtype=torch.long)
    fold[users] = torch.arange(len(users), device=fold.device) % NUM_FOLDS
    return fold, count


def _fit(method: Any, part: Tensor, count: Tensor, on_fit: Callable[[Iterable[PreferenceBatch]], None]) -> None:
    """Train the shared weights for `NUM_STEPS` steps of Adam on the pairs that all processes have of some users.

    Args:
        method: The method.
        part: ``(U,)`` bool, True = the user takes part.
        count: ``(U,)`` numbers of training pairs.
        on_fit: See `choose_for_strangers`.
    """
    optimizer = torch.optim.Adam(method.param_groups())
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [value for group in optimizer.param_groups for value in group["params"]]

    def pairs() -> Iterator[PreferenceBatch]:
        """The batches of one pass, without those that are empty."""
        batches = (batch.take(part[batch.user_index]) for batch in method.train_pass())
        return (batch for batch in batches if batch.num_pairs)

    def total(num_pairs: int) -> Tensor:
        """Pairs of all processes."""
        found: Tensor = method.sum_over_processes(parameters[0].new_tensor(float(num_pairs)))
        return found

    passes = kept(pairs)
    num_train_pairs = method.num_train_pairs
    method.num_train_pairs = int(method.sum_over_processes(count[part].sum()))
    steps = chain.from_iterable(passes() for _ in range(NUM_STEPS))  # as many passes as it takes
    for step in range(NUM_STEPS):
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        batch = next(steps, None)
        share = (batch.num_pairs if batch else 0) / total(batch.num_pairs if batch else 0)
        if batch:
            # not backward(): what DistributedDataParallel has hung on it belongs to the steps of the trainer
            gradients = torch.autograd.grad(method.loss(batch)["loss"] * share, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = method.sum_over_processes(torch.zeros_like(parameter) if gradient is None else gradient)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / NUM_STEPS)
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        on_fit(passes())
    method.num_train_pairs = num_train_pairs


def _of(batches: Iterable[PreferenceBatch], part: Tensor) -> PreferenceBatch:
    """All pairs of the users ``part`` ``(U,)``, as one batch in the order of the users."""
    parts = [batch.take(part[batch.user_index]) for batch in batches]
    names = ["chosen", "rejected", "user_index", "weight", "tie"]
    names += ["prompt"] if isinstance(parts[0].prompt, Tensor) else []
    fields: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in parts]) for name in names}
    return PreferenceBatch(**fields).take(torch.argsort(fields["user_index"], stable=True))


def _context(batch: PreferenceBatch, users: Tensor, shots: int) -> Context:
    """The first pairs of every user, at most ``shots``, padded."""
    row = torch.searchsorted(users, batch.user_index)
    count = torch.bincount(row, minlength=len(users))
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    is_shot = place < shots
    width = int(count.clamp_max(shots).max())

    def padded(values: Tensor) -> Tensor:
        out = values.new_zeros(len(users), width, *values.shape[1:])
        out[row[is_shot], place[is_shot]] = values[is_shot]
        return out

    chosen, rejected = batch.features
    prompt = None if not isinstance(batch.prompt, Tensor) else padded(batch.prompt)
    mask = padded(torch.ones_like(batch.tie))
    return Context(padded(chosen), padded(rejected), mask, padded(batch.weight), prompt, padded(batch.tie))


def _losses(method: Any, states: UserState, held: PreferenceBatch, users: Tensor) -> Tensor:
    """Summed loss of the held-out pairs of every user: ``(U,)``."""
    margin = method._margin(held, states.take(torch.searchsorted(users, held.user_index)))
    return held_out_losses(margin, held, method.num_users)
