"""Files of samples: many responses of a policy to each prompt, written so that a killed run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plm.atomic import json_line, only_writer, write_text
from plm.backbones import Policy, RemotePolicy
from plm.generation import sample_texts
from plm.recipe.prompts import Prompt, prompt_of

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
    key = policy.key() if isinstance(policy, RemotePolicy) else policy.backbone.key()
    model = {f"policy {name}": value for name, value in key.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another plm sample is writing {output}; wait for it, or share the work by --shard"
    with only_writer(output.with_name(f".{output.name}.lock"), busy):
        done = _prepare(output, {**model, "num_samples": num_samples, **drawn})
        missing = [prompt for prompt in prompts if prompt.text not in done]
        chunk = 4 * policy.concurrency if isinstance(policy, RemotePolicy) else CHUNK
        step = max(1, chunk // num_samples)
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
    with output.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return {prompt_of(json.loads(line)).text for line in content[:whole].splitlines()}
