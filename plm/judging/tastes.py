"""Who likes what: rewards and the people who weigh them, from a recipe, a YAML file or the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from plm.data.sources.sampled import SampledPairs
from plm.recipe.read import build_source, merged_recipe

SOURCE = f"{SampledPairs.__module__}.{SampledPairs.__qualname__}"
EXAMPLE = "{rewards: {length: {class_path: plm.data.rewards.Length}}, people: {short: {length: -1}}}"


def read_tastes(text: str, samples: list[str]) -> SampledPairs:
    """Read rewards and people, and set them over files of samples; nothing is scored yet.

    Args:
        text: Path of a recipe over `SampledPairs`, or YAML, as a file or as text, with its arguments ``rewards`` and
            ``people``.
        samples: Files of samples.

    Raises:
        ValueError: If it cannot be read, names no rewards, or an argument is wrong.
    """
    if text.lstrip().startswith("{"):
        try:
            document = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--rewards: expected YAML like {EXAMPLE}, got {' '.join(str(error).split())}") from error
    elif Path(text).suffix in (".yaml", ".yml"):
        document = merged_recipe(text, [])
    else:
        gone = "" if os.path.exists(text) else ", which does not exist"
        raise ValueError(f"--rewards: expected a .yaml file or text like {EXAMPLE}, got {text!r}{gone}")
    if "data" in document:
        source = document["data"].get("source") or {}
        if str(source.get("class_path")).rpartition(".")[2] != SampledPairs.__name__:
            raise ValueError(f"{text}: expected data.source to be {SOURCE}, got {source.get('class_path')!r}")
        document = source.get("init_args") or {}
    return build(document, samples)


def build(arguments: dict[str, Any], samples: list[str]) -> SampledPairs:
    """Build a `SampledPairs` from its arguments, people by default one for each reward.

    Raises:
        ValueError: If there are no rewards, or an argument is wrong.
    """
    rewards = arguments.get("rewards")
    if not isinstance(rewards, dict) or not rewards:
        raise ValueError(f"--rewards: expected rewards, as in {EXAMPLE}, got the keys {sorted(arguments)}")
    if not arguments.get("people") and not arguments.get("num_people"):
        arguments = {**arguments, "people": {name: {name: 1.0} for name in rewards}}
    source = {"class_path": SOURCE, "init_args": {**arguments, "path": samples}}
    built = build_source({"data": {"source": source}})
    assert isinstance(built, SampledPairs)
    return built
