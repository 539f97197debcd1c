"""One cell of a leaderboard: one method, one seed, one ``plm fit`` in a folder of its own, done once.

A cell is a folder named by row, seed and the hash of all that decides its result. It appears in one step when it is
finished; what a killed run left is thrown away, and a failed one leaves ``<cell>.failed`` and is tried again next time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from plm.atomic import replace, write_text
from plm.leaderboard.facts import RunFacts
from plm.messages import WrongUsage
from plm.recipe.fit import RecipeCLI, run_recipe

QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")


class CellCLI(RecipeCLI):
    """A recipe whose run also writes what it cost."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `RunFacts`."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(RunFacts, "facts")


@dataclass(frozen=True)
class Cell:
    """What to run and where."""

    row: str
    """Row of the leaderboard."""
    seed: int
    args: tuple[str, ...]
    """Arguments of ``plm fit`` but for seed and logger."""
    folder: Path
    split_hash: str
    """The split the result must come from."""

    @property
    def failed(self) -> Path:
        """Where a failure is kept."""
        return self.folder.with_name(f"{self.folder.name}.failed")

    @property
    def is_done(self) -> bool:
        """Whether there is a result."""
        return self.folder.is_dir()

    @property
    def error(self) -> str:
        """Why it failed the last time; empty if it did not."""
        path = self.failed / "error.txt"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def clean(root: Path) -> None:
    """Throw away what killed runs left unfinished."""
    for folder in root.glob("*.part"):
        shutil.rmtree(folder, ignore_errors=True)


def run_cells(cells: Sequence[Cell], jobs: int, on_progress: Callable[[Cell], None]) -> None:
    """Run what is not done, each cell once; failures are kept in their folders and do not stop the others.

    Args:
        cells: The cells.
        jobs: 1 = one after another in this process; more = so many processes at a time, one per cell.
        on_progress: Called after each cell that was run.
    """
    todo = [cell for cell in cells if not cell.is_done]
    if jobs == 1:
        for cell in todo:
            run_here(cell)
            on_progress(cell)
        return
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(_run_apart, cell, jobs): cell for cell in todo}
        try:
            for future in as_completed(started):
                future.result()
                on_progress(started[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_here(cell: Cell) -> None:
    """Run a cell in this process; its output goes to ``log.txt`` in its folder."""
    part = cell.folder.with_name(f"{cell.folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(cell.failed, ignore_errors=True)
    part.mkdir(parents=True)
    logger: dict[str, Any] = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    logger["init_args"] = {"save_dir": str(part), "name": "", "version": "run"}
    overlay = part / "logger.yaml"
    write_text(overlay, yaml.safe_dump({"trainer": {"logger": logger}}))
    args = ["fit", *cell.args, "--config", str(overlay), "--seed_everything", str(cell.seed), *QUIET]
    error = ""
    with (part / "log.txt").open("w", encoding="utf-8") as log, output_to(log):
        try:
            run_recipe(args, CellCLI)
            found = json.loads((part / "run" / "facts.json").read_text(encoding="utf-8"))
            if (part / "run" / "metrics.json").is_file():
                metrics = json.loads((part / "run" / "metrics.json").read_text(encoding="utf-8"))
                if metrics["split_hash"] != cell.split_hash:
                    error = f"the run saw the split {metrics['split_hash'][:12]}, expected {cell.split_hash[:12]}"
            elif "class_path" not in found:
                error = "the run wrote no facts"
        except WrongUsage as caught:
            error = f"the recipe was refused: {caught}"
        except Exception as caught:
            traceback.print_exc(file=log)
            error = f"{type(caught).__name__}: {caught}"
    if error:
        _fail(cell, part, error)
        return
    write_text(part / "cell.json", json.dumps({"row": cell.row, "seed": cell.seed, "args": cell.args}, indent=1) + "\n")
    for file in list((part / "run").iterdir()):
        file.rename(part / file.name)
    (part / "run").rmdir()
    replace(part, cell.folder)


def _fail(cell: Cell, part: Path, error: str) -> None:
    """Keep a failure: error and log."""
    write_text(part / "error.txt", error + "\n")
    shutil.rmtree(cell.failed, ignore_errors=True)
    replace(part, cell.failed)


def _run_apart(cell: Cell, jobs: int) -> None:
    """Run a cell in a process of its own, so that even a crash stays in its cell."""
    job = {**vars(cell), "folder": str(cell.folder)}
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    done = subprocess.run(
        [sys.executable, "-m", "plm.leaderboard.cells"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if not cell.is_done and not cell.error:
        part = cell.folder.with_name(f"{cell.folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        _fail(cell, part, f"the process ended with status {done.returncode}: {last[0]}")


@contextlib.contextmanager
def output_to(log: TextIO) -> Iterator[None]:
    """Send what a run prints, logs and warns to a file."""
    handler = logging.StreamHandler(log)
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    before = [(one, one.handlers, one.propagate) for one in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for one in loggers:
            one.handlers, one.propagate = [handler] if one.name == "lightning" else [], one.name != "lightning"
        try:
            yield
        finally:
            for one, handlers, propagate in before:
                one.handlers, one.propagate = handlers, propagate


def end_with_parent(every: float = 0.5) -> None:
    """End this process when the one that started it is gone: what a killed leaderboard left would disturb the next."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run the cell that is described on standard input."""
    end_with_parent()
    job = json.loads(sys.stdin.read())
    run_here(Cell(**{**job, "args": tuple(job["args"]), "folder": Path(job["folder"])}))


if __name__ == "__main__":
    main()
