"""Work on many requests at once: threads hand in jobs, and one thread does all that have come meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Batcher(Generic[Job, Result]):
    """Collects jobs while the ones before are worked on: alone, a job waits for nobody; under load, batches grow.

    The queue is as long as there are threads that wait.

    Args:
        work: Gives a result, or an exception, for each of some jobs.
        size_of: How large a job is.
        most: Sum of sizes at which a batch is closed.
    """

    def __init__(
        self, work: Callable[[Sequence[Job]], Sequence[Result | Exception]], size_of: Callable[[Job], int], most: int
    ) -> None:
        self._work, self._size_of, self._most = work, size_of, most
        self._waiting: queue.SimpleQueue[tuple[Job, Future[Result]]] = queue.SimpleQueue()
        self.num_batches = 0
        threading.Thread(target=self._run, name="plm-batches", daemon=True).start()

    def __call__(self, job: Job) -> Result:
        """Hand in a job and wait for its result.

        Raises:
            Exception: What ``work`` gave or raised.
        """
        future: Future[Result] = Future()
        self._waiting.put((job, future))
        return future.result()

    def _run(self) -> None:
        """Work for as long as the process lives."""
        while True:
            batch = [self._waiting.get()]
            size = self._size_of(batch[0][0])
            while size < self._most and not self._waiting.empty():
                batch.append(self._waiting.get())
                size += self._size_of(batch[-1][0])
            self.num_batches += 1
            try:
                results: Sequence[Result | Exception] = self._work([job for job, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
