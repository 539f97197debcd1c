"""Ask `plm serve` for rewards of a user, tell it what the user prefers, and ask again: python client.py URL USER."""

import json
import sys
import urllib.parse
import urllib.request


def post(url: str, body: dict) -> dict:
    """Send JSON and read JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=30).read())


url, user = sys.argv[1:]
responses = {"prompt": "What should I drink?", "responses": ["Strong tea.", "Black coffee."], "user": user}
pair = {"prompt": responses["prompt"], "chosen": "Strong tea.", "rejected": "Black coffee."}
print("before:", [entry["reward"] for entry in post(f"{url}/v1/rewards", responses)["data"]])
print("learned:", post(f"{url}/v1/users/{urllib.parse.quote(user, safe='')}/pairs", {"pairs": [pair]}))
print("after:", [entry["reward"] for entry in post(f"{url}/v1/rewards", responses)["data"]])
