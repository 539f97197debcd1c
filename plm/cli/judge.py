"""``plm judge``: do the users' policies of a checkpoint write what they like?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from rich.console import Console

from plm.backbones import Backbone, CausalLM, Policy
from plm.checkpoint import KnownUsers, load_method
from plm.cli import judge_report
from plm.cli.options import OptionParser
from plm.cli.prompts import read_prompts
from plm.cli.tastes import REWARDS, read_tastes
from plm.cli.writing import PROMPTS, add_settings, device, progress_bar, settings_of
from plm.config import nearest
from plm.data.rewards.reward import DoubleArray
from plm.data.sources.sampled import SampledPairs
from plm.evaluation.policies import compare_policies, distinct
from plm.generation import Sample, Writes, sample, sample_logps
from plm.method import PersonalizationMethod

UNALIGNED, POPULATION = "unaligned", "population"
_SHOWN = 3
"""Prompts whose texts are shown."""


def run(args: list[str]) -> None:
    """Write, value, compare and report.

    Raises:
        ValueError: For whatever the user can mend.
    """
    parser = OptionParser(
        prog="plm judge",
        description="Whether each user's policy writes what the user likes. Users' policies, the population's (of an\n"
        "unknown user) and the unaligned one, the language model as it is, write on the same held-out prompts with\n"
        "the same seeds; every person of --rewards values all texts, in standard deviations of the unaligned policy's\n"
        "texts (z_score: false: as they come). Intervals resample prompts. Where rows have a split, only those of the\n"
        "test are used.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint of a method with a policy")
    parser.add_argument("--prompts", required=True, metavar="FILE", help=PROMPTS)
    parser.add_argument("--rewards", required=True, metavar="YAML", help=REWARDS)
    parser.add_argument("--user", nargs="+", metavar="ID", help="default: the people who are users of the checkpoint")
    parser.add_argument("--num_prompts", type=int, metavar="N", help="the first N prompts (default: all)")
    parser.add_argument("--num_samples", type=int, default=4, metavar="N", help="texts on each prompt (default 4)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for judge.md and judge.json; default: <stem>.judge beside the checkpoint",
    )
    add_settings(parser)
    options = parser.parse(args)
    for name in ("num_prompts", "num_samples"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected an integer >= 1, got {getattr(options, name)}")
    tastes = read_tastes(options.rewards, [])
    prompts = held_out(options.prompts)[: options.num_prompts]
    method = load_method(options.ckpt_path, device())
    if not isinstance(method, Writes):
        raise ValueError(f"plm judge needs a method with a policy, got {type(method).__name__}")
    users = users_of(method, tastes, options.user, options.ckpt_path)
    unaligned = Policy(cast(CausalLM, Backbone.from_spec(method.policy.backbone.spec()))).to(device())
    settings = settings_of(options)
    with progress_bar("writing", (2 + len(users)) * len(prompts) * options.num_samples) as tell:
        more: dict[str, Any] = {**settings, "num_samples": options.num_samples, "progress": tell}
        texts = [sample(unaligned, prompts, **more), sample(method, prompts, **more)]
        mixed = sample(method, prompts * len(users), user_id=[user for user in users for _ in prompts], **more)
    texts += [mixed[start : start + len(prompts)] for start in range(0, len(mixed), len(prompts))]
    raw = score(tastes, prompts, texts)
    scale = np.ones_like(raw[0, 0, 0]) if not tastes.z_score else raw[0].std(axis=(0, 1))
    shift = np.zeros_like(scale) if not tastes.z_score else raw[0].mean(axis=(0, 1))
    flat = [name for name, size in zip(tastes.rewards, scale.tolist(), strict=True) if size == 0]
    if flat:
        raise ValueError(f"rewards {flat} are the same for all texts of the unaligned policy; leave them out")
    values = np.stack([(raw - shift) / scale @ weights for weights in tastes.weights.values()], axis=-1)
    written = Written(unaligned, prompts, users, texts, list(tastes.rewards), raw)
    result = judgement(written, values, list(tastes.weights), settings)
    judge_report.show(result, Console())
    folder = Path(options.output or Path(options.ckpt_path).with_suffix(".judge"))
    judge_report.write(result, folder)
    print(f"written to {folder}")


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
    raw: DoubleArray
    """``(W, P, N, A)``."""


def judgement(
    written: Written, values: DoubleArray, people: Sequence[str], settings: Mapping[str, Any]
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
    assert isinstance(method.find_users, KnownUsers)
    known = method.find_users.store.ids
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


def score(tastes: SampledPairs, prompts: Sequence[str], texts: Sequence[Sequence[Sequence[Sample]]]) -> DoubleArray:
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
