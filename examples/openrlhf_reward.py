"""A reward function for OpenRLHF: --reward.remote_url examples/openrlhf_reward.py --data.label_key user_id.

Labels are ids of users. Without this file, the server itself takes OpenRLHF's requests:

    plm serve --ckpt_path best.ckpt --port 5000 --label_is_user --end_of_turn '<|im_end|>'
    ... --reward.remote_url http://127.0.0.1:5000/get_reward --data.label_key user_id
"""

import json
import os
import urllib.request

import torch

URL = os.environ.get("PLM_URL", "http://127.0.0.1:8000")


def reward_func(queries: list[str], prompts: list[str], labels: list, **_: object) -> dict:
    """Rewards ``(n,)`` of n texts that begin with their prompts."""
    body = {"query": queries, "prompts": prompts, "users": labels}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('PLM_KEY', '')}"}
    request = urllib.request.Request(f"{URL}/get_reward", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        found = json.loads(response.read())
    logs = {name: torch.tensor(values) for name, values in found["extra_logs"].items()}
    return {"rewards": torch.tensor(found["rewards"]), "scores": torch.tensor(found["scores"]), "extra_logs": logs}
