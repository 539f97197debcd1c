"""The methods of a leaderboard: recipes or installed ones, read once, on one split, with one search budget."""

from __future__ import annotations

import hashlib
import inspect
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import plm
from plm.atomic import write_text
from plm.data.datamodule import PreferenceDataModule
from plm.leaderboard.cells import Cell, output_to, run_cells
from plm.leaderboard.results import Kind, SweepPoint
from plm.messages import nearest
from plm.method import PersonalizationMethod, constructor_arguments
from plm.recipe.defaults import expand, find_config, read_config
from plm.recipe.fit import RecipeReader, run_recipe

PUBLISHED = {"LoRe": "lore_paper", "MRM": "mrm_paper", "PAL": "pal_paper", "VPL": "vpl_paper"}
"""Method that is an estimator of our own by default -> group of ``conf/method`` with its paper's model and settings."""

_OF_A_METHOD = ("model", "select", "defaults", "paper")
"""Keys of a recipe that the other rows do not share."""


@dataclass(frozen=True)
class Entry:
    """A row of a leaderboard that is fitted: its name, kind and the arguments of its ``plm fit``."""

    name: str
    kind: Kind
    description: str
    args: tuple[str, ...]
    """Arguments of ``plm fit`` but for seed and logger."""
    error: str = ""
    """Why it cannot be run."""
    identity: str = ""
    """The resolved recipe, the key of the backbone and hashes of the sources: another of any is another run."""
    method_class: type[PersonalizationMethod] | None = None
    """The class of its method, once the recipe was read."""
    mode: str = "min"
    """Whether a good validation value is low (min) or high (max)."""
    split_hash: str = ""
    is_fixed: bool = False
    """Whether its settings are those of a paper and not searched."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the search picked."""
    num_candidates: int = 1
    point: SweepPoint | None = None

    def cell(self, root: Path, seed: int, extra: Sequence[str] = ()) -> Cell:
        """The cell of a seed, whose folder is named by a hash of all that decides its result."""
        args = (*self.args, *extra)
        text = "\n".join([plm.__version__, self.identity, self.split_hash, str(seed), *args])
        name = f"{self.name}-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        folder = root / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return Cell(self.name, seed, args, folder, self.split_hash)


def of_methods(names: Sequence[str], shared: Sequence[str]) -> tuple[list[Entry], dict[str, str]]:
    """Make entries of methods by short name, class path or group of ``conf/method`` with a paper's settings.

    Where one method has both, its rows are ``LoRe (ours)`` and ``LoRe (published)``. ``all`` = every installed one that
    reads features, and the published settings of those in `PUBLISHED`.

    Returns:
        The entries, and why each of the other methods that ``all`` might have meant is left out.

    Raises:
        ValueError: If a name is not installed.
    """
    installed = {entry.name: entry for entry in sorted(entry_points(group="plm.methods"), key=lambda e: e.name)}
    groups = {group: f"{name} (published)" for name, group in PUBLISHED.items()}
    wanted = list(names)
    if wanted == ["all"]:
        # the class of a published model alone has the settings of no paper
        wanted = [*(name for name in installed if name != "PublishedLoRe"), *groups]
    unknown = [name for name in wanted if name not in (*installed, *groups) and "." not in name]
    if unknown:
        near = nearest(unknown[0], [*installed, *groups])
        listed = ", ".join([*installed, *groups])
        raise ValueError(f"no method {unknown[0]!r}{near} (installed: {listed})")
    entries = []
    left_out: dict[str, str] = {}
    for name in wanted:
        if name in groups:
            path = f"conf/method/{name}.yaml"
            args = (*shared, "--config", str(find_config(path)))
            entries.append(
                Entry(groups[name], "method", f"the paper's model and settings, {path}", args, is_fixed=True)
            )
            continue
        if name not in installed:
            entries.append(Entry(name.rpartition(".")[2], "method", name, (*shared, "--model", name)))
            continue
        value = installed[name].value.replace(":", ".")
        entry = Entry(f"{name} (ours)" if name in PUBLISHED else name, "method", value, (*shared, "--model", value))
        try:
            view = installed[name].load().view
        except Exception as error:
            entries.append(replace(entry, error=f"cannot be imported: {error!r}"))
            continue
        if view == "features" or list(names) != ["all"]:
            entries.append(entry)
        else:
            left_out[name] = f"reads {view}, not the features that the others share"
    return entries, left_out


def source_hash(method: type) -> str:
    """Hash the file a method is written in, or all files of the package that is the method."""
    package = sys.modules.get(method.__module__.rpartition(".")[0])
    path = Path(inspect.getfile(method))
    is_package = path.name == "__init__.py" or getattr(package, method.__name__, None) is method
    files = sorted(path.parent.glob("*.py")) if is_package else [path]
    return hashlib.sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest()


@cache
def library_hash() -> str:
    """Hash all source files of plm."""
    root = Path(plm.__file__).parent
    files = sorted(root.rglob("*.py"))
    parts = [part for file in files for part in (file.relative_to(root).as_posix().encode(), file.read_bytes())]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def of_recipes(paths: Sequence[str], more: Sequence[str]) -> list[Entry]:
    """Make entries of recipes, called by their file names."""
    names = [Path(path).stem for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected recipes with names of their own, got {twice[0]!r} twice; rename one")
    return [Entry(name, "method", path, ("--config", path, *more)) for name, path in zip(names, paths, strict=True)]


def swept(entries: Sequence[Entry], argument: str, values: str) -> list[Entry]:
    """Make an entry of each, for each value of an argument of its method.

    Args:
        entries: Methods that have the argument.
        argument: Its name.
        values: Distinct finite numbers with commas between them.

    Raises:
        ValueError: For other values.
    """
    texts = [text.strip() for text in values.split(",")]
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if not 2 <= len(texts) == len(set(numbers)) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"--sweep: expected two or more numbers, each once, got {argument}={values}")
    return [
        replace(
            entry,
            name=f"{entry.name}, {argument} {text}",
            args=(*entry.args, f"--model.init_args.{argument}", text),
            point=SweepPoint(entry.name, argument, value),
        )
        for entry in entries
        for value, text in sorted(zip(numbers, texts, strict=True))
    ]


def shared_part(recipe: str, folder: Path) -> list[str]:
    """What the baselines take from a recipe: its configs without the method, written into a folder.

    They are named by their content, so that a second leaderboard in this folder never rewrites those of a running one.
    """
    args = []
    for file in (Path(arg) for arg in expand(["--config", recipe]) if arg != "--config"):
        text = yaml.safe_dump({key: value for key, value in read_config(file).items() if key not in _OF_A_METHOD})
        path = folder / f"{file.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
        write_text(path, text)
        args += ["--config", str(path)]
    return args


def read_entries(entries: Sequence[Entry]) -> tuple[list[Entry], PreferenceDataModule]:
    """Read all recipes; an entry that cannot be read keeps its error.

    Returns:
        The entries and the data of the first that could be read.

    Raises:
        ValueError: If none can be read, or they do not share features and split.
    """
    found, data, keys = [], None, {}
    for entry in entries:
        if entry.error:
            found.append(entry)
            continue
        try:
            with output_to(io.StringIO()):
                cli = run_recipe(["fit", *entry.args], RecipeReader)
            check_search_space(type(cli.model))
            config = cli.config["fit"]
            argument = entry.point.argument if entry.point else None
            if f"model.init_args.{argument}" in (config.select or {}):
                raise ValueError(f"the recipe selects {argument} on validation pairs; take it out of its select")
            if not config.final_test:
                raise ValueError("expected final_test: true, got false: a row is the result of the test after its fit")
            module: PreferenceDataModule = cli.datamodule
            keys[entry.name] = (module.split_hash, json.dumps(module.backbone.key(), sort_keys=True))
            entry = replace(
                entry,
                identity="\n".join(
                    [
                        source_hash(type(cli.model)),
                        library_hash(),
                        keys[entry.name][1],
                        cli._parser("fit").dump(config, skip_unset=False),
                    ]
                ),
                method_class=type(cli.model),
                mode=config.checkpoint.mode,
                split_hash=module.split_hash,
            )
            data = data or module
        except (ValueError, OSError) as error:
            entry = replace(entry, error=str(error))
        found.append(entry)
    wrong = [entry for entry in found if entry.point and entry.error]
    if wrong:
        raise ValueError(f"--sweep: {wrong[0].name}: {wrong[0].error}")
    if data is None:
        raise ValueError("no row can be run\n" + "\n".join(f"{entry.name}: {entry.error}" for entry in found))
    for what, index in (("split", 0), ("features", 1)):
        if len({key[index] for key in keys.values()}) > 1:
            listing = "\n".join(f"  {name}: {key[index][:300]}" for name, key in keys.items())
            raise ValueError(
                f"expected all rows on the same {what}, got\n{listing}\ncompare them in separate leaderboards"
            )
    return found, data


# ---------------------------------------------------------------------- search
def check_search_space(method: type[PersonalizationMethod]) -> None:
    """Refuse a grid over what is no argument of the method.

    Raises:
        ValueError: Naming the class, the argument and the one that may be meant.
    """
    arguments = constructor_arguments(method)
    for name in method.search_space:
        if name not in arguments:
            near = nearest(name, sorted(arguments))
            raise ValueError(f"{method.__name__}.search_space: expected arguments of the class, got {name!r}{near}")


def candidates(entry: Entry, budget: int) -> list[dict[str, Any]]:
    """List the entry as it is and ``budget - 1`` draws without repetition from the ``search_space`` of its method.

    Settings of a paper stay as they are. The draws depend on nothing but that grid and the name of the class.
    """
    method = entry.method_class
    if budget == 1 or entry.is_fixed or method is None or not method.search_space:
        return [{}]
    grid = {
        name: values for name, values in method.search_space.items() if not entry.point or name != entry.point.argument
    }
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    seed = int.from_bytes(hashlib.blake2b(method.__name__.encode(), digest_size=8).digest(), "big")
    order = np.random.default_rng(seed).permutation(len(every))[: budget - 1]
    return [{}, *(every[index] for index in order.tolist())]


def as_options(arguments: dict[str, Any]) -> list[str]:
    """Turn arguments of a method into command line options."""
    return [
        part
        for name, value in arguments.items()
        for part in (f"--model.init_args.{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def search(
    entries: Sequence[Entry], budget: int, root: Path, jobs: int, on_progress: Callable[[Cell], None]
) -> list[Entry]:
    """Fit every candidate of every method once, without a test, and keep the best by its validation value."""
    plan: dict[str, list[tuple[dict[str, Any], Cell]]] = {}
    for entry in entries:
        if entry.kind == "method" and not entry.error and len(drawn := candidates(entry, budget)) > 1:
            untested = ("--final_test", "false")
            plan[entry.name] = [(one, entry.cell(root, 0, [*as_options(one), *untested])) for one in drawn]
    run_cells([one for tried in plan.values() for _, one in tried], jobs, on_progress)
    return [_pick(entry, plan[entry.name]) if entry.name in plan else entry for entry in entries]


def _pick(entry: Entry, tried: list[tuple[dict[str, Any], Cell]]) -> Entry:
    """Give an entry the arguments of its best candidate."""
    sign = 1.0 if entry.mode == "min" else -1.0
    values = [sign * value if math.isfinite(value := _val_value(one)) else math.inf for _, one in tried]
    best = int(np.argmin(values))
    if math.isinf(values[best]):
        errors = {one.error for _, one in tried if one.error}
        return replace(entry, error="; ".join(sorted(errors)) or "no candidate reached a finite validation value")
    arguments = tried[best][0]
    args = (*entry.args, *as_options(arguments))
    return replace(entry, args=args, arguments=arguments, num_candidates=len(tried))


def _val_value(one: Cell) -> float:
    if not one.is_done:
        return math.nan
    value = json.loads((one.folder / "facts.json").read_text(encoding="utf-8"))["val_value"]
    return math.nan if value is None else float(value)
