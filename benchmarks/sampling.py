"""Texts drawn by `plm.generation.sample`, against `generate` of transformers.

Usage: OMP_NUM_THREADS=2 python benchmarks/sampling.py --model FOLDER [--texts 96 --tokens 40 --rounds 1]

Both write as many texts after the same prompts in one batch, at temperature 1 over the whole vocabulary, of the same
network with a key/value cache; no text ends early. Rounds time both in turns, so that a busy machine slows both alike;
"ratio" is the median over rounds of the time of `generate` to ours.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from plm.backbones import CausalLM, Policy, completion_tokens, device
from plm.generation import sample

PROMPTS = ["The film was", "I went to see it because", "What I liked most:", "Nobody in the audience could tell that"]


def ours(policy: Policy, prompts: list[str], tokens: int, seed: int) -> None:
    """Write with the library."""
    sample(policy, prompts, max_new_tokens=tokens, min_new_tokens=tokens, seed=seed, batch_tokens=10**9)


@torch.no_grad()
def theirs(policy: Policy, prompts: list[str], tokens: int, seed: int) -> None:
    """Write with transformers."""
    torch.manual_seed(seed)
    rows = [(policy.backbone.prompt_tokens(prompt), []) for prompt in prompts]
    read = completion_tokens(rows, left=True).to(policy.device)
    written = policy.network.generate(
        input_ids=read.input_ids,
        attention_mask=read.attention_mask.long(),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        pad_token_id=0,
    )
    assert written.shape == (len(prompts), read.input_ids.shape[1] + tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    policy = Policy(CausalLM(options.model, append_eos=False)).to(device()).eval()
    prompts = [f"{row}. {PROMPTS[row % len(PROMPTS)]}" for row in range(options.texts)]
    times: dict[str, list[float]] = {"plm": [], "transformers": []}
    for write in (ours, theirs):
        write(policy, prompts[:2], 2, 0)
    for seed in range(options.rounds):
        for name, write in (("plm", ours), ("transformers", theirs)):
            start = time.perf_counter()
            write(policy, prompts, options.tokens, seed)
            times[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(times["plm"], times["transformers"], strict=True))
    table = Table("", "seconds", "tokens/s")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        table.add_row(name, f"{middle:.1f}", f"{options.texts * options.tokens / middle:.0f}")
    Console().print(table)
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
