"""Methods that packages register under the entry point ``plm.methods``: imported for recipes, or only described."""

from __future__ import annotations

import ast
import textwrap
import warnings
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, resolve_name
from itertools import takewhile
from pathlib import Path

GROUP = "plm.methods"


def load_plugins() -> None:
    """Import plm's own classes and every registered method, so that recipes may use short names.

    A plug-in that cannot be imported, or shares its name with another, is reported: it must not stop the others.
    """
    sources = import_module("plm.data.sources").source_modules()
    for module in ("plm.backbones", *sources):
        import_module(module)
    origin: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        try:
            name = entry.load().__name__
        except Exception as error:
            warnings.warn(f"the method {entry.name!r} ({entry.value}) cannot be imported: {error!r}", stacklevel=2)
            continue
        if origin.setdefault(name, entry.value) != entry.value:
            both = f"{origin[name]} and {entry.value}"
            warnings.warn(f"two methods are named {name!r}, {both}; recipes must give their full paths", stacklevel=2)


def describe_methods() -> str:
    """Describe every registered method in a few lines, read from its source without importing it."""
    lines = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        lines.append(f"{entry.name}  ({entry.value.replace(':', '.')})")
        lines += [
            textwrap.fill(text, 120, initial_indent="    ", subsequent_indent="      ")
            for text in _describe(entry)
            if text
        ]
    return "\n".join(lines) or "no methods are installed; install plm itself with `pip install .`"


def _describe(entry: EntryPoint) -> tuple[str, str]:
    """First docstring line of the class, and the ``Paper:`` part of the docstring of the module that defines it."""
    module: str | None = entry.module
    while module is not None:
        source = _source(module)
        if source is None:
            return "cannot be imported: its package or module is missing", ""
        tree = ast.parse(source.read_text(encoding="utf-8"))
        package = module if source.name == "__init__.py" else module.rpartition(".")[0]
        header, module = ast.get_docstring(tree) or "", None
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == entry.attr:
                return (ast.get_docstring(node) or "").partition("\n")[0], _paper(header)
            if isinstance(node, ast.ImportFrom) and entry.attr in [alias.name for alias in node.names]:
                module = resolve_name("." * node.level + (node.module or ""), package)
    return "", ""


def _source(module: str) -> Path | None:
    """File of a module that is not imported."""
    package, *rest = module.split(".")
    spec = find_spec(package)  # a top-level name is found without importing anything
    if spec is None:
        return None
    if rest:
        bases = [Path(folder, *rest) for folder in spec.submodule_search_locations or []]
        files = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py")]
    else:
        files = [Path(spec.origin or "")]
    return next((file for file in files if file.is_file()), None)


def _paper(header: str) -> str:
    """The lines of a docstring from ``Paper:`` on that belong together, as one."""
    lines = header.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("Paper:")), len(lines))
    more = takewhile(lambda line: line.startswith(" "), lines[start + 1 :])
    return " ".join(line.strip() for line in (*lines[start : start + 1], *more))
