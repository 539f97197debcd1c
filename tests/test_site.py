"""The site: every method has a card, numbers of cards are those of recipes, links lead somewhere, and it builds."""

from __future__ import annotations

import importlib.util
import posixpath
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlparse

import pytest
import yaml

import plm

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "plm/methods").glob("*.md"))
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, *CARDS, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
HOSTS = {"arxiv.org", "github.com", "keepachangelog.com"}
"""Where links may lead; whether they do is not asked."""
HEADINGS = ["Idea", "Equations", "Results", "When not to use it"]
RECIPE = re.compile(r"recipes/(\w+)\.yaml")
LINK = re.compile(r"\]\(([^)\s]+)\)")
METHODS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["plm.methods"]


def outside_code(page: Path) -> str:
    """Text of a page without what stands in backticks."""
    return re.sub(r"^ *```.*?^ *```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def header(recipe: str) -> str:
    """Comment at the head of a recipe, with the signs of pages."""
    lines = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#")).replace("-", "−")


def numbers(text: str) -> list[str]:
    """Decimal numbers, dates and intervals of a text; minus signs that stand between words are no signs."""
    return re.findall(r"\d{4}−\d\d−\d\d|[+−]?\d+\.\d+", text.replace("-", "−"))


def anchors(page: Path) -> set[str]:
    """What links to a page may name: headings as the site names them, and names that it documents."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = (heading.encode("ascii", "ignore").decode() for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE))
    slugs = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", slug) for slug in slugs} | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


# ---------------------------------------------------------------------- cards
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_card(method: str) -> None:
    """Beside its file or folder, and of the same name: an idea with a picture, equations, results, limits."""
    module = METHODS[method].partition(":")[0].removeprefix("plm.methods.").partition(".")[0]
    card = ROOT / "plm/methods" / f"{module}.md"
    text = card.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert f"`{method}`" in text.split("## Idea")[0]
    assert f"]({module}.svg)" in text.split("## Equations")[0] and card.with_suffix(".svg").is_file()
    assert "```math\n" in text.split("## Equations")[1].split("## Results")[0]
    assert RECIPE.findall(text.split("## Results")[1])


def test_no_card_is_left_over() -> None:
    modules = {value.partition(":")[0].split(".")[2] for value in METHODS.values()}
    assert {card.stem for card in CARDS} == modules
    assert {picture.stem for picture in (ROOT / "plm/methods").glob("*.svg")} == modules


@pytest.mark.parametrize(
    "page", [*CARDS, *(ROOT / "docs" / name for name in ("capabilities.md", "choosing.md"))], ids=lambda page: page.name
)
def test_numbers_of_a_row_are_those_of_its_recipe(page: Path) -> None:
    text = re.sub(r"\[\d+\.\d+\]\(https[^)]*\)", "", page.read_text(encoding="utf-8"))  # papers
    rows = [line for line in text.splitlines() if line[:1] == "|" and len(set(RECIPE.findall(line))) == 1]
    for row in rows:
        (recipe,) = set(RECIPE.findall(row))
        found = numbers(header(recipe))
        known = {*found, *(number.lstrip("+−") for number in found)}
        cells = RECIPE.sub("", row)
        missing = [number for number in numbers(cells) if number not in known]
        assert not missing, f"{recipe}: its header has no {missing}"
    assert rows


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_percentages_of_a_card_are_those_of_its_recipes(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    headers = "\n".join(header(recipe) for recipe in set(RECIPE.findall(text)))
    results = text.split("## Results")[1]
    known = set(re.findall(r"\d+\.\d+|\d+(?= %)", headers))
    said = re.findall(r"(\d+(?:\.\d+)?) %(?! interval)", results)
    assert [number for number in said if number not in known] == []


# ---------------------------------------------------------------------- links
@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(outside_code(page)):
        if re.match(r"[a-z]+:", link):
            assert urlparse(link).scheme == "https" and urlparse(link).hostname in HOSTS, link
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists() and (ROOT in target.resolve().parents), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


def test_every_page_has_its_place() -> None:
    def pages(entry: object) -> list[str]:
        values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]
        return [str(entry)] if isinstance(entry, str) else [page for value in values for page in pages(value)]

    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(nav) == len(set(nav))
    assert {page.name for page in PAGES} | {f"methods/{card.name}" for card in CARDS} <= set(nav)


def test_every_public_name_is_documented() -> None:
    page = anchors(ROOT / "docs/api.md")
    assert [name for name in plm.__all__ if name != "__version__" and f"plm.{name}" not in page] == []


# ---------------------------------------------------------------------- pages
@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason='no mkdocs-material: pip install -e ".[docs]"')
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", text
        )
        assert not loaded, f"{page.relative_to(tmp_path)} loads {loaded}"
        for target in re.findall(r"<img\b[^>]*?src=\"?([^\s\">]+)", text):
            assert (
                target.startswith("data:") or posixpath.isabs(target) or (page.parent / target).resolve().is_file()
            ), f"{page}: no {target}"
    recipes = (tmp_path / "recipes/index.html").read_text(encoding="utf-8")
    assert all(f'id="{file.stem}"' in recipes for file in (ROOT / "recipes").rglob("*.yaml"))
    assert 'role="math"' in (tmp_path / "methods/lore/index.html").read_text(encoding="utf-8")
