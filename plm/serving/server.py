"""The server: `RewardService` behind FastAPI and uvicorn, in one process or in several on one store of users."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from plm.querying import read_pool
from plm.serving.app import make_app
from plm.serving.embeddings import EncoderServer
from plm.serving.gate import is_loopback, read_keys
from plm.serving.service import RewardService

HEAD_SECONDS = 10.0
"""Time in which a connection must send the head of a request."""
log = logging.getLogger("plm.serving")
_SETTINGS = "PLM_SERVE_SETTINGS"
"""Environment variable that tells worker processes what to serve."""


class Settings(NamedTuple):
    """What to serve, and within which limits; each is the option of ``plm serve`` of its name."""

    ckpt_path: str
    users: str | None = None
    model_name: str | None = None
    label_is_user: bool = False
    end_of_turn: str = ""
    api_keys: str | None = None
    """File of keys, one a line."""
    max_body: int = 4 * 2**20
    max_queue: int = 128
    encoder_url: str | None = None
    encoder_model: str | None = None
    encoder_unchecked: bool = False
    pool: str | None = None
    """File of pairs to ask users about."""

    def app(self) -> ASGIApp:
        """Load the checkpoint and make the application."""
        service = RewardService(
            self.ckpt_path,
            self.users,
            self.model_name,
            label_is_user=self.label_is_user,
            end_of_turn=self.end_of_turn,
            encoder=self._encoder,
        )
        keys = () if self.api_keys is None else read_keys(Path(self.api_keys).read_text(encoding="utf-8").splitlines())
        pool = [] if self.pool is None else read_pool(self.pool)[0]
        return make_app(service, pool, keys=keys, max_body=self.max_body, max_queue=self.max_queue)

    @property
    def _encoder(self) -> EncoderServer | None:
        if self.encoder_url is None:
            return None
        return EncoderServer(self.encoder_url, self.encoder_model or "", self.encoder_unchecked)


class ImpatientProtocol(H11Protocol):
    """Closes connections on which no head of a request comes, and logs no paths: ids of users stand in them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        self._patience: asyncio.TimerHandle | None = None
        self.access_log = False  # whatever handlers the program has given uvicorn's logger
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait on, unless the head was complete."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        self._rest()

    def _watch(self) -> None:
        """Wait for a head, unless a request is under way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEAD_SECONDS, self._close)

    def _rest(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _close(self) -> None:
        self._patience = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def serve(settings: Settings, host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve until SIGINT or SIGTERM; what has been let in is answered before the end.

    Args:
        settings: What to serve.
        host: Address to listen at.
        port: Port.
        workers: Processes, each with its own copy of the model; they share the store of users.

    Raises:
        ValueError: If the checkpoint or the file of keys cannot be read.
    """
    _start_logging()
    _allow_many_connections()
    if settings.api_keys is None and not (host == "localhost" or is_loopback(host)):
        log.warning("whoever reaches %s may read, teach and delete users: set --api_keys", host)
    options: dict[str, Any] = {**_OPTIONS, "host": host, "port": port}
    if workers == 1:
        uvicorn.run(_lasting(settings), **options)
        return
    os.environ[_SETTINGS] = json.dumps(settings._asdict())
    uvicorn.run(f"{__name__}:app_of_worker", factory=True, workers=workers, **options)


def app_of_worker() -> ASGIApp:
    """The application of one of several processes."""
    _start_logging()
    return _lasting(Settings(**json.loads(os.environ[_SETTINGS])))


def _lasting(settings: Settings) -> ASGIApp:
    """The application of a process that only serves: no request waits for a collection that visits the model."""
    app = settings.app()
    gc.freeze()
    return app


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """Serve from a thread, for as long as the block lasts.

    Yields:
        The address, such as ``http://127.0.0.1:54321``.
    """
    server = uvicorn.Server(uvicorn.Config(app, **{**_OPTIONS, "host": "127.0.0.1", "port": 0}))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise ValueError("the server did not start; its log says why")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


_OPTIONS: dict[str, Any] = {
    "http": f"{__name__}:ImpatientProtocol",  # by name: a worker answers its supervisor before it imports torch
    "timeout_worker_healthcheck": 120,
    "ws": "none",
    "lifespan": "on",
    "log_config": None,
    "server_header": False,
    "timeout_keep_alive": 5,
    "timeout_graceful_shutdown": 30,
    "h11_max_incomplete_event_size": 2**15,
}


def _start_logging() -> None:
    """Log to standard error, each line with its time."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("plm.serving").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.INFO)


def _allow_many_connections() -> None:
    """Let the process hold as many open connections as the system lets it."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
