"""Small HTTP servers that stand for engines of other people."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from plm.backbones import Backbone


@contextmanager
def answering(server: ThreadingHTTPServer) -> Iterator[None]:
    """Have a server answer while the block lasts."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


class LocalServer(ThreadingHTTPServer):
    """A server of this machine at a free port, a thread per request."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        """Where the paths of OpenAI's interface begin."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def running(self) -> AbstractContextManager[None]:
        """Answer while the block lasts."""
        return answering(self)


class PolicyServer(LocalServer):
    """Answers with a text that tells prompt and seed; fails as it is told."""

    def __init__(self) -> None:
        super().__init__(PolicyHandler)
        self.models = ["tiny"]
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.refuses_prompt: str | None = None
        self.busy = self.most_busy = 0
        self.pause = 0.0
        self.lock = threading.Lock()


class PolicyHandler(BaseHTTPRequestHandler):
    server: PolicyServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": name} for name in self.server.models]}, {})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            failure = server.failures.pop() if server.failures else None
            server.bodies.append(body)
            server.paths.append(self.path)
        time.sleep(server.pause)
        with server.lock:
            server.busy -= 1
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if failure is not None:
            self.answer(failure[0], {"error": "later"}, failure[1])
        elif prompt == server.refuses_prompt:
            self.answer(400, {"error": {"message": "too long"}}, {})
        else:
            text = f"{prompt} {body['seed']}"
            choice = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
            self.answer(200, {"choices": [choice]}, {})


class EmbeddingsServer(LocalServer):
    """``/v1/embeddings`` of a backbone, which may be told to do something else."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(EmbeddingsHandler)
        self.backbone = backbone
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.refused: str | None = None
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.warp: Callable[[torch.Tensor], torch.Tensor] = lambda features: features


class EmbeddingsHandler(BaseHTTPRequestHandler):
    server: EmbeddingsServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        server.keys.append(self.headers["Authorization"])
        status = server.failures.pop() if server.failures else 400 if server.refused in body["input"] else 200
        answer: Any = {"error": {"message": f"not {body['input']}"}}
        if status == 200:
            rows = server.warp(server.backbone.encode(body["input"])).tolist()
            data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
            answer = server.change({"object": "list", "data": data[::-1], "model": body["model"]})
        data_sent = json.dumps(answer).encode()
        self.send_response(status if self.path == "/v1/embeddings" else 404)
        self.send_header("Content-Length", str(len(data_sent)))
        self.end_headers()
        self.wfile.write(data_sent)


class Hub(LocalServer):
    """As much of the hub of Hugging Face as an upload asks for; who has the key ``key``, or ``reader``, is anna."""

    def __init__(self) -> None:
        super().__init__(HubHandler)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.is_full = False


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        role = {"Bearer key": "write", "Bearer reader": "read"}.get(self.headers["authorization"])
        if self.path == "/api/whoami-v2" and role:
            token = {"type": "access_token", "accessToken": {"displayName": "a key", "role": role}}
            self.answer(200, {"name": "anna", "type": "user", "auth": token})
        else:
            is_there = self.path == "/api/models/anna/public"
            found = {"id": "anna/public", "private": False, "siblings": []}
            status = 200 if is_there else 404 if self.path.startswith("/api/models/") else 401
            self.answer(status, found if is_there else {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer(200, {"url": f"http://127.0.0.1:{self.server.server_address[1]}/anna/taste"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/anna/taste/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path == "/api/models/anna/taste/commit/main" and not self.server.is_full:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/anna/taste"})
        else:
            self.answer(507, {"error": "no space is left"})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("x-error-code", "RepoNotFound")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
