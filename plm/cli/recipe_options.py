"""Command lines of the verbs that run a recipe, as far as they can be judged before its classes are imported."""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import plm
from plm.cli.options import stop
from plm.messages import nearest

COMMON = (
    *("c", "checkpoint", "ckpt_path", "config", "data", "defaults", "early_stopping", "few_shot"),
    *(
        "h",
        "help",
        "metrics",
        "model",
        "name",
        "paper",
        "print_config",
        "seed_everything",
        "show_lightning",
        "trainer",
        "weights_only",
    ),
)
"""First parts of the options that ``plm fit`` and its siblings share."""
_WIDTH = 110


def wants_help(args: Sequence[str]) -> str | None:
    """Say which help a command line asks for: ``"short"``, ``"all"`` or None."""
    for arg, value in pairwise((*args, "")):
        if arg in ("-h", "--help"):
            return "all" if value == "all" else "short"
    return None


def check_options(args: Sequence[str], names: Collection[str]) -> None:
    """Stop where the first part of an option is none of ``names``, a recipe is missing or ``--select`` is malformed.

    Raises:
        ValueError: If a recipe or one of its groups cannot be read, or a selection cannot be made.
    """
    for arg in args:
        if arg == "--":
            break
        option = arg.partition("=")[0]
        first, dot, rest = option.removeprefix("--").partition(".")
        if option.startswith("--") and first.removesuffix("+") not in names:
            stop(f"no option {option!r}{nearest(option, [f'--{name}{dot}{rest}' for name in names])}")

    from plm.recipe.defaults import expand, values_of  # help does not wait for a reader of YAML

    expand(args)
    for text in values_of(args, "--select"):
        _check_select(text)


def _check_select(text: str) -> None:
    """Stop, or raise, where the text is no grid; an interpolation is resolved later."""
    if "${" in text:
        return

    import yaml

    from plm.recipe.grid import check_grid

    try:
        grid = yaml.safe_load(text)
    except yaml.YAMLError as error:
        stop(f"--select: expected YAML, got {' '.join(str(error).split())}")
    if grid is None:
        return
    if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
        stop(f"--select: expected a mapping like {{model.init_args.NAME: [VALUE, ...]}}, got {text!r}")
    check_grid({str(key): values for key, values in grid.items()})


def constructor_options(module: str, class_name: str) -> list[tuple[str, str, str]]:
    """Read name, default and description of a class's constructor arguments from its source, which is not imported.

    Args:
        module: Name of the module, in a package of plm.
        class_name: A class whose docstring has a section ``Args:``.

    Returns:
        One entry for each argument; the default is an empty string where the argument is required.
    """
    file = Path(plm.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    node = next(node for node in classes if node.name == class_name)
    init = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__").args
    texts = _argument_texts(ast.get_docstring(node) or "")
    required = len(init.args) - len(init.defaults)
    values = [*[None] * required, *init.defaults, *init.kw_defaults][1:]  # without self
    names = [argument.arg for argument in (*init.args, *init.kwonlyargs)][1:]
    return [
        (name, "" if value is None else _default(value), texts.get(name, ""))
        for name, value in zip(names, values, strict=True)
    ]


def _default(value: ast.expr) -> str:
    """A default as a recipe would hold it."""
    try:
        plain = ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _argument_texts(docstring: str) -> dict[str, str]:
    """Argument -> description in the section ``Args:`` of a docstring."""
    texts: dict[str, str] = {}
    name = ""
    section = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    for line in section.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, texts[name] = line.strip().partition(": ")
        elif name:
            texts[name] += f" {line.strip()}"
    return texts


def show_help(usage: str, purpose: str, rows: Sequence[tuple[str, str]], ending: str = "") -> None:
    """Print the help of a verb whose recipe has more options than are shown.

    Args:
        usage: The command line.
        purpose: What the verb does.
        rows: Options and their descriptions.
        ending: Lines after the options.
    """
    formatter = argparse.RawDescriptionHelpFormatter("plm", max_help_position=30, width=_WIDTH)
    formatter.add_text(f"usage: {usage}")
    formatter.add_text(textwrap.fill(purpose, _WIDTH, break_on_hyphens=False))
    formatter.start_section("options")
    for name, text in rows:
        formatter.add_argument(
            argparse.Action([name], dest="", nargs=0, help=text.replace("%", "%%").replace("``", ""))
        )
    formatter.end_section()
    formatter.add_text(ending)
    print(formatter.format_help(), end="")
