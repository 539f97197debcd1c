"""Whether a run reaches the numbers of the paper that its recipe names, and what a recipe needs before it can run.

Axes: N texts, D feature width.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import yaml

from plm.backbones import Backbone, CausalLM, HFBackbone
from plm.backbones.weights import num_weights
from plm.data.features import FeatureCache
from plm.data.schema import PairTable
from plm.evaluation import Section, TableRow, difference, interval, points
from plm.evaluation.report import ROWS
from plm.fitting import Run
from plm.hub import no_downloads
from plm.recipe.defaults import read_config
from plm.recipe.fit import run_recipe
from plm.recipe.paper import DIFFERENCES, Paper
from plm.recipe.read import build_part, build_source, merged_recipe

_HEADS = {name: head for head, name in ROWS.items()}
_OWN = ("defaults", "paper", "name", "data.cache_dir", "trainer.default_root_dir", "trainer.logger")
"""Keys that may differ between two runs of one recipe."""
_COUNTS = {"billion": 1e9, "million": 1e6, "thousand": 1e3}
_TIMES = {"h": 3600.0, "min": 60.0, "s": 1.0}
_BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CHARACTERS = 4
"""Of a token, about."""
SPEEDS = {"a GPU of 100 TFLOP/s": 1e14, "CPU cores of 0.1 TFLOP/s": 1e11}
"""What does the arithmetic -> floating-point operations in a second, assumed."""


# ---------------------------------------------------------------------- the verdict
def verdict(numbers: Mapping[str, float], name: str, value: float, artefact: str = "") -> str:
    """Say where a number of a run is beside that of a paper, by the run's 95% interval over users.

    Args:
        numbers: Of a group of users, as `plm.evaluation.summarize` gives them.
        name: The number.
        value: What the paper has, a share of 1.
        artefact: Why that is too high, where it is known.

    Returns:
        ``within`` the interval, ``above`` or ``below`` the paper's number, and that it has a ``known artefact`` where
        it is below one.

    Example:
        >>> found = {"accuracy": 0.70, "accuracy_low": 0.68, "accuracy_high": 0.72}
        >>> [verdict(found, "accuracy", value) for value in (0.71, 0.65, 0.75)]
        ['within', 'above', 'below']
        >>> verdict(found, "accuracy", 0.977, "labels in the brackets")
        'below, known artefact'
    """
    if name not in numbers:
        return "not measured"
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    if math.isnan(low):
        return "too few users for an interval"
    if low <= value <= high:
        return "within"
    return "above" if low > value else "below, known artefact" if artefact else "below"


def comparison(paper: Paper, metrics: Mapping[str, Any], changed: Sequence[str] = ()) -> Section:
    """The numbers of a paper beside those of a run, with verdicts, and what to know of both.

    Args:
        paper: What the paper says.
        metrics: ``metrics.json`` of the run.
        changed: As of `changed_keys`.
    """
    rows = []
    for users, named in paper.numbers.items():
        numbers = {key: math.nan if value is None else value for key, value in metrics.get(users, {}).items()}
        for name, value in named.items():
            sign = "+" if name in DIFFERENCES else ""
            here = "–"
            if name in numbers:
                here = difference(numbers, name) if sign else points(numbers[name], "") + interval(numbers, name)
            cells = (
                f"{users}: {_HEADS[name]}",
                points(value, sign),
                here,
                verdict(numbers, name, value, paper.artefact),
            )
            rows.append(TableRow(cells))
    lines = [] if rows else [f"no number of {paper.table} is known, so there is nothing to compare with"]
    if rows:
        lines.append(
            "the verdict goes by the interval of this run over its users; seeds and the paper's own error are not in it"
        )
    lines += [f"known artefact, which explains a part at most: {paper.artefact}"] if paper.artefact else []
    lines += [f"the paper differs: {paper.differs}"] if paper.differs else []
    lines += [f"this run differs from the recipe: {', '.join(changed)}"] if changed else []
    return Section("", ("", "paper", "this run", "verdict") if rows else (), rows, lines=lines)


def changed_keys(recipe: str, run: Run) -> list[str]:
    """Keys in which a run differs from a recipe, as ``key: its value instead of that of the recipe``.

    Raises:
        ValueError: If the run holds no recipe.
    """
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        run_recipe(["fit", "--config", recipe, "--print_config"])
    wanted = dict(_flat(yaml.safe_load(printed.getvalue())))
    found = dict(_flat(read_config(run.folder / "recipe.yaml")))
    return [
        f"{key}: {found.get(key)!r} instead of {wanted.get(key)!r}"
        for key in dict.fromkeys([*wanted, *found])
        if not key.startswith(_OWN) and _plain(found.get(key)) != _plain(wanted.get(key))
    ]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping under its key with dots."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    """A value as it compares: a class by its short name."""
    return value.rpartition(".")[2] if isinstance(value, str) and re.fullmatch(r"[\w.]+\.[A-Z]\w+", value) else value


# ---------------------------------------------------------------------- what it needs
def needs(recipe: str, overrides: Sequence[str] = (), configs: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What a recipe needs and whether it is here, as (what, how it is); nothing is downloaded, encoded or trained.

    Args:
        recipe: The recipe.
        overrides: Options as ``key=value``.
        configs: Recipes or groups that win over it.

    Raises:
        ValueError: If the recipe cannot be read.
    """
    keys = merged_recipe(recipe, list(overrides), configs)
    backbone = build_part(keys, "backbone", Backbone)  # type: ignore[type-abstract]
    with no_downloads():
        table: PairTable | None = None
        try:
            source = build_source(keys)
            table = source.load()
            data = f"{source.name}: {table.num_pairs:,} pairs of {table.num_users:,} users"
        except (ValueError, OSError) as error:
            data = f"not here: {error}"
        rows = [("data", data), *_encoder_rows(backbone, table, keys)]
    epochs = (keys.get("trainer") or {}).get("max_epochs")
    candidates = math.prod(len(values) for values in (keys.get("select") or {}).values())
    fits = f"{candidates} fits" if candidates > 1 else "one fit"
    return [*rows, ("fit", f"{fits} of at most {epochs} passes; hours are not estimated")]


def _encoder_rows(backbone: Backbone, table: PairTable | None, keys: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whether the backbone is here, what it holds in memory, and how long it takes for the texts."""
    name = type(backbone).__name__
    if not isinstance(backbone, HFBackbone):
        return [("encoder", f"{name}: nothing to download")]
    found = num_weights(backbone.find_file)
    here = (
        "here" if found is not None else "not here: the folder of a model, or what the first run downloads by that id"
    )
    rows = [("encoder", f"{backbone.model}, {here}")]
    size, how = (_named_size(backbone.model), "by its name") if found is None else (found, "in its files")
    if size is None:
        return [*rows, ("memory, hours", "not known: neither its files nor its name say how large it is")]
    held = _short(size * BYTES[backbone.dtype], _BYTES)
    rows.append(("memory", f"{held} for the {_short(size)} weights ({how}) alone, in {backbone.dtype}"))
    if table is None:
        return [*rows, ("hours", "not known before the data are here")]
    texts, is_trained = table.texts(), isinstance(backbone, CausalLM)
    share = 1.0
    if found is None or is_trained:
        rows.append(("texts", f"{len(texts):,} distinct responses to prompts"))
    else:
        data = keys.get("data") or {}
        dtype = data.get("feature_dtype", "float32")
        cache = FeatureCache(backbone, data.get("cache_dir", "~/.cache/plm"), dtype=dtype)
        num_texts, num_missing = cache.count(texts)
        on_disk = _short(num_texts * backbone.feature_dim * BYTES[dtype], _BYTES)
        rows.append(("texts", f"{num_texts:,} distinct ones, {num_missing:,} of them to encode; features: {on_disk}"))
        share = num_missing / max(num_texts, 1)
    characters = sum(len(text) + (len(prompt) if backbone.template != "response" else 0) for prompt, text in texts)
    return [*rows, ("hours", _hours(size, share * characters / CHARACTERS, is_trained))]


def _hours(size: int, tokens: float, is_trained: bool) -> str:
    """Time of the arithmetic: two operations for a weight and a token, six where there are gradients, too."""
    if not tokens:
        return "none to encode"
    each, what = (6, "a pass of training") if is_trained else (2, "encoding")
    times = " or ".join(
        f"{_short(max(each * size * tokens / speed, 1), _TIMES)} on {chip}" for chip, speed in SPEEDS.items()
    )
    assumed = f"{each} operations for each weight and token, {_short(tokens)} tokens of {CHARACTERS} characters"
    return f"{what}: {times}, where these are reached; assumed: {assumed}"


def _named_size(model: str) -> int | None:
    """Number of weights that the name of a model tells, such as ``Qwen2.5-0.5B-Instruct``; None where it does not.

    Mixtures share weights between their experts, so that ``8x7B`` tells nothing.

    >>> _named_size("mistralai/Mixtral-8x7B-v0.1")
    >>> _named_size("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"), _named_size("google/gemma-3-270m"), _named_size("gpt2")
    (8000000000, 270000000, None)
    """
    match = re.search(r"(?<![\d.x])(\d+(?:\.\d+)?)([bm])(?![a-z])", Path(model).name.lower())
    return None if match is None else round(float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]])


def _short(number: float, units: Mapping[str, float] = _COUNTS) -> str:
    """A number in the largest unit that it reaches: ``8.0 billion``, ``1.5 MB``."""
    unit, size = next(((unit, size) for unit, size in units.items() if number >= size), ("", 1.0))
    return f"{number / size:.1f} {unit}" if unit else f"{number:.0f}"
