"""Methods that packages register under the entry point ``plm.methods``: imported for recipes, or only described."""

from __future__ import annotations

import ast
import warnings
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
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
        lines += [f"    {text}" for text in _describe(entry) if text]
    return "\n".join(lines) or "no methods are installed; install plm itself with `pip install .`"


def _describe(entry: EntryPoint) -> tuple[str, str]:
    """First docstring line of the class, and the ``Paper:`` line of its module."""
    package, *rest = entry.module.split(".")
    spec = find_spec(package)  # a top-level name is found without importing anything
    if spec is None:
        return "cannot be imported: its package is missing", ""
    if rest:
        bases = [Path(folder, *rest) for folder in spec.submodule_search_locations or []]
        files = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py")]
    else:
        files = [Path(spec.origin or "")]
    source = next((file for file in files if file.is_file()), None)
    if source is None:
        return "", ""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    summary = ast.get_docstring(classes[entry.attr]) if entry.attr in classes else ""
    header = (ast.get_docstring(tree) or "").splitlines()
    paper = next((line.strip() for line in header if line.strip().startswith("Paper:")), "")
    return (summary or "").partition("\n")[0], paper
