"""``POST /v1/chat/completions``: what users of a checkpoint would write, in OpenAI's bodies.

Requests that come at the same time and agree in how texts are drawn are written in one batch, whoever they are for;
each gets the text that it would get alone, as `plm.generation.sample` promises.
"""

from __future__ import annotations

import secrets
import time
import uuid
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, Field, model_validator

from plm.backbones import Completion, Policy
from plm.data.values import to_prompt
from plm.generation import BATCH_TOKENS, Sample, sample
from plm.method.abilities import Writer
from plm.serving.batching import Batcher
from plm.serving.bodies import MAX_CHARACTERS, MAX_TEXTS, No, Sent, UserId
from plm.serving.service import Places, RequestError, RewardService, store_errors
from plm.types import UserState

MAX_CHOICES = 16
"""Texts of one request."""
DEFAULT_TOKENS = 512
"""Tokens of a text where the request names no number and the model has room for them."""
LEAST_TEMPERATURE = 0.01
"""Above 0: what is colder overflows."""
NUM_WRITING = 16
"""Requests that are written or wait for it: the others find a thread meanwhile."""


# ---------------------------------------------------------------------- bodies
class ChatMessage(Sent):
    """A message of a conversation, as text."""

    role: Literal["developer", "system", "user", "assistant"]
    content: str = Field(max_length=MAX_CHARACTERS)


class TextFormat(Sent):
    """The only form of responses."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class ChatRequest(Sent):
    """OpenAI's request for responses to a conversation; ``top_k`` and ``min_tokens`` are vLLM's."""

    model: str | None = Field(None, max_length=512, description="the served model; may be left out")
    user: UserId | None = Field(None, description="who writes; without it, the population")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_TEXTS)]
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="responses; default 1")
    max_completion_tokens: int | None = Field(
        None, ge=1, description=f"default: what the model has room for, {DEFAULT_TOKENS} at most"
    )
    max_tokens: int | None = Field(None, ge=1, description="the former name of max_completion_tokens")
    min_tokens: int | None = Field(None, ge=0, description="no response ends earlier; default 0")
    temperature: float | None = Field(None, ge=0, le=2, description="0 = the likeliest token; default 1")
    top_p: float | None = Field(None, gt=0, le=1, description="default 1")
    top_k: int | None = Field(None, ge=1, description="default: all")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="default: another one for each request")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="a response ends before it; it is written on and then cut"
    )
    stream: No | None = Field(None, description="responses come whole: true is refused")
    stream_options: None = None
    logprobs: No | None = None
    top_logprobs: None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: None = None
    response_format: TextFormat | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None
    store: No | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("expected max_tokens and max_completion_tokens to be equal, or one of them alone")
        if any((self.min_tokens or 0) > length for length in lengths if length is not None):
            raise ValueError("expected min_tokens to be at most max_tokens")
        if self.temperature and self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"expected a temperature of 0 or at least {LEAST_TEMPERATURE}")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of a response, if the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Texts before which a response ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatReply(BaseModel):
    """What was written."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One response."""

    index: int
    message: ChatReply
    finish_reason: Literal["stop", "length"] = Field(description="length: cut at the most tokens")
    logprobs: None = None


class TokenCounts(BaseModel):
    """Tokens that were read and written, those that end texts too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """Responses to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: None = None
    choices: list[Choice]
    usage: TokenCounts
    user_known: bool


# ---------------------------------------------------------------------- writing
class _Job(NamedTuple):
    """A conversation to go on with."""

    prompt: str
    user: str | None
    seed: int
    request: ChatRequest


class _Options(NamedTuple):
    """Arguments of `sample` that a batch has in common."""

    num_samples: int
    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


class _Text(NamedTuple):
    """A response."""

    text: str
    num_tokens: int
    is_ended: bool


class _Written(NamedTuple):
    """What one request gets."""

    texts: list[_Text]
    num_prompt_tokens: int
    user_known: bool


class Chat:
    """Writes with the policy of a service's checkpoint.

    Args:
        service: Whose method and users; a method that does not write answers every request with 404.
    """

    def __init__(self, service: RewardService) -> None:
        self.service = service
        method = service.method
        self.writer: Writer | None = method if isinstance(method, Writer) and method.can_write else None
        self.batches: Batcher[_Job, _Written] = Batcher(self._work, self._size_of, BATCH_TOKENS)
        self.places = Places(NUM_WRITING, "too many conversations at once")

    def complete(self, request: ChatRequest) -> ChatCompletion:
        """Write responses to a conversation.

        Raises:
            RequestError: If the checkpoint does not write, the model has no room, or too many wait.
        """
        self.service.check_model(request.model)
        if self.writer is None:
            raise RequestError(
                "NotFoundError",
                f"`{self.service.name}` scores responses and writes none: it answers /classify, /score, /get_reward, "
                "/v1/rewards and /v1/users; serve a checkpoint of LoRADPO, LatentDPO or another method that writes",
            )
        with self.places.one():
            written = self.batches(self.job(request))
        texts = written.texts if len(written.texts) > 1 else written.texts * (request.n or 1)
        num_tokens = sum(text.num_tokens for text in texts)
        return ChatCompletion(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.service.name,
            choices=[
                Choice(
                    index=index,
                    message=ChatReply(content=text.text),
                    finish_reason="stop" if text.is_ended else "length",
                )
                for index, text in enumerate(texts)
            ],
            usage=TokenCounts(
                prompt_tokens=written.num_prompt_tokens,
                completion_tokens=num_tokens,
                total_tokens=written.num_prompt_tokens + num_tokens,
            ),
            user_known=written.user_known,
        )

    def job(self, request: ChatRequest) -> _Job:
        """What is to be written for a request."""
        seed = secrets.randbits(63) if request.seed is None else request.seed
        return _Job(to_prompt([message.model_dump() for message in request.messages]), request.user, seed, request)

    def _size_of(self, job: _Job) -> int:
        return (job.request.n or 1) * (job.request.limit or DEFAULT_TOKENS)

    def _work(self, jobs: Sequence[_Job]) -> list[_Written | Exception]:
        """Write for all jobs, those of equal options in one batch."""
        assert self.writer is not None
        row_of = {user: row for row, user in enumerate(dict.fromkeys(job.user for job in jobs))}
        with store_errors():
            users, known = self.service.method.known_users.lookup(list(row_of))
        rows = [row_of[job.user] for job in jobs]
        results: dict[int, _Written | Exception] = {}
        groups: defaultdict[_Options, list[int]] = defaultdict(list)
        with self.service.method.one_thread():
            policy, read = self.writer.policy, {}
            for place, job in enumerate(jobs):
                try:
                    read[place] = policy.backbone.prompt_tokens(job.prompt)
                    groups[_options(job, policy.backbone.max_tokens - len(read[place]))].append(place)
                except ValueError as error:
                    results[place] = RequestError("UnprocessableError", str(error), "body.messages")
                except RequestError as error:
                    results[place] = error
            for options, places in groups.items():
                for place, written in zip(places, self._texts(jobs, places, users, rows, options), strict=True):
                    if isinstance(written, Exception):
                        results[place] = written
                        continue
                    texts = [_cut(policy, read[place], one, jobs[place].request.stops) for one in written]
                    results[place] = _Written(texts, len(read[place]), bool(known[rows[place]]))
        return [results[place] for place in range(len(jobs))]

    def _texts(
        self, jobs: Sequence[_Job], places: list[int], users: UserState, rows: list[int], options: _Options
    ) -> Sequence[list[Sample] | Exception]:
        """Texts of the jobs at ``places``; or, where one of them fails, of each by itself."""
        try:
            return sample(
                self.service.method,
                [jobs[place].prompt for place in places],
                users,
                rows=torch.tensor([rows[place] for place in places]),
                seed=[jobs[place].seed for place in places],
                **options._asdict(),
            )
        except Exception as error:
            if len(places) > 1:
                return [self._texts(jobs, [place], users, rows, options)[0] for place in places]
            return [RequestError("UnprocessableError", str(error)) if isinstance(error, ValueError) else error]


def _options(job: _Job, room: int) -> _Options:
    """How the texts of a job are drawn.

    Raises:
        RequestError: If more tokens are wanted than the model can read after the prompt.
    """
    request = job.request
    if request.limit is not None and request.limit > room:
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        message = f"expected {name} of at most {room}, what the model can read after this prompt, got {request.limit}"
        raise RequestError("UnprocessableError", message, f"body.{name}")
    limit = request.limit or min(DEFAULT_TOKENS, room)
    least = request.min_tokens or 0
    if least > limit:
        message = f"expected min_tokens of at most {limit}, what is written after this prompt, got {least}"
        raise RequestError("UnprocessableError", message, "body.min_tokens")
    temperature = 1.0 if request.temperature is None else request.temperature
    num_samples = 1 if temperature == 0 else request.n or 1
    return _Options(num_samples, limit, least, temperature, request.top_k, request.top_p)


def _cut(policy: Policy, prompt: list[int], written: Sample, stops: Sequence[str]) -> _Text:
    """A response up to the first of the texts that end it, with the tokens that were needed to get there."""
    ids = list(written.token_ids)
    places = [place for stop in stops if (place := written.text.find(stop)) >= 0]
    if not places:
        return _Text(written.text, len(ids), ids[-1] in policy.end_tokens)

    def holds(length: int) -> bool:
        text = policy.backbone.response_text(Completion(prompt, ids[:length]))
        return any(stop in text for stop in stops)

    return _Text(written.text[: min(places)], 1 + bisect_left(range(1, len(ids)), True, key=holds), True)
