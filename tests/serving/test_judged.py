"""A served checkpoint whose method asks a language model elsewhere, while that answers and while it does not."""

from __future__ import annotations

from contextlib import ExitStack

import httpx
import pytest

from plm.backbones import PlainText, remote
from plm.methods.persona_judge import PersonaJudge
from plm.serving.app import make_app
from plm.serving.server import running
from plm.serving.service import RewardService
from plm.testing import saved
from plm.testing.judge import ChatServer
from tests.http_servers import answering
from tests.scripted_judge import Script


def test_people_are_learned_and_judged_and_a_judge_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.005)
    method = PersonaJudge(2, 1, PlainText().spec())
    method.user_ids = ["anna", "ben"]
    server = ChatServer(Script(default="long"))
    monkeypatch.setenv("PLM_JUDGE_URL", server.url)
    pairs = [{"prompt": f"{place}", "chosen": "x" * (5 + place), "rejected": "y" * 60} for place in range(6)]
    ask = {"input": ["x" * 9, "y" * 60], "user": "dora"}
    with saved(method) as path, ExitStack() as serving:
        with answering(server):
            url = serving.enter_context(running(make_app(RewardService(path, name="judge"))))
            client = serving.enter_context(httpx.Client(base_url=url, timeout=60))
            before = [entry["probs"][0] for entry in client.post("/classify", json=ask).json()["data"]]
            assert client.post("/v1/users/dora/pairs", json={"pairs": pairs}).json()["num_pairs"] == 6
            after = [entry["probs"][0] for entry in client.post("/classify", json=ask).json()["data"]]
            assert before[0] < before[1] and after[0] > after[1]
        for path_of, body in (("/classify", {**ask, "input": ["new"]}), ("/v1/users/emil/pairs", {"pairs": pairs[:5]})):
            answer = client.post(path_of, json=body)
            assert answer.status_code == 503 and "chat/completions failed" in answer.text
        assert client.get("/v1/users/emil").status_code == 404 and client.get("/health").status_code == 200
