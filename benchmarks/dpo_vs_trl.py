"""LoRA-DPO training steps against TRL's DPOTrainer: tokens per second of the same pairs on the same network.

Usage: OMP_NUM_THREADS=2 python benchmarks/dpo_vs_trl.py [--pairs 8 --prompt 96 --completion 32 --rounds 5]

With ``--memory`` it prints the peak resident memory of a process of each kind instead, which takes a few steps alone.

Both train rank-8 adapters of one random GPT-2-style network in float32 (bf16 on a GPU) with AdamW. The reference is
the network with the adapter off, read in every step, or its log-probabilities are known before ("reference known":
``reference_logps`` of the data here, ``precompute_ref_log_probs`` of TRL, neither timed); a ratio is to TRL with the
same reference. A step is loss, backward pass and optimizer step on a batch made before, without trainer and loader. A
token is one of prompt and response of either side, as TRL counts them, whether or not a prompt is read twice. Rounds
time all in turns, so that a busy machine slows all alike; ratios are medians over rounds. TRL >= 1.16.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from plm.backbones import FreshCausalLM
from plm.methods.lora_dpo import LoRADPO
from plm.types import PreferenceBatch, Tokens

KNOWN = ", reference known"
OURS = {"LoRADPO, prompts read twice": False, "LoRADPO, prompts shared": True}
"""Name -> whether prompts are shared."""
NAMES = [name + known for known in ("", KNOWN) for name in ("TRL", *OURS)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Random token ids of prompts and responses."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"prompt_ids": options.prompt, "chosen_ids": options.completion, "rejected_ids": options.completion}
    return [
        {name: torch.randint(10, 2000, (size,), generator=draw).tolist() for name, size in sizes.items()}
        for _ in range(options.pairs)
    ]


def ours(folder: str, pairs: list[dict[str, list[int]]], share: bool, known: bool) -> Callable[[], Any]:
    """One training step of LoRADPO."""
    spec = {"class_path": "plm.backbones.CausalLM", "init_args": {"model": folder}}
    method = LoRADPO(num_users=1, feature_dim=1, backbone=spec, rank=8, alpha=16, share_prompts=share)
    method.configure_model()
    method.to(DEVICE).train()

    def side(name: str) -> Tokens:
        ids = torch.tensor([row["prompt_ids"] + row[name] for row in pairs], device=DEVICE)
        attended = torch.ones_like(ids, dtype=torch.bool)
        return Tokens(
            ids, attended, torch.arange(ids.shape[1], device=DEVICE).expand_as(ids) >= len(pairs[0]["prompt_ids"])
        )

    zero = torch.zeros(len(pairs), dtype=torch.long, device=DEVICE)
    chosen, rejected = side("chosen_ids"), side("rejected_ids")
    if known:
        with torch.no_grad():
            chosen, rejected = (part._replace(ref_logps=method.logps(part).total) for part in (chosen, rejected))
    batch = PreferenceBatch(chosen, rejected, zero, torch.ones(len(pairs), device=DEVICE), zero > 0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = method.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def theirs(folder: str, pairs: list[dict[str, list[int]]], known: bool) -> Callable[[], Any]:
    """One training step of TRL's trainer on the batch its own collator makes."""
    import datasets
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.generation_config.pad_token_id = None
    trainer = trl.DPOTrainer(
        model=network,
        args=trl.DPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=DEVICE == "cpu",
            bf16=DEVICE == "cuda",
            gradient_checkpointing=False,
            precompute_ref_log_probs=known,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True),
    )
    batch = {key: value.to(DEVICE) for key, value in trainer.data_collator(pairs).items() if torch.is_tensor(value)}
    model = trainer.model.to(DEVICE).train()
    if known:
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = trainer.compute_ref_log_probs(model, batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = trainer.compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"pairs": 8, "prompt": 96, "completion": 32, "rounds": 5, "steps": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory and not options.only:
        for name in NAMES:
            subprocess.run([sys.executable, *sys.argv, "--only", name], check=True)
        return
    pairs = rows(options)
    with tempfile.TemporaryDirectory() as root:
        folder = str(Path(root) / "network")
        FreshCausalLM(folder, vocab_size=4096, width=256, num_layers=4, num_heads=4).prepare(
            f"word{n} and {n * n} more of it" for n in range(20000)
        )
        steps: dict[str, Callable[[], Any]] = {}
        for name in NAMES if options.only is None else [options.only]:
            kind, known = name.removesuffix(KNOWN), name.endswith(KNOWN)
            steps[name] = theirs(folder, pairs, known) if kind == "TRL" else ours(folder, pairs, OURS[kind], known)
        if options.only:
            import trl  # noqa: F401 - what is imported counts for both

            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(3):
                steps[options.only]()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"{options.only}: peak {peak / 1024:,.0f} MiB, {(peak - before) / 1024:,.0f} MiB of it in the steps")
            return
        first = {name: step() for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                begin = time.perf_counter()
                for _ in range(options.steps):
                    step()
                seconds[name].append((time.perf_counter() - begin) / options.steps)
    tokens = 2 * options.pairs * (options.prompt + options.completion)
    title = f"{options.pairs} pairs of {options.prompt} + {options.completion} tokens, {DEVICE}"
    table = Table("what", "tokens/s", "ratio", "first loss", title=title)
    for name, times in seconds.items():
        peers = seconds["TRL" + KNOWN * name.endswith(KNOWN)]
        ratio = statistics.median(peer / taken for peer, taken in zip(peers, times, strict=True))
        table.add_row(name, f"{tokens / statistics.median(times):,.0f}", f"{ratio:.2f}x", f"{first[name]:.6f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
