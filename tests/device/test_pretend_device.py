"""The cases on the pretend device, in processes of their own.

Autograd learns of all devices at the first backward pass of a process; one that is registered later cannot be used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(cases: str, *options: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / cases)]
    env = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], env=env, cwd=HERE.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_one_mode_of_each_method_does_there_what_it_does_on_the_cpu() -> None:
    names = "BradleyTerry LoRe VPL DPL PALResidual PALM LatentDPO LiveVPL SFT LoRADPOBasis CLaP"
    run(
        "cases.py",
        "-k",
        " or ".join([f"Test{name}]" for name in names.split()] + ["devices", "waits", "trained", "differ"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("contracts", ["contract", "latent_dpo", "live_methods", "token_methods"])
def test_all_modes_do_there_what_they_do_on_the_cpu(contracts: str) -> None:
    run("cases.py", PLM_DEVICE_CONTRACTS=contracts)


@pytest.mark.slow
@pytest.mark.parametrize("oracle", ["lora_dpo", "logits"])
def test_portfolios_are_there_what_they_are_on_the_cpu(oracle: str) -> None:
    run("portfolio_cases.py", "-k", oracle)


@pytest.mark.slow
def test_the_host_waits_seldom() -> None:
    run("waits_cases.py")
