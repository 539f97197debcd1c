"""The FastAPI application: every endpoint is a call of `RewardService`, and every error has the body of vLLM's."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, cast
from urllib.parse import unquote

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import plm
from plm.backbones import EncoderError
from plm.querying import PoolPair
from plm.serving import bodies, pages
from plm.serving.chat import Chat, ChatCompletion, ChatRequest
from plm.serving.gate import Gate, problem_json
from plm.serving.interviews import Interviews
from plm.serving.metrics import Metrics
from plm.serving.service import RequestError, RewardService

_TOO_LONG = {"too_long", "string_too_long"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": bodies.Refusal, "description": "not what is expected here"},
    401: {"model": bodies.Refusal, "description": "no known key"},
    403: {"model": bodies.Refusal, "description": "without keys: a request to this machine under another host's name"},
    404: {"model": bodies.Refusal, "description": "no such model, user or path"},
    408: {"model": bodies.Refusal, "description": "the body did not come in time"},
    409: {"model": bodies.Refusal, "description": "pairs cannot be added to those that were not kept"},
    413: {"model": bodies.Refusal, "description": "the body is too large"},
    415: {"model": bodies.Refusal, "description": "not application/json"},
    422: {"model": bodies.Refusal, "description": "too long, or nothing that the method can read"},
    429: {"model": bodies.Refusal, "description": "too many requests at once"},
    500: {"model": bodies.Refusal, "description": "an error of the server"},
    502: {"model": bodies.Refusal, "description": "the encoder's server gives no features"},
    503: {"model": bodies.Refusal, "description": "the users, or the encoder, cannot be reached now"},
}


def _user_of_path(user_id: str) -> str:
    """The id of a user, whose percent signs the path has kept."""
    try:
        return bodies.user_id_of(unquote(user_id, errors="strict"))
    except ValueError as error:
        raise RequestError("BadRequestError", str(error), "user_id") from error


def _user_of_query(user: Annotated[str | None, Query(description="whose rewards")] = None) -> str | None:
    try:
        return None if user is None else bodies.user_id_of(user)
    except ValueError as error:
        raise RequestError("BadRequestError", str(error), "user") from error


UserOfPath = Annotated[str, Depends(_user_of_path)]
UserOfQuery = Annotated[str | None, Depends(_user_of_query)]


def make_app(service: RewardService, pool: Sequence[PoolPair] = (), **limits: Any) -> ASGIApp:
    """The application of a service.

    Args:
        service: What answers.
        pool: Pairs to ask users about where a request brings none.
        **limits: ``keys``, ``max_body``, ``max_queue`` and ``body_seconds`` of `Gate`.
    """
    metrics, chat, interviews = Metrics(), Chat(service), Interviews(service, pool)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with service.method.users.held_open():
            yield

    app = FastAPI(
        lifespan=lifespan,
        title="plm",
        summary="Rewards that know their user",
        version=plm.__version__,
        docs_url=None,  # the pages load scripts from other servers
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the server answers."""
        return Response()

    @app.get("/v1/models")
    async def models() -> bodies.Models:
        return service.models()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counters() -> PlainTextResponse:
        """Prometheus' text format."""
        return PlainTextResponse(
            metrics.text(batches=service.batches.num_batches, chat_batches=chat.batches.num_batches)
        )

    @app.post("/classify")
    def classify(request: bodies.ClassifyRequest) -> bodies.ClassifyResponse:
        """Raw rewards, in vLLM's shape."""
        return service.classify(request)

    @app.post("/score")
    @app.post("/v1/score", include_in_schema=False)
    def score(request: bodies.ScoreRequest) -> bodies.ScoreResponse:
        """Raw rewards of responses to prompts, in vLLM's shape."""
        return service.score(request)

    @app.post("/get_reward")
    def get_reward(request: bodies.GetRewardRequest, user: UserOfQuery) -> bodies.GetRewardResponse:
        """Raw rewards, in OpenRLHF's shape."""
        return service.get_reward(request, user)

    @app.post("/v1/rewards")
    def rewards(request: bodies.RewardsRequest) -> bodies.RewardsResponse:
        """Rewards of responses to one prompt, their spread, and how often each would be preferred to another."""
        return service.rewards(request)

    @app.post("/v1/chat/completions")
    def complete(request: ChatRequest) -> ChatCompletion:
        """Responses to a conversation, in OpenAI's shape; 404 for a checkpoint that writes none."""
        return chat.complete(request)

    @app.get("/v1/users")
    def users(
        after: Annotated[int, Query(ge=-1, lt=2**63, description="next_after of the part before")] = -1,
    ) -> bodies.Users:
        """What is known of users, in the order in which they were added, a part at a time."""
        return interviews.users(after)

    @app.get("/v1/users/{user_id}")
    def user(user_id: UserOfPath) -> bodies.User:
        """What is known of a user."""
        return service.user(user_id)

    @app.delete("/v1/users/{user_id}")
    def forget(user_id: UserOfPath) -> bodies.Erased:
        """Forget a user; who is not known gets a receipt too."""
        return service.forget(user_id)

    @app.post("/v1/users/{user_id}/pairs")
    def learn(user_id: UserOfPath, request: bodies.PairsRequest) -> bodies.User:
        """Learn from pairs; they are on the disk when the answer comes."""
        return service.learn(user_id, request)

    @app.post("/v1/users/{user_id}/next-question")
    def next_question(user_id: UserOfPath, request: bodies.QuestionRequest) -> bodies.QuestionResponse:
        """The pairs whose answers would tell most about the user."""
        return interviews.next_question(user_id, request)

    @app.post("/v1/users/{user_id}/beliefs")
    def beliefs(user_id: UserOfPath, request: bodies.BeliefsRequest) -> bodies.Beliefs:
        """Where a user, known or not, is believed to differ from others, and how well answers were foretold."""
        return interviews.beliefs(user_id, request)

    @app.post("/v1/users/{user_id}/undo")
    def undo(user_id: UserOfPath, request: bodies.UndoRequest) -> bodies.User:
        """Take back the last pair: the user is fitted anew to those before it, on the disk when the answer comes."""
        return interviews.undo(user_id, request)

    pages.add_page(app, num_questions=len(pool), needs_key=bool(limits.get("keys")))
    _answer_errors(app)
    return Gate(app, metrics, **limits)


def _answer_errors(app: FastAPI) -> None:
    """Give every error the body of vLLM's; of what was sent only the first characters of a wrong pair are repeated."""

    def answer(status: int, kind: str, message: str, param: str | None = None) -> Response:
        return Response(problem_json(status, kind, message, param), status, media_type="application/json")

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        response = answer(error.status, error.kind, str(error), error.param)
        if error.status in (429, 503):
            response.headers["retry-after"] = "1"
        return response

    @app.exception_handler(EncoderError)
    async def not_encoded(request: Request, error: EncoderError) -> Response:
        kind = "ServiceUnavailableError" if error.status == 503 else "BadGateway"
        response = answer(error.status, kind, str(error))
        if error.status == 503:
            response.headers["retry-after"] = "1"
        return response

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        status = 422 if any(problem["type"] in _TOO_LONG for problem in found) else 400
        places = [
            ".".join(str(part) for part in problem["loc"] if re.fullmatch(r"\w+", str(part))) for problem in found
        ]
        message = "; ".join(f"{place}: {problem['msg']}" for place, problem in zip(places[:5], found, strict=False))
        return answer(status, "Bad Request", message, places[0])

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kind = {404: "NotFoundError", 405: "MethodNotAllowed"}.get(error.status_code, "BadRequestError")
        response = answer(error.status_code, kind, str(error.detail))
        response.headers.update(cast(dict[str, str], error.headers or {}))
        return response

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return answer(500, "InternalServerError", f"{type(error).__name__}; the server's log says more")
