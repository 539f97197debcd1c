"""Choose few policies that serve everybody, and show how good they are at every size."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from rich.console import Console

from plm.arrays import Float64Array
from plm.atomic import write_csv, write_json
from plm.checkpoint import KnownUsers
from plm.evaluation import print_parts
from plm.judging import report as judge_report
from plm.methods.palm import MAX_OBJECTIVES, PALM
from plm.methods.palm.grid import as_array, combined_grid_size, lattice, random_weights
from plm.methods.palm.measures import route, usage
from plm.methods.palm.oracle import BestOfN, Oracle
from plm.methods.palm.search import Certified
from plm.methods.palm.selection import Portfolio, choose_portfolio
from plm.portfolio.held_out import held_out_table
from plm.portfolio.objectives import Deployment, LoReBases, RewardSource, Users, read_weights
from plm.portfolio.report import (
    comparison_lines,
    members_table,
    regret_figure,
    search_table,
    simplex_figure,
    size_table,
)
from plm.portfolio.sampled import SampledRewards
from plm.portfolio.study import StudyRow, run_search, run_study
from plm.portfolio.writing import WritingPortfolio
from plm.portfolio.written import Finished, WrittenMembers, inferred, own_mix_lines, users_table
from plm.users import store_path

_SWEEP_STEPS = 10  # an edge of the lattice of weights in sweep.csv


_SEARCH_GRID = 1000  # largest grid that is searched for the comparison of searches


class PortfolioRun:
    """Choose a portfolio of few best-of-n policies, and judge portfolios of several sizes on held-out prompts.

    Args:
        rewards: Objectives and the pool of candidates.
        size: Members of the portfolio that is saved.
        sizes: Sizes of the table and the curve; ``size`` is added.
        num_objectives: Use only the first so many objectives, each number in a run of its own; null = all.
        seeds: Random halvings of the prompts into those to choose on and those to judge on.
        search: corner = call the oracle where the certificate is worst; lazy = only at weights of a grid that are not
            served yet; grid = at all weights of a grid.
        delta: Loss at which the corner and lazy searches stop, in units of a calibrated reward.
        cell: Relative and absolute slack of the grid's cells.
        max_calls: Most oracle calls of the corner search.
        solver: greedy = greedy covers and exchanges; milp = exact covers by integer programming.
        beta: What a nat of KL costs, in units of a calibrated reward: of soft best-of-n, and of policies that write
            from the unaligned one. 0 = KL is free: the best candidate, and utilities are plain rewards.
        num_users: Users drawn evenly from the simplex, for mean regret and usage, where fewer are known than the
            largest of ``sizes``.
        weights: JSONL file of users with given weights for one number of objectives, in the place of those that the
            rewards bring; they are routed, certified and saved.
        policies: Make the members policies of a language model, which write, for the weights that best-of-n chose;
            null = best-of-n policies, whose texts are chosen among those of any policy.
        output: Folder of runs; a new numbered one is made inside.
    """

    def __init__(
        self,
        rewards: RewardSource,
        size: int = 5,
        sizes: list[int] = [1, 2, 3, 4, 5, 6, 8],  # noqa: B006 - read only; jsonargparse shows it as the default
        num_objectives: list[int] | None = None,
        seeds: int = 8,
        search: Literal["corner", "lazy", "grid"] = "corner",
        delta: float = 0.02,
        cell: tuple[float, float] = (0.4, 0.2),
        max_calls: int = 150,
        solver: Literal["greedy", "milp"] = "greedy",
        beta: float = 0.0,
        num_users: int = 1000,
        weights: str | None = None,
        policies: WrittenMembers | None = None,
        output: str = "runs/portfolio",
    ) -> None:
        self.rewards, self.size, self.sizes = rewards, size, sorted({*sizes, size})
        self.num_objectives, self.seeds, self.search, self.delta = num_objectives, seeds, search, delta
        self.cell, self.max_calls, self.solver, self.beta = cell, max_calls, solver, beta
        self.num_users, self.weights, self.policies, self.output = num_users, weights, policies, output
        checks = {
            f"size and sizes: expected numbers >= 1, got {self.sizes!r}": min(self.sizes) >= 1,
            f"seeds: expected at least 1, got {seeds!r}": seeds >= 1,
            f"delta: expected a loss > 0, got {delta!r}": delta > 0,
            f"cell: expected two slacks > 0 and at most 1, got {cell!r}": all(0 < slack <= 1 for slack in cell),
            f"max_calls: expected at least 1, got {max_calls!r}": max_calls >= 1,
            f"beta: expected a finite number >= 0, got {beta!r}": 0 <= beta < math.inf,
            f"num_users: expected at least the largest size, got {num_users!r}": num_users >= max(self.sizes),
            f"num_objectives: expected numbers from 2 to {MAX_OBJECTIVES}, got {num_objectives!r}": all(
                2 <= num <= MAX_OBJECTIVES for num in num_objectives or []
            ),
        }
        problems = [text for text, fine in checks.items() if not fine]
        if weights is not None and len(num_objectives or []) > 1:
            problems.append(
                f"num_objectives: expected one number with weights, whose users weigh so many, got {num_objectives!r}; "
                f"run once for each, e.g. --num_objectives [{(num_objectives or [0])[0]}] --weights {weights}"
            )
        if policies is not None and not isinstance(rewards, SampledRewards):
            problems.append(f"policies: expected rewards to be SampledRewards, got {type(rewards).__name__}")
        if problems:
            raise ValueError("\n".join(problems))

    def run(self) -> None:
        """Run all numbers of objectives and say where the results are."""
        num = self.num_objectives[0] if self.num_objectives else None
        given = None if self.weights is None else read_weights(self.weights, num)
        with _new_folder(Path(self.output)) as folder:
            self.rewards.prepare(folder)
            numbers = self._numbers()
            if given is not None and given[1].shape[1] != numbers[0]:
                raise ValueError(
                    f"--weights: expected {numbers[0]} weights of each user, of {', '.join(self.rewards.names)}, got "
                    f"{given[1].shape[1]}"
                )
            for num in numbers:
                self._run_one(num, given, folder if len(numbers) == 1 else folder / f"d{num}")

    def _numbers(self) -> list[int]:
        """Numbers of objectives to run.

        Raises:
            ValueError: If there are not so many objectives, or too many.
        """
        names = self.rewards.names
        if not self.num_objectives and len(names) > MAX_OBJECTIVES:
            instead = (
                f"train LoRe with at most {MAX_OBJECTIVES} bases"
                if isinstance(self.rewards, LoReBases)
                else f"leave {len(names) - MAX_OBJECTIVES} out of rewards.objectives, or give "
                f"--num_objectives [{MAX_OBJECTIVES}]"
            )
            raise ValueError(f"{len(names)} objectives, at most {MAX_OBJECTIVES} are possible: {instead}")
        numbers = self.num_objectives or [len(names)]
        if max(numbers) > min(len(names), MAX_OBJECTIVES):
            raise ValueError(
                f"num_objectives: expected at most {min(len(names), MAX_OBJECTIVES)} of {names}, got {numbers!r}"
            )
        return numbers

    def _run_one(self, num: int, given: Users | None, folder: Path) -> None:
        names = self.rewards.names[:num]
        deployment = self.rewards.deployment(num, given)
        rows = run_study(
            lambda rng: self._oracles(num, rng, deployment), self.sizes, self.seeds, self._find, self.solver
        )
        split = self.rewards.split(num, None)  # what is saved is chosen from all prompts
        oracle = BestOfN(split.train, self.beta)
        portfolio = choose_portfolio(oracle, self._find(oracle).policies, self.size, self.solver)
        finished = None
        if self.policies is not None and isinstance(self.rewards, SampledRewards):
            wanted = portfolio.members.weights
            finished = self.policies.make(self.rewards, deployment, wanted, self.size, self.solver, self.beta)
            portfolio = finished.portfolio
        studied = self._users(num, np.random.default_rng(0), deployment)
        users = deployment.weights if deployment.user_ids else studied  # who the shares are of
        counted = f"{len(users):,} users, {'those who are known' if deployment.user_ids else 'drawn from the simplex'}"
        row = next(row for row in rows if row.size == self.size)
        used = usage(route(portfolio.members, users), len(portfolio.members.weights))
        searches = self._searches(split.train)
        method = deploy(portfolio, deployment, self.size, self.delta) if finished is None else finished.method
        save(method, folder / "portfolio.ckpt")
        about = {
            "objectives": names,
            "calibration": split.calibration,
            "members": [
                {"weights": w.tolist(), "rewards": r.tolist(), "cost": float(c), "share": float(s)}
                for w, r, c, s in zip(*portfolio.members, used.shares, strict=True)
            ],
            "shares_of": counted,
            "cold_start": method.cold_start,
            "certificate": portfolio.certificate,
            "certificate_says": what_is_certified(finished, self.beta),
            "oracle_calls": portfolio.num_calls,
            **({} if finished is None else {"policies": finished.about}),
        }
        write_json(folder / "portfolio.json", about)
        write_json(folder / "study.json", {"sizes": [_plain(row) for row in rows], "searches": searches})
        self._write_users(method, folder)
        self._write_sweep(method, names, folder)
        regret_figure(rows).savefig(folder / "regret.png")
        if num == 3:
            simplex_figure(portfolio.members, names, users).savefig(folder / "simplex.png")
        if finished is not None:
            print_parts(
                "Sizes and searches are those of best-of-n, which chose the weights that policies were made for"
            )
        print_parts(size_table(rows, num, self.seeds))
        if len(deployment.user_ids) > 0 and studied is not users:
            print_parts(
                f"Mean regret, k-means, usage and dead members above are of {self.num_users:,} users drawn evenly from "
                f"the simplex: known are {len(users)}, fewer than the largest size {max(self.sizes)}"
            )
        print_parts("", members_table(portfolio.members, names, used, method.cold_start, counted), "")
        print_parts(search_table(searches, self.delta), "", *comparison_lines(row))
        if finished is not None and isinstance(self.rewards, SampledRewards):
            self._judge(finished, self.rewards, folder)
        pictures = "regret.png and simplex.png" if num == 3 else "regret.png"
        what = f"portfolio.ckpt, portfolio.json, study.json, {pictures} in {folder}"
        print_parts(f"certificate {portfolio.certificate:.4f}: {about['certificate_says']}", f"{what}\n")

    def _judge(self, finished: Finished, rewards: SampledRewards, folder: Path) -> None:
        """Users learned from pairs, and what the members write on prompts that nothing was chosen on."""
        assert self.policies is not None
        method = finished.method
        names = rewards.names[: method.num_objectives]
        print_parts(*finished.notes)
        if method.user_ids:
            pool = rewards.candidates(len(names), "measure")
            learned = inferred(method, pool, method.weights.double().cpu().numpy())
            print_parts(users_table(method, learned, len(pool.prompts), names), "")
        print_parts(held_out_table(*finished.held_out, method.user_ids, names, finished.sizes), "")
        result = self.policies.judged(finished, rewards.prompts_to_judge, names)
        judge_report.show(result, Console())
        print_parts(*own_mix_lines(result, list(result["users"])))
        judge_report.write(result, folder)

    # ------------------------------------------------------------------ parts
    def _find(self, oracle: Oracle) -> Certified:
        return run_search(oracle, self.search, self.delta, self.cell, self.max_calls)

    def _users(self, num: int, rng: np.random.Generator, deployment: Deployment) -> Float64Array:
        """Known users, or draws from the simplex."""
        if len(deployment.weights) >= max(self.sizes):
            return deployment.weights
        return random_weights(self.num_users, num, rng)

    def _oracles(
        self, num: int, rng: np.random.Generator, deployment: Deployment
    ) -> tuple[BestOfN, BestOfN, Float64Array]:
        split = self.rewards.split(num, rng)
        users = self._users(num, rng, deployment)
        return BestOfN(split.train, self.beta), BestOfN(split.test, self.beta), users

    def _searches(self, rewards: Float64Array) -> list[dict[str, float | str]]:
        """Oracle calls and whole-simplex certificates of the three searches, on all prompts."""
        found: list[dict[str, float | str]] = []
        grid_size = combined_grid_size(*self.cell, rewards.shape[2])
        for how in ("grid", "lazy", "corner"):
            if how == "corner" or grid_size <= _SEARCH_GRID:
                done = run_search(BestOfN(rewards, self.beta), how, self.delta, self.cell, self.max_calls)
                found.append({"search": how, "calls": done.num_calls, "certificate": done.gap})
        return found

    def _regret_column(self) -> str:
        """What the regret of a user is called in files: a certificate of best-of-n, an estimate of other oracles."""
        return "certified_regret" if self.policies is None else "regret_within_oracle"

    def _write_users(self, method: PALM | WritingPortfolio, folder: Path) -> None:
        """Member and regret of every known user."""
        if not method.user_ids:
            return
        with torch.no_grad():
            state = method.user_states(torch.arange(method.num_users)).tensors
        columns = [state[name].tolist() for name in ("member", "regret", "weights")]
        rows = [
            [user_id, member, f"{lost:.6f}", json.dumps([round(w, 6) for w in weights])]
            for user_id, member, lost, weights in zip(method.user_ids, *columns, strict=True)
        ]
        write_csv(folder / "users.csv", ["user_id", "member", self._regret_column(), "weights"], rows)

    def _write_sweep(self, method: PALM | WritingPortfolio, names: list[str], folder: Path) -> None:
        """What evenly spaced weights would be served with: the member, its regret and its rewards."""
        weights = torch.as_tensor(as_array(lattice(_SWEEP_STEPS, len(names)))).to(method.member_rewards)
        member, lost = method.route(weights)
        rows = [
            [*(f"{value:.6g}" for value in mix), index, f"{regret:.6f}", *(f"{value:.6f}" for value in rewards)]
            for mix, index, regret, rewards in zip(
                weights.tolist(), member.tolist(), lost.tolist(), method.member_rewards[member].tolist(), strict=True
            )
        ]
        mixes, rewards = ([f"{name} {what}" for name in names] for what in ("weight", "reward"))
        heads = [*mixes, "member", self._regret_column(), *rewards]
        write_csv(folder / "sweep.csv", heads, rows)


def what_is_certified(finished: Finished | None, beta: float) -> str:
    """What the certificate of a portfolio bounds, and what it does not."""
    price = "KL is free, utilities are plain rewards" if beta == 0 else f"a nat of KL costs {beta:g}"
    if finished is None:
        return (
            "no weights lose more than this to any way of picking among the candidates of the prompts it was computed "
            f"on; {price}"
        )
    return (
        f"estimated loss to policies made in the same way ({finished.about['oracle']}), no bound on the loss to "
        f"others, such as the best of several samples; {price}"
    )


def deploy(portfolio: Portfolio, deployment: Deployment, size: int, delta: float) -> PALM:
    """The method that routes users to the members of a portfolio."""
    width, num = deployment.objectives.shape
    method = PALM(len(deployment.user_ids), width, deployment.backbone, num_objectives=num, size=size, delta=delta)
    method.user_ids = list(deployment.user_ids)
    users = torch.as_tensor(deployment.weights, dtype=torch.float32) if deployment.user_ids else None
    method.install(portfolio, users, deployment.objectives.float())
    return method.eval()


def save(method: PALM | WritingPortfolio, path: Path) -> None:
    """Write a checkpoint that `plm.load_method` and the light commands read, and its users to the store beside it."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=path.parent,
        )
        trainer.strategy.connect(method)
        trainer.save_checkpoint(path, weights_only=True)
    finally:
        log.setLevel(level)
    beside = store_path(path)
    KnownUsers(method, beside).store.save(beside)


@contextmanager
def _new_folder(root: Path) -> Iterator[Path]:
    """The next free ``version_N``; one in which nothing was written is removed again."""
    number = 0
    while (folder := root / f"version_{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _plain(row: StudyRow) -> dict[str, object]:
    """A row of the study for JSON."""
    plain: dict[str, object] = {"size": row.size}
    for name in ("certificate", "num_calls", "disagreement"):
        plain[name] = getattr(row, name)._asdict()
    plain["held_out"] = {
        way: {name: value._asdict() for name, value in fields.items()} for way, fields in row.quality.items()
    }
    plain["baseline_minus_palm"] = {way: value._asdict() for way, value in row.ahead.items()}
    return plain
