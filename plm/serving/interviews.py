"""`Interviews`: what a user is asked next, what the answers have told, and how one is taken back.

What the page of the server does, without the page. Every method takes and gives a pydantic model and may be called by
any number of threads.

Axes: N pairs of a pool, M draws from a posterior, R answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from plm.adapting import Foretold, foretold_chances
from plm.data.values import from_prompt, to_prompt, to_response
from plm.querying import PoolPair, choose_pairs, encode_pool, posterior_samples, sampled_chances
from plm.serving import bodies
from plm.serving.service import Places, RequestError, RewardService, store_errors
from plm.types import UserState

log = logging.getLogger("plm.serving")
NUM_DRAWS = 256
"""Draws from a user's posterior."""
MAX_FORETOLD = 64
"""Answers, the last ones, that are predicted from those before them."""
NUM_BELIEFS = 3
"""Pairs that are shown of those on which a user and the population differ."""
USERS_AT_ONCE = 50
"""Users of one page of the list."""
MAX_ASKED = 8
"""Requests for questions and beliefs that are worked on, or wait for the model."""
MAX_POOL = 1024
"""Pairs of the server's own pool."""


class Interviews:
    """Asks users of a service.

    Args:
        service: Whose users.
        pool: Pairs to ask about where a request brings none.

    Raises:
        ValueError: If the pool is larger than can be looked through before every question, or the method has no
            posterior of users, or reads tokens.
    """

    def __init__(self, service: RewardService, pool: Sequence[PoolPair] = ()) -> None:
        if len(pool) > MAX_POOL:
            raise ValueError(f"--pool: expected at most {MAX_POOL} pairs, got {len(pool)}; take a sample of them")
        self.service, self.method, self.pool = service, service.method, list(pool)
        self.places = Places(MAX_ASKED, "too many users are asked at once")
        for number, pair in enumerate(pool, 1):
            try:
                bodies.Candidate.model_validate(_sent(pair))
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise ValueError(f"--pool: pair {number} could not be answered through the server: {problem}") from None
        if pool:
            log.info("reading the texts of %d pairs to ask about", len(pool))
            with self.method.one_thread():
                self._chances(pool, posterior_samples(self.method.population_state(1), 1))

    def users(self, after: int) -> bodies.Users:
        """Users in the order in which they were added, a page at a time."""
        with store_errors():
            page, count = self.method.users.page(after, USERS_AT_ONCE + 1), len(self.method.users)
        shown = list(page)[:USERS_AT_ONCE]
        return bodies.Users(
            num_users=count,
            data=self.service.described([page[number] for number in shown]),
            next_after=shown[-1] if len(page) > USERS_AT_ONCE else None,
        )

    def next_question(self, user_id: str, request: bodies.QuestionRequest) -> bodies.QuestionResponse:
        """The pairs of a pool whose answers tell most about a user, known or not."""
        pool = self._pool(request.pool)
        with store_errors():
            state, known = self.method.known_users.lookup([user_id])
            kept = self.method.users.snapshot(user_id).pairs if request.skip_answered else []
        try:
            answered = {_question(*_read(pair)) for pair in kept}
            with self.places.one(), self.method.one_thread():
                chances = self._chances(pool, posterior_samples(state, NUM_DRAWS, request.seed))
        except ValueError as error:
            raise RequestError("UnprocessableError", str(error)) from error
        rows = [row for row, pair in enumerate(pool) if _question(pair.prompt, pair.left, pair.right) not in answered]
        queries = choose_pairs(chances[:, rows], request.num_pairs, request.seed)
        return bodies.QuestionResponse(
            user_known=bool(known[0]),
            data=[
                bodies.Question(**_shown(rows[query.row], pool), information=query.information, chance=query.chance)
                for query in queries
            ],
            num_open=len(rows),
            expected_accuracy=expected_accuracy(chances),
        )

    def beliefs(self, user_id: str, request: bodies.BeliefsRequest) -> bodies.Beliefs:
        """What the model holds to be true of a user, and how it foretold the answers so far."""
        pool = self._pool(request.pool)
        with store_errors():
            found, kept, _ = self.method.users.snapshot(user_id)
            state, _ = self.method.known_users.lookup([user_id])
        try:
            with self.places.one(), self.method.one_thread():
                chances, usual = (self._chances(pool, one)[0] for one in (state, self.method.population_state(1)))
                foretold = foretold_chances(self.method, kept, MAX_FORETOLD) if kept else None
        except ValueError as error:
            raise RequestError("UnprocessableError", str(error)) from error
        unusual = (chances - usual).abs().argsort(descending=True, stable=True)[:NUM_BELIEFS].tolist()
        return bodies.Beliefs(
            user=None if found is None else self.service.described([found])[0],
            num_kept=len(kept),
            data=[
                bodies.Belief(**_shown(row, pool), chance=float(chances[row]), population_chance=float(usual[row]))
                for row in unusual
                if chances[row] != usual[row]
            ],
            foretold=None if foretold is None else _foretold(foretold),
        )

    def undo(self, user_id: str, request: bodies.UndoRequest) -> bodies.User:
        """Fit a user anew without the last pair; durable when the call returns."""
        with self.service.learning():
            is_undone = self.method.known_users.unlearn(user_id, request.version)
        if not is_undone:
            self.service.user(user_id)  # or 404
            message = f"the user has another version than {request.version} by now: look before you undo"
            raise RequestError("ConflictError", message, "body.version")
        return self.service.user(user_id)

    # ------------------------------------------------------------------ inside
    def _pool(self, sent: Sequence[bodies.Candidate] | None) -> list[PoolPair]:
        """The pairs of a request, or else the server's own."""
        if sent is not None:
            return [PoolPair(bodies.prompt_text(pair.prompt), *pair.both(), {}) for pair in sent]
        if not self.pool:
            message = "expected a pool of pairs: the server has none of its own (plm serve --pool FILE)"
            raise RequestError("BadRequestError", message, "body.pool")
        return self.pool

    def _chances(self, pool: Sequence[PoolPair], states: UserState) -> Tensor:
        """Probability that each of M states prefers the left of each pair: ``(M, N)``; by one thread at a time."""
        left, right, prompts = encode_pool(self.method, pool, self.method.text_encoder.recent)
        return sampled_chances(self.method, left, right, states, prompts).cpu()


def expected_accuracy(chances: Tensor) -> bodies.Share:
    """How many of N questions the model would guess as the user would answer them, by its own uncertainty.

    The guess for pair n is the likelier side under ``p_n``, the mean over draws of the chance ``p_mn`` of the left one.
    If the user is draw m, the share of right guesses is on average

        a_m = mean over n of  p_mn  where the guess is left,  1 - p_mn  where it is right,

    and as the posterior says which draw the user is, its mean over draws, ``mean_n max(p_n, 1 - p_n)``, is the expected
    accuracy, and 95 % of the ``a_m`` are its interval. It is as honest as the posterior is, needs no answers that were
    set aside, and is taken over the whole pool, answered or not: leaving out what was asked, the least certain pairs,
    would raise it without anything being learned.

    Args:
        chances: ``(M, N)`` see `sampled_chances`.
    """
    chances = chances.double()
    of_draw = torch.where(chances.mean(0) >= 0.5, chances, 1 - chances).mean(1)
    low, high = of_draw.quantile(of_draw.new_tensor([0.025, 0.975])).tolist()
    return bodies.Share(share=float(of_draw.mean()), low=low, high=high)


def share_right(num_right: float, count: int) -> bodies.Share:
    """A share with its 95 % interval by Wilson's score.

    It is wide enough also where guesses get better with time: of all sequences of chances with the same mean, the
    variance of the number of hits, a sum of p (1 - p), is largest where all p are equal.
    """
    squared, share = 1.959964**2, num_right / count
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    half = math.sqrt(squared * (share * (1 - share) / count + squared / (4 * count**2))) / (1 + squared / count)
    return bodies.Share(share=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def _foretold(answers: Foretold) -> bodies.Foretold | None:
    """Right guesses; answers without a preference count for none, and a chance of one half is half right."""
    user, population = (values[~answers.is_tie].double() for values in (answers.chances, answers.population_chances))
    if not len(user):
        return None
    right, usual = (float(torch.sign(values - 0.5).add(1).div(2).sum()) for values in (user, population))
    return bodies.Foretold(
        chances=user.tolist(),
        accuracy=share_right(right, len(user)),
        population_accuracy=share_right(usual, len(user)),
    )


def _question(prompt: str, left: str, right: str) -> tuple[str, frozenset[str]]:
    """What makes two pairs the same question."""
    return prompt, frozenset((left, right))


def _read(pair: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt and responses of a kept pair as a pool has them; programs may have given chat messages."""
    return to_prompt(pair["prompt"]), to_response(pair["chosen"]).text, to_response(pair["rejected"]).text


def _shown(row: int, pool: Sequence[PoolPair]) -> dict[str, Any]:
    """A pair of a pool as it was sent, and where it stands there."""
    return {"index": row, **_sent(pool[row])}


def _sent(pair: PoolPair) -> dict[str, Any]:
    return {"prompt": from_prompt(pair.prompt), "responses": [pair.left, pair.right]}
