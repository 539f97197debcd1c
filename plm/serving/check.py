"""``plm serve --check``: what comes by HTTP is what ``plm score`` says, to the last bit, and ``plm generate``."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from plm.backbones import GOLDEN, device
from plm.checkpoint import load_method
from plm.generation import sample
from plm.method import PersonalizationMethod
from plm.method.abilities import Writer
from plm.scoring import response_row, score_responses
from plm.serving.server import Settings, running

NUM_USERS = 3
"""Known users who are scored for, besides an unknown one and nobody."""


CHAT = "/v1/chat/completions"
ASKED = '[{"role":"user","content":"Tea or coffee?"}]'
"""What a policy is asked."""
NUM_TOKENS = 16


class Comparison(NamedTuple):
    """One request, and the rewards, or the text, that it should have got."""

    endpoint: str
    user: str | None
    found: list[Any]
    expected: list[Any]


def check(settings: Settings) -> list[Comparison]:
    """Score the golden texts through a server and by ``plm score``; where users write, write through both, too.

    Args:
        settings: What is served; keys are not asked for.

    Raises:
        ValueError: If the checkpoint cannot be read, or does not score the texts.
    """
    method = load_method(settings.ckpt_path, users=settings.users)
    if isinstance(method, Writer):
        method.to(device())
    known = [user.user_id for user in islice(method.users, NUM_USERS)]
    found = []
    with running(settings._replace(api_keys=None).app()) as url:
        for user in (*known, "nobody who is known", None):
            for prompt, texts in GOLDEN:
                record = {"prompt": prompt, "user_id": user}
                rows = [response_row({**record, "response": text}) for text in texts]
                expected = score_responses(method, rows).rewards.tolist()
                for endpoint, rewards in _by_http(url, user, prompt, list(texts)):
                    found.append(Comparison(endpoint, user, rewards, expected))
            if isinstance(method, Writer) and method.can_write:
                found.append(_written(method, url, user))
    return found


def _by_http(url: str, user: str | None, prompt: str, texts: list[str]) -> Iterator[tuple[str, list[float]]]:
    """Endpoint and rewards, by all endpoints that score responses to this prompt."""
    query = {"query": [prompt + text for text in texts], "prompts": [prompt] * len(texts), "users": [user] * len(texts)}
    yield "/get_reward", post(f"{url}/get_reward", query)["rewards"]
    scores = post(f"{url}/score", {"queries": prompt, "documents": texts, "user": user})
    yield "/score", [entry["score"] for entry in scores["data"]]
    rewards = post(f"{url}/v1/rewards", {"prompt": prompt, "responses": texts, "user": user})
    yield "/v1/rewards", [entry["reward"] for entry in rewards["data"]]
    if not prompt:
        classes = post(f"{url}/classify", {"input": texts, "user": user})
        yield "/classify", [entry["probs"][0] for entry in classes["data"]]


def _written(method: PersonalizationMethod, url: str, user: str | None) -> Comparison:
    """A text of one user."""
    state = method.known_users.lookup([user])[0]
    [[expected]] = sample(method, [ASKED], state, max_new_tokens=NUM_TOKENS)
    body = {"messages": json.loads(ASKED), "user": user, "seed": 0, "max_tokens": NUM_TOKENS}
    [choice] = post(url + CHAT, body)["choices"]
    return Comparison(CHAT, user, [choice["message"]["content"]], [expected.text])


def post(url: str, body: dict[str, Any]) -> Any:
    """Send JSON and read JSON.

    Raises:
        ValueError: If the server refuses it.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answers {error.code}: {error.read(1000).decode(errors='replace')}") from error
