"""How long ``plm VERB --help`` takes, for every verb, as seconds and as a ratio to an interpreter that does nothing.

Run: python benchmarks/cli_latency.py [--runs 7]
Every verb and the empty program are started in turn, so that what else the machine does slows all of them alike; the
medians are printed. The goal is 0.5 s for each verb on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time

GOAL = 0.5  # seconds


def seconds(command: list[str]) -> float:
    """Wall time of one start."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "80"}
    )
    return time.perf_counter() - start


def verbs() -> list[str]:
    """The commands that ``plm --help`` lists."""
    shown = subprocess.run([sys.executable, "-m", "plm", "--help"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^  ([a-z]+) ", shown, flags=re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    commands = {"python -c pass": ["-c", "pass"], "plm --help": ["-m", "plm", "--help"]}
    commands |= {f"plm {verb} --help": ["-m", "plm", verb, "--help"] for verb in verbs() if verb != "plm"}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    nothing = medians["python -c pass"]
    for name, median in medians.items():
        missed = "  [missed]" if median >= GOAL else ""
        print(f"{name:<24}{median:7.3f} s {median / nothing:6.1f}x{missed}")


if __name__ == "__main__":
    main()
