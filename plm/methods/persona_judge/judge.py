"""The judge: questions to a language model, what they cost, and what comes of the answers."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from plm.backbones import Answer, Chat, Messages, RemoteError, TooLong
from plm.methods.persona_judge.prompts import (
    BEGIN,
    BEST,
    Persona,
    ask_pair,
    ask_score,
    digest,
    probability,
    score,
)

_In = TypeVar("_In")
_Out = TypeVar("_Out")
REASON_TOKENS = 256
"""Most tokens of an answer with a reason, or of a persona."""
LINE_TOKENS = 12
"""Most tokens of an answer without one."""
KEPT_TOKENS = 16
"""Tokens of an answer, from its end, whose log-probabilities are kept: the verdict is among them."""
HOPELESS = 20
"""Answers after which a model that has given no verdict is given up."""


class Question(NamedTuple):
    """What a language model is asked."""

    messages: Messages
    max_tokens: int
    temperature: float = 0.0
    number: int = 0
    """Which of several answers to the same messages."""
    begin: str = ""
    """How the answer begins, for a model that can be told."""
    is_graded: bool = False
    """Whether log-probabilities are asked for."""

    def key(self, model: str) -> bytes:
        """Hash of all that decides the answer."""
        content = json.dumps([model, list(self.messages), *self[1:]], sort_keys=True)
        return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=16).digest()


class Duel(NamedTuple):
    """Two responses to a prompt, judged with what is known about a person."""

    persona: Persona
    prompt: str
    first: str
    second: str


@dataclass
class Costs:
    """What a judge has been asked so far, and how it answered."""

    calls: int = 0
    """Answers of the model; the others had been given before."""
    known_answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Waited for answers, summed over those waited for at once."""
    verdicts: int = 0
    unparsed: int = 0
    """Answers whose last line was no verdict."""
    refused: int = 0
    """Questions that the model did not take, such as too long ones."""
    duels: int = 0
    consistent: int = 0
    """Duels whose winner was the same in both orders, or that had none in either."""
    first: float = 0.0
    """Sum over the duels of the mean probability of the response that was shown first."""

    def report(self) -> dict[str, float]:
        """Numbers for ``metrics.json``; nan where nothing was asked."""
        duels, verdicts = self.duels or float("nan"), self.verdicts or float("nan")
        return {
            "judge_calls": self.calls,
            "judge_known_answers": self.known_answers,
            "judge_prompt_tokens": self.prompt_tokens,
            "judge_tokens": self.tokens,
            "judge_seconds": self.seconds,
            "judge_unparsed": self.unparsed / verdicts,
            "judge_refused": self.refused,
            "judge_order_consistency": self.consistent / duels,
            "judge_position_bias": self.first / duels - 0.5,
        }


class BudgetError(ValueError):
    """More would have to be asked than is allowed."""


class Judge:
    """Asks a language model, several questions at once, and none twice.

    Args:
        chat: Makes the model when it is first needed.
        concurrency: Questions under way at once.
        votes: Answers to each question about responses, drawn at temperature 1 where there are several.
        with_reason: Whether a verdict comes with a reason, before it.
        max_calls: Most answers of the model; None = any number.
        answers: SQLite file in which answers are kept; None = as long as the judge lives.
    """

    def __init__(
        self,
        chat: Callable[[], Chat],
        *,
        concurrency: int,
        votes: int,
        with_reason: bool,
        max_calls: int | None,
        answers: str | None,
    ) -> None:
        self._make = chat
        self._chat: Chat | None = None
        self.concurrency, self.votes, self.with_reason, self.max_calls = concurrency, votes, with_reason, max_calls
        self.costs = Costs()
        self._known: dict[bytes, Answer] = {}
        self._pending: dict[bytes, Future[Answer]] = {}
        self._failure: BaseException | None = None
        """Why questions that were under way together were given up."""
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._file = None if answers is None else _AnswerFile(Path(answers).expanduser())

    @property
    def keeps_answers(self) -> bool:
        """Whether there is a file of answers."""
        return self._file is not None

    # ------------------------------------------------------------------ asking
    def each(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
        """What ``work`` makes of each item; several of them ask the judge at the same time."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(work, items))

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each question, from those that are known or from the model.

        Raises:
            ValueError: If more would be asked than is allowed (then nothing is asked), or the model fails.
        """
        with self._lock:
            if self._chat is None:
                self._chat = self._make()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.concurrency)
            keys = [question.key(self._chat.name) for question in questions]
            self._failure = self._failure if self._pending else None
            asked = {key: question for key, question in zip(keys, questions, strict=True) if not self._is_known(key)}
            new = {key: question for key, question in asked.items() if key not in self._pending}
            if self.max_calls is not None and self.costs.calls + len(new) > self.max_calls:
                raise BudgetError(
                    f"model.max_calls: {self.costs.calls:,} questions have been asked and {len(new):,} more are needed "
                    f"now, {self.max_calls:,} are allowed; raise it, or name a file in model.answers and go on later"
                )
            self.costs.calls += len(new)
            self.costs.known_answers += len(questions) - len(new)
            for key, question in new.items():
                self._pending[key] = self._pool.submit(self._answer, self._chat, key, question)
            futures = {key: self._pending[key] for key in asked}
        try:
            found = {key: future.result() for key, future in futures.items()}
        except BaseException as error:
            with self._lock:
                self.costs.calls -= sum(future.cancel() for future in futures.values())
                self._failure = self._failure or error
            raise self._failure from None
        finally:
            with self._lock:
                for key in new:
                    self._pending.pop(key, None)
        return [found[key] if key in found else self._known[key] for key in keys]

    def _is_known(self, key: bytes) -> bool:
        if key in self._known:
            return True
        found = None if self._file is None else self._file.get(key)
        if found is not None:
            self._known[key] = found
        return found is not None

    def _answer(self, chat: Chat, key: bytes, question: Question) -> Answer:
        """Ask; a question that is not taken has an empty answer, which is not kept in the file."""
        start = time.perf_counter()
        seed = digest(question.number, key.hex()) % 2**31
        messages, max_tokens, temperature, _, begin, is_graded = question
        with self._lock:
            if self._failure is not None:
                self.costs.calls -= 1
                raise self._failure
        try:
            answer, is_taken = chat(messages, max_tokens, temperature, seed, begin, is_graded), True
        except TooLong:
            answer, is_taken = Answer("", []), False
        except Exception as error:
            if not (isinstance(error, RemoteError) and error.status in (400, 413, 422)):
                self._failure = error  # the others need not be asked
                raise
            answer, is_taken = Answer("", []), False
        text = answer.text.encode(errors="replace").decode()  # half of a character cannot be stored
        answer = answer._replace(text=text, tokens=answer.tokens[-KEPT_TOKENS:] if is_graded else [])
        with self._lock:
            self.costs.seconds += time.perf_counter() - start
            self.costs.prompt_tokens += answer.num_prompt_tokens
            self.costs.tokens += answer.num_tokens
            self.costs.refused += not is_taken
            self._known[key] = answer
        if self._file is not None and is_taken:
            self._file.put(key, answer)
        return answer

    # ------------------------------------------------------------------ judging
    def preferences(self, duels: Sequence[Duel], is_counted: bool = False) -> list[float]:
        """Probability that the first response of each duel is preferred: the mean over both orders of showing them.

        ``is_counted``: Whether consistency and position bias are those of these duels, too.
        """
        orders = [
            ask_pair(duel.persona, duel.prompt, *sides, self.with_reason)
            for duel in duels
            for sides in ((duel.first, duel.second), (duel.second, duel.first))
        ]
        shown_first = self._shares(orders)
        out = []
        for forward, backward in zip(shown_first[::2], shown_first[1::2], strict=True):
            out.append((forward + 1 - backward) / 2)
            if is_counted:
                with self._lock:
                    self.costs.duels += 1
                    self.costs.consistent += (forward - 0.5) * (0.5 - backward) > 0 or forward == backward == 0.5
                    self.costs.first += (forward + backward) / 2
        return out

    def _shares(self, asked: Sequence[Messages]) -> list[float]:
        """Probability of the response shown first, each.

        The mean over the answers where these bring log-probabilities; else v of n votes count ``(v + 1/2) / (n + 1)``.
        """
        shares = []
        for read in self._votes(asked, BEGIN[True], probability):
            added = 0 if read and all(chance.is_graded for chance in read) else 1
            shares.append((sum(chance.value for chance in read) + added / 2) / (len(read) + added))
        return shares

    def scores(self, asked: Sequence[tuple[Persona, str, str]]) -> list[float]:
        """The mark of each response to a prompt, 1 to `BEST`; the middle where no answer gives one."""
        messages = [ask_score(*one, self.with_reason) for one in asked]
        votes = self._votes(messages, BEGIN[False], score)
        return [sum(read) / len(read) if read else (1 + BEST) / 2 for read in votes]

    def _votes(self, asked: Sequence[Messages], begin: str, read: Callable[[Answer], _Out | None]) -> list[list[_Out]]:
        """What ``read`` makes of the answers to each question about responses, without those it makes nothing of."""
        temperature = 1.0 if self.votes > 1 else 0.0
        max_tokens, told = (REASON_TOKENS, "") if self.with_reason else (LINE_TOKENS, begin)
        answers = self.ask(
            [
                Question(messages, max_tokens, temperature, number, told, True)
                for messages in asked
                for number in range(self.votes)
            ]
        )
        starts = range(0, len(answers), self.votes)
        return [self._read([read(answer) for answer in answers[start : start + self.votes]]) for start in starts]

    def _read(self, values: Sequence[_In | None]) -> list[_In]:
        """Those that are there; the others are counted.

        Raises:
            ValueError: If none of the first answers is a verdict: this model will give none.
        """
        read = [value for value in values if value is not None]
        with self._lock:
            self.costs.verdicts += len(values)
            self.costs.unparsed += len(values) - len(read)
            verdicts, unparsed, refused = self.costs.verdicts, self.costs.unparsed, self.costs.refused
        if verdicts >= HOPELESS and unparsed == verdicts:
            raise ValueError(
                f"expected answers that end with PREFERENCE: A or B, got none in {verdicts} ({refused} questions were "
                "refused); take a model that follows instructions, or give it room for a reason (model.with_reason)"
            )
        return read


class _AnswerFile:
    """Answers by the hash of their question, in a file that processes may share."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            columns = "key BLOB PRIMARY KEY, answer TEXT"
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS answers ({columns}) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"model.answers: expected an SQLite file, got {str(path)!r}: {error}") from error

    def get(self, key: bytes) -> Answer | None:
        """The answer, if there is one."""
        with self._lock:
            row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        text, tokens, num_prompt_tokens, num_tokens = json.loads(row[0])
        return Answer(text, [(token, likely) for token, likely in tokens], num_prompt_tokens, num_tokens)

    def put(self, key: bytes, answer: Answer) -> None:
        """Keep an answer."""
        with self._lock:
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
