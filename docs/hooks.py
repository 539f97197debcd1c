"""Bring files beside ``docs/`` into the site: cards of methods, recipes, CONTRIBUTING.md and CHANGELOG.md.

Their links stay those of the repository; here they are turned into those of the site. Pictures of cards are set into
the page, so that they follow its light or dark colours. Formulas are drawn by matplotlib, for no script is to be loaded
from elsewhere.
"""

from __future__ import annotations

import html
import io
import posixpath
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
CARDS = "plm/methods/"
MARK = "<!-- recipes -->"
"""Where ``docs/recipes.md`` shows the recipes."""
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)]+\.svg)\)$", re.MULTILINE)
_FORMULA = re.compile(r"^```math\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(
    r"<td(?=>(?:<strong>)?(?:\d{4}-\d\d-\d\d|[+−-]?[\d.,]+(?: %)?(?: points)?(?: \[[^\]<]*\])?)(?:</strong>)?</td>)"
)
_FENCES = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not below ``docs/``."""
    for path in (*sorted((ROOT / CARDS).glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        place = _place(path.relative_to(ROOT).as_posix())
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in recipes, pictures and formulas, and turn links of the repository into those of the site."""
    if page.file.abs_src_path is None or not page.file.src_uri.endswith(".md"):
        return markdown
    source = Path(page.file.abs_src_path)
    markdown = markdown.replace(MARK, _recipes())
    markdown = _FORMULA.sub(lambda match: _formula(match[1]), markdown)
    markdown = _PICTURE.sub(lambda match: _picture(source.parent / match[2], match[1]), markdown)
    parts = _FENCES.split(markdown)
    parts[::2] = [_LINK.sub(lambda match: _link(match, source, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(text: str, **_: Any) -> str:
    """Mark cells of numbers, which are not to be broken into lines."""
    return _NUMBER.sub('<td class="number"', text)


def _place(path: str) -> str:
    """Page of the site that shows a file of the repository, both from their roots."""
    if path.startswith("recipes/"):
        return f"recipes.md#{Path(path).stem}"
    return path.replace(CARDS, "methods/").removeprefix("docs/")


def _link(match: re.Match[str], source: Path, page: str) -> str:
    """A link from a file of the repository as a link from the page that shows it."""
    target = posixpath.normpath(posixpath.join(source.relative_to(ROOT).parent.as_posix(), match[1]))
    return posixpath.relpath(_place(target), posixpath.dirname(page) or ".") + (match[2] or "")


def _recipes() -> str:
    """Every recipe under its name, those of papers last."""
    files = [file for pattern in ("*.yaml", "papers/*.yaml") for file in sorted((ROOT / "recipes").glob(pattern))]
    return "\n\n".join(
        f"## {file.stem} {{ #{file.stem} }}\n\n```yaml\n{file.read_text(encoding='utf-8')}```" for file in files
    )


def _picture(file: Path, words: str) -> str:
    """An SVG as a part of the page."""
    drawing = re.sub(r"\s*\n\s*", " ", file.read_text(encoding="utf-8"))
    return f'<figure class="drawing" role="img" aria-label="{html.escape(words)}">{drawing}</figure>'


def _formula(text: str) -> str:
    """A formula in TeX as shapes in the colour of the text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"mathtext.fontset": "cm", "savefig.transparent": True, "svg.hashsalt": text}):
        math_to_image(f"${text}$", buffer, FontProperties(size=14), dpi=72, format="svg", color="#22262b")
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace("#22262b", "currentColor")
    drawing = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"\s*\n\s*", " ", drawing)
    return f'<div class="formula" role="math" aria-label="{html.escape(text)}">{drawing}</div>'
