"""The rules of the house: who may import whom, how long a file may be, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import plm

PACKAGE = Path(plm.__file__).parent
MODULES = {
    ".".join(("plm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_LINES = 450

EVERYBODY = {"plm.arrays", "plm.atomic", "plm.messages", "plm.types"}
"""What every room needs and nobody owns."""
METHOD_NEEDS = {"backbones", "distributed", "functional", "method", "optimizer"}
EVERYTHING_BUT_CLI = {
    *METHOD_NEEDS,
    "adapting",
    "audit",
    "callbacks",
    "checkpoint",
    "data",
    "erasure",
    "evaluation",
    "explaining",
    "exporting",
    "fitting",
    "generation",
    "hub",
    "judging",
    "leaderboard",
    "learned_rewards",
    "methods",
    "metrics",
    "portfolio",
    "querying",
    "recipe",
    "rewardbench",
    "sampling",
    "scoring",
    "serving",
    "users",
    "verifying",
}


def of_plm(*rooms: str) -> set[str]:
    """Full names of rooms."""
    return {f"plm.{room}" for room in rooms}


ARROWS: dict[str, set[str]] = {
    "plm.types": set(),
    "plm.messages": set(),
    "plm.arrays": set(),
    "plm.atomic": set(),
    "plm.distributed": set(),
    "plm.hub": set(),
    "plm.optimizer": set(),
    "plm.functional": of_plm(),
    "plm.users": of_plm("users"),
    "plm.metrics": of_plm(),
    "plm.backbones": of_plm("distributed", "hub"),
    "plm.method": of_plm(),
    "plm.method.base": of_plm("callbacks", "method"),
    "plm.method.factored": of_plm("functional", "method", "optimizer"),
    "plm.method.abilities": of_plm("backbones"),
    "plm.method.population": of_plm("functional", "method"),
    "plm.method.strangers": of_plm("functional", "method"),
    "plm.method.linear": of_plm("method", "backbones"),
    "plm.method.network": of_plm("method", "backbones", "distributed"),
    "plm.method.policy": of_plm(*METHOD_NEEDS),
    "plm.method.live": of_plm("method", "backbones"),
    "plm.methods": of_plm(*METHOD_NEEDS),
    "plm.methods.clap": of_plm(*METHOD_NEEDS, "checkpoint", "users"),
    "plm.data": of_plm("data"),
    "plm.data.sources": of_plm(
        "data.rewards", "data.schema", "data.files", "data.values", "data.keys", "data.conversations", "hub"
    ),
    "plm.data.features": of_plm("backbones", "data.cache", "data.keys", "data.shards"),
    "plm.data.encoding": of_plm("backbones", "data"),
    "plm.data.datamodule": of_plm("backbones", "data"),
    "plm.adapting": of_plm("data", "functional", "method", "metrics"),
    "plm.scoring": of_plm("backbones", "data.files", "data.values", "functional", "method"),
    "plm.explaining": of_plm(
        "data.keys", "data.schema", "data.splits", "data.values", "evaluation", "method", "scoring"
    ),
    "plm.exporting": of_plm("backbones", "method"),
    "plm.querying": of_plm("data.encoding", "data.files", "data.values", "method"),
    "plm.sampling": of_plm("backbones", "generation", "method", "recipe", "users"),
    "plm.generation": of_plm("method", "functional", "backbones"),
    "plm.checkpoint": of_plm("adapting", "method", "backbones", "users", "data.values"),
    "plm.serving": {
        "plm",
        *of_plm(
            "adapting", "backbones", "checkpoint", "data.values", "generation", "method", "querying", "scoring", "users"
        ),
    },
    "plm.erasure": of_plm("checkpoint", "method", "users"),
    "plm.learned_rewards": of_plm("method", "checkpoint", "backbones", "data.rewards", "data.values", "scoring"),
    "plm.rewardbench": of_plm("data.sources.corpus", "data.values"),
    "plm.evaluation": of_plm("metrics"),
    "plm.callbacks": of_plm("metrics", "evaluation", "users"),
    "plm.audit": of_plm("data", "evaluation"),
    "plm.recipe": {"plm", *of_plm("callbacks", "checkpoint", "data", "evaluation", "method", "metrics")},
    "plm.fitting": of_plm("backbones", "callbacks", "checkpoint", "data", "erasure", "method", "recipe"),
    "plm.verifying": of_plm("backbones", "data", "evaluation", "fitting", "hub", "recipe"),
    "plm.judging": of_plm("backbones", "data", "evaluation", "generation", "method", "recipe"),
    "plm.leaderboard": {
        "plm",
        *of_plm("callbacks", "data", "evaluation", "functional", "method", "metrics", "recipe"),
    },
    "plm.portfolio": of_plm(
        "backbones",
        "checkpoint",
        "data",
        "evaluation",
        "functional",
        "generation",
        "judging",
        "method",
        "methods.clap",
        "methods.latent_dpo",
        "methods.lora_dpo",
        "methods.palm",
        "recipe",
    ),
    "plm.testing": of_plm("checkpoint", "method", "backbones", "users"),
    "plm.cli": {"plm", *of_plm(*EVERYTHING_BUT_CLI)},
    "plm.__main__": of_plm("cli"),
}
"""Module or package -> what it may import besides itself; the longest matching name counts."""

FLOORS: dict[str, list[set[str]]] = {
    "plm.users": [{"database", "folder", "rows"}, {"stored"}, {"store"}],
    "plm.method": [
        {"arguments", "conditioning", "episodes", "loaded", "passes"},
        {"population", "reading", "strangers"},
        {"accumulation"},
        {"abilities", "base"},
        {"factored", "network", "shared"},
        {"linear", "live", "policy"},
    ],
    "plm.evaluation": [{"page", "statistics", "terminal"}, {"comparison", "wording"}, {"figures", "report"}, {"drift"}],
    "plm.explaining": [{"axes"}, {"rewards"}, {"explanation"}, {"report"}],
    "plm.audit": [
        {"check", "items"},
        {"comparison"},
        {"models", "results", "signal"},
        {"verdict"},
        {"report"},
    ],
    "plm.recipe": [
        {"defaults", "errors", "grid", "plugins", "predict", "quiet", "runs"},
        {"paper", "parser", "read"},
        {"prompts", "select"},
        {"fit"},
    ],
    "plm.judging": [{"compare", "labels", "report", "tastes"}, {"written"}],
    "plm.leaderboard": [
        {"baselines", "facts", "per_user", "results"},
        {"cells", "report"},
        {"entries", "figures", "wandb"},
        {"board", "dashboard", "runs"},
    ],
    "plm.serving": [
        {"batching", "bodies", "embeddings", "metrics"},
        {"gate", "pages", "service"},
        {"chat", "interviews"},
        {"app"},
        {"server"},
        {"check"},
    ],
    "plm.portfolio": [
        {"features", "study", "training", "writing"},
        {"guarantee", "held_out", "latents", "objectives", "policies"},
        {"measured", "sampled"},
        {"written"},
        {"report"},
        {"run"},
    ],
    "plm.cli": [
        {"options", "writing"},
        {"recipe_options", "shares"},
        {
            "adapt",
            "checks",
            "data",
            "export",
            "features",
            "fit",
            "generate",
            "judge",
            "leaderboard",
            "portfolio",
            "query",
            "runs",
            "score",
            "serve",
            "users",
        },
    ],
}
"""Room -> its floors, the lowest first: a module imports from lower floors of its room, never from its own."""

FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py", "registry.py"}


def longest(name: str, names: set[str]) -> str | None:
    """The longest of ``names`` that is ``name`` or one of its packages."""
    return max((one for one in names if name == one or name.startswith(one + ".")), key=len, default=None)


@cache
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
        allowed = ARROWS[room] if room in EVERYBODY else ARROWS[room] | EVERYBODY
        # the package itself ("plm", lazily imported names) must be named exactly
        assert target in allowed or longest(target, allowed - {"plm"}), f"{name} may not import {target}"


@pytest.mark.parametrize("room", [room for room in ARROWS if room != "plm.cli"])
def test_every_arrow_is_needed(room: str) -> None:
    """An edge that nothing uses any more leaves ARROWS, and the table of CONTRIBUTING.md."""
    mine = [name for name in MODULES if longest(name, set(ARROWS)) == room]
    targets = {target for name in mine for target in imports(MODULES[name], name)}
    assert {longest(target, ARROWS[room]) for target in targets} >= ARROWS[room] - {"plm"}


@pytest.mark.parametrize("room", FLOORS)
def test_imports_inside_a_room_go_down(room: str) -> None:
    """Inside a room, imports go down; a new module is given a floor."""
    floor_of = {f"{room}.{module}": number for number, floor in enumerate(FLOORS[room]) for module in floor}
    modules = {name for name in MODULES if name.startswith(f"{room}.")}
    assert set(floor_of) == modules
    for name in modules:
        for target in imports(MODULES[name], name) & modules:
            assert floor_of[target] < floor_of[name], f"{name} may not import {target}: it is on no lower floor"


def test_there_is_no_circle() -> None:
    """Neither inside a room nor between rooms."""
    arrows = {name: imports(path, name) & set(MODULES) - {name} for name, path in MODULES.items()}
    list(TopologicalSorter(arrows).static_order())


def test_nothing_but_the_program_imports_the_command_line() -> None:
    """What a command can do, a program can do without it."""
    for name, path in MODULES.items():
        if not longest(name, {"plm.cli", "plm.__main__"}):
            assert not any(longest(target, {"plm.cli"}) for target in imports(path, name)), name


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("plm.data")])
def test_only_the_datamodule_wires_data_together(name: str) -> None:
    """Nothing in data imports the datamodule, only it what encodes texts, and only that the feature cache."""
    targets = imports(MODULES[name], name)
    assert "plm.data.datamodule" not in targets
    assert "plm.data.encoding" not in targets or name == "plm.data.datamodule"
    assert "plm.data.features" not in targets or name == "plm.data.encoding"


def test_the_walk_sees_what_it_should() -> None:
    """The test of the test: known edges are found, lazy ones too, and those under TYPE_CHECKING are not."""
    assert "plm.functional" in imports(MODULES["plm.methods.lore.model"], "plm.methods.lore.model")
    assert "plm.recipe.fit" in imports(MODULES["plm.cli.fit"], "plm.cli.fit")
    assert "plm.recipe.fit" in imports(MODULES["plm.portfolio.objectives"], "plm.portfolio.objectives")
    assert imports(MODULES["plm"], "plm") == set()
    assert longest("plm.data.sources.pairs", set(ARROWS)) == "plm.data.sources"
    assert longest("plm.methodical", {"plm.method"}) is None
    assert method_of("plm.methods.pal.model") == "plm.methods.pal" != method_of("plm.methods.palm.grid")


def test_each_large_dependency_stays_in_one_room() -> None:
    """Backbones alone import transformers and peft, users sqlalchemy, data Ray, serving the web server."""
    room_of = {"transformers": "plm.backbones", "peft": "plm.backbones", "sqlalchemy": "plm.users", "ray": "plm.data"}
    room_of |= dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic"), "plm.serving")
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for room in {room_of.get(module.partition(".")[0], name) for module in modules}:
                assert longest(name, {room}), f"{name} imports {modules}"


@pytest.mark.parametrize("name", MODULES)
def test_protocols_have_methods_only_and_are_never_asked_for(name: str) -> None:
    """`isinstance` with a Protocol reads attributes, and which of them it finds depends on the version of Python."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        assert "runtime_checkable" not in (getattr(node, "id", ""), getattr(node, "attr", "")), name
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
            for member in node.body:
                is_method = isinstance(member, ast.FunctionDef) and not member.decorator_list
                is_text = isinstance(member, ast.Expr) and isinstance(member.value, ast.Constant)
                assert is_method or is_text, f"{name}: {node.name} has {ast.unparse(member)!r}; make it a base class"


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
        "heavy &= set(sys.modules); assert not heavy, heavy; assert set(plm.__all__) <= set(dir(plm))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    assert all(getattr(plm, name) is not None for name in plm.__all__)


def test_type_checkers_see_the_public_names() -> None:
    """Those under TYPE_CHECKING are those of the table, from the same modules."""
    tree = ast.parse(MODULES["plm"].read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert typed == plm._MODULE_OF and {"__version__", *typed} == set(plm.__all__)


def test_installed_methods_are_public() -> None:
    """Every registered method is a name of `plm`, found by its entry point where it is not in the table."""
    registered = {point.name: point.value for point in entry_points(group="plm.methods")}
    assert registered
    for name, value in registered.items():
        method = getattr(plm, name)
        assert f"{method.__module__}.".startswith(f"{value.partition(':')[0]}."), name
