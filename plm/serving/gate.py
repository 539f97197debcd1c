"""What a request must pass before it reaches the service: an ASGI middleware.

It reads the body within bounds of size, time and memory, checks that it is JSON and nothing else, asks for a key where
one is needed, and lets only so many requests in; the others get 429. Of every request one line is logged: its id, its
route and how long it took, and never a text or the id of a user.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plm.serving.metrics import Metrics

OPEN = {"/health", "/", "/page.css", "/page.js"}
"""Paths that need no key and always have room: nothing of users or texts is there."""
QUERIES = {"/get_reward": {"user"}, "/v1/users": {"after"}}
"""Path -> parameters that may stand behind a question mark."""
HELD_BODIES = 64
"""Largest bodies that may be in memory at once, whole or in part."""
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
log = logging.getLogger("plm.serving")


def problem_json(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    """The body of an error, as of vLLM."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return json.dumps({"error": error}).encode()


def problem_of_body(body: bytes) -> str | None:
    """What keeps bytes from being JSON that says one thing: other numbers, halves of characters, a key twice."""
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return "expected JSON in UTF-8, got other bytes"
    except UnicodeEncodeError:
        return "expected text, got half of a character (a lone surrogate)"
    except RecursionError:
        return "expected JSON of few levels"
    except json.JSONDecodeError as error:
        return f"expected JSON, got an error at character {error.pos}: {error.msg}"
    except ValueError as error:
        return str(error)
    return None


def _refuse(name: str) -> float:
    raise ValueError(f"expected JSON, whose numbers are finite, got {name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("expected each key of an object once, got one of them twice")
    return made


class _Refused(Exception):
    """A request that is answered before it is read, or instead."""

    def __init__(self, status: int, kind: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


class Gate:
    """The middleware.

    Args:
        app: What is behind it.
        metrics: Counts requests.
        keys: Bearer keys, one of which a request must have; none = no key is needed.
        max_body: Bytes of a body.
        max_queue: Requests that are worked on or wait for it.
        body_seconds: Time in which a body must have come, and a part of the answer have gone.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        keys: Collection[str] = (),
        max_body: int = 4 * 2**20,
        max_queue: int = 128,
        body_seconds: float = 10.0,
    ) -> None:
        self.app, self.metrics = app, metrics
        self.digests = {_digest(key) for key in keys}
        self.max_body, self.max_queue, self.body_seconds = max_body, max_queue, body_seconds
        self.held = 0
        """Bytes of all bodies that are being read or worked on."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand on what is none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), dict(scope["headers"])
        named = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = named if _REQUEST_ID.fullmatch(named) else uuid.uuid4().hex
        status = 499  # the client has gone

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            async with asyncio.timeout(self.body_seconds):  # a client that does not read gives up its place
                await send(message)

        try:
            try:
                await self._answer(scope, headers, receive, send_named)
            except _Refused as refused:
                body = problem_json(refused.status, refused.kind, str(refused))
                await _send(send_named, refused.status, body, refused.headers)
            except Exception as error:  # answered with 500; its message may hold texts
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("%s %s\n%s", request_id, type(error).__name__, where)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "-")
            self.metrics.count(route, status, seconds)
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], route, status, 1000 * seconds)

    async def _answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Check a request and hand it on.

        Raises:
            _Refused: If it is not let in.
        """
        self._check_head(scope, headers)
        held = 0
        try:
            body = bytearray()
            end = asyncio.get_running_loop().time() + self.body_seconds
            while True:
                try:
                    async with asyncio.timeout_at(end):
                        message = await receive()
                except TimeoutError:
                    await _close(send, f"the body did not come within {self.body_seconds:g} s")
                    return
                if message["type"] == "http.disconnect":
                    return
                part = message.get("body", b"")
                self.held += len(part)
                held += len(part)
                if held > self.max_body:
                    raise self._too_large()
                if self.held > HELD_BODIES * self.max_body:
                    raise self._busy()
                body += part
                if not message.get("more_body", False):
                    break
            if (body or scope["method"] == "POST") and (problem := problem_of_body(bytes(body))):
                raise _Refused(400, "Bad Request", problem)
            if scope["path"] not in OPEN and self.metrics.in_flight >= self.max_queue:
                raise self._busy()
            self.metrics.in_flight += 1
            try:
                await self.app(scope, _replay(bytes(body), receive), send)
            finally:
                self.metrics.in_flight -= 1
        finally:
            self.held -= held

    def _check_head(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Check the key, the path, the query and the announced size."""
        # ids may hold any character: the path is matched as it was sent, and its parts are decoded one by one
        scope["path"] = scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]
        path = scope["path"]
        if not self.digests and not _is_of_this_machine(scope, headers.get(b"host", b"localhost").decode("latin-1")):
            raise _Refused(
                403, "Forbidden", "expected the host localhost: without --api_keys pages of other hosts are not let in"
            )
        if self.digests and path not in OPEN:
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            if scheme.lower() != "bearer" or _digest(key.strip()) not in self.digests:
                raise _Refused(
                    401, "Unauthorized", "expected a known key as a bearer", **{"www-authenticate": "Bearer"}
                )
        try:
            query = parse_qsl(scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict")
        except UnicodeError:
            raise _Refused(400, "BadRequestError", "expected a query in UTF-8, percent-encoded") from None
        names = [name for name, _ in query]
        known = QUERIES.get(path, set())
        if not known.issuperset(names) or len(names) > len(known):
            raise _Refused(
                400, "BadRequestError", f"expected no parameters of the query but {sorted(known)}, once each"
            )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise _Refused(415, "BadRequestError", "expected the content type application/json")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body:
            raise self._too_large()

    def _too_large(self) -> _Refused:
        return _Refused(413, "BadRequestError", f"expected a body of at most {self.max_body} bytes", connection="close")

    def _busy(self) -> _Refused:
        return _Refused(429, "TooManyRequests", "too many requests at once; try again", **{"retry-after": "1"})


def _is_of_this_machine(scope: Scope, host: str) -> bool:
    """Whether a request to a loopback address names it, or localhost; true where it came to another address.

    A page of another host can make its name resolve to this machine, and is then of the same origin to a browser.
    """
    if not is_loopback((scope.get("server") or ("",))[0]):
        return True
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    return name.lower() == "localhost" or is_loopback(name.strip("[]"))


def is_loopback(address: str) -> bool:
    """Whether an address is one of this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    """Keys are compared by their hashes: how long that takes says nothing about a key."""
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def read_keys(lines: Iterable[str]) -> list[str]:
    """Keys, one a line; empty lines and those that begin with # are left out.

    Raises:
        ValueError: If there is none, or one could not be sent.
    """
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys or any(not re.fullmatch(r"[!-~]{16,}", key) for key in keys):
        raise ValueError(
            "--api_keys: expected a file with a key a line, 16 or more printable characters without blanks each; make "
            "one with python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return keys


async def _send(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    sent = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


async def _close(send: Send, message: str) -> None:
    await _send(send, 408, problem_json(408, "BadRequestError", message), {"connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body again, and then what comes."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return parts.pop() if parts else await receive()

    return again
