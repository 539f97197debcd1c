"""``plm sample``: many responses to each prompt from a policy, for later stages to be made of."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from plm.atomic import write_text
from plm.cli.options import OptionParser
from plm.cli.writing import PROMPTS, add_policy, add_settings, policy_of, progress_bar, settings_of
from plm.generation import sample
from plm.recipe.prompts import Prompt, read_prompts

CHUNK = 1024
"""Responses written between two visits to the file: what a kill costs at most."""


def run(args: list[str]) -> None:
    """Write the file, or what is missing of it.

    Raises:
        ValueError: For whatever the user can mend.
    """
    parser = OptionParser(
        prog="plm sample",
        description="N responses to each prompt from a policy. Output rows: the prompt's with responses, a list. The\n"
        "file grows while texts are written; the same command goes on where it was killed. Processes that share the\n"
        "work get --shard 1/4 to --shard 4/4 and write samples-1of4.jsonl to samples-4of4.jsonl. A text depends on\n"
        "policy, prompt and seed alone: however the work is shared, the responses are the same.",
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help=PROMPTS)
    parser.add_argument("--num", type=int, required=True, metavar="N", help="responses to each prompt")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file")
    parser.add_argument("--shard", default="1/1", metavar="I/K", help="the I-th of K equal shares of the prompts")
    add_settings(parser)
    add_policy(parser, required=True)
    options = parser.parse(args)
    if options.num < 1:
        parser.error(f"--num: expected an integer >= 1, got {options.num}")
    prompts, output = share(read_prompts(options.prompts), Path(options.output), options.shard)
    policy = policy_of(options)
    settings = settings_of(options)
    about = {name: value for name, value in settings.items() if name != "batch_tokens"}
    model = {f"policy {name}": value for name, value in policy.backbone.key().items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another plm sample is writing {output}; wait for it, or share the work by --shard") from None
    done = _prepare(output, {**model, "num": options.num, **about})
    missing = [prompt for prompt in prompts if prompt.text not in done]
    step = max(1, CHUNK // options.num)
    with progress_bar("sampling", len(prompts) * options.num) as tell, output.open("a", encoding="utf-8") as file:
        tell((len(prompts) - len(missing)) * options.num)
        for start in range(0, len(missing), step):
            part = missing[start : start + step]
            written = sample(
                policy, [prompt.text for prompt in part], num_samples=options.num, progress=tell, **settings
            )
            for prompt, row in zip(part, written, strict=True):
                record = {**prompt.record, "prompt": prompt.text, "responses": [one.text for one in row]}
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
    print(f"{len(missing)} prompts written, {len(prompts) - len(missing)} were there already: {output}")


def share(prompts: list[Prompt], output: Path, shard: str) -> tuple[list[Prompt], Path]:
    """The prompts of one process and its file.

    Raises:
        ValueError: If there is no such share.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    index, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--shard: expected I/K with 1 <= I <= K, got {shard!r}")
    if count == 1:
        return prompts, output
    return prompts[index - 1 :: count], output.with_name(f"{output.stem}-{index}of{count}{output.suffix}")


def _prepare(output: Path, about: dict[str, Any]) -> set[str]:
    """Prompts that are done already; a line that a kill has torn is removed.

    Beside the file stands ``.NAME.settings.json``: what it was made with.

    Raises:
        ValueError: If the file was made with other settings, or is no file of samples.
    """
    settings = output.with_name(f".{output.name}.settings.json")
    if not output.exists():
        write_text(settings, json.dumps(about))
        return set()
    if not settings.is_file():
        raise ValueError(f"{output} exists and was not written by plm sample; choose another --output or remove it")
    before = json.loads(settings.read_text(encoding="utf-8"))
    changed = [
        f"{name}={before.get(name)!r}, not {value!r}" for name, value in about.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{output} was made with {', '.join(changed)}; choose another --output or remove it")
    with output.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return {str(json.loads(line)["prompt"]) for line in content[:whole].splitlines()}
