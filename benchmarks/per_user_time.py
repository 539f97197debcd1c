"""Seconds to learn one more person: LoRA-DPO against Latent DPO on the same pairs, and people learned together.

Usage: OMP_NUM_THREADS=2 python benchmarks/per_user_time.py [--pairs 540 --prompts 600 --clap_seconds 775]

First table, one new person, from indices of pairs to what is stored of the person. The networks have the sizes of
recipes/clap_imdb_tiny.yaml with random weights, the texts its lengths: time depends on nothing else. LoRA-DPO and
``full`` take one pass over the pairs, as published, ``mlp`` the 200 steps of the default, ``newton`` solves. What is
made once for everybody is left out under "new person": log-probabilities of all responses under the reference, or their
latents, features of prompts and, as given by ``--clap_seconds``, the training of CLaP. Under "among N" it is
included, shared by N people. "together" is the time of one among ``--people`` who are learned in one call.

Second table, people learned in one call of ``LatentDPO.adapt`` against one call for each, and against a plain loop: a
``torch.nn`` module, ``torch.optim.AdamW``, and the same loss on the same pairs. The latter two are timed on ``--alone``
of the people. "apart" is the largest difference between a number of a person trained alone and together.

Rounds time all in turns, so that a busy machine slows all alike; shown are medians.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.backbones import Backbone, FreshCausalLM
from plm.data.collate import build_context
from plm.data.datamodule import PreferenceDataModule
from plm.data.encoding import CachedReader, encode_pairs, token_rows, with_reference_logps
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource
from plm.functional import kl_to_prior
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.methods.latent_dpo.maths import Gaussian, gaussian
from plm.methods.latent_dpo.rules import preference_losses
from plm.methods.lora_dpo import LoRADPO
from plm.recipe.defaults import read_config, shipped
from plm.testing import saved
from plm.types import Context

AMONG = (1, 10, 100, 1000)
WORDS, RESPONSES = 1000, 8


def group(name: str) -> dict[str, Any]:
    """The arguments of ``conf/method/<name>.yaml``."""
    options: dict[str, Any] = read_config(shipped("conf") / "method" / f"{name}.yaml")["model"]["init_args"]
    return options


CASES: dict[str, dict[str, Any]] = {
    "mlp (default)": {},
    "linear": {"family": "linear"},
    "vector": {"family": "vector"},
    "newton": group("latent_dpo_newton"),
}


class Samples(PairSource):
    """Eight responses of random words to every prompt, of which each of the people compares two."""

    name = "samples"

    def __init__(self, num_people: int, num_pairs: int, num_prompts: int, prompt_words: int, words: int) -> None:
        self.num_people, self.num_pairs = num_people, num_pairs
        random = np.random.default_rng(0)
        lexicon = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(WORDS)]
        self.prompts = [" ".join(random.choice(lexicon, prompt_words)) for _ in range(num_prompts)]
        lengths = random.integers(1, 2 * words, num_prompts * RESPONSES)
        self.responses = [" " + " ".join(random.choice(lexicon, length)) for length in lengths]

    def load(self) -> PairTable:
        random = np.random.default_rng(1)
        prompt = np.concatenate(
            [random.permutation(len(self.prompts))[: self.num_pairs] for _ in range(self.num_people)]
        )
        two = np.argsort(random.random((len(prompt), RESPONSES)), 1)[:, :2] + RESPONSES * prompt[:, None]
        user = np.repeat(np.arange(self.num_people), self.num_pairs)
        ids = [f"person {number}" for number in range(self.num_people)]
        texts = self.prompts, self.responses
        return pair_table(ids, *texts, user=user, prompt=prompt, chosen=two[:, 0], rejected=two[:, 1])

    def everything(self) -> PairTable:
        """All responses as pairs of one user: what is encoded once for everybody."""
        first = np.arange(0, len(self.responses), 2)
        texts, user = (self.prompts, self.responses), np.zeros_like(first)
        return pair_table(["all"], *texts, user=user, prompt=first // RESPONSES, chosen=first, rejected=first + 1)


class NewPerson:
    """Networks and texts, and one new person learned by either method."""

    def __init__(
        self, options: argparse.Namespace, folder: Path, clap: Path, lm: FreshCausalLM, texts: Samples
    ) -> None:
        self.options, self.folder, self.lm, self.texts = options, folder, lm, texts
        self.caches: dict[str, float] = {}
        self.lora = {reference: self._lora(reference) for reference in (False, True)}
        self.latent: dict[str, tuple[LatentDPO, Any]] = {}
        cases = {"full": group("latent_dpo_paper"), "mlp": {}, "newton": group("latent_dpo_newton")}
        for name, case in cases.items():
            backbone = ClapLatents(str(clap), prompts="tokens" if name == "full" else "hidden")
            reader = backbone.prompt_backbone
            began = time.perf_counter()
            self._encode(backbone, texts.everything(), name != "newton")
            self.caches[name] = time.perf_counter() - began + options.clap_seconds
            data = self._encode(backbone, texts.load(), name != "newton")
            dim = 0 if name == "newton" else reader.feature_dim
            self.latent[name] = LatentDPO(1, backbone.feature_dim, backbone.spec(), dim, **case), data

    def _encode(self, backbone: Backbone, table: PairTable, prompts: bool) -> Any:
        cache = str(self.folder / f"cache-{prompts}-{getattr(backbone, 'prompts', '')}")
        return encode_pairs(table, backbone, CachedReader(backbone, cache), prompt_features=prompts)

    def _lora(self, reference: bool) -> Any:
        one = Samples(1, self.options.pairs, self.options.prompts, 0, 1)
        one.prompts, one.responses = self.texts.prompts, self.texts.responses
        data = PreferenceDataModule(
            one,
            self.lm,
            str(self.folder / "cache"),
            unseen_users=0.0,
            val_rows=0.0,
            test_rows=0.0,
            batch_size=8,
            pairs_per_user=8,
            reference_logps=reference,
        )
        if reference:
            began, cache = time.perf_counter(), str(self.folder / "cache")
            table, tokens = token_rows(self.texts.everything(), self.lm)
            with_reference_logps(tokens, table, self.lm, cache)
            self.caches["reference"] = time.perf_counter() - began
        data.setup("fit")
        method = LoRADPO(num_users=1, feature_dim=self.lm.feature_dim, backbone=self.lm.spec(), mode="shared")
        method.configure_model()
        return method, data.train_dataloader()

    def by_lora(self, reference: bool) -> None:
        """One pass over the pairs."""
        method, loader = self.lora[reference]
        with torch.no_grad():
            method.shared.copy_(method.fresh[None])
        optimizer = torch.optim.AdamW([method.shared], lr=1e-3, weight_decay=0.0, fused=True)
        for batch in loader:
            optimizer.zero_grad(set_to_none=True)
            method.loss(batch)["loss"].backward()
            optimizer.step()

    def by_latent(self, name: str, people: Sequence[int]) -> None:
        """Learn some of the people in one call."""
        method, data = self.latent[name]
        rows = np.flatnonzero(np.isin(data.table.user, people))
        method.adapt(build_context(data, rows, np.asarray(people)))


def new_person(options: argparse.Namespace) -> tuple[Table, str]:
    """The first table, and what it was measured on."""
    texts = Samples(options.people, options.pairs, options.prompts, 12, 34)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"vocab_size": 4096, "width": 192, "num_layers": 4, "num_heads": 4, "max_positions": 256}
        lm = FreshCausalLM(str(folder / "model"), **sizes)  # type: ignore[arg-type]
        lm.prepare([*texts.prompts, *texts.responses])
        clap = CLaP(1, lm.width, lm.spec())
        clap.configure_model()
        tokens = [len(ids) for ids in lm.tokenizer(texts.responses).input_ids]
        with saved(clap) as path:
            person = NewPerson(options, folder, path, lm, texts)
            calls: dict[str, tuple[Callable[[], None], str | None, int]] = {
                "LoRA-DPO": (partial(person.by_lora, False), None, 1),
                "LoRA-DPO, reference cached": (partial(person.by_lora, True), "reference", 1),
            }
            crowd = range(options.people)
            for kind in ("full", "mlp", "newton"):
                calls[f"Latent DPO, {kind}"] = (partial(person.by_latent, kind, [0]), kind, 1)
            for kind in ("mlp", "newton"):
                calls[f"Latent DPO, {kind}, together"] = (partial(person.by_latent, kind, crowd), kind, len(crowd))
            times: dict[str, list[float]] = {name: [] for name in calls}
            for round_number in range(options.rounds + 1):
                for name, (call, _, count) in calls.items():
                    took = seconds(call) / count
                    if round_number:  # the first is a rehearsal
                        times[name].append(took)
            caches = person.caches
    shown = {name: statistics.median(taken) for name, taken in times.items()}
    lora = [shown["LoRA-DPO"], shown["LoRA-DPO, reference cached"]]
    table = Table(title=f"One new person with {options.pairs} pairs: seconds")
    for column in ("", "new person", "of LoRA-DPO", "of LoRA-DPO, cached", "once", *(f"among {n}" for n in AMONG)):
        table.add_column(column, justify="right" if column else "left")
    for name, (_, cache, _) in calls.items():
        once = caches[cache] if cache else 0.0
        shares = [f"{shown[name] / one:.3%}" for one in lora]
        among = [f"{shown[name] + once / number:.3g}" for number in AMONG]
        table.add_row(name, f"{shown[name]:.3g}", *shares, f"{once:.3g}", *among)
    facts = (
        f"responses of {statistics.mean(tokens):.0f} tokens, {options.prompts} prompts x {RESPONSES}; training CLaP is "
        f"{options.clap_seconds:.0f} s of the Latent rows' once; together: {options.people} people"
    )
    return table, facts


def planted(num_people: int, num_pairs: int, latent_dim: int, prompt_dim: int) -> Context:
    """Pairs of people who prefer latents along a direction of their own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    sides, direction = normal(2, num_people, num_pairs, latent_dim), normal(num_people, 1, latent_dim)
    first_wins = ((sides[0] - sides[1]) * direction).sum(-1, keepdim=True) > 0
    both = [torch.where(first_wins, sides[0], sides[1]), torch.where(first_wins, sides[1], sides[0])]
    chosen, rejected = (torch.cat([side, torch.full_like(side, -1.4)], -1) for side in both)
    mask = torch.ones(num_people, num_pairs, dtype=torch.bool)
    return Context(chosen, rejected, mask, mask.float(), prompt=normal(num_people, num_pairs, prompt_dim))


def one(context: Context, person: int) -> Context:
    """One person of a context."""
    return Context(*(value[person : person + 1] if isinstance(value, Tensor) else None for value in context))  # type: ignore[arg-type]


def plain_loop(context: Context, hidden_dim: int, num_steps: int, kl_coef: float) -> torch.nn.Module:
    """One person as one would write it: the default with a module and an optimizer of its own."""
    chosen, rejected, prompt = (value[0] for value in (context.chosen, context.rejected, context.prompt))  # type: ignore[index]
    latent_dim = chosen.shape[-1] // 2
    layers = [torch.nn.Linear(prompt.shape[-1], hidden_dim), torch.nn.SiLU(), torch.nn.Linear(hidden_dim, latent_dim)]
    network = torch.nn.Sequential(*layers)
    torch.nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    responses = gaussian(torch.stack([chosen, rejected], 1))
    grades = torch.tensor([1.0, 0.0]).expand(len(chosen), 2)
    for _ in range(num_steps):
        mean = network(prompt)
        policy = Gaussian(mean, torch.zeros_like(mean))
        losses = preference_losses("closed_form", policy, responses, grades, None, 0.1)
        loss = (losses + kl_coef * kl_to_prior(*policy).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def together(options: argparse.Namespace, prompt_dim: int) -> Table:
    """The second table."""
    context = planted(options.people, options.small, options.latent_dim, prompt_dim)
    some = torch.linspace(0, options.people - 1, options.alone).long().tolist()
    title = f"{options.people} people, {options.small} pairs each, {options.steps} steps, Z = {options.latent_dim}"
    table = Table(title=f"{title}, F = {prompt_dim}: ms per person")
    for column in ("people are", "together", "alone", "ratio", "plain loop", "ratio", "apart"):
        table.add_column(column, justify="left" if column == "people are" else "right")
    for name, case in CASES.items():
        steps = {} if name == "newton" else {"num_steps": options.steps}
        method = LatentDPO(1, 2 * options.latent_dim, prompt_dim=prompt_dim, **steps, **case)
        state = method.adapt(context).tensors["policy"]
        apart = max(
            float((method.adapt(one(context, person)).tensors["policy"][0] - state[person]).abs().max())
            for person in some
        )
        times: tuple[list[float], list[float], list[float]] = ([], [], [])
        for _ in range(options.rounds):
            times[0].append(seconds(lambda: method.adapt(context)) / options.people)  # noqa: B023 - called at once
            times[1].append(seconds(lambda: [method.adapt(one(context, person)) for person in some]) / len(some))  # noqa: B023
            if name == "mlp (default)":
                times[2].extend(seconds(lambda: plain_loop(one(context, p), 128, options.steps, 0.01)) for p in some)  # noqa: B023
        shown = [statistics.median(values) * 1e3 for values in times if values]
        cells = [f"{shown[0]:.3g}", f"{shown[1]:.3g}", f"{shown[1] / shown[0]:.1f}x"]
        cells += [f"{shown[2]:.3g}", f"{shown[2] / shown[0]:.1f}x"] if len(shown) == 3 else ["", ""]
        table.add_row(name, *cells, f"{apart:.1e}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=540, help="of the new person")
    parser.add_argument("--prompts", type=int, default=600, help="on which responses were sampled")
    parser.add_argument("--clap_seconds", type=float, default=775.0, help="what training CLaP took, by its recipe")
    parser.add_argument("--people", type=int, default=256)
    parser.add_argument("--small", type=int, default=50, help="pairs of each person in the second table")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--latent_dim", type=int, default=32)
    parser.add_argument("--prompt_dim", type=int, nargs="+", default=[192, 768])
    parser.add_argument("--alone", type=int, default=8, help="people who are also trained alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)

    console = Console(width=150)
    table, facts = new_person(options)
    console.print(table)
    console.print(facts)
    for prompt_dim in options.prompt_dim:
        console.print(together(options, prompt_dim))
    load = f"{os.getloadavg()[0]:.1f} at the end"
    console.print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, load {load}")


if __name__ == "__main__":
    main()
