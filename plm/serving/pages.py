"""The page at ``/``: a shell without anything of users or texts, which its script fills by the endpoints of the server.

The shell needs no key, as a browser has none to send before somebody has typed it in; every call of the script does.
The policy of the page lets it load and reach nothing but this server, and no text can become script.
"""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response
from jinja2 import Environment, StrictUndefined

import plm
from plm.serving import bodies

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI, num_questions: int, needs_key: bool) -> None:
    """Serve the page, its style and its script.

    Args:
        app: The application.
        num_questions: Pairs of the server's own pool.
        needs_key: Whether the endpoints want a key.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    shell = environment.from_string(_read("page.html.j2")).render(
        version=plm.__version__, num_questions=num_questions, needs_key=needs_key, max_pairs=bodies.MAX_PAIRS
    )

    def answer(path: str, content: str, media_type: str) -> None:
        async def file() -> Response:
            return Response(content, media_type=media_type, headers=HEADERS)

        app.get(path, include_in_schema=False)(file)

    answer("/", shell, "text/html")
    answer("/page.css", _read("page.css"), "text/css")
    answer("/page.js", _read("page.js"), "text/javascript")


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
