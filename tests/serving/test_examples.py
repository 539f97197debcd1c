"""The examples do what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import plm
from plm.cli import main
from plm.serving.service import RewardService

EXAMPLES = Path(plm.__file__).parents[1] / "examples"


def test_the_client_teaches_and_asks(client: httpx.Client) -> None:
    command = [sys.executable, str(EXAMPLES / "client.py"), str(client.base_url).rstrip("/"), "anna/b"]
    before, learned, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "'user': 'anna/b', 'num_pairs': 1" in learned

    def gap(line: str) -> float:
        tea, coffee = map(float, re.findall(r"-?\d+\.\d+(?:e-?\d+)?", line))
        return tea - coffee

    assert gap(after) > gap(before)


def test_the_reward_function_of_openrlhf(
    client: httpx.Client, service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called as OpenRLHF calls it."""
    monkeypatch.setenv("PLM_URL", str(client.base_url).rstrip("/"))
    found = runpy.run_path(str(EXAMPLES / "openrlhf_reward.py"))["reward_func"](["a tea"], ["a "], ["ben"])
    assert found["rewards"].tolist() == [float(service.method.score(["tea"], user_id="ben"))]
    assert found["extra_logs"]["user_known"].tolist() == [1.0]


def test_the_options_in_the_examples_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    options = set(re.findall(r"--\w+", capsys.readouterr().out))
    for name in ("Dockerfile", "plm-serve.service", "openrlhf_reward.py"):
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        used = {
            option
            for line in re.findall(r"(?:plm serve|ENTRYPOINT|^CMD).*", text, re.M)
            for option in re.findall(r"--\w+", line)
        }
        assert used and used <= options, name
