"""Texts of policies on the same prompts: what they are worth to whom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from plm.arrays import Float64Array
from plm.backbones import Policy
from plm.data.sources.sampled import SampledPairs
from plm.generation import Sample, sample_logps
from plm.judging.compare import compare_policies, distinct
from plm.messages import nearest
from plm.method import PersonalizationMethod
from plm.recipe.prompts import read_prompts

UNALIGNED, POPULATION = "unaligned", "population"


_SHOWN = 3
"""Prompts whose texts are shown."""


class Written(NamedTuple):
    """What the unaligned policy, the population's and others wrote on the same prompts, and what it is worth."""

    unaligned: Policy
    prompts: Sequence[str]
    users: Sequence[str]
    """Names of the others."""
    texts: Sequence[Sequence[Sequence[Sample]]]
    """W x P x N, the unaligned policy first, the population's second."""
    rewards: Sequence[str]
    """Names."""
    raw: Float64Array
    """``(W, P, N, A)``."""


def judgement(
    written: Written, values: Float64Array, people: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that is reported of texts whose values to people are ``(W, P, N, V)``."""
    names = [UNALIGNED, POPULATION, *written.users]
    prompts, texts = written.prompts, written.texts
    means = [dict(zip(written.rewards, own.mean((0, 1)).tolist(), strict=True)) for own in written.raw]
    return {
        "num_prompts": len(prompts),
        "num_samples": len(texts[0][0]),
        "settings": {name: value for name, value in settings.items() if name != "batch_tokens"},
        **compare_policies(values, written.users, people),
        "texts": {
            name: describe(written.unaligned, prompts, rows, own)
            for name, rows, own in zip(names, texts, means, strict=True)
        },
        "samples": [
            {"prompt": prompt, **{name: rows[place][0].text for name, rows in zip(names, texts, strict=True)}}
            for place, prompt in enumerate(prompts[:_SHOWN])
        ],
    }


def held_out(path: str) -> list[str]:
    """Prompts of the test where rows have a split, else all.

    Raises:
        ValueError: If none belongs to the test.
    """
    prompts = read_prompts(path)
    if all(prompt.record.get("split") is None for prompt in prompts):
        return [prompt.text for prompt in prompts]
    kept = [prompt.text for prompt in prompts if prompt.record.get("split") == "test"]
    if not kept:
        raise ValueError(f"expected prompts of split test in {path}, got none among {len(prompts)}")
    return kept


def users_of(method: PersonalizationMethod, tastes: SampledPairs, asked: Sequence[str] | None, path: str) -> list[str]:
    """Users whose policies are judged.

    Raises:
        ValueError: If one is unknown, or nobody is named and no person is a user.
    """
    known = method.known_users.store.ids
    if asked is None:
        users = [person for person in tastes.weights if person in known]
        if not users:
            raise ValueError(f"none of the people {list(tastes.weights)} is a user of {path}; name users by --user")
        strangers = [person for person in tastes.weights if person not in known]
        if strangers:
            warnings.warn(f"{strangers} are no users of {path}: no texts are written for them", stacklevel=2)
        return users
    for user in asked:
        if user not in known:
            raise ValueError(f"no user {user!r}{nearest(user, known)} beside {path!r}; run plm adapt first")
    return list(dict.fromkeys(asked))


def score(tastes: SampledPairs, prompts: Sequence[str], texts: Sequence[Sequence[Sequence[Sample]]]) -> Float64Array:
    """Every reward of every text: ``(W, P, N, A)``.

    Raises:
        ValueError: If a reward gives what is no finite number.
    """
    shape = (len(texts), len(prompts), len(texts[0][0]))
    asked = [prompt for _ in texts for prompt in prompts for _ in range(shape[2])]
    flat = [one.text for rows in texts for row in rows for one in row]
    columns = []
    for name, reward in tastes.rewards.items():
        values = reward.score(asked, flat)
        if values.shape != (len(flat),) or not np.isfinite(values).all():
            raise ValueError(f"expected a finite score of each of {len(flat)} texts from the reward {name!r}")
        columns.append(values.reshape(shape))
    return np.stack(columns, axis=-1)


def describe(
    unaligned: Policy, prompts: Sequence[str], rows: Sequence[Sequence[Sample]], rewards: dict[str, float]
) -> dict[str, Any]:
    """Facts about the texts of one policy; perplexity is that of the unaligned policy."""
    flat = [one for row in rows for one in row]
    texts = [one.text for one in flat]
    logps = sample_logps(unaligned, [prompt for prompt, row in zip(prompts, rows, strict=True) for _ in row], flat)
    num_tokens = sum(len(one.token_ids) for one in flat)
    return {
        "rewards": rewards,
        "perplexity": math.exp(-float(logps.double().sum()) / num_tokens),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }
