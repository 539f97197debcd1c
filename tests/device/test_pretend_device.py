"""The cases on the pretend device, in processes of their own.

Autograd learns of all devices at the first backward pass of a process; one that is registered later cannot be used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("cases.py")


@pytest.mark.parametrize("contracts", ["contract", "latent_dpo", "live_methods", "token_methods"])
def test_methods_do_there_what_they_do_on_the_cpu(contracts: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    env = {**os.environ, "PLM_DEVICE_CONTRACTS": contracts, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=CASES.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
