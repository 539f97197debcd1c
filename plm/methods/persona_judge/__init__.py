"""PersonaJudge: a language model reads who a user is, and judges for the user; all that is learned is a text.

Paper: Ryan et al. 2025, "SynthesizeMe!", arXiv 2506.05598 (ACL 2025): personas and examples chosen on held-out pairs.
Reference code: SALT-NLP/SynthesizeMe, read for its algorithm alone.
Deviations: every pair is judged in both orders, and the probability is read from the verdict's log-probabilities; a
    user's pairs are ordered by a hash of their texts, so that their order says nothing; reasons are drawn once, for the
    persona and the examples beside it; the search stops at the first candidate that is good enough; a persona that
    does worse on held-out pairs than knowing nothing is dropped; instructions are ours and not optimised.

Axes: B pairs or responses, U users, S support pairs of one user (padded), L bytes of a state.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from plm.backbones import Chat, LocalChat, Patience, PlainText, RemoteChat, is_loopback
from plm.messages import Problems
from plm.method import PersonalizationMethod
from plm.methods.persona_judge.judge import BudgetError, Duel, Judge
from plm.methods.persona_judge.persona import Search, learn, most_questions
from plm.methods.persona_judge.prompts import NOBODY, Demo, Pair, Persona
from plm.types import Context, PreferenceBatch, Tokens, UserState

LEAST_CHANCE = 0.01
"""Margins are log-odds of probabilities from this one to 1 less it."""


class PersonaJudge(PersonalizationMethod):
    """A language model that is told about each user and asked which of two responses the user prefers.

    The state of a user is a text: a persona that the model wrote from the user's pairs, and a few of them as worked
    examples. Nothing is trained; the population is the same judge without both. Data need ``backbone: PlainText``.

    The margin of a pair is the log-odds of the answers to the pair, shown in both orders. `score` cannot compare, so it
    asks for a mark from 1 to 9: its differences are no margins.

    No checkpoint says whom to ask, or where answers are kept: a loaded method reads the environment.

    Args:
        num_users: Number of seen users; linked from the data in recipes.
        feature_dim: Linked from the data, not read.
        backbone: `plm.backbones.PlainText`, as ``{class_path, init_args}``; linked from the data.
        policy: The model: a folder or an id on the hub, read in this process; with ``policy_url`` the name it has
            there, null = the only one. Without both, the environment says: ``PLM_JUDGE`` and ``PLM_JUDGE_URL``.
        policy_url: An OpenAI-compatible server, such as ``http://localhost:8000/v1``; its key is ``PLM_POLICY_KEY``.
        allow_remote: Whether pairs of users may be sent to the server where ``policy_url`` is not this machine.
        num_demos: Most worked examples in a state.
        bootstraps: Sets of examples with reasons that are tried, besides pairs without reasons.
        max_pairs: Most pairs of a user that are read.
        with_reason: Whether the judge gives a reason before its verdict.
        votes: Answers to each question, drawn at temperature 1 where there are several.
        max_calls: Most questions that the model is asked by this process; null = any number.
        answers: SQLite file in which all answers are kept, so that none is asked for again; null = none. It holds
            personas, and nothing that deletes users finds them there: delete the file.
        max_bytes: Width L of the state; examples that do not fit are left out.
        concurrency: Questions under way at once.
        timeout: Seconds after which a server has not answered.
        seed: Of what is random: sides, order and number of examples.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "tokens"
    user_tables: tuple[str, ...] = ("text", "length", "num_pairs")
    search_space: ClassVar[dict[str, list[Any]]] = {"num_demos": [0, 2, 4], "bootstraps": [0, 2]}
    text: Tensor
    length: Tensor
    num_pairs: Tensor

    def __init__(
        self,
        num_users: int,
        feature_dim: int = 1,
        backbone: dict[str, Any] | None = None,
        *,
        policy: str | None = None,
        policy_url: str | None = None,
        allow_remote: bool = False,
        num_demos: int = 4,
        bootstraps: int = 2,
        max_pairs: int = 20,
        with_reason: bool = False,
        votes: int = 1,
        max_calls: int | None = None,
        answers: str | None = None,
        max_bytes: int = 16384,
        concurrency: int = 16,
        timeout: float = 120.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_users, feature_dim, backbone)
        for name in ("policy", "policy_url", "allow_remote", "answers", "max_calls"):  # of this process alone
            self.hparams.pop(name, None)
        problems = Problems("model.")
        problems.integers(0, num_demos=num_demos, bootstraps=bootstraps)
        problems.integers(1, max_pairs=max_pairs, votes=votes, max_bytes=max_bytes, concurrency=concurrency)
        problems.at_least(0, max_calls=max_calls)
        problems.positive(timeout=timeout)
        problems.say(
            f"model.policy_url: {policy_url} is not this machine, and pairs of users would be sent there; set "
            "model.allow_remote to true if they may be",
            when=policy_url is not None and not allow_remote and not is_loopback(policy_url),
        )
        problems.check()
        self.policy, self.policy_url, self.patience = policy, policy_url, Patience(retries=4, timeout=timeout)
        self.search, self.max_bytes = Search(num_demos, bootstraps, max_pairs, seed, max_bytes), max_bytes
        self.judge = Judge(
            self._chat,
            concurrency=concurrency,
            votes=votes,
            with_reason=with_reason,
            max_calls=max_calls,
            answers=answers,
        )
        self.register_buffer("text", torch.zeros(num_users, max_bytes, dtype=torch.uint8))
        self.register_buffer("length", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self._is_learned = False

    def _chat(self) -> Chat:
        """The language model.

        Raises:
            ValueError: If nobody says which, or it cannot be asked.
        """
        policy, url = self.policy, self.policy_url
        if policy is None and url is None:
            policy, url = os.environ.get("PLM_JUDGE"), os.environ.get("PLM_JUDGE_URL")
        if url is not None:
            return RemoteChat(url, policy, self.patience)
        if policy is None:
            raise ValueError(
                "model.policy: expected a language model to ask, got none; set model.policy_url or model.policy, or "
                "for a checkpoint the environment variables PLM_JUDGE_URL or PLM_JUDGE"
            )
        return LocalChat(policy)

    # ------------------------------------------------------------------ states are texts
    def states(self, personas: Sequence[Persona], num_pairs: Tensor) -> UserState:
        """States ``U`` of personas, which say on how many pairs ``(U,)`` they rest.

        Raises:
            ValueError: If a persona does not fit into ``max_bytes``.
        """
        text = torch.zeros(len(personas), self.max_bytes, dtype=torch.uint8)
        written = [persona.to_bytes(self.max_bytes) for persona in personas]
        for row, content in enumerate(written):
            text[row, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
        length = torch.tensor([len(content) for content in written], dtype=torch.long)
        device = self.length.device
        return UserState({"text": text.to(device), "length": length.to(device)}, num_pairs.to(device))

    @staticmethod
    def personas(users: UserState) -> list[Persona]:
        """What the judge is told about each of U users."""
        text, length = users.tensors["text"].cpu().numpy(), users.tensors["length"].tolist()
        known: dict[bytes, Persona] = {}
        found = []
        for row, size in enumerate(length):
            written = text[row, :size].tobytes()
            if written not in known:
                known[written] = Persona.from_bytes(written)
            found.append(known[written])
        return found

    def user_states(self, user_index: Tensor) -> UserState:
        """States of seen users: ``(B,)`` -> leading axis B."""
        tensors = {"text": self.text[user_index], "length": self.length[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The judge who knows nobody."""
        text = self.text.new_zeros(num_users, self.max_bytes)
        return UserState({"text": text, "length": self.length.new_zeros(num_users)}, self.length.new_zeros(num_users))

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """Nobody."""
        return torch.zeros_like(self.population_state(1).tensors.get(name, self.length[:1].new_zeros(1))[0])

    # ------------------------------------------------------------------ learning
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Zero: nothing is trained."""
        return {"loss": torch.zeros((), requires_grad=True)}

    def setup(self, stage: str) -> None:
        """Also refuse several processes, which would each ask everything.

        Raises:
            ValueError: For them, or other tokens than bytes.
        """
        made_by = getattr(getattr(self.trainer, "datamodule", None), "backbone", None)
        if made_by is not None and not isinstance(made_by, PlainText):
            raise ValueError(
                f"PersonaJudge needs data.backbone to be a plm.backbones.PlainText, got {type(made_by).__name__}"
            )
        if self.trainer.world_size > 1:
            raise ValueError(
                f"trainer.devices: expected 1 for PersonaJudge, got {self.trainer.world_size} processes; its language "
                "model may run elsewhere, on as many devices as you like (model.policy_url)"
            )
        super().setup(stage)

    def on_train_start(self) -> None:
        """Users are learned anew by every fit."""
        self._is_learned = False
        super().on_train_start()

    def refresh_users(self) -> None:
        """Learn every seen user from the training pairs, once in a fit.

        Raises:
            ValueError: If that may take more questions than are allowed; nobody is asked then.
        """
        if self._is_learned:
            return
        pairs: dict[int, list[Pair]] = {}
        counts = torch.zeros_like(self.num_pairs)
        for batch in self.train_pass():
            counts += torch.bincount(batch.user_index, minlength=self.num_users)
            for user, pair in _untied(batch):
                pairs.setdefault(user, []).append(pair)
        users = sorted(pairs)
        found = self.states(self._learned([pairs[user] for user in users]), counts[users])
        self.text[users], self.length[users] = found.tensors["text"], found.tensors["length"]
        self.num_pairs.copy_(counts)
        self._is_learned = True

    def _learned(self, pairs: Sequence[Sequence[Pair]]) -> list[Persona]:
        """The personas of users with such pairs, learned at once."""
        most = sum(most_questions(len(set(some)), self.search) for some in pairs)
        left = math.inf if self.judge.max_calls is None else self.judge.max_calls - self.judge.costs.calls
        left = math.inf if self.judge.keeps_answers else left  # most may be known
        if most > left:
            raise BudgetError(
                f"model.max_calls: learning {len(pairs):,} users takes up to {most:,} questions, {left:,} are left; "
                "raise it, or lower model.bootstraps or model.max_pairs"
            )
        return self.judge.each(lambda some: learn(self.judge, some, self.search), pairs)

    def _adapt(self, context: Context) -> UserState:
        pairs: list[list[Pair]] = [[] for _ in range(context.num_users)]
        for user, pair in _untied(context.pairs):
            pairs[user].append(pair)
        return self.states(self._learned(pairs), context.mask.sum(-1))

    # ------------------------------------------------------------------ judging
    def _margin(self, batch: PreferenceBatch, users: UserState) -> Tensor:
        """Log-odds ``(B,)`` that chosen is preferred, asked in both orders."""
        return self._margins(_pairs(batch), self.personas(users))

    def _margins(self, pairs: Sequence[Pair], personas: Sequence[Persona]) -> Tensor:
        duels = [Duel(persona, *pair) for persona, pair in zip(personas, pairs, strict=True)]
        chances = torch.tensor(self.judge.preferences(duels, is_counted=True), dtype=torch.float64)
        return torch.logit(chances, LEAST_CHANCE).to(self.reference)

    @torch.no_grad()
    def evaluate(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Compute margins as every method does, but copy no state for every pair."""
        if batch.context is not None and batch.context_row is not None:
            users, rows, other_rows = self.adapt(batch.context), batch.context_row, batch.other_row
        else:
            users = UserState({"text": self.text, "length": self.length}, self.num_pairs)
            rows, other_rows = batch.user_index, batch.other_index
        personas, pairs = self.personas(users), _pairs(batch)
        facts = {"margin": self._margins(pairs, [personas[row] for row in rows.tolist()])}
        if other_rows is not None:
            facts["other_margin"] = self._margins(pairs, [personas[row] for row in other_rows.tolist()])
        if batch.num_shots is None:
            facts["population_margin"] = self._margins(pairs, [NOBODY] * len(pairs))
        return facts

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """The mark from 1 to 9 of each response."""
        return self._score_rows(responses, users, torch.arange(users.num_users))

    def _score_rows(self, responses: Tensor | Tokens, users: UserState, rows: Tensor, **prompts: Any) -> Tensor:
        assert isinstance(responses, Tokens)
        personas, texts = self.personas(users), PlainText.texts(responses)
        asked = [(personas[row], *text) for row, text in zip(rows.tolist(), texts, strict=True)]
        return torch.tensor(self.judge.scores(asked)).to(self.reference)

    def report(self) -> dict[str, float]:
        """What was asked, how often the answer was none, and whether the order of the responses mattered."""
        found = self.judge.costs.report()
        if found["judge_unparsed"] > 0.1:
            warnings.warn(
                f"{100 * found['judge_unparsed']:.0f} % of the judge's answers were no verdict and count as ties",
                stacklevel=2,
            )
        return found


def _pairs(batch: PreferenceBatch) -> list[Pair]:
    """The texts of B pairs."""
    chosen, rejected = map(PlainText.texts, batch.tokens)
    return [Pair(prompt, better, worse) for (prompt, better), (_, worse) in zip(chosen, rejected, strict=True)]


def _untied(batch: PreferenceBatch) -> list[tuple[int, Pair]]:
    """The user index and the texts of the pairs in which one response was preferred."""
    batch = batch.take(~batch.tie & (batch.weight > 0))
    return list(zip(batch.user_index.tolist(), _pairs(batch), strict=True))


__all__ = ["NOBODY", "Demo", "Pair", "Persona", "PersonaJudge"]
