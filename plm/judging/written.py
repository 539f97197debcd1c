"""Judge policies by their texts on the same prompts: what the texts are worth to whom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from plm.arrays import Float64Array
from plm.backbones import Backbone, CausalLM, Policy, RemotePolicy, device
from plm.data.rewards import scores_of
from plm.data.sources.sampled import SampledPairs
from plm.generation import Sample, best_responses, sample, sample_logps, sample_texts
from plm.judging.compare import compare_policies, distinct
from plm.messages import no_writer
from plm.method import PersonalizationMethod
from plm.method.abilities import Writer

UNALIGNED, POPULATION = "unaligned", "population"
_SHOWN = 3
"""Prompts whose texts are shown in a report."""


class Written(NamedTuple):
    """Texts of the unaligned policy, the population's and others on the same prompts, and the rewards of the texts."""

    unaligned: Policy | RemotePolicy
    prompts: Sequence[str]
    users: Sequence[str]
    """Names of the other policies."""
    texts: Sequence[Sequence[Sequence[Sample]]]
    """W x P x N, the unaligned policy first, the population's second."""
    rewards: Sequence[str]
    """Names of the rewards."""
    raw: Float64Array
    """``(W, P, N, A)`` rewards as they come."""


def judgement(
    written: Written, values: Float64Array, people: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect what is reported of texts.

    Args:
        written: The texts.
        values: ``(W, P, N, V)`` what each text is worth to each person.
        people: V names.
        settings: Arguments of `plm.generation.sample` that the texts were drawn with.
    """
    names = [UNALIGNED, POPULATION, *written.users]
    prompts, texts = written.prompts, written.texts
    means = [dict(zip(written.rewards, raw.mean((0, 1)).tolist(), strict=True)) for raw in written.raw]
    return {
        "num_prompts": len(prompts),
        "num_samples": len(texts[0][0]),
        "settings": {name: value for name, value in settings.items() if name != "batch_tokens"},
        **compare_policies(values, written.users, people),
        "texts": {
            name: describe(written.unaligned, prompts, rows, rewards)
            for name, rows, rewards in zip(names, texts, means, strict=True)
        },
        "samples": [
            {"prompt": prompt, **{name: rows[place][0].text for name, rows in zip(names, texts, strict=True)}}
            for place, prompt in enumerate(prompts[:_SHOWN])
        ],
    }


def judge_users(
    method: PersonalizationMethod,
    tastes: SampledPairs,
    prompts: Sequence[str],
    users: Sequence[str],
    *,
    num_samples: int,
    settings: Mapping[str, Any],
    policy: Policy | RemotePolicy | None = None,
    best_of: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Let the unaligned policy, the population's and those of users write on the same prompts, and value the texts.

    Args:
        method: A method of ``load_method`` whose users write, or with ``policy`` any.
        tastes: Rewards, and the people who weigh them.
        prompts: P prompts that nothing was trained on.
        users: Users whose policies write.
        num_samples: Texts of each policy on each prompt.
        settings: Further arguments of `plm.generation.sample`, such as ``max_new_tokens``.
        policy: The unaligned policy, where it writes for everybody and each text of population and users is the best
            of its texts by the method's reward.
        best_of: Of how many; where all of them are empty, the first.
        on_progress: Called with the number of texts finished since the last call.

    Returns:
        See `judgement`.

    Raises:
        ValueError: If the method does not write, a reward is the same for all texts of the unaligned policy, or there
            is ``best_of`` without ``policy``.
    """
    if policy is None and best_of != 1:
        raise ValueError(f"expected best_of=1 without a policy whose texts are chosen from, got {best_of!r}")
    drawn: dict[str, Any] = {**settings, "progress": on_progress}
    if policy is None:
        policy, texts = _written(method, prompts, users, num_samples, drawn)
    else:
        texts = _chosen(policy, method, prompts, users, num_samples, best_of, drawn)
        settings = {**settings, "best_of": best_of}
    raw = score(tastes, prompts, texts)
    scale = np.ones_like(raw[0, 0, 0]) if not tastes.z_score else raw[0].std(axis=(0, 1))
    shift = np.zeros_like(scale) if not tastes.z_score else raw[0].mean(axis=(0, 1))
    flat = [name for name, size in zip(tastes.rewards, scale.tolist(), strict=True) if size == 0]
    if flat:
        raise ValueError(f"rewards {flat} are the same for all texts of the unaligned policy; leave them out")
    values = np.stack([(raw - shift) / scale @ weights for weights in tastes.weights.values()], axis=-1)
    written = Written(policy, prompts, users, texts, list(tastes.rewards), raw)
    return judgement(written, values, list(tastes.weights), settings)


def _written(
    method: PersonalizationMethod, prompts: Sequence[str], users: Sequence[str], num_samples: int, drawn: dict[str, Any]
) -> tuple[Policy, list[list[list[Sample]]]]:
    """The unaligned policy, and W x P x N texts of it, of the population and of users, each by their own policy."""
    if not isinstance(method, Writer):
        raise ValueError(no_writer(type(method).__name__))
    backbone = Backbone.from_spec(method.policy.backbone.spec())
    assert isinstance(backbone, CausalLM)
    unaligned = Policy(backbone).to(device())
    drawn = {**drawn, "num_samples": num_samples}
    texts = [sample(unaligned, prompts, **drawn), sample(method, prompts, **drawn)]
    of_users = sample(method, [*prompts] * len(users), user_id=[user for user in users for _ in prompts], **drawn)
    texts += [of_users[start : start + len(prompts)] for start in range(0, len(of_users), len(prompts))]
    return unaligned, texts


def _chosen(
    policy: Policy | RemotePolicy,
    method: PersonalizationMethod,
    prompts: Sequence[str],
    users: Sequence[str],
    num_samples: int,
    best_of: int,
    drawn: dict[str, Any],
) -> list[list[list[Sample]]]:
    """W x P x N texts of a policy: the first of every ``best_of``, and the best by the population and by users.

    Of texts that are all empty, of which a method may know no reward, everybody gets the first.
    """
    size = best_of * num_samples
    if isinstance(policy, RemotePolicy):
        texts = sample_texts(policy, prompts, num_samples=size, **drawn)
        pool = [[Sample(text, ()) for text in row] for row in texts]
    else:
        pool = sample(policy, prompts, num_samples=size, **drawn)
    states, _ = method.known_users.lookup([None, *users])
    chosen: list[list[list[Sample]]] = [[[] for _ in prompts] for _ in (None, *users)]
    for start in range(0, size, best_of):
        parts = [row[start : start + best_of] for row in pool]
        filled = [row for row, part in enumerate(parts) if any(one.text for one in part)]
        number = np.zeros((len(chosen), len(prompts)), dtype=np.int64)
        if filled:
            responses = {prompts[row]: [one.text for one in parts[row]] for row in filled}
            state_row = torch.arange(len(chosen)).repeat_interleave(len(filled))
            best = best_responses(method, [prompts[row] for row in filled] * len(chosen), responses, states, state_row)
            number[:, filled] = np.array([one.number for one in best]).reshape(len(chosen), len(filled))
        for (writer, row), place in np.ndenumerate(number):
            chosen[writer][row].append(parts[row][place])
    return [[row[::best_of] for row in pool], *chosen]


def users_to_judge(
    method: PersonalizationMethod, tastes: SampledPairs, names: Sequence[str] | None, path: str
) -> list[str]:
    """Choose the users whose policies are judged.

    Args:
        method: A method of ``load_method``.
        tastes: Its people are the default, as far as they are users.
        names: Users that were asked for; None = the default.
        path: The checkpoint, for messages.

    Raises:
        ValueError: If one is unknown, or nobody is named and no person is a user.
    """
    known = method.known_users.store
    if names is None:
        users = [person for person in tastes.weights if person in known]
        if not users:
            raise ValueError(f"none of the people {list(tastes.weights)} is a user of {path}; name users by --user")
        others = [person for person in tastes.weights if person not in known]
        if others:
            warnings.warn(f"{others} are no users of {path}: no texts are written for them", stacklevel=2)
        return users
    for name in names:
        if name not in known:
            raise ValueError(f"no user {name!r} beside {path!r}; run plm adapt first")
    return list(dict.fromkeys(names))


def score(tastes: SampledPairs, prompts: Sequence[str], texts: Sequence[Sequence[Sequence[Sample]]]) -> Float64Array:
    """Compute every reward of every text: ``(W, P, N, A)``.

    Raises:
        ValueError: If a reward is no finite number.
    """
    shape = (len(texts), len(prompts), len(texts[0][0]))
    prompt_of = [prompt for _ in texts for prompt in prompts for _ in range(shape[2])]
    flat = [one.text for rows in texts for row in rows for one in row]
    return scores_of(tastes.rewards, prompt_of, flat).reshape(*shape, -1)


def _perplexity(unaligned: Policy | RemotePolicy, prompts: Sequence[str], rows: Sequence[Sequence[Sample]]) -> float:
    """Of texts by the unaligned policy; nan where a server has it, which gives texts alone."""
    if isinstance(unaligned, RemotePolicy):
        return math.nan
    flat = [one for row in rows for one in row]
    logps = sample_logps(unaligned, [prompt for prompt, row in zip(prompts, rows, strict=True) for _ in row], flat)
    return math.exp(-float(logps.double().sum()) / sum(len(one.token_ids) for one in flat))


def describe(
    unaligned: Policy | RemotePolicy,
    prompts: Sequence[str],
    rows: Sequence[Sequence[Sample]],
    rewards: dict[str, float],
) -> dict[str, Any]:
    """Describe the texts of one policy: rewards, length, variety, and perplexity by the unaligned policy."""
    texts = [one.text for row in rows for one in row]
    return {
        "rewards": rewards,
        "perplexity": _perplexity(unaligned, prompts, rows),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }
