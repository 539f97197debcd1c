"""RewardBench 2: does the reward that all users share still rank good answers above bad ones?

Paper: Malik et al. 2025, arXiv 2506.01937.
Protocol: in five subsets one of four answers is right, and a prompt counts where it has the highest reward (answers
that share the highest reward share the point). In ``Ties`` several answers are right; its score is that of the
benchmark's own code, see `ties_score`. The overall score is the mean of the subsets, each with the same weight.
Deviations: none known; a personalised method is scored as one user, by default the population, or by each basis.
Licence of the data: ODC-BY, by its dataset card.

Axes: B answers, P prompts, N comparisons of a right answer with a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from plm.arrays import Float64Array, IntArray
from plm.data.sources.corpus import PARQUET, corpus_files, corpus_rows, local_files
from plm.data.values import to_prompt

REPO = "allenai/reward-bench-2"
TIES = "Ties"
_COLUMNS = {name: name for name in ("id", "prompt", "chosen", "rejected", "subset")}


class Question(NamedTuple):
    """A prompt of the benchmark."""

    id: str
    subset: str
    prompt: str
    right: list[str]
    wrong: list[str]


class Answered(NamedTuple):
    """Rewards of the answers to a question."""

    id: str
    subset: str
    right: Sequence[float]
    wrong: Sequence[float]


class Answers(NamedTuple):
    """All answers to a benchmark, question by question, the right ones first."""

    prompts: list[str]
    texts: list[str]
    ids: list[str]
    """Of the questions."""
    right: IntArray
    """``(N,)`` rows of right answers."""
    wrong: IntArray
    """``(N,)`` the wrong answer that each is compared with."""


class Stats(NamedTuple):
    """What the Ties score needs of a prompt."""

    accurate: bool
    """Whether every right answer beats every wrong one."""
    gap: float
    """Worst right answer minus best wrong one."""
    spread: float
    """Best right answer minus worst right one."""


def ties_stats(right: Sequence[float], wrong: Sequence[float]) -> Stats:
    """Gap and spread of a prompt.

    Example:
        >>> ties_stats([3.0, 2.0], [0.5, -1.0])
        Stats(accurate=True, gap=1.5, spread=1.0)
    """
    gap = min(right) - max(wrong)
    return Stats(gap > 0, gap, max(right) - min(right))


def ties_score(ref: Mapping[str, Stats], tied: Mapping[str, Stats]) -> float:
    """Score of the Ties subset, whose prompts come in twos: one with a single right answer, one with many.

    0.3 accuracy (tied) + 0.3 accuracy (ref) + 0.2 share of gap(tied) > spread(tied)
    + 0.2 share of min(gap(ref), gap(tied)) > spread(tied)
    + 0.01 mean tanh(min(gap(ref), gap(tied)) / spread(tied) - 1).

    Args:
        ref: Prompt number -> stats of the prompt with a single right answer.
        tied: Prompt number -> stats of the prompt with several.

    Returns:
        The score, at most 1.01: a spread of zero with a positive gap counts as infinitely good, zero by zero as zero.
    """
    both = sorted(set(ref) & set(tied))
    if not both:
        raise ValueError(
            f"expected Ties prompts as ref:N and tied:N of the same N, got {sorted(ref)} and {sorted(tied)}"
        )
    spread = np.array([tied[number].spread for number in both])
    gap_tied = np.array([tied[number].gap for number in both])
    gap_both = np.minimum(gap_tied, [ref[number].gap for number in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.nan_to_num(np.tanh(gap_both / spread - 1), nan=0.0)
    terms = [
        (0.30, np.mean([stats.accurate for stats in tied.values()])),
        (0.30, np.mean([stats.accurate for stats in ref.values()])),
        (0.20, np.mean(gap_tied > spread)),
        (0.20, np.mean(gap_both > spread)),
        (0.01, np.mean(excess)),
    ]
    return float(sum(weight * value for weight, value in terms))


def point(right: float, wrong: Sequence[float]) -> float:
    """Credit of a prompt with one right answer: 1 where it is best, shared with those as good, else 0.

    Example:
        >>> point(1.0, [1.0, 0.2, 0.1]), point(1.0, [2.0, 0.2, 0.1])
        (0.5, 0.0)
    """
    best = max(right, *wrong)
    return 1 / (1 + sum(reward == best for reward in wrong)) if right == best else 0.0


def subset_scores(answered: Iterable[Answered]) -> dict[str, float]:
    """Score of every subset, and their mean as ``overall``.

    Raises:
        ValueError: If a Ties prompt has another id than ``ref:N`` or ``tied:N``.
    """
    points: dict[str, list[float]] = {}
    ties: dict[str, dict[str, Stats]] = {"ref": {}, "tied": {}}
    for entry in answered:
        if entry.subset != TIES:
            points.setdefault(entry.subset, []).append(point(min(entry.right), entry.wrong))
            continue
        kind, _, number = entry.id.partition(":")
        if kind not in ties or not number:
            raise ValueError(f"expected the id of a {TIES} prompt as ref:N or tied:N, got {entry.id!r}")
        ties[kind][number] = ties_stats(entry.right, entry.wrong)
    scores = {subset: float(np.mean(values)) for subset, values in sorted(points.items())}
    if any(ties.values()):
        scores[TIES] = ties_score(ties["ref"], ties["tied"])
    return {**scores, "overall": float(np.mean(list(scores.values())))}


def read_questions(path: str | None = None) -> list[Question]:
    """Read the prompts of a file with the columns of the benchmark; None = download it from the hub.

    Raises:
        ValueError: If a column is missing or a prompt lacks a right or a wrong answer.
    """
    if path is None:
        files = corpus_files(None, REPO, "default/test/*.parquet", PARQUET, "give it by --questions")
    else:
        files = local_files(path)
    questions = [
        Question(str(row["id"]), row["subset"], to_prompt(row["prompt"]), list(row["chosen"]), list(row["rejected"]))
        for row in corpus_rows(files, _COLUMNS)
    ]
    invalid = [question.id for question in questions if not (question.right and question.wrong)]
    if invalid or not questions:
        raise ValueError(
            f"expected prompts with right and wrong answers in {files}, got none for {invalid[:5] or 'any'}"
        )
    return questions


def answers_of(questions: Sequence[Question]) -> Answers:
    """List all answers, and compare each right one with each wrong one of its question."""
    rows = [(question, text) for question in questions for text in (*question.right, *question.wrong)]
    right, wrong, start = [], [], 0
    for question in questions:
        middle = start + len(question.right)
        end = middle + len(question.wrong)
        right += [row for row in range(start, middle) for _ in range(middle, end)]
        wrong += [*range(middle, end)] * len(question.right)
        start = end
    prompts, ids = [question.prompt for question, _ in rows], [question.id for question, _ in rows]
    return Answers(prompts, [text for _, text in rows], ids, np.array(right), np.array(wrong))


def answer(questions: Sequence[Question], rewards: Callable[[list[str], list[str]], Float64Array]) -> list[Answered]:
    """Give every answer its reward.

    Args:
        questions: The benchmark.
        rewards: Prompts and as many answers -> rewards ``(B,)``, such as `plm.learned_rewards.MethodReward.score`.

    Raises:
        ValueError: If a reward is not finite: no answer would be right, or wrong, by more than luck.
    """
    answers = answers_of(questions)
    scored = rewards(answers.prompts, answers.texts)
    if not np.isfinite(scored).all():
        row = int(np.flatnonzero(~np.isfinite(scored))[0])
        raise ValueError(
            f"expected finite rewards, got {scored[row]} for an answer to {answers.ids[row]!r} "
            f"({int((~np.isfinite(scored)).sum())} of {len(scored)} answers); the checkpoint may have diverged"
        )
    values = iter(scored.tolist())
    return [
        Answered(q.id, q.subset, [next(values) for _ in q.right], [next(values) for _ in q.wrong]) for q in questions
    ]
