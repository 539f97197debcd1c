from __future__ import annotations

from pathlib import Path

import pytest

from plm.backbones import Backbone, CausalLM
from plm.messages import nearest
from plm.recipe.defaults import expand, find_config, read_config, shipped


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """recipes/r.yaml beside conf/data/{a,b}.yaml and conf/trainer/cpu.yaml."""
    for name in ("data/a", "data/b", "trainer/cpu"):
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name.split('/')[0]}: {{}}\n")
    (tmp_path / "recipes").mkdir()
    return tmp_path


def recipe(project: Path, text: str) -> str:
    path = project / "recipes" / "r.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("form", [["--config", "{}"], ["-c", "{}"], ["--config={}"]])
def test_groups_come_before_their_recipe_in_order(project: Path, form: list[str]) -> None:
    path = recipe(project, "defaults: [{trainer: cpu}, {data: b}]\nseed_everything: 1\n")
    args = ["fit", "--a=1", *(part.format(path) for part in form), "--model.lr", "2"]
    conf = project / "conf"
    groups = ["--config", str(conf / "trainer/cpu.yaml"), "--config", str(conf / "data/b.yaml")]
    assert expand(args) == ["fit", *groups, "--config", path, "--a=1", "--model.lr", "2"]


def test_without_defaults_nothing_changes(project: Path) -> None:
    path = recipe(project, "seed_everything: 1\n")
    assert expand(["fit", "--config", path]) == ["fit", "--config", path]
    assert expand(["fit", "--trainer.max_epochs", "3"]) == ["fit", "--trainer.max_epochs", "3"]


def test_shipped_groups_back_a_recipe_of_ones_own(project: Path) -> None:
    path = recipe(project, "defaults: [{logger: csv}]\n")  # not in the project's conf
    assert expand(["--config", path]) == ["--config", str(shipped("conf") / "logger/csv.yaml"), "--config", path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [{data: c}]", r"no data named 'c' .*data: a, .*b, "),
        ("defaults: [{dta: a}]", "no group 'dta' in defaults; did you mean 'data'"),
        ("defaults: {data: a}", "expected defaults like"),
        ("defaults: [data]", "expected defaults like"),
        ("- 1", "expected a mapping .* got a list"),
        ("a: [", "is not valid YAML: .*line 1"),
    ],
)
def test_a_wrong_recipe_is_named_with_what_exists(project: Path, text: str, message: str) -> None:
    path = recipe(project, text)
    with pytest.raises(ValueError, match=message) as error:
        expand(["fit", "--config", path])
    assert "r.yaml" in str(error.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config file 'nope\.yaml'"):
        expand(["fit", "--config", "nope.yaml"])
    with pytest.raises(ValueError, match="needs the path"):
        expand(["fit", "--config"])


def test_a_recipe_of_ones_own_is_suggested_before_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are shipped are listed only where none is near."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for own in ("quickstart2.yaml", "mine.yaml", "mine/pairs.yaml"):
        Path(own).write_text("a: 1")
    near = {
        "mine.yml": "mine.yaml",
        "mine/pair.yaml": "mine/pairs.yaml",
        "quickstart.yml": "recipes/quickstart.yaml",  # the same but for the ending and the folder
        "quickstart3.yaml": "quickstart2.yaml",
    }
    for path, meant in near.items():
        with pytest.raises(ValueError) as raised:
            find_config(path)
        assert str(raised.value) == f"no config file {path!r}; did you mean {meant!r}?"
    with pytest.raises(ValueError, match=r"'zzzzzz' \(shipped: .*recipes/quickstart\.yaml"):
        find_config("zzzzzz")


def test_groups_have_no_defaults_of_their_own(project: Path) -> None:
    (project / "conf/data/a.yaml").write_text("defaults: [{data: b}]\n")
    with pytest.raises(ValueError, match="only a recipe may have defaults"):
        expand(["--config", recipe(project, "defaults: [{data: a}]")])


def test_nearest_suggests_only_what_is_near() -> None:
    assert nearest("num_base", ["lr", "num_bases"]) == "; did you mean 'num_bases'?"
    assert nearest("zzz", ["lr", "num_bases"]) == ""


def test_groups_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plm reads conf/method/vpl_paper.yaml by that name, as it does its recipes."""
    monkeypatch.chdir(tmp_path)
    assert find_config("conf/method/vpl_paper.yaml") == shipped("conf") / "method/vpl_paper.yaml"
    with pytest.raises(ValueError, match=r"did you mean 'conf/method/vpl_paper\.yaml'"):
        find_config("vpl_papr.yaml")


@pytest.mark.parametrize("name", ["gpu_bf16", "gpu_qlora"])
def test_groups_for_a_gpu_give_what_a_language_model_takes(name: str) -> None:
    backbone = read_config(shipped("conf") / "trainer" / f"{name}.yaml")["data"]["backbone"]
    lm = Backbone.from_spec({**backbone, "init_args": {"model": "some/model", **backbone["init_args"]}})
    assert isinstance(lm, CausalLM) and lm.dtype == "bfloat16" and lm.max_length == 1024
    assert lm.quantization == ("4bit" if name == "gpu_qlora" else None)
