"""Files of texts: responses of a policy to prompts, and texts for users, written so that a killed run can go on."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from plm.atomic import json_line, only_writer, replace, write_text
from plm.backbones import Policy, RemotePolicy
from plm.generation import best_of_n, mixture, sample, sample_texts
from plm.messages import no_writer
from plm.method import PersonalizationMethod
from plm.method.abilities import Writer
from plm.recipe.prompts import Prompt, prompt_of
from plm.users import shared_hash

CHUNK = 1024
"""Responses written between two visits to the file: what a kill costs at most."""


def write_samples(
    policy: Policy | RemotePolicy,
    prompts: list[Prompt],
    output: Path,
    *,
    num_samples: int,
    settings: dict[str, Any],
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Write a row for every prompt that the file does not hold yet: the prompt's own row with ``responses``.

    Beside the file stands ``.NAME.settings.json``, what its texts were drawn with.

    Args:
        policy: The language model that writes, here or behind a server.
        prompts: Prompts, each once.
        output: JSONL file; it grows while texts are written.
        num_samples: Responses to each prompt.
        settings: Further arguments of `plm.generation.sample`, such as ``max_new_tokens``.
        on_progress: Called with the number of responses finished since the last call, those found in the file first.

    Returns:
        Number of prompts that were written.

    Raises:
        ValueError: If the file was written with other settings or by something else, or is being written.
    """
    drawn = {name: value for name, value in settings.items() if name != "batch_tokens"}
    model = {f"policy {name}": value for name, value in _key(policy).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another plm sample is writing {output}; wait for it, or share the work by --shard"
    with only_writer(output.with_name(f".{output.name}.lock"), busy):
        done = _prepare(output, {**model, "num_samples": num_samples, **drawn})
        missing = [prompt for prompt in prompts if prompt.text not in done]
        step = max(1, _texts_at_once(policy) // num_samples)
        if on_progress is not None:
            on_progress((len(prompts) - len(missing)) * num_samples)
        with output.open("a", encoding="utf-8") as file:
            for start in range(0, len(missing), step):
                part = missing[start : start + step]
                texts = [prompt.text for prompt in part]
                samples = sample_texts(policy, texts, num_samples=num_samples, progress=on_progress, **settings)
                for prompt, row in zip(part, samples, strict=True):
                    record = {**prompt.record, "prompt": prompt.value, "responses": row}
                    file.write(json_line(record))
                file.flush()
                os.fsync(file.fileno())
    return len(missing)


def prompts_of_share(prompts: list[Prompt], share: tuple[int, int]) -> list[Prompt]:
    """The prompts of one of several processes, ``share = (i, n)``: every n-th, from the i-th on."""
    index, count = share
    return prompts[index - 1 :: count]


def _prepare(output: Path, metadata: dict[str, Any]) -> set[str]:
    """Return the prompts that are done already; a line that a kill has cut short is removed.

    Raises:
        ValueError: If the file was written with other settings, or is no file of samples.
    """
    settings = output.with_name(f".{output.name}.settings.json")
    if not output.exists():
        write_text(settings, json.dumps(metadata))
        write_text(output, "")
        return set()
    if not settings.is_file():
        raise ValueError(f"{output} exists and was not written by plm sample; choose another --output or remove it")
    before = json.loads(settings.read_text(encoding="utf-8"))
    changed = [
        f"{name}={before.get(name)!r}, not {value!r}" for name, value in metadata.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{output} was made with {', '.join(changed)}; choose another --output or remove it")
    return {prompt_of(json.loads(line)).text for line in _whole_lines(output)}


def _key(policy: Policy | RemotePolicy) -> Mapping[str, Any]:
    """Who writes, wherever it is."""
    return policy.key() if isinstance(policy, RemotePolicy) else policy.backbone.key()


def _texts_at_once(policy: Policy | RemotePolicy | None) -> int:
    """How many texts are written between two visits to a file."""
    return 4 * policy.concurrency if isinstance(policy, RemotePolicy) else CHUNK


class UserTexts:
    """Texts for users: of their policies, of a mixture of them, or the best that another policy writes.

    Args:
        method: A method of ``load_method``.
        prompts: P prompts.
        users: The user of each; None = the population.
        num_samples: Texts on each prompt, for a method that writes.
        mix: User id -> weight, instead of ``users``: one writer for all prompts.
        policy: Who writes ``best_of`` texts, of which the user's reward takes one.
        best_of: How many.
        settings: Further arguments of `plm.generation.sample`, such as ``max_new_tokens``.

    Raises:
        ValueError: If the method does not write and there is no policy, or the mixture cannot be made.
    """

    def __init__(
        self,
        method: PersonalizationMethod,
        prompts: Sequence[Prompt],
        users: Sequence[str] | None,
        *,
        settings: Mapping[str, Any],
        num_samples: int = 1,
        mix: Mapping[str, float] | None = None,
        policy: Policy | RemotePolicy | None = None,
        best_of: int = 1,
    ) -> None:
        if policy is None and not isinstance(method, Writer):
            raise ValueError(no_writer(type(method).__name__))
        self.method, self.prompts, self.settings, self.policy = method, prompts, dict(settings), policy
        self.user_ids: list[str | None] = [None] * len(prompts) if users is None else [*users]
        self.mixture = mixture(method, mix) if mix else None
        self.texts_per_row = num_samples if policy is None else best_of
        writes = len(prompts) if policy is None else len({prompt.text for prompt in prompts})
        self.num_texts = self.texts_per_row * writes

    def rows(self, start: int, stop: int, progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
        """The rows of some prompts: each prompt's own with ``user_id``, ``user_known`` and ``responses``."""
        prompts, user_ids = self.prompts[start:stop], self.user_ids[start:stop]
        texts = [prompt.text for prompt in prompts]
        named = None if None in user_ids else [user for user in user_ids if user is not None]
        settings: dict[str, Any] = {**self.settings, "progress": progress}
        responses: list[dict[str, Any]]
        if self.policy is not None:
            best = best_of_n(self.policy, self.method, texts, n=self.texts_per_row, user_id=named, **settings)
            responses = [{"responses": [one.text], "rewards": [one.reward]} for one in best]
        else:
            if self.mixture is not None:
                settings |= {"users": self.mixture, "rows": torch.zeros(len(texts), dtype=torch.long)}
            else:
                settings["user_id"] = named
            samples = sample(self.method, texts, num_samples=self.texts_per_row, **settings)
            responses = [{"responses": [one.text for one in row]} for row in samples]
        known = self.method.known_users.store.get(user_ids)[1].tolist()
        return [
            {
                **prompt.record,
                "prompt": prompt.value,
                "user_id": user,
                "user_known": self.mixture is not None or is_known,
                **columns,
            }
            for prompt, user, is_known, columns in zip(prompts, user_ids, known, responses, strict=True)
        ]

    def identity(self) -> str:
        """Hash of all that decides the rows: prompts, users and their states, weights, policy and settings."""
        states = self.mixture or self.method.known_users.lookup(list(dict.fromkeys(self.user_ids)))[0]
        of_users = shared_hash({**states.tensors, "num_pairs": states.num_pairs})
        weights = shared_hash(self.method.state_dict(), self.method.user_tables)
        policy = None if self.policy is None else dict(_key(self.policy))
        drawn = {name: value for name, value in self.settings.items() if name != "batch_tokens"}
        rows = [[prompt.text, prompt.record, user] for prompt, user in zip(self.prompts, self.user_ids, strict=True)]
        content = [rows, of_users, weights, policy, self.texts_per_row, drawn]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_texts(texts: UserTexts, output: Path, on_progress: Callable[[int], None] | None = None) -> None:
    """Write the rows of texts to a JSONL file, which appears, or takes the place of a former one, when all are there.

    Until then they are in ``.NAME.HASH.part`` beside it, named by all that decides them: the same call goes on where it
    was killed, and another one starts anew.

    Args:
        texts: Them.
        output: The file.
        on_progress: Called with the number of texts finished since the last call, those found first.

    Raises:
        ValueError: If another process is writing the same.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{texts.identity()}.part")
    lock = output.with_name(f".{output.name}.lock")
    with only_writer(lock, f"another plm generate is writing {output}; wait for it"):
        part.touch()
        num_done = len(_whole_lines(part))
        if on_progress is not None and num_done:
            on_progress(num_done * texts.num_texts // len(texts.prompts))
        with part.open("a", encoding="utf-8") as file:
            while num_done < len(texts.prompts):
                stop = num_done + max(1, _texts_at_once(texts.policy) // texts.texts_per_row)
                while stop < len(texts.prompts) and texts.prompts[stop].text == texts.prompts[stop - 1].text:
                    stop += 1  # users who choose among the same texts
                rows = texts.rows(num_done, stop, on_progress)
                file.write("".join(map(json_line, rows)))
                file.flush()
                os.fsync(file.fileno())
                num_done += len(rows)
        replace(part, output)
        for rest in output.parent.glob(f".{glob.escape(output.name)}.*.part"):
            rest.unlink(missing_ok=True)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without one that a kill has cut short, which is removed."""
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return content[:whole].splitlines()
