"""Expand the ``defaults:`` of recipes into native ``--config`` arguments.

A recipe may start with ``defaults: [{data: synthetic}, {trainer: cpu}]``. Each item names a partial config,
``conf/<group>/<name>.yaml``, read before the recipe, in order, so that the recipe's own keys win.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from plm.messages import closest, nearest

_PACKAGE = Path(__file__).parent.parent


def shipped(kind: str) -> Path:
    """The folder ``conf`` or ``recipes``: inside the installed package, else beside it in a source checkout."""
    inside = _PACKAGE / f"_{kind}"
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: If the file cannot be read or holds no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the config {str(path)!r}: {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"the config {str(path)!r} is not valid YAML: its brackets are too deep to read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        got = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"expected a mapping in the config {str(path)!r}, got {got}")
    return content


def find_config(path: str) -> Path:
    """Find a recipe or a group: the file itself, or the shipped one of that name, from anywhere.

    Shipped are ``recipes/quickstart.yaml`` and its like, also in ``recipes/papers``, and the groups, such as
    ``conf/method/vpl_paper.yaml``.

    Raises:
        ValueError: If there is neither.
    """
    file = Path(path)
    if file.is_file():
        return file
    root = shipped("recipes")
    recipes = {f"recipes/{file.relative_to(root).as_posix()}": file for file in sorted(root.rglob("*.yaml"))}
    groups = {f"conf/{group.parent.name}/{group.name}": group for group in sorted(shipped("conf").glob("*/*.yaml"))}
    known = recipes | groups
    if path in known:
        return known[path]
    names = [*map(str, sorted(file.parent.glob("*.y*ml"))), *known]
    by_stem = {Path(name).stem: name for name in reversed(names)}
    near = by_stem.get(file.stem) or closest(path, names) or by_stem.get(closest(file.stem, by_stem) or "")
    advice = f"; did you mean {near!r}?" if near else f" (shipped: {', '.join(recipes) or 'none'})"
    raise ValueError(f"no config file {path!r}{advice}")


def group_files(recipe: Path, defaults: Any) -> list[Path]:
    """List the files that the ``defaults`` of a recipe name.

    Args:
        recipe: Path of the recipe; ``<recipe>/../../conf`` is searched before the shipped ``conf``.
        defaults: Its ``defaults`` value, a list of one-key mappings ``{group: name}``.

    Raises:
        ValueError: If it is no such list, or a group or file is missing; the existing ones are named.
    """
    if not isinstance(defaults, list) or not all(isinstance(item, dict) and len(item) == 1 for item in defaults):
        raise ValueError(
            f"expected defaults like [{{data: synthetic}}, {{trainer: cpu}}] in {recipe}, got {defaults!r}"
        )
    roots = [recipe.resolve().parent.parent / "conf", shipped("conf")]
    files = []
    for group, name in (pair for item in defaults for pair in item.items()):
        candidates = [root / str(group) / f"{name}.yaml" for root in roots]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            groups = sorted({file.parent.name for root in roots for file in root.glob("*/*.yaml")})
            if group not in groups:
                near = nearest(str(group), groups)
                raise ValueError(f"{recipe}: no group {group!r} in defaults{near} (groups: {', '.join(groups)})")
            names = sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})
            raise ValueError(
                f"{recipe}: no {group} named {name!r}{nearest(str(name), names)} ({group}: {', '.join(names)})"
            )
        files.append(file)
    return files


def expand(args: Sequence[str]) -> list[str]:
    """Put every ``--config``, after its group files, before the other options, which win over it wherever they stand.

    Without one, a checkpoint of a run is evaluated by the recipe of the run.

    Args:
        args: Command line, the verb first if there is one.

    Raises:
        ValueError: See `find_config`, `read_config` and `group_files`.
    """
    configs: list[str] = []
    others: list[str] = []
    verb = [arg for arg in args[:1] if not arg.startswith("-")]
    rest: Iterator[str] = iter(args[len(verb) :])
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option not in ("--config", "-c"):
            others.append(arg)
            continue
        path = value if equals else next(rest, None)
        if path is None:
            raise ValueError(f"{option} needs the path of a config file")
        configs += _with_groups(path)
    if not configs and verb and verb[0] in ("validate", "test", "predict"):
        configs += _recipe_of_run(others)
    return [*verb, *configs, *others]


def _with_groups(path: str) -> list[str]:
    """Options that name a config file and the groups before it."""
    recipe = find_config(path)
    groups = group_files(recipe, read_config(recipe).get("defaults") or [])
    nested = [str(file) for file in groups if "defaults" in read_config(file)]
    if nested:
        raise ValueError(f"only a recipe may have defaults, not its groups; found them in {nested}")
    return [part for file in [*groups, recipe] for part in ("--config", str(file))]


def _recipe_of_run(args: Sequence[str]) -> list[str]:
    """Options that name the recipe of the run that a checkpoint is of; none where there is none."""
    for path in values_of(args, "--ckpt_path"):
        recipe = Path(path).absolute().parent.parent / "recipe.yaml"
        return ["--config", str(recipe)] if recipe.is_file() else []
    return []


def values_of(args: Sequence[str], option: str) -> Iterator[str]:
    """The values of an option on a command line."""
    for arg, following in pairwise((*args, "")):
        name, equals, value = arg.partition("=")
        if name == option:
            yield value if equals else following
