"""``plm methods``: the installed methods, read without importing any."""

from __future__ import annotations

import ast
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Print every entry point of the group plm.methods."""
    OptionParser(prog="plm methods", description="List the installed methods.").parse(args)
    print(_methods())


def _methods() -> str:
    """The text of ``plm methods``: every entry point of the group plm.methods, read without being imported."""
    lines = []
    for entry in sorted(entry_points(group="plm.methods"), key=lambda entry: entry.name):
        about, paper = _describe(entry)
        lines.append(f"{entry.name}  ({entry.value.replace(':', '.')})")
        lines += [f"    {text}" for text in (about, paper) if text]
    return "\n".join(lines) or "no methods are installed; install plm itself with `pip install .`"


def _describe(entry: EntryPoint) -> tuple[str, str]:
    """First docstring line of the class and the ``Paper:`` line of its module, read from the source text."""
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
    about = ast.get_docstring(classes[entry.attr]) if entry.attr in classes else ""
    header = (ast.get_docstring(tree) or "").splitlines()
    paper = next((line.strip() for line in header if line.strip().startswith("Paper:")), "")
    return (about or "").partition("\n")[0], paper
