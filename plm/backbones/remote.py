"""A language model behind an OpenAI-compatible server (vLLM, SGLang, TGI, llama.cpp) as a writer of texts."""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from plm.backbones.backbone import Key, chat_messages, choose, plain_text

KEY_VARIABLE = "PLM_POLICY_KEY"
"""Environment variable with the key of the server, if it wants one."""
_FIRST_WAIT = 0.5  # seconds
_PASSING = (408, 409, 425, 429)
"""Statuses below 500 that may be another one later."""
_SENT = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p"}
_SENT_WHERE_SET = {"top_k": "top_k", "min_new_tokens": "min_tokens"}
"""No part of OpenAI's interface, but of that of the engines above."""


class Patience(NamedTuple):
    """How long a server is waited for."""

    retries: int = 6
    """How often more it is asked."""
    timeout: float = 600.0
    """Seconds after which an attempt has failed, whether nothing comes or too little."""
    longest_wait: float = 30.0
    """Seconds between two attempts, whatever the server says; a quarter is added by chance."""


PATIENT = Patience()
"""For work that nobody waits for."""


def text_key(seed: int, prompt: str, number: int) -> int:
    """The seed of all randomness in one sample of one prompt, a signed integer of 64 bits."""
    text = f"{seed}\0{number}\0{prompt}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


class RemotePolicy:
    """A model that is served by somebody else and writes texts; nothing else can be asked of it.

    Every text is a request with a seed of its own, so that engines which know no ``n`` give different texts; engines
    read a prompt once for all of them. Requests that fail in passing (no connection, status 408, 409, 425, 429, 500
    and above) are sent again after growing waits, or when the server says.

    Args:
        url: Where the server's paths begin, such as ``http://localhost:8000/v1``.
        model: Name of the model there; None = the only one.
        template: ``chat`` asks for replies in conversations, ``plain`` for the rest of texts.
        concurrency: Requests under way at once.

    Raises:
        ValueError: If the server cannot be asked, or does not serve the model.
    """

    def __init__(
        self, url: str, model: str | None = None, template: Literal["chat", "plain"] = "plain", concurrency: int = 16
    ) -> None:
        choose("template", template, ("chat", "plain"))
        if concurrency < 1:
            raise ValueError(f"expected concurrency to be at least 1, got {concurrency!r}")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--policy_url: expected an address such as http://localhost:8000/v1, got {url!r}")
        self.url, self.template, self.concurrency = url.rstrip("/"), template, concurrency
        served = [str(entry["id"]) for entry in self._ask("models", None, Patience(retries=1)).get("data", [])]
        if model is None and len(served) != 1:
            raise ValueError(f"--policy: expected the name of one of the models at {url}: {served}, got none")
        self.model = served[0] if model is None else model
        if self.model not in served:
            raise ValueError(f"--policy: expected one of the models at {url}: {served}, got {model!r}")

    def key(self) -> Key:
        """Who writes, wherever it is served."""
        return {"engine": "openai", "model": self.model, "template": self.template}

    def texts(
        self,
        prompts: Sequence[str],
        num_samples: int,
        *,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> list[list[str]]:
        """Write ``num_samples`` texts on each prompt.

        Args:
            prompts: Plain texts or JSON lists of chat messages.
            num_samples: Texts on each prompt.
            seed: With the prompt and the number of a text the seed that the server is told.
            progress: Called with the number of texts finished since the last call.
            **settings: ``max_new_tokens``, ``temperature``, ``top_p``, ``top_k`` and ``min_new_tokens``.

        Raises:
            ValueError: If the server refuses a request, keeps failing, or gives no text.
        """
        body = {sent: settings[name] for name, sent in _SENT.items() if settings.get(name) is not None}
        body |= {sent: settings[name] for name, sent in _SENT_WHERE_SET.items() if settings.get(name)}
        jobs = [(prompt, number) for prompt in prompts for number in range(num_samples)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._text, prompt, text_key(seed, prompt, number), body) for prompt, number in jobs]
            try:
                flat = []
                for future in futures:
                    flat.append(future.result())
                    if progress is not None:
                        progress(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [flat[start : start + num_samples] for start in range(0, len(flat), num_samples)]

    def _text(self, prompt: str, key: int, body: Mapping[str, Any]) -> str:
        """One text."""
        messages = chat_messages(prompt)
        request: dict[str, Any] = {"model": self.model, "seed": key % 2**31, "n": 1, **body}
        if self.template == "chat":
            request["messages"] = messages or [{"role": "user", "content": prompt}]
            choices = self._ask("chat/completions", request).get("choices") or [{}]
            text = (choices[0].get("message") or {}).get("content")
        else:
            request["prompt"] = prompt if messages is None else plain_text(prompt, "")
            text = (self._ask("completions", request).get("choices") or [{}])[0].get("text")
        if not isinstance(text, str):
            raise ValueError(f"expected a text from {self.url}, got none to the prompt {prompt[:60]!r}")
        return text

    def _ask(self, path: str, body: Mapping[str, Any] | None, patience: Patience = PATIENT) -> dict[str, Any]:
        """One request, repeated while it fails for a transient reason."""
        try:
            return ask(f"{self.url}/{path}", body, KEY_VARIABLE, patience)
        except RemoteError as error:
            raise ValueError(f"--policy_url: {error}; what was written is kept") from error


class RemoteError(ValueError):
    """A server does not answer as it should.

    Args:
        message: What it did.
        status: Of HTTP; None = no answer, or no JSON.
        is_passing: Whether it may answer later.
    """

    def __init__(self, message: str, status: int | None, is_passing: bool) -> None:
        super().__init__(message)
        self.status, self.is_passing = status, is_passing


def _body(response: http.client.HTTPResponse, seconds: float) -> bytes:
    """What a server answers, if it comes in time.

    Raises:
        TimeoutError: If it does not.
    """
    end, parts = time.monotonic() + seconds, []
    while part := response.read1(2**16):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError(f"the answer did not end within {seconds:g} s")
    return b"".join(parts)


@cache
def _direct() -> urllib.request.OpenerDirector:
    """Sends what is for this machine past any proxy; made once, for it reads certificates."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, body: Mapping[str, Any] | None, key_variable: str, patience: Patience) -> dict[str, Any]:
    """Ask an OpenAI-compatible server for a JSON object, and again while it fails in passing.

    Args:
        url: The address.
        body: What is sent; None = nothing, by GET.
        key_variable: Environment variable with the key, if the server wants one.
        patience: How long an answer is waited for.

    Raises:
        RemoteError: If it refuses the request, or keeps failing.
    """
    headers = {"Content-Type": "application/json"}
    if os.environ.get(key_variable):
        headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    send = _direct().open if is_loopback(url) else urllib.request.urlopen
    wait = _FIRST_WAIT
    for tries_left in range(patience.retries, -1, -1):
        asked_to_wait, status = None, None
        try:
            try:
                with send(request, timeout=patience.timeout) as response:
                    answer = json.loads(_body(response, patience.timeout))
            except urllib.error.HTTPError as error:
                status, asked_to_wait = error.code, error.headers.get("Retry-After")
                reason = f"status {status}: {error.read(500).decode(errors='replace')}"
                is_passing = status in _PASSING or status >= 500
            else:
                if isinstance(answer, dict):
                    return answer
                reason, is_passing = f"expected a JSON object, got {type(answer).__name__}", False
        except (OSError, http.client.HTTPException) as error:  # also while the words of an error are read
            reason, is_passing = str(error) or type(error).__name__, True
        except ValueError as error:  # no JSON, or none in UTF-8: the page of a proxy, say
            reason, is_passing = f"expected JSON, got other bytes ({error})", False
        if not is_passing or not tries_left:
            raise RemoteError(f"{url} failed ({reason})", status, is_passing)
        seconds = float(asked_to_wait) if asked_to_wait and asked_to_wait.isdigit() else wait
        time.sleep(min(seconds, patience.longest_wait) * (1 + 0.25 * random.random()))
        wait *= 2
    raise AssertionError


def is_loopback(url: str) -> bool:
    """Whether an address is one of this machine.

    >>> is_loopback("http://localhost:8000/v1"), is_loopback("http://[::1]/v1"), is_loopback("https://example.org/v1")
    (True, True, False)
    """
    try:
        host = urlsplit(url).hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
