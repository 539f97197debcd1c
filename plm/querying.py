"""Which pair to ask a user about next: the pair whose answer reveals most, by samples of the posterior.

Works with every method whose user state holds a normal posterior: ``mean`` and ``log_var`` (diagonal), ``weights`` and
``precision`` (full), or ``weights`` on the simplex and ``log_precision``, the precision of their logarithms.

Axes: N candidate pairs, U users, M posterior samples, D feature width, K weights, C sequences of answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.data.encoding import TextReader
from plm.data.files import read_rows
from plm.data.values import Response, parsed, short, to_prompt, to_response
from plm.messages import missing_key
from plm.method import PersonalizationMethod
from plm.types import POSTERIORS, Tokens, UserState, take_rows

MAX_SEQUENCES = 1024
"""Most sequences of answers that are distinguished while several pairs are chosen at once; beyond, a sample of them."""

MAX_FLOATS = 2**24
"""Feature values scored at once (64 MiB)."""


POOL_ROW = '{"prompt": ..., "responses": [..., ...]}'
"""A row of a pool, for messages."""


class PoolPair(NamedTuple):
    """A pair that nobody has judged yet."""

    prompt: str
    left: str
    right: str
    record: dict[str, Any]
    """The row as it was read."""


class Query(NamedTuple):
    """A pair worth asking about."""

    row: int
    """Its row among the candidates."""
    information: float
    """What its answer is expected to reveal beyond the pairs chosen before it, in nats, at most log 2."""
    chance: float
    """Probability that the user prefers the left response."""


def posterior_samples(users: UserState, num_samples: int, seed: int = 0) -> UserState:
    """Draws from the posteriors of U users, as states with M rows per user, user by user.

    Args:
        users: States with ``mean`` and ``log_var`` ``(U, Z)``, or with ``weights`` ``(U, K)`` and ``precision`` or
            ``log_precision`` ``(U, K, K)``; the draws stand where the mean or the weights were. That a user may also be
            exactly as the population is, as LoRe and PAL hold of new users, is in the mean alone.
        num_samples: Number M of draws per user.
        seed: Seed; the same for every user, so that a draw does not depend on who else is asked.

    Returns:
        States with leading axis ``U * M``.

    Raises:
        ValueError: If the states hold no normal posterior, or an improper one.
    """
    tensors = users.tensors
    names = next((pair for pair in POSTERIORS if set(pair) <= tensors.keys()), None)
    if names is None:
        forms = ", ".join(" and ".join(pair) for pair in POSTERIORS)
        raise ValueError(
            f"choosing pairs needs users with an uncertainty, one of {forms}, got {sorted(tensors) or 'nothing'}; use "
            "a method with a posterior, such as LoRe, PAL or VPL"
        )
    centre, spread = (tensors[name].double() for name in names)
    if not (centre.isfinite().all() and spread.isfinite().all()):
        raise ValueError("choosing pairs needs a finite posterior, got nan or inf; adapt the user anew")
    noise = torch.randn(num_samples, centre.shape[-1], generator=torch.Generator().manual_seed(seed)).to(centre)
    if names[1] == "log_var":
        draws = centre[:, None] + (0.5 * spread).exp()[:, None] * noise
    else:
        factor, failed = torch.linalg.cholesky_ex(spread)
        if failed.any():
            raise ValueError(
                "choosing pairs needs a proper posterior, got a precision that is not positive definite: of "
                "PublishedLoRe, set model.prior_precision above 0"
            )
        # precision = L L', so L'^-1 noise has its inverse as covariance
        wide = noise.mT.expand(len(centre), -1, -1)
        shift = torch.linalg.solve_triangular(factor.mT, wide, upper=True).mT
        if names[1] == "precision":
            draws = centre[:, None] + shift
        else:
            tiny = torch.finfo(tensors[names[0]].dtype).tiny
            draws = torch.softmax(centre.clamp_min(tiny).log()[:, None] + shift, -1)
    repeated = users.take(torch.arange(users.num_users, device=centre.device).repeat_interleave(num_samples))
    return repeated._replace(tensors={**repeated.tensors, names[0]: draws.flatten(0, 1).to(tensors[names[0]])})


def sampled_chances(
    method: PersonalizationMethod,
    left: Tensor,
    right: Tensor,
    samples: UserState,
    prompt_features: Tensor | Tokens | None = None,
) -> Tensor:
    """Probability that each sample of a user prefers left: ``(N, D)``, ``(N, D)``, M rows -> ``(M, N)``.

    ``prompt_features`` ``(N, D)``, or tokens ``(N, T)``, are for a method that reads prompts.

    Raises:
        ValueError: If rewards are not finite.
    """
    num_samples, num_pairs = samples.num_users, len(left)
    block = max(1, MAX_FLOATS // max(left.numel(), 1))
    chances = []
    with torch.no_grad():
        for start in range(0, num_samples, block):
            rows = torch.arange(start, min(start + block, num_samples), device=left.device)
            states = samples.take(rows.repeat_interleave(num_pairs))
            pair = torch.arange(num_pairs, device=left.device).repeat(len(rows))
            prompts = take_rows(prompt_features, pair)
            rewards = [method.score(side[pair], states, prompt_features=prompts) for side in (left, right)]
            chances.append(torch.sigmoid(rewards[0] - rewards[1]).view(-1, num_pairs))
    both = torch.cat(chances)
    if both.isnan().any():
        raise ValueError(
            f"expected finite rewards from {type(method).__name__}, got nan; its training diverged: fit again with a "
            "lower model.lr"
        )
    return both


def entropy(chance: Tensor) -> Tensor:
    """Entropy of a yes or no with this probability of yes, in nats.

    >>> entropy(torch.tensor([0.0, 0.5])).tolist()
    [0.0, 0.6931471824645996]
    """
    both: Tensor = torch.special.entr(chance) + torch.special.entr(1 - chance)
    return both


def choose_pairs(chances: Tensor, num_pairs: int, seed: int = 0) -> list[Query]:
    """Greedy choice of the pairs whose answers together reveal most about the user (BatchBALD, Kirsch et al. 2019).

    The gain of pair q after the chosen pairs, whose answers ``y`` are not known yet, is

        I(q) = E_y[ H( E[p_q | y] ) ] - E[ H(p_q) ],      E over posterior samples, reweighted by ``p(y | sample)``:

    BALD (Houlsby et al. 2011) averaged over what the user may have answered before. It never asks for the same thing
    twice, and the encoder is not run again. All answers are enumerated until `MAX_SEQUENCES`, then drawn.

    Args:
        chances: ``(M, N)`` see `sampled_chances`.
        num_pairs: How many; at most N are returned.
        seed: Seed of the drawn answers.

    Returns:
        Queries in the order in which to ask.
    """
    chances = chances.double()
    certain = entropy(chances).mean(0)  # what is left to guess when the user is known
    likelihood = chances.new_ones(1, len(chances))  # (C, M) of the answers so far, up to a factor per row
    share = chances.new_ones(1)  # (C,) probability of the answers
    draw = torch.Generator().manual_seed(seed)
    taken: list[Query] = []
    free = torch.ones(chances.shape[1], dtype=torch.bool, device=chances.device)
    for _ in range(min(num_pairs, chances.shape[1])):
        posterior = likelihood / likelihood.sum(-1, keepdim=True)
        gain = torch.cat([share @ entropy(posterior @ part) for part in torch.split(chances, 4096, dim=1)]) - certain
        best = int(gain.masked_fill(~free, -math.inf).argmax())
        free[best] = False
        taken.append(Query(best, max(float(gain[best]), 0.0), float(chances[:, best].mean())))
        chance = chances[:, best]
        answers = posterior @ chance  # (C,) probability of left after the answers so far
        if 2 * len(share) <= MAX_SEQUENCES:
            share = torch.cat([share * answers, share * (1 - answers)])
            likelihood = torch.cat([posterior * chance, posterior * (1 - chance)])
        else:
            left = torch.rand(len(share), generator=draw, dtype=torch.float64).to(answers) < answers
            likelihood = posterior * torch.where(left[:, None], chance, 1 - chance)
        likelihood, share = likelihood[share > 0], share[share > 0]
    return taken


def read_pool(path: str) -> tuple[list[PoolPair], int]:
    """Read the pairs of a pool, each once, and count the rows they were read from.

    Args:
        path: JSONL, CSV or Parquet rows with two ``responses``, or with ``chosen`` and ``rejected``, and a ``prompt``.

    Raises:
        ValueError: If the file cannot be read or rows are malformed; these are named by their lines.
    """
    rows = read_rows(Path(path), _pool_pair, POOL_ROW)
    distinct: dict[tuple[str, frozenset[str]], PoolPair] = {}
    for row in rows:
        distinct.setdefault((row.prompt, frozenset((row.left, row.right))), row)
    return list(distinct.values()), len(rows)


class EncodedPool(NamedTuple):
    """A pool as a method reads it."""

    left: Tensor
    """``(N, D)``"""
    right: Tensor
    """``(N, D)``"""
    prompts: Tensor | Tokens | None
    """``(N, D)`` or tokens, for a method that reads prompts."""


def encode_pool(
    method: PersonalizationMethod, pool: Sequence[PoolPair], reader: TextReader | None = None
) -> EncodedPool:
    """Features of N pairs.

    Args:
        method: A method of ``load_method``.
        pool: The pairs.
        reader: Reads them; default: the encoder of the method.

    Raises:
        ValueError: If the method reads tokens.
    """
    read, prompts = reader or method.text_encoder, [pair.prompt for pair in pool]
    features = read(prompts * 2, [pair.left for pair in pool] + [pair.right for pair in pool])
    if not isinstance(features, Tensor):
        raise ValueError(f"choosing pairs needs a method that reads features, got {type(method).__name__}")
    return EncodedPool(features[: len(pool)], features[len(pool) :], read.prompts(prompts))


def choose_queries(
    method: PersonalizationMethod,
    user: UserState,
    pool: list[PoolPair],
    num_pairs: int,
    *,
    num_draws: int = 256,
    seed: int = 0,
) -> list[Query]:
    """Choose the pairs of a pool whose answers tell most about a user.

    Args:
        method: A method of ``load_method`` that reads features.
        user: The state of one user.
        pool: Candidates.
        num_pairs: Pairs to choose.
        num_draws: Draws from the posterior of the user.
        seed: Seed of the draws.

    Raises:
        ValueError: If the method reads tokens, or the user's state holds no posterior.
    """
    samples = posterior_samples(user, num_draws, seed)
    left, right, prompts = encode_pool(method, pool)
    return choose_pairs(sampled_chances(method, left, right, samples, prompts), num_pairs, seed)


def _pool_pair(record: dict[str, Any]) -> PoolPair:
    """Check one row."""
    sides = record.get("responses", [record[name] for name in ("chosen", "rejected") if name in record] or None)
    if sides is None:
        raise ValueError(missing_key("responses", record))
    if not isinstance(sides, list) or len(sides) != 2:
        raise ValueError(f"responses: expected a list of two, got {short(sides)}")
    left, right = parsed("responses", sides, _two_responses)
    prompt = record.get("prompt")
    text = (left.history or "") if prompt is None else parsed("prompt", prompt, to_prompt)
    return PoolPair(text, left.text, right.text, record)


def _two_responses(sides: list[Any]) -> tuple[Response, Response]:
    """Both responses of a pair."""
    left, right = (to_response(side) for side in sides)
    if left.text == right.text:
        raise ValueError("expected two different texts")
    return left, right
