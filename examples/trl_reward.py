"""A reward function for TRL's GRPOTrainer and RLOOTrainer: rewards of `plm serve` for the user of each row.

    GRPOTrainer(model, reward_funcs=plm_reward, train_dataset=..., args=GRPOConfig(...))

The data set has a column ``user_id`` beside ``prompt``; `PLM_URL` names the server, `PLM_KEY` its key if it wants one.
"""

import json
import os
import urllib.request

URL = os.environ.get("PLM_URL", "http://127.0.0.1:8000")


def plm_reward(prompts: list, completions: list, user_id: list[str] | None = None, **_: object) -> list[float]:
    """Raw rewards, one for each completion; prompts and completions are texts or chat messages."""
    if user_id is None:
        raise ValueError("the data set needs a column user_id; keep remove_unused_columns=False")
    rewards = []
    for prompt, completion, user in zip(prompts, completions, user_id, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        body = {"prompt": prompt, "responses": [text], "user": user}
        rewards.append(_post("/v1/rewards", body)["data"][0]["reward"] if text.strip() else 0.0)
    return rewards


def _post(path: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('PLM_KEY', '')}"}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())
