"""What clients send and get, as pydantic models: vLLM's, OpenRLHF's and plm's own bodies.

A key that stands in no model is an error, and so is a value of another type. Keys of vLLM that are honoured in one way
only take that value alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from plm.data.values import Response, to_id, to_prompt, to_response
from plm.users import problem_of_id

MAX_TEXTS = 2048
"""Texts of one request."""
MAX_CHARACTERS = 200_000
"""Characters of one text."""
MAX_PAIRS = 256
"""Pairs of one request, and pairs to choose a question from."""

_Value = TypeVar("_Value")


def _checked(parse: Callable[[Any], Any]) -> AfterValidator:
    """Raise what a converter raises, and keep the value as it was sent."""

    def check(value: _Value) -> _Value:
        parse(value)
        return value

    return AfterValidator(check)


def user_id_of(user_id: str) -> str:
    """The id of a user, as it is.

    Raises:
        ValueError: If it is not one that can be stored.
    """
    if isinstance(user_id, str) and (problem := problem_of_id(user_id)):
        raise ValueError(f"expected the id of a user, got one {problem}")
    return to_id(user_id)


class Sent(BaseModel):
    """A body: strict about types, unknown keys and numbers that JSON does not have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Sent):
    """A message of a conversation."""

    role: str = Field(max_length=64)
    content: str = Field(max_length=MAX_CHARACTERS)


Text = Annotated[str, Field(max_length=MAX_CHARACTERS), _checked(to_response)]
"""A response: not blank."""
AnyText = Annotated[str, Field(max_length=MAX_CHARACTERS), _checked(to_prompt)]
"""A prompt, which may be empty; a text that holds the JSON of chat messages is read as these."""
Conversation = Annotated[list[Message], Field(min_length=1, max_length=MAX_TEXTS)]
UserId = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(user_id_of)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
No = Annotated[Literal[False], BeforeValidator(lambda value: value if isinstance(value, bool) else None)]
"""Only false, not 0, which equals it in Python."""
Zero = Annotated[int, Field(ge=0, le=0)]
Prompts = Annotated[list[AnyText], Field(min_length=1, max_length=MAX_TEXTS)]


def prompt_text(prompt: str | list[Message]) -> str:
    """A prompt as methods read it: text, or canonical JSON of its messages."""
    return to_prompt(prompt if isinstance(prompt, str) else [message.model_dump() for message in prompt])


# ---------------------------------------------------------------------- vLLM
class _Pooling(Sent):
    """What vLLM takes in every request of this kind."""

    model: str | None = Field(None, max_length=512, description="the served model; may be left out")
    user: UserId | None = Field(None, description="whose reward; without it, the population's")
    request_id: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    use_activation: No | None = Field(None, description="rewards are raw: true is refused")
    truncate_prompt_tokens: Literal[-1] | None = Field(None, description="long texts are cut at the model's length")
    truncation_side: None = None
    padding: None = None
    priority: Zero = 0
    cache_salt: None = None
    mm_processor_kwargs: None = None
    chat_template: None = None
    chat_template_kwargs: None = None


class ClassifyRequest(_Pooling):
    """vLLM's ``/classify``: texts, or one conversation whose last message is the response."""

    input: Text | Texts | None = None
    messages: Conversation | None = None
    add_special_tokens: bool | None = Field(None, description="read as the backbone of the checkpoint does, always")
    add_generation_prompt: No = False
    continue_final_message: No = False
    media_io_kwargs: None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages")
        if self.messages is not None:
            self.replies()
        return self

    def replies(self) -> list[Response]:
        """The responses, each with the messages before it."""
        if self.messages is not None:
            return [to_response([message.model_dump() for message in self.messages])]
        return [to_response(text) for text in ([self.input] if isinstance(self.input, str) else self.input or [])]


class ScoreRequest(_Pooling):
    """vLLM's ``/score``: prompts and responses, one to one, one to many or pairwise, in any of its four spellings."""

    queries: AnyText | Prompts | None = None
    documents: Text | Texts | None = None
    items: Text | Texts | None = None
    data_1: AnyText | Prompts | None = None
    data_2: Text | Texts | None = None
    text_1: AnyText | Prompts | None = None
    text_2: Text | Texts | None = None
    max_tokens_per_query: Zero = 0
    max_tokens_per_doc: Zero = 0
    instruction: None = None

    SPELLINGS: ClassVar = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        self.rows()
        return self

    def rows(self) -> tuple[list[str], list[str]]:
        """Prompts and responses of the same number."""
        names = {name for spelling in self.SPELLINGS for name in spelling if getattr(self, name) is not None}
        spelling = next((spelling for spelling in self.SPELLINGS if {*spelling} == names), None)
        if spelling is None:
            shown = ", ".join(" and ".join(spelling) for spelling in self.SPELLINGS)
            raise ValueError(f"expected one of {shown}, got {', '.join(sorted(names)) or 'none'}")
        prompts, texts = ([value] if isinstance(value := getattr(self, name), str) else value for name in spelling)
        if len(prompts) not in (1, len(texts)):
            raise ValueError(f"expected one prompt, or one for each response, got {len(prompts)} and {len(texts)}")
        return [prompt_text(prompt) for prompt in prompts] * (1 if len(prompts) == len(texts) else len(texts)), texts


class Usage(BaseModel):
    """vLLM's count of tokens, which clients may expect to find; tokens are not counted here."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    completion_tokens_details: None = None


class _Listed(BaseModel):
    """The frame of vLLM's responses."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    usage: Usage = Usage()


class Classified(BaseModel):
    """The reward of one text, as the only class."""

    index: int
    label: None = None
    probs: list[float] = Field(description="the raw reward: no probability")
    num_classes: Literal[1] = 1
    user_known: bool
    global_reward: float = Field(description="the reward of the population")


class ClassifyResponse(_Listed):
    """Rewards in the order of the texts."""

    data: list[Classified]


class Scored(BaseModel):
    """The reward of one response."""

    index: int
    object: Literal["score"] = "score"
    score: float
    user_known: bool


class ScoreResponse(_Listed):
    """Rewards in the order of the responses."""

    data: list[Scored]


# ---------------------------------------------------------------------- OpenRLHF
class GetRewardRequest(Sent):
    """OpenRLHF's ``/get_reward``: whole texts and the prompts that they begin with."""

    query: Prompts
    prompts: Prompts
    labels: Annotated[list[Any], Field(max_length=MAX_TEXTS)] | None = None
    users: Annotated[list[UserId | None], Field(max_length=MAX_TEXTS)] | None = Field(
        None, description="a user for each text; OpenRLHF's own client cannot send them"
    )

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        for name in ("prompts", "labels", "users"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.query):
                raise ValueError(f"expected {name} of the length of query, {len(self.query)}, got {len(values)}")
        return self


class GetRewardResponse(BaseModel):
    """Raw rewards; numbers only, as OpenRLHF makes tensors of all of them."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


# ---------------------------------------------------------------------- plm
class RewardsRequest(Sent):
    """Responses to one prompt, compared for one user."""

    model: str | None = Field(None, max_length=512)
    user: UserId | None = None
    prompt: AnyText | Conversation = ""
    responses: Texts


class Reward(BaseModel):
    """What is known of one response."""

    index: int
    reward: float
    global_reward: float = Field(description="the reward of the population")
    reward_sd: float | None = Field(description="its spread over the user's posterior; null without one")
    win_probability: float | None = Field(description="over another of the responses; null for a lone response")


class RewardsResponse(BaseModel):
    """Rewards in the order of the responses."""

    id: str
    object: Literal["rewards"] = "rewards"
    created: int
    model: str
    user_known: bool
    data: list[Reward]


class Pair(Sent):
    """What a user prefers to what."""

    prompt: AnyText | Conversation = ""
    chosen: Text
    rejected: Text
    tie: bool = False
    weight: float = Field(1.0, ge=0, le=1e30)


class PairsRequest(Sent):
    """Pairs to learn a user from, after those before."""

    pairs: Annotated[list[Pair], Field(min_length=1, max_length=MAX_PAIRS)]
    anew: bool = Field(False, description="forget what was known of the user before")
    must_exist: bool = Field(False, description="409 where the user is not known, as after a deletion; do not add one")


class User(BaseModel):
    """What is known of a user."""

    user: str
    num_pairs: int
    version: int
    created: float = Field(description="seconds since 1970")
    updated: float
    served: Literal["personal", "population"] = Field(description="population: no pairs, or too few to do better")


class Erased(BaseModel):
    """The receipt of an erasure, which the log in the store keeps."""

    receipt: str = Field(description="a keyed hash of the id")
    erased: str
    was_stored: bool
    is_wiped: bool = Field(description="whether the bytes are gone from the disk of the store too")


class Candidate(Sent):
    """A pair that may be asked about."""

    prompt: AnyText | Conversation = ""
    responses: Annotated[list[Text], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _two_texts(self) -> Self:
        if self.responses[0] == self.responses[1]:
            raise ValueError("expected two different responses")
        return self

    def both(self) -> tuple[str, str]:
        """Both responses."""
        left, right = self.responses
        return left, right


Pool = Annotated[list[Candidate], Field(min_length=1, max_length=MAX_PAIRS)]


class QuestionRequest(Sent):
    """Pairs to choose the next question from."""

    pool: Pool | None = Field(None, description="without it, the server's own, if it has one")
    num_pairs: int = Field(1, ge=1, le=16)
    seed: int = Field(0, ge=0, lt=2**63)
    skip_answered: bool = Field(False, description="leave out pairs that the user was learned from")


class BeliefsRequest(Sent):
    """Pairs about which the model says what it holds to be true of a user."""

    pool: Pool | None = Field(None, description="without it, the server's own, if it has one")


class UndoRequest(Sent):
    """What is to be taken back."""

    version: int = Field(
        ge=1, lt=2**63, description="of the user whose last pair it is; 409 if there is another by now"
    )


class Question(BaseModel):
    """A pair worth asking about."""

    index: int = Field(description="its place in the pool")
    prompt: str | list[Message]
    responses: list[str]
    information: float = Field(description="nats that the answer adds about the user")
    chance: float = Field(
        description="that the user prefers the first response, the mean over what the user may be like"
    )


class Share(BaseModel):
    """A share of guesses, with its 95 % interval."""

    share: float
    low: float
    high: float


class QuestionResponse(BaseModel):
    """Questions, the first to ask first."""

    user_known: bool
    data: list[Question]
    num_open: int = Field(description="pairs of the pool that may still be asked about")
    expected_accuracy: Share = Field(description="of guesses of the answers to the whole pool, by the model itself")


class Belief(BaseModel):
    """A pair on which a user and the population differ."""

    index: int = Field(description="its place in the pool")
    prompt: str | list[Message]
    responses: list[str]
    chance: float = Field(description="that the user, as most probably is, prefers the first response")
    population_chance: float


class Foretold(BaseModel):
    """Answers of a user, each predicted by the model that had learned those before it."""

    chances: list[float] = Field(description="of the response that was chosen, oldest first; ties are left out")
    accuracy: Share
    population_accuracy: Share = Field(description="of one model for all")


class Beliefs(BaseModel):
    """What the model holds to be true of a user."""

    user: User | None = Field(description="null if the user is unknown")
    num_kept: int = Field(description="pairs of the user that were kept, of which the last can be taken back")
    data: list[Belief] = Field(description="the pairs on which the user differs most from the population")
    foretold: Foretold | None


class Users(BaseModel):
    """A part of the users, in the order in which they were added."""

    num_users: int = Field(description="of all")
    data: list[User]
    next_after: int | None = Field(description="where the next part begins: ?after=; null after the last")


class Permission(BaseModel):
    """Empty: vLLM's list of permissions."""


class Model(BaseModel):
    """The served checkpoint."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["plm"] = "plm"
    root: str
    parent: None = None
    max_model_len: None = None
    permission: list[Permission] = []


class Models(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None = None
    code: int


class Refusal(BaseModel):
    """The body of every error, as of vLLM."""

    error: Problem
