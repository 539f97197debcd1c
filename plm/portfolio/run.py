"""Choose few policies that serve everybody, and show how good they are at every size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from plm.arrays import Float64Array
from plm.atomic import write_csv, write_json
from plm.checkpoint import store_users
from plm.judging import report as judge_report
from plm.messages import Problems
from plm.methods.palm import MAX_OBJECTIVES, PALM
from plm.methods.palm.bounds import Slack
from plm.methods.palm.grid import as_array, combined_grid_size, lattice, random_weights
from plm.methods.palm.measures import route, usage
from plm.methods.palm.oracle import BestOfN, Oracle
from plm.methods.palm.search import Certified
from plm.methods.palm.selection import Portfolio, choose_portfolio
from plm.portfolio import report
from plm.portfolio.guarantee import guarantee_of
from plm.portfolio.objectives import Deployment, LoReBases, RewardSource, Users, read_weights
from plm.portfolio.sampled import SampledRewards
from plm.portfolio.study import StudyRow, record, run_search, run_study
from plm.portfolio.writing import WritingPortfolio
from plm.portfolio.written import Finished, WrittenMembers, inferred
from plm.recipe.quiet import quiet
from plm.recipe.runs import claim, discard_empty

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
        delta: Loss that anybody may have, in units of a calibrated reward: where the corner and lazy searches stop.
        eps: Share of the best value that anybody may lose besides ``delta``. Above 0 the run also prints the cell that
            this accuracy needs, how many weights are proved to cover the simplex, and the most that is lost with them.
        cell: Relative and absolute slack of the cells of the grid that the lazy and grid searches visit.
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
        eps: float = 0.0,
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
        self.num_objectives, self.seeds, self.search, self.accuracy = num_objectives, seeds, search, Slack(eps, delta)
        self.cell, self.max_calls, self.solver, self.beta = cell, max_calls, solver, beta
        self.num_users, self.weights, self.policies, self.output = num_users, weights, policies, output
        problems = Problems()
        if min(self.sizes) < 1:
            problems.add("size and sizes", "numbers >= 1", self.sizes)
        problems.at_least(1, seeds=seeds, max_calls=max_calls)
        if not delta > 0:
            problems.add("delta", "a loss > 0", delta)
        problems.shares(eps=eps)
        if not all(0 < slack <= 1 for slack in cell):
            problems.add("cell", "two slacks > 0 and at most 1", cell)
        problems.numbers(beta=beta)
        if num_users < max(self.sizes):
            problems.add("num_users", "at least the largest size", num_users)
        if not all(2 <= num <= MAX_OBJECTIVES for num in num_objectives or []):
            problems.add("num_objectives", f"numbers from 2 to {MAX_OBJECTIVES}", num_objectives)
        if weights is not None and len(num_objectives or []) > 1:
            advice = f"; run once for each, e.g. --num_objectives [{(num_objectives or [0])[0]}] --weights {weights}"
            problems.add("num_objectives", "one number with weights, whose users weigh so many", num_objectives, advice)
        if policies is not None and not isinstance(rewards, SampledRewards):
            problems.say(f"policies: expected rewards to be SampledRewards, got {type(rewards).__name__}")
        problems.check()

    def run(self) -> None:
        """Run all numbers of objectives and print where the results are."""
        num = self.num_objectives[0] if self.num_objectives else None
        users = None if self.weights is None else read_weights(self.weights, num)
        with _new_folder(Path(self.output)) as folder:
            self.rewards.prepare(folder)
            numbers = self._numbers()
            if users is not None and users[1].shape[1] != numbers[0]:
                raise ValueError(
                    f"--weights: expected {numbers[0]} weights of each user, of {', '.join(self.rewards.names)}, got "
                    f"{users[1].shape[1]}"
                )
            for num in numbers:
                self._run_one(num, users, folder if len(numbers) == 1 else folder / f"d{num}")

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

    def _run_one(self, num: int, given_users: Users | None, folder: Path) -> None:
        names = self.rewards.names[:num]
        deployment = self.rewards.deployment(num, given_users)
        rows = run_study(
            lambda rng: self._oracles(num, rng, deployment), self.sizes, self.seeds, self._find_policies, self.solver
        )
        split = self.rewards.split(num, None)  # what is saved is chosen from all prompts
        oracle: Oracle = BestOfN(split.train, self.beta)
        portfolio = choose_portfolio(oracle, self._find_policies(oracle).policies, self.size, self.solver)
        finished = None
        if self.policies is not None and isinstance(self.rewards, SampledRewards):
            wanted = portfolio.members.weights
            finished = self.policies.make(self.rewards, deployment, wanted, self.size, self.solver, self.beta)
            oracle, portfolio = finished.oracle, finished.portfolio
        drawn = self._users(num, np.random.default_rng(0), deployment)
        users = deployment.weights if deployment.user_ids else drawn  # whose shares are counted
        origin = "those who are known" if deployment.user_ids else "drawn from the simplex"
        searches = self._searches(split.train)
        method = deploy(portfolio, deployment, self.size, self.accuracy.delta) if finished is None else finished.method
        result = report.Result(
            names=names,
            rows=rows,
            num_seeds=self.seeds,
            size=self.size,
            drawn_users=self.num_users if deployment.user_ids and drawn is not users else None,
            num_known=len(deployment.user_ids),
            accuracy=self.accuracy,
            searches=searches,
            portfolio=portfolio,
            usage=usage(route(portfolio.members, users), len(portfolio.members.weights)),
            cold_start=method.cold_start,
            shares_of=f"{len(users):,} users, {origin}",
            guarantee=guarantee_of(self.accuracy, oracle, portfolio) if self.accuracy.eps else None,
            certificate_says=report.what_is_certified(finished, self.beta),
        )
        save(method, folder / "portfolio.ckpt")
        found = {"objectives": names, "calibration": record(split.calibration), **_record(result)}
        write_json(folder / "portfolio.json", found | ({"policies": finished.record()} if finished else {}))
        study = {"sizes": [_study_record(row) for row in rows], "searches": record(searches)}
        write_json(folder / "study.json", study)
        self._write_users(method, folder)
        self._write_sweep(method, names, folder)
        report.regret_figure(rows).savefig(folder / "regret.png")
        if num == 3:
            report.simplex_figure(portfolio.members, names, users).savefig(folder / "simplex.png")
        writing = None if finished is None else self._judge_writing(finished, names, folder)
        report.show(result, writing, folder)

    def _judge_writing(self, finished: Finished, names: list[str], folder: Path) -> report.WritingResult:
        """Learn users from pairs, and judge what the members write on prompts that nothing was chosen on."""
        assert self.policies is not None and isinstance(self.rewards, SampledRewards)
        pool = self.rewards.candidates(len(names), "measure")
        learned = inferred(finished.method, pool, finished.method.weights.double().cpu().numpy())
        judgement = self.policies.judge_texts(finished, self.rewards.prompts_to_judge, names)
        judge_report.write(judgement, folder)
        return report.WritingResult(finished, learned, len(pool.prompts), judgement)

    # ------------------------------------------------------------------ parts
    def _find_policies(self, oracle: Oracle) -> Certified:
        return run_search(oracle, self.search, self.accuracy, self.cell, self.max_calls)

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

    def _searches(self, rewards: Float64Array) -> list[report.Search]:
        """Oracle calls and whole-simplex certificates of the three searches, on all prompts."""
        done = []
        grid_size = combined_grid_size(*self.cell, rewards.shape[2])
        for search in ("grid", "lazy", "corner"):
            if search == "corner" or grid_size <= _SEARCH_GRID:
                found = run_search(BestOfN(rewards, self.beta), search, self.accuracy, self.cell, self.max_calls)
                done.append(report.Search(search, found.num_calls, found.gap))
        return done

    def _regret_column(self) -> str:
        """Name of the column of a user's regret in files: a certificate of best-of-n, an estimate of other oracles."""
        return "certified_regret" if self.policies is None else "regret_within_oracle"

    def _write_users(self, method: PALM | WritingPortfolio, folder: Path) -> None:
        """Write member and regret of every known user."""
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
        """Write the member that evenly spaced weights would be served by, its regret and its rewards."""
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


def deploy(portfolio: Portfolio, deployment: Deployment, size: int, delta: float) -> PALM:
    """Make the method that routes users to the members of a portfolio."""
    width, num = deployment.objectives.shape
    method = PALM(len(deployment.user_ids), width, deployment.backbone, num_objectives=num, size=size, delta=delta)
    method.user_ids = list(deployment.user_ids)
    users = torch.as_tensor(deployment.weights, dtype=torch.float32) if deployment.user_ids else None
    method.install(portfolio, users, deployment.objectives.float())
    return method.eval()


def save(method: PALM | WritingPortfolio, path: Path) -> None:
    """Write a checkpoint that `plm.load_method` and the light commands read, and its users to the store beside it."""
    with quiet():
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
    store_users(method, path)


@contextmanager
def _new_folder(root: Path) -> Iterator[Path]:
    """Claim the next free ``version_N``; one in which nothing was written is removed again."""
    folder = claim(root, (f"version_{number}" for number in itertools.count()))
    try:
        yield folder
    finally:
        discard_empty(folder)


def _record(result: report.Result) -> dict[str, Any]:
    """What ``portfolio.json`` holds of every portfolio."""
    portfolio = result.portfolio
    return {
        "members": [
            {"weights": w.tolist(), "rewards": r.tolist(), "cost": float(c), "share": float(s)}
            for w, r, c, s in zip(*portfolio.members, result.usage.shares, strict=True)
        ],
        "shares_of": result.shares_of,
        "cold_start": result.cold_start,
        "certificate": portfolio.certificate,
        "certificate_says": result.certificate_says,
        "oracle_calls": portfolio.num_calls,
        **({} if result.guarantee is None else {"guarantee": result.guarantee.record()}),
    }


def _study_record(row: StudyRow) -> dict[str, Any]:
    """What ``study.json`` holds of a size."""
    found = record(row)
    kept = {name: found[name] for name in ("size", "certificate", "num_calls", "disagreement")}
    return {**kept, "held_out": found["quality"], "baseline_minus_palm": found["ahead"]}
