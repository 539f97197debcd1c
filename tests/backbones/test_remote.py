"""Writing by an OpenAI-compatible server: what is sent, tried again, bounded, and kept when it fails."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from plm.backbones import RemoteError, RemotePolicy, remote
from plm.cli import main
from plm.methods.bradley_terry import BradleyTerry
from plm.testing import saved
from tests.http_servers import LocalServer, PolicyHandler, PolicyServer

CHAT = [{"role": "user", "content": "a bird?"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PolicyServer]:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.005)
    server = PolicyServer()
    with server.running():
        yield server


def test_a_text_is_asked_for_with_a_seed_of_its_own(server: PolicyServer) -> None:
    policy = RemotePolicy(server.url)
    first = policy.texts(["one", "two"], 3, max_new_tokens=7, temperature=0.5, top_p=None, top_k=5, min_new_tokens=0)
    assert set(server.paths) == {"/v1/completions"} and len(server.bodies) == 6
    assert {json.dumps({k: v for k, v in body.items() if k not in ("seed", "prompt")}) for body in server.bodies} == {
        json.dumps({"model": "tiny", "n": 1, "max_tokens": 7, "temperature": 0.5, "top_k": 5})
    }
    assert len({text for row in first for text in row}) == 6
    assert [[text.split()[0] for text in row] for row in first] == [["one"] * 3, ["two"] * 3]
    assert policy.texts(["two"], 2, max_new_tokens=7) == [first[1][:2]], "whatever else is asked for"
    assert policy.texts(["two"], 1, seed=1)[0][0] != first[1][0]
    RemotePolicy(server.url, template="chat").texts(["a bird?", json.dumps(CHAT)], 1)
    assert server.paths[-2:] == ["/v1/chat/completions"] * 2
    assert [body["messages"] for body in server.bodies[-2:]] == [CHAT, CHAT]


def test_what_fails_in_passing_is_tried_again_and_what_is_refused_is_not(server: PolicyServer) -> None:
    server.failures = [(503, {}), (429, {"Retry-After": "0"}), (500, {}), (408, {})]
    policy = RemotePolicy(server.url, concurrency=1)
    assert policy.texts(["one"], 1)[0][0].startswith("one ") and len(server.bodies) == 5
    assert len({json.dumps(body) for body in server.bodies}) == 1
    server.failures = [(500, {})] * 100
    with pytest.raises(ValueError, match=r"completions failed \(status 500: .*later.*\); what was written is kept"):
        policy.texts(["one"], 1)
    assert len(server.bodies) == 5 + 1 + remote.PATIENT.retries
    server.failures, server.refuses_prompt = [], "two"
    with pytest.raises(ValueError, match=r"status 400: .*too long"):
        policy.texts(["two"], 1)
    assert len(server.bodies) == 5 + 1 + remote.PATIENT.retries + 1


@pytest.mark.parametrize("answer", [b"<html>", b"\xff\xfe{}", b"[1]"])
def test_answers_without_a_json_object_are_refusals(answer: bytes) -> None:
    class Odd(PolicyHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

    odd = LocalServer(Odd)
    with odd.running(), pytest.raises(RemoteError, match=r"expected (a JSON object|JSON)") as error:
        remote.ask(odd.url, {}, "NO_KEY", remote.Patience(retries=3))
    assert not error.value.is_passing


def test_an_error_whose_words_do_not_come_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an answer that trickles has failed when its time is over."""
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.005)
    tries: list[int] = []

    class Cut(PolicyHandler):
        def do_POST(self) -> None:
            tries.append(1)
            self.send_response(500 if len(tries) == 1 else 200)
            self.send_header("Content-Length", "999")
            self.end_headers()
            for _ in range(2 if len(tries) == 1 else 40):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.02)
            self.connection.close()

    cut = LocalServer(Cut)
    with cut.running(), pytest.raises(RemoteError) as error:
        remote.ask(cut.url, {}, "NO_KEY", remote.Patience(retries=1, timeout=0.2))
    assert len(tries) == 2 and error.value.is_passing and "did not end within 0.2 s" in str(error.value)


def test_only_so_many_requests_are_under_way(server: PolicyServer) -> None:
    server.pause = 0.1
    RemotePolicy(server.url, concurrency=3).texts([f"p{row}" for row in range(12)], 1)
    assert server.most_busy == 3


def test_the_model_is_named_where_there_are_several(server: PolicyServer) -> None:
    server.models = ["anna", "base"]
    with pytest.raises(ValueError, match=r"--policy: expected the name of one of .*\['anna', 'base'\], got none"):
        RemotePolicy(server.url)
    with pytest.raises(ValueError, match="got 'ben'"):
        RemotePolicy(server.url, "ben")
    assert RemotePolicy(server.url, "anna").key() == {"engine": "openai", "model": "anna", "template": "plain"}
    with pytest.raises(ValueError, match=r"--policy_url: http://127.0.0.1:9/v1/models failed"):
        RemotePolicy("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="an address such as"):
        RemotePolicy("localhost:8000")


def test_plm_sample_goes_on_where_the_server_failed_and_writes_nothing_twice(
    server: PolicyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": CHAT}, *({"prompt": f"p{row}"} for row in range(20))]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["sample", "--policy_url", server.url, "--template", "chat", "--prompts", str(prompts)]
    command += ["--num_samples", "2", "--concurrency", "2", "--output", str(out)]
    server.refuses_prompt = "p9"
    assert main(command) == 1
    assert "status 400" in capsys.readouterr().err
    kept = out.read_text()
    written = [json.loads(line)["prompt"] for line in kept.splitlines()]
    assert 0 < len(written) < 21 and written[0] == CHAT
    before, server.refuses_prompt = len(server.bodies), None
    assert main(command) == 0
    assert out.read_text().startswith(kept)
    again = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert Counter(map(str, again)) == Counter(str(row["prompt"]) for row in rows)
    asked_again = [body["messages"][-1]["content"] for body in server.bodies[before:]]
    assert len(asked_again) == 2 * (21 - len(written))
    assert main([*command[:-1], str(out), "--dtype", "bfloat16"]) == 2
    assert "--dtype is of a policy that is loaded here" in capsys.readouterr().err
    assert main(["sample", "--prompts", str(prompts), "--num_samples", "1", "--output", str(out)]) == 2
    assert "--policy MODEL or --policy_url URL" in capsys.readouterr().err


def test_plm_generate_chooses_among_texts_of_the_server(server: PolicyServer, tmp_path: Path) -> None:
    from plm.backbones import HashingBackbone

    method = BradleyTerry(1, 16, backbone=HashingBackbone(16).spec())
    prompts, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("one\ntwo\n")
    with saved(method) as path:
        command = ["generate", "--ckpt_path", str(path), "--prompts", str(prompts), "--policy_url", server.url]
        assert main([*command, "--best_of", "4", "--output", str(out)]) == 0
    assert len(server.bodies) == 8
    assert [json.loads(line)["responses"][0].split()[0] for line in out.read_text().splitlines()] == ["one", "two"]
