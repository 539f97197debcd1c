"""A stand-in for a language model that judges: it counts the words that a person has preferred.

Usage: python -m plm.testing.judge [--port 8100]

It answers as an OpenAI-compatible server does, so that `plm.methods.persona_judge.PersonaJudge` runs without a model.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from plm.backbones import Answer, Messages

HEADINGS = "Response A|Response B|Response|Preferred response|Other response"
BLOCK = re.compile(rf"^({HEADINGS}):\n(=== \w+ ===)\n(.*?)\n\2$", re.M | re.S)
LIKES, DISLIKES = "Likes: ", "Dislikes: "
PER_NAT = 4
"""How many words make the judge e times as sure."""
MOST_WORDS = 60
"""Words of a persona."""


def blocks(text: str) -> dict[str, list[str]]:
    """The texts of a question that stand between marks, by their headings."""
    found: dict[str, list[str]] = {}
    for heading, _, content in BLOCK.findall(text):
        found.setdefault(heading, []).append(content)
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _told(better: str, worse: str) -> Counter[str]:
    """What a pair says of words: 1 for those of the preferred response alone, -1 for those of the other one."""
    return Counter(dict.fromkeys(_words(better) - _words(worse), 1) | dict.fromkeys(_words(worse) - _words(better), -1))


def count_words(messages: Messages, max_tokens: int, temperature: float, seed: int, begin: str = "") -> Answer:
    """Answer a question of a `PersonaJudge`: words liked and disliked, or which response has more of the liked."""
    question = messages[-1]["content"]
    shown = blocks(question)
    liked: Counter[str] = Counter()
    if "Preferred response" in shown:
        for better, worse in zip(shown["Preferred response"], shown["Other response"], strict=True):
            liked.update(_told(better, worse))
        order: list[str] = sorted(liked, key=lambda word: (-abs(liked[word]), word))
        likes, dislikes = ([word for word in order[:MOST_WORDS] if sign * liked[word] > 0] for sign in (1, -1))
        return Answer(f"{LIKES}{' '.join(likes)}\n{DISLIKES}{' '.join(dislikes)}", [])
    for line in messages[0]["content"].splitlines():
        liked.update(dict.fromkeys(line.removeprefix(LIKES).split(), 1) if line.startswith(LIKES) else {})
        liked.update(dict.fromkeys(line.removeprefix(DISLIKES).split(), -1) if line.startswith(DISLIKES) else {})
    for asked, reply in zip(messages[1:-1:2], messages[2:-1:2], strict=True):
        sides = blocks(asked["content"])
        first, second = sides["Response A"][0], sides["Response B"][0]
        liked.update(_told(*((first, second) if reply["content"].endswith("A") else (second, first))))
    if "Response" in shown:
        value = sum(liked[word] for word in _words(shown["Response"][0]))
        mark = str(min(9, max(1, 5 + value)))
        return Answer(f"SCORE: {mark}", [("SCORE: ", {}), (mark, {mark: 0.0})])
    more, less = (sum(liked[word] for word in _words(shown[side][0])) for side in ("Response A", "Response B"))
    chance = 1 / (1 + math.exp(min(9.0, max(-9.0, (less - more) / PER_NAT))))
    letter = "A" if chance >= 0.5 else "B"
    text = f"More of the words that this person likes.\nPREFERENCE: {letter}"
    return Answer(text, [(text[:-1], {}), (letter, {"A": math.log(chance), "B": math.log(1 - chance)})])


class ChatServer(ThreadingHTTPServer):
    """A function that answers conversations, behind OpenAI's interface; a thread per request.

    Args:
        chat: The function.
        port: Where it listens on this machine; 0 = a free port.
    """

    daemon_threads = True

    def __init__(self, chat: Callable[[Messages, int, float, int], Answer], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.chat = chat

    @property
    def url(self) -> str:
        """Where the paths of OpenAI's interface begin."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _send(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """The only model."""
        self._send({"data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        """One answer."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.chat(body["messages"], body["max_tokens"], body["temperature"], body["seed"])
        content = [
            {"token": token, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": p} for t, p in likely.items()]}
            for token, likely in answer.tokens
        ]
        choice = {"message": {"role": "assistant", "content": answer.text}, "logprobs": {"content": content or None}}
        usage = {"prompt_tokens": answer.num_prompt_tokens, "completion_tokens": answer.num_tokens}
        self._send({"choices": [choice], "usage": usage})


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8100)
    server = ChatServer(count_words, parser.parse_args().port)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
