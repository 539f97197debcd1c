"""The rules of the house: who may import whom, how long a file may be, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import plm

PACKAGE = Path(plm.__file__).parent
MODULES = {
    ".".join(("plm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_LINES = 450

DATA_LEAVES = {"plm.data.schema", "plm.data.files", "plm.data.values", "plm.data.keys"}
ARROWS: dict[str, set[str]] = {
    "plm.types": set(),
    "plm.config": set(),
    "plm.functional": {"plm.types"},
    "plm.users": {"plm.types"},
    "plm.backbones": {"plm.distributed", "plm.types"},
    "plm.distributed": set(),
    "plm.method": {"plm.types"},
    "plm.optimizer": set(),
    "plm.network_method": {"plm.method", "plm.backbones", "plm.distributed", "plm.types"},
    "plm.policy_method": {
        "plm.method",
        "plm.network_method",
        "plm.backbones",
        "plm.distributed",
        "plm.functional",
        "plm.optimizer",
        "plm.types",
    },
    "plm.live_method": {"plm.method", "plm.network_method", "plm.backbones", "plm.functional", "plm.types"},
    "plm.generation": {"plm.method", "plm.functional", "plm.backbones", "plm.types"},
    "plm.methods": {
        "plm.config",
        "plm.method",
        "plm.policy_method",
        "plm.live_method",
        "plm.functional",
        "plm.backbones",
        "plm.optimizer",
        "plm.distributed",
        "plm.types",
    },
    "plm.methods.clap": {
        "plm.checkpoint",
        "plm.method",
        "plm.policy_method",
        "plm.functional",
        "plm.backbones",
        "plm.optimizer",
        "plm.types",
        "plm.users",
    },
    "plm.data.sources": {"plm.types", "plm.config", "plm.data.rewards", *DATA_LEAVES},
    "plm.data.features": {"plm.types", "plm.backbones", *DATA_LEAVES},
    "plm.data.datamodule": {"plm.types", "plm.backbones", "plm.data"},
    "plm.data.encoding": {"plm.types", "plm.backbones", "plm.data"},
    "plm.data": {"plm.types", "plm.config", "plm.data"},
    "plm.querying": {"plm.method", "plm.types"},
    "plm.reward_features": {"plm.backbones", "plm.data.rewards"},
    "plm.policy_oracles": {
        "plm.backbones",
        "plm.data",
        "plm.generation",
        "plm.methods.latent_dpo",
        "plm.methods.lora_dpo",
        "plm.methods.palm",
        "plm.types",
    },
    "plm.learned_rewards": {"plm.method", "plm.checkpoint", "plm.backbones", "plm.config", "plm.data.rewards"},
    "plm.metrics": {"plm.types"},
    "plm.evaluation": {"plm.metrics", "plm.types", "plm.users"},
    "plm.callbacks": {"plm.metrics", "plm.evaluation", "plm.types", "plm.users"},
    "plm.checkpoint": {"plm.method", "plm.backbones", "plm.users", "plm.data.values", "plm.types"},
    "plm.leaderboard": {
        "plm.callbacks",
        "plm.data",
        "plm.evaluation",
        "plm.functional",
        "plm.method",
        "plm.metrics",
        "plm.types",
    },
    "plm.rewardbench": {"plm.method", "plm.checkpoint", "plm.config", "plm.data.sources.corpus", "plm.data.values"},
    "plm.testing": {
        "plm.checkpoint",
        "plm.method",
        "plm.backbones",
        "plm.types",
        "plm.users",
        "plm.data.sources.synthetic",
    },
    "plm.cli": {
        "plm",
        "plm.config",
        "plm.checkpoint",
        "plm.callbacks",
        "plm.evaluation",
        "plm.leaderboard",
        "plm.rewardbench",
        "plm.data",
        "plm.method",
        "plm.methods",
        "plm.types",
        "plm.users",
        "plm.functional",
        "plm.backbones",
        "plm.generation",
        "plm.policy_method",
        "plm.policy_oracles",
        "plm.querying",
        "plm.reward_features",
    },
    "plm.__main__": {"plm.cli"},
}
"""Module or package -> what it may import besides itself; the longest matching name counts."""

FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py", "registry.py"}


def longest(name: str, names: set[str]) -> str | None:
    """The longest of ``names`` that is ``name`` or one of its packages."""
    return max((one for one in names if name == one or name.startswith(one + ".")), key=len, default=None)


def imports(path: Path, name: str) -> set[str]:
    """Modules of plm that a file imports anywhere but under TYPE_CHECKING, as full names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "plm"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write the full name of a relative import"
            if node.module and node.module.partition(".")[0] == "plm":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in MODULES else node.module)
    return found


def method_of(name: str) -> str:
    """``plm.methods.pal.model`` -> ``plm.methods.pal``: one paper, a file or a folder."""
    return ".".join(name.split(".")[:3])


@pytest.mark.parametrize("name", [name for name in MODULES if name != "plm"])
def test_arrows(name: str) -> None:
    """A new module belongs into ARROWS, and so does a new edge, with its reason in CONTRIBUTING.md."""
    room = longest(name, set(ARROWS))
    assert room is not None, f"{name} has no place in ARROWS"
    for target in imports(MODULES[name], name):
        if room == "plm.methods" and longest(target, {room}):
            assert method_of(target) == method_of(name), f"{name} imports {target}: a method never imports another"
            continue
        if longest(target, {room}) and room != "plm.data":
            continue
        allowed = ARROWS[room]
        # the package itself ("plm", lazily imported names) must be named exactly
        assert target in allowed or longest(target, allowed - {"plm"}), f"{name} may not import {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("plm.data")])
def test_only_the_datamodule_wires_data_together(name: str) -> None:
    """Nothing in data imports the datamodule, only it what encodes texts, and only that the feature cache."""
    targets = imports(MODULES[name], name)
    assert "plm.data.datamodule" not in targets
    assert "plm.data.encoding" not in targets or name == "plm.data.datamodule"
    assert "plm.data.features" not in targets or name == "plm.data.encoding"


def test_the_walk_sees_what_it_should() -> None:
    """The test of the test: known edges are found, lazy ones too, and those under TYPE_CHECKING are not."""
    assert "plm.functional" in imports(MODULES["plm.methods.lore"], "plm.methods.lore")
    assert "plm.cli.training" in imports(MODULES["plm.cli"], "plm.cli")
    assert imports(MODULES["plm"], "plm") == set()
    assert longest("plm.data.sources.pairs", set(ARROWS)) == "plm.data.sources"
    assert longest("plm.methodical", {"plm.method"}) is None
    assert method_of("plm.methods.pal.model") == "plm.methods.pal" != method_of("plm.methods.palm.grid")


def test_transformers_and_peft_stay_in_one_room() -> None:
    """Backbones are the only importer of transformers and peft."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {module.partition(".")[0] for module in modules} & {"transformers", "peft"}:
                assert longest(name, {"plm.backbones"}), f"{name} imports {modules}"


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short_and_named_for_what_they_hold(name: str) -> None:
    path = MODULES[name]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines; make it a folder of the same name"
    assert path.name not in FORBIDDEN_NAMES and not path.stem.endswith("_utils")


def test_importing_plm_waits_for_nothing_heavy() -> None:
    """And the public names are the promised ones."""
    code = (
        "import sys, plm; heavy = {'torch', 'lightning', 'transformers', 'numpy', 'sklearn', 'wandb'}; "
        "heavy &= set(sys.modules); assert not heavy, heavy; names = plm.__all__; "
        "assert all(getattr(plm, name) is not None for name in names); assert set(names) <= set(dir(plm))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
