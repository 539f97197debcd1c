"""`RewardService`: what the server does, without the server.

Every method takes and gives a pydantic model and may be called by any number of threads. Texts of requests that come at
the same time are encoded together; each request is then scored by itself, as ``plm score`` scores its rows.

Axes: B responses of a request, M draws from a posterior.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from plm.backbones import EncoderError, RemoteError, device
from plm.checkpoint import PairsNotKeptError, load_method
from plm.method import PersonalizationMethod
from plm.method.abilities import Writer
from plm.querying import MAX_FLOATS, posterior_samples
from plm.scoring import ResponseRow, refuse_nan, response_row
from plm.serving import bodies
from plm.serving.batching import Batcher
from plm.serving.embeddings import EncoderServer
from plm.types import Tokens, UserState, take_rows
from plm.users import StoredUser, StoreError

BATCH_TEXTS = 64
"""Texts that are encoded at once, if as many wait; the last request may exceed it."""
NUM_DRAWS = 64
"""Draws from a user's posterior for the spread of a reward."""

NUM_WRITERS = 16
"""Users who are learned or deleted at once: where the database is slow, rewards still find a thread."""

Kind = Literal[
    "NotFoundError",
    "ConflictError",
    "UnprocessableError",
    "BadRequestError",
    "TooManyRequests",
    "ServiceUnavailableError",
]
STATUS: dict[Kind, int] = {
    "BadRequestError": 400,
    "NotFoundError": 404,
    "ConflictError": 409,
    "UnprocessableError": 422,
    "TooManyRequests": 429,
    "ServiceUnavailableError": 503,
}


class RequestError(Exception):
    """What a request cannot be given, in words for its sender.

    Args:
        kind: A key of `STATUS`.
        message: What was expected, and what came.
        param: The field that is meant.
    """

    def __init__(self, kind: Kind, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.param, self.status = kind, param, STATUS[kind]


class Places:
    """Room for so many requests at once; the others are refused, so that those for rewards still find a thread.

    Args:
        count: How many.
        message: What the others are told.
    """

    def __init__(self, count: int, message: str) -> None:
        self._free, self.message = BoundedSemaphore(count), message

    @contextmanager
    def one(self) -> Iterator[None]:
        """A place while the block lasts."""
        if not self._free.acquire(blocking=False):
            raise RequestError("TooManyRequests", f"{self.message}; try again")
        try:
            yield
        finally:
            self._free.release()


class _Job(NamedTuple):
    """Responses to score."""

    rows: list[ResponseRow]
    wants_spread: bool


class _Rewards(NamedTuple):
    """What is known of B responses."""

    rewards: Tensor
    """``(B,)`` of the user of each row."""
    population: Tensor
    """``(B,)`` of the population."""
    is_known: list[bool]
    spread: Tensor | None
    """``(B,)`` standard deviation over the posterior of the first row's user."""


def _unreachable(error: RemoteError) -> EncoderError:
    """What clients are told where a method asks a server that does not answer."""
    return EncoderError(503 if error.is_passing else 502, str(error))


class RewardService:
    """Scores for users, learns users and forgets them.

    Args:
        ckpt_path: A checkpoint written by ``plm fit``.
        users: Where the users are, if not beside it: a file or ``postgresql+psycopg://...``.
        name: What clients call the model; default: the name of the checkpoint's file without its ending.
        label_is_user: Whether the labels of ``get_reward`` are ids of users.
        end_of_turn: What ``get_reward`` takes off the end of responses, such as ``<|im_end|>``.
        encoder: A server that encodes texts, instead of this process.

    Raises:
        ValueError: If the checkpoint, its backbone or the users cannot be read.
    """

    def __init__(
        self,
        ckpt_path: str | Path,
        users: str | Path | None = None,
        name: str | None = None,
        *,
        label_is_user: bool = False,
        end_of_turn: str = "",
        encoder: EncoderServer | None = None,
    ) -> None:
        self.method: PersonalizationMethod = load_method(ckpt_path, users=users)
        if isinstance(self.method, Writer):
            self.method.to(device())  # a language model is what needs it
        if encoder is not None:
            encoder.attach(self.method)
        self.name = Path(ckpt_path).stem if name is None else name
        self.created = int(time.time())
        self.label_is_user, self.end_of_turn = label_is_user, end_of_turn
        self._writers = Places(NUM_WRITERS, "too many users are learned at once")
        self.batches: Batcher[_Job, _Rewards] = Batcher(self._work, lambda job: len(job.rows), BATCH_TEXTS)
        refused = self._alone(_Job([response_row({"response": "a text", "prompt": "a prompt"})], False))
        if isinstance(refused, Exception):  # what is wrong with the checkpoint shows before anybody asks
            raise ValueError(str(refused))

    # ------------------------------------------------------------------ rewards
    def classify(self, request: bodies.ClassifyRequest) -> bodies.ClassifyResponse:
        """Raw rewards of texts or of the last message of a conversation."""
        rows = [self._row(reply.text, reply.history or "", request.user) for reply in request.replies()]
        found = self._rewards(request.model, rows)
        return bodies.ClassifyResponse(
            **self._frame("classify", request.request_id),
            data=[
                bodies.Classified(index=index, probs=[reward], user_known=known, global_reward=population)
                for index, (reward, known, population) in enumerate(
                    zip(found.rewards.tolist(), found.is_known, found.population.tolist(), strict=True)
                )
            ],
        )

    def score(self, request: bodies.ScoreRequest) -> bodies.ScoreResponse:
        """Raw rewards of responses to one prompt, or to one each."""
        prompts, texts = request.rows()
        rows = [self._row(text, prompt, request.user) for prompt, text in zip(prompts, texts, strict=True)]
        found = self._rewards(request.model, rows)
        return bodies.ScoreResponse(
            **self._frame("score", request.request_id),
            data=[
                bodies.Scored(index=index, score=reward, user_known=known)
                for index, (reward, known) in enumerate(zip(found.rewards.tolist(), found.is_known, strict=True))
            ],
        )

    def get_reward(self, request: bodies.GetRewardRequest, user: str | None = None) -> bodies.GetRewardResponse:
        """Raw rewards of texts that begin with their prompts.

        Args:
            request: The texts; its ``users``, or else its labels where they are users, win over ``user``.
            user: Whose rewards, where the request does not say.
        """
        named = request.users
        if named is None and self.label_is_user and request.labels is not None:
            named = [None if label is None else self._label(label) for label in request.labels]
        users = [user if one is None else one for one in named or [None] * len(request.query)]
        rows = []
        for place, (query, prompt, one) in enumerate(zip(request.query, request.prompts, users, strict=True)):
            if not query.startswith(prompt):
                message = (
                    "expected a query that begins with its prompt, as a guess where the response begins may be wrong"
                )
                raise RequestError("BadRequestError", message, f"query.{place}")
            text = query[len(prompt) :].removesuffix(self.end_of_turn)
            rows.append(ResponseRow(bodies.prompt_text(prompt), text, one, {}))
        found = self._rewards(None, rows)
        rewards, known = found.rewards.tolist(), [float(known) for known in found.is_known]
        return bodies.GetRewardResponse(rewards=rewards, scores=rewards, extra_logs={"user_known": known})

    def rewards(self, request: bodies.RewardsRequest) -> bodies.RewardsResponse:
        """Rewards of responses to one prompt, how sure they are, and how often each would be preferred to another."""
        prompt = bodies.prompt_text(request.prompt)
        rows = [self._row(text, prompt, request.user) for text in request.responses]
        found = self._rewards(request.model, rows, wants_spread=True)
        count = len(rows)
        wins: Sequence[float | None] = [None]
        if count > 1:
            each = torch.sigmoid(found.rewards.double()[:, None] - found.rewards.double()[None])
            wins = ((each.sum(1) - 0.5) / (count - 1)).tolist()
        spreads: Sequence[float | None] = [None] * count if found.spread is None else found.spread.tolist()
        rewards, population = found.rewards.tolist(), found.population.tolist()
        return bodies.RewardsResponse(
            id=f"rewards-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.name,
            user_known=found.is_known[0],
            data=[
                bodies.Reward(
                    index=index,
                    reward=rewards[index],
                    global_reward=population[index],
                    reward_sd=spreads[index],
                    win_probability=wins[index],
                )
                for index in range(count)
            ],
        )

    # ------------------------------------------------------------------ users
    def user(self, user_id: str) -> bodies.User:
        """What is known of a user besides the state."""
        if (user := self._find(user_id)) is None:
            raise RequestError("NotFoundError", "no such user is known")
        return user

    def _find(self, user_id: str) -> bodies.User | None:
        with store_errors():
            found = self.method.users.find(user_id)
        if found is None:
            return None
        return self.described([found])[0]

    def described(self, users: Sequence[StoredUser]) -> list[bodies.User]:
        """What is known of stored users, and whether they are served their own state."""
        if not users:
            return []
        with store_errors():
            states, known = self.method.known_users.lookup([user.user_id for user in users])
        population = self.method.population_state(len(users)).tensors
        is_own = torch.zeros_like(known)
        for name, value in states.tensors.items():
            is_own |= (value != population[name]).reshape(len(users), -1).any(1).cpu()
        return [
            bodies.User(
                user=user.user_id,
                num_pairs=user.num_pairs,
                version=user.version,
                created=user.created,
                updated=user.updated,
                served="personal" if own else "population",
            )
            for user, own in zip(users, (is_own & known).tolist(), strict=True)
        ]

    def learn(self, user_id: str, request: bodies.PairsRequest) -> bodies.User:
        """Learn a user from pairs and from those before; durable when the call returns."""
        pairs = [{**pair.model_dump(), "prompt": bodies.prompt_text(pair.prompt)} for pair in request.pairs]
        with self.learning("body.pairs"):
            is_stored = self.method.learn(user_id, pairs, request.anew, request.must_exist)
        user = self._find(user_id) if is_stored else None
        if user is None:
            raise RequestError("ConflictError", "there is no such user any more, or never was; nothing was stored")
        return user

    def forget(self, user_id: str) -> bodies.Erased:
        """Delete a user from the store; a user who is not there gets a receipt too."""
        with self.writing():
            return bodies.Erased(**self.method.forget(user_id)._asdict())

    def models(self) -> bodies.Models:
        """The served checkpoint."""
        return bodies.Models(data=[bodies.Model(id=self.name, created=self.created, root=self.name)])

    def check_model(self, model: str | None) -> None:
        """Refuse a model that is not the served one.

        Raises:
            RequestError: If it is another.
        """
        if model and model != self.name:
            raise RequestError("NotFoundError", f"The model `{model}` does not exist.")

    # ------------------------------------------------------------------ inside
    @contextmanager
    def writing(self) -> Iterator[None]:
        """A change of the store, one of so many at once."""
        with self._writers.one(), store_errors():
            yield

    @contextmanager
    def learning(self, param: str | None = None) -> Iterator[None]:
        """A change of a user's state that is fitted to pairs, which ``param`` of the request names."""
        with self.writing():
            try:
                yield
            except PairsNotKeptError as error:
                raise RequestError("ConflictError", str(error)) from error
            except StoreError:
                raise
            except RemoteError as error:
                raise _unreachable(error) from error
            except ValueError as error:
                raise RequestError("UnprocessableError", str(error), param) from error

    def _row(self, text: str, prompt: str, user: str | None) -> ResponseRow:
        return response_row({"response": text, "prompt": prompt, "user_id": user})

    def _label(self, label: Any) -> str:
        """A label of ``get_reward`` as the id of a user."""
        try:
            return bodies.user_id_of(str(label) if isinstance(label, int) and not isinstance(label, bool) else label)
        except ValueError as error:
            raise RequestError("BadRequestError", str(error), "body.labels") from error

    def _frame(self, prefix: str, request_id: str | None) -> dict[str, Any]:
        """The frame of vLLM's responses."""
        number = request_id or uuid.uuid4().hex
        return {"id": f"{prefix}-{number}", "created": int(time.time()), "model": self.name}

    def _rewards(self, model: str | None, rows: list[ResponseRow], wants_spread: bool = False) -> _Rewards:
        """Rewards of rows by the served model, encoded together with those of other requests."""
        self.check_model(model)
        return self.batches(_Job(rows, wants_spread))

    def _work(self, jobs: Sequence[_Job]) -> list[_Rewards | Exception]:
        """Results of all jobs; or of each by itself, where one of them fails."""
        try:
            return list(self._together(jobs))
        except EncoderError as error:  # one by one they would wait for it, one after the other
            return [error] * len(jobs)
        except RemoteError as error:
            return [_unreachable(error)] * len(jobs)
        except Exception:
            return [self._alone(job) for job in jobs]

    def _alone(self, job: _Job) -> _Rewards | Exception:
        try:
            return self._together([job])[0]
        except Exception as error:
            return error

    @torch.no_grad()
    def _together(self, jobs: Sequence[_Job]) -> list[_Rewards]:
        """Encode the texts of all jobs at once, look all users up at once, and score each job by itself."""
        rows = [row for job in jobs for row in job.rows]
        ids = list(dict.fromkeys(row.user_id for row in rows))
        with store_errors():
            states, known = self.method.known_users.lookup(ids)
        place = {user_id: number for number, user_id in enumerate(ids)}
        prompts, encoder = [row.prompt for row in rows], self.method.text_encoder
        results, start = [], 0
        with self.method.one_thread():
            try:
                features = encoder(prompts, [row.text for row in rows])
                prompt_features = encoder.prompts(prompts)
            except ValueError as error:
                raise RequestError("UnprocessableError", str(error)) from error
            for job in jobs:
                one = torch.arange(start, start + len(job.rows))
                start += len(job.rows)
                inputs = (
                    (features, prompt_features)
                    if len(jobs) == 1
                    else map(_take, (features, prompt_features), (one, one))
                )
                mine = list(dict.fromkeys(row.user_id for row in job.rows))
                users = states.take(torch.tensor([place[user_id] for user_id in mine]).to(states.num_pairs.device))
                is_known = [bool(known[place[row.user_id]]) for row in job.rows]
                results.append(self._scored(job, mine, users, is_known, *inputs))
        return results

    def _scored(
        self,
        job: _Job,
        user_ids: list[str | None],
        users: UserState,
        is_known: list[bool],
        features: Tensor | Tokens,
        prompts: Tensor | Tokens | None,
    ) -> _Rewards:
        """Score B responses, as features or tokens, for the users of their rows."""
        row_of = {user_id: number for number, user_id in enumerate(user_ids)}
        user_rows = torch.tensor([row_of[row.user_id] for row in job.rows])
        score = self.method.score
        rewards = score(features, users, rows=user_rows, prompt_features=prompts)
        population = score(features, prompt_features=prompts) if any(is_known) else rewards
        for values in (rewards, population):
            refuse_nan(values, job.rows, type(self.method).__name__)
        spread = self._spread(features, users, prompts) if job.wants_spread else None
        return _Rewards(rewards.cpu(), population.cpu(), is_known, spread)

    def _spread(self, features: Tensor | Tokens, user: UserState, prompts: Tensor | Tokens | None) -> Tensor | None:
        """Standard deviation of B rewards over draws from the posterior of one user; None if there is none."""
        try:
            draws = posterior_samples(user, NUM_DRAWS)
        except ValueError:
            return None
        count = features.num_rows if isinstance(features, Tokens) else len(features)
        at_once = max(1, MAX_FLOATS // max(1, count * self.method.feature_dim))
        rewards = []
        for block in torch.split(torch.arange(NUM_DRAWS), at_once):
            pick = torch.arange(count).repeat(len(block))
            inputs, asked = take_rows(features, pick), take_rows(prompts, pick)
            assert inputs is not None
            rewards.append(self.method.score(inputs, draws, rows=block.repeat_interleave(count), prompt_features=asked))
        return torch.cat(rewards).view(NUM_DRAWS, count).std(0, correction=0).cpu()


def _take(values: Tensor | Tokens | None, rows: Tensor) -> Tensor | Tokens | None:
    """Rows of features or of tokens, which lose the padding of other texts."""
    taken = take_rows(values, rows)
    return taken.trimmed() if isinstance(taken, Tokens) else taken


@contextmanager
def store_errors() -> Iterator[None]:
    """Say of a database that cannot be reached that it may be later."""
    try:
        yield
    except StoreError as error:
        raise RequestError("ServiceUnavailableError", str(error)) from error
