"""``plm generate``: texts for users of a checkpoint."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plm.atomic import write_text
from plm.backbones import device
from plm.checkpoint import load_method
from plm.cli.options import OptionParser
from plm.cli.writing import PROMPTS, add_policy, add_settings, policy_of, progress_bar, settings_of
from plm.data.values import to_id
from plm.generation import best_of_n, sample
from plm.messages import nearest
from plm.method import PersonalizationMethod
from plm.method.abilities import Mixable, Writer
from plm.recipe.prompts import Prompt, read_prompts
from plm.types import UserState

_SHOWN = 200


def run(args: list[str]) -> None:
    """Write texts for users.

    Raises:
        ValueError: For whatever the user can mend.
    """
    parser = OptionParser(
        prog="plm generate",
        description="Responses to prompts, written for users of a checkpoint, all of them in the same batches.\n"
        "A method with a policy writes itself, a portfolio by the member that serves the user; any other method\n"
        "chooses the best of N that --policy writes. An unknown user, or nobody, gets the policy, or the reward, of\n"
        "the population: of a portfolio the one member whose largest regret is smallest if it alone serves everybody.\n"
        "Output rows: the prompt's with user_id, user_known and responses (chosen ones with rewards). A text depends\n"
        "on policy, prompt and seed, not on its batch.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint written by plm fit")
    parser.add_argument("--prompts", required=True, metavar="FILE", help=PROMPTS)
    parser.add_argument(
        "--user", nargs="+", metavar="ID", help="each writes on every prompt; default: the rows' user_id, or nobody"
    )
    parser.add_argument(
        "--mix",
        nargs="+",
        metavar="ID=WEIGHT",
        help="instead of --user: one writer whose reward is the weighted sum of theirs: weights 0.5 and 0.5 are the "
        "average of two users, 1 and 1 twice as strong",
    )
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts of each user (default 1)")
    parser.add_argument("--best_of", type=int, metavar="N", help="choose the best of N by the method's reward")
    parser.add_argument("--output", metavar="FILE", help="JSONL file; default: readable texts on standard output")
    add_settings(parser)
    add_policy(parser, required=False)
    options = parser.parse(args)
    if (options.policy is None) != (options.best_of is None):
        parser.error("--policy and --best_of go together: N texts of the policy are written, the best is chosen")
    if options.best_of is not None and options.num_samples > 1:
        parser.error(f"--best_of chooses one text, got --num_samples {options.num_samples}")
    if options.mix and (options.user or options.best_of):
        parser.error("--mix writes with one mixture of users: leave out --user, and --policy with --best_of")
    given = [" ".join(options.mix)] if options.mix else options.user
    if options.output and Path(options.output).is_dir():
        parser.error(f"--output: expected a file, got the folder {options.output!r}")
    prompts, users = asked(read_prompts(options.prompts, per_user=given is None), given, options.prompts)
    texts = [prompt.text for prompt in prompts]
    method = load_method(options.ckpt_path, device())
    if options.best_of is not None:
        with progress_bar("writing", options.best_of * len(set(texts))) as tell:
            best = best_of_n(
                policy_of(options),
                method,
                texts,
                n=options.best_of,
                user_id=users,
                progress=tell,
                **settings_of(options),
            )
        made: list[dict[str, Any]] = [{"responses": [one.text], "rewards": [one.reward]} for one in best]
    elif isinstance(method, Writer):
        with progress_bar("writing", options.num_samples * len(texts)) as tell:
            written = sample(
                method,
                texts,
                mixture(method, options.mix) if options.mix else None,
                rows=torch.zeros(len(texts), dtype=torch.long) if options.mix else None,
                user_id=None if options.mix else users,
                num_samples=options.num_samples,
                progress=tell,
                **settings_of(options),
            )
        made = [{"responses": [one.text for one in row]} for row in written]
    else:
        raise ValueError(
            f"{type(method).__name__} has no policy that writes: give --policy MODEL --best_of N, and the texts are "
            "chosen by its reward"
        )
    store = method.known_users.store
    whose: list[str | None] = [None] * len(prompts) if users is None else [*users]
    rows = [
        {
            **prompt.record,
            "prompt": prompt.text,
            "user_id": user,
            "user_known": bool(options.mix) or (user is not None and user in store),
            **own,
        }
        for prompt, user, own in zip(prompts, whose, made, strict=True)
    ]
    if options.output:
        write_text(options.output, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    else:
        sys.stdout.write("\n".join(map(_readable, rows)))


def mixture(method: PersonalizationMethod, mix: Sequence[str]) -> UserState:
    """The state of one mixture of stored users.

    Raises:
        ValueError: If the method's users cannot be mixed, a user is unknown or named twice, or weights are not finite
            or have no positive sum.
    """
    if not isinstance(method, Mixable):
        raise ValueError(f"users of {type(method).__name__} cannot be mixed; give --user")
    weights: dict[str, float] = {}
    for part in mix:
        user, _, weight = part.rpartition("=")
        if user in weights:
            raise ValueError(f"--mix: expected every user once, got {user!r} again in {part!r}; add up the weights")
        try:
            weights[user] = float(weight)
        except ValueError:
            raise ValueError(f"--mix: expected ID=WEIGHT with a number, got {part!r}") from None
        if not math.isfinite(weights[user]):
            raise ValueError(f"--mix: expected ID=WEIGHT with a finite number, got {part!r}")
        if user not in method.known_users.store:
            raise ValueError(f"--mix: no user {user!r}{nearest(user, method.known_users.store.ids)}")
    given = " ".join(mix)
    if sum(weights.values()) <= 0:
        raise ValueError(f"--mix: expected weights with a positive sum, got {given!r}")
    states = method.known_users(list(weights))
    return method.mixed(states, torch.tensor([list(weights.values())]))


def asked(prompts: Sequence[Prompt], users: Sequence[str] | None, path: str) -> tuple[list[Prompt], list[str] | None]:
    """Prompts and the user of each: all of ``users`` on every prompt, else who stands in the rows; None = nobody.

    Raises:
        ValueError: If some rows name a user and others do not.
    """
    if users is not None:
        distinct = list(dict.fromkeys(users))
        return [prompt for prompt in prompts for _ in distinct], distinct * len(prompts)
    named = [prompt.record.get("user_id") for prompt in prompts]
    if all(user is None for user in named):
        return list(prompts), None
    if any(user is None for user in named):
        raise ValueError(f"expected a user_id in all rows of {path} or in none, got it in some; give --user ID")
    try:
        return list(prompts), [to_id(user) for user in named]
    except ValueError as error:
        raise ValueError(f"user_id of a row of {path}: {error}") from error


def _readable(row: dict[str, Any]) -> str:
    """Prompt and texts for the terminal."""
    prompt = row["prompt"] if len(row["prompt"]) <= _SHOWN else "..." + row["prompt"][-_SHOWN:]
    who = row["user_id"] or "population"
    rewards = [f" ({reward:.3f})" for reward in row.get("rewards", [])] or [""] * len(row["responses"])
    texts = [f"[{who}]{reward} {text.strip()}\n" for text, reward in zip(row["responses"], rewards, strict=True)]
    return f"{prompt}\n{''.join(texts)}"
