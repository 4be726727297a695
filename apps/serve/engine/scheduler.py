"""The thread that runs a batch, and the bounded queue in front of it."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from plumbline.apps.serve.engine.backend import BusyError, DeadlineError, DrainingError, ServeError
from plumbline.apps.serve.engine.batch import Batch, Job

logger = logging.getLogger(__name__)


class Scheduler:
    """Jobs wait in the order in which they came, join the batch when there is room, and are told of their pieces.

    Args:
        queue_limit: jobs that may wait; one more is refused with an estimate of when to come back.
        wake: called by the thread of the batch with the jobs that have new pieces.
    """

    def __init__(self, batch: Batch, *, queue_limit: int, wake: Callable[[list[Job]], None]) -> None:
        self.batch, self.queue_limit, self.wake = batch, queue_limit, wake
        self.steps = 0
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._draining = self._stopping = False
        self._seconds = 1.0  # that a job takes: a moving average
        self._started: dict[Job, float] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job, which is answered through its `pieces`.

        Raises:
            BusyError: when the queue is full.
            DrainingError: when no more jobs are taken.
        """
        with self._changed:
            if self._draining:
                raise DrainingError("the server is shutting down; ask another one", retry_after_s=5)
            if len(self._waiting) >= self.queue_limit:
                ahead = len(self._waiting) / self.batch.decoder.max_rows + 1
                wait_s = min(60, max(1, math.ceil(self._seconds * ahead)))
                raise BusyError(
                    f"{len(self._waiting)} requests are waiting; come back in {wait_s} s", retry_after_s=wait_s
                )
            self._waiting.append(job)
            self._started[job] = time.monotonic()
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Frees what a job holds, before the next token."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._started.pop(job, None)
            self._changed.notify()

    def drain(self) -> None:
        """Takes no more jobs."""
        with self._changed:
            self._draining = True

    @property
    def idle(self) -> bool:
        """Whether no job waits or is under way."""
        with self._changed:
            return not self._waiting and self.batch.idle

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._stopping

    def stats(self) -> dict[str, float]:
        """Gauges for /metrics."""
        return {
            "rows": len(self.batch.rows),
            "reading": len(self.batch.reading),
            "waiting": len(self._waiting),
            "prefix_tokens": self.batch.prefixes.tokens,
            "prefix_hit_tokens": self.batch.prefixes.hits,
        }

    def stop(self) -> None:
        """Ends the thread; what is still under way ends in an error."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not self._waiting and self.batch.idle:
                    self._changed.wait()
                stopping = self._stopping
                self._admit(stopping)
            if stopping:
                self.batch.fail(DrainingError("the server stopped before the answer was complete"))
                self._deliver()
                return
            try:
                self.batch.step()
            except Exception as error:  # noqa: BLE001  the jobs at hand fail, the server goes on
                logger.exception("a step of the engine failed")
                self.batch.fail(ServeError(f"the engine failed ({type(error).__name__}); the log says more"))
            self.steps += 1
            self._deliver()

    def _admit(self, stopping: bool) -> None:
        now = time.monotonic()
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for job in list(self._waiting):
            if job.deadline < now or stopping:
                error: ServeError = DeadlineError("the deadline passed while the request waited for its turn")
                if stopping:
                    error = DrainingError("the server stopped before the request had its turn")
                job.pieces.append(error)
                job.over = job.cancelled = True
                self.batch.touched.add(job)
                self._waiting.remove(job)
        while self._waiting and self._waiting[0].n <= self.batch.free:
            self.batch.take(self._waiting.popleft())

    def _deliver(self) -> None:
        touched, self.batch.touched = self.batch.touched, set()
        if touched:
            self.wake(list(touched))
        with self._changed:
            under_way = {
                *(row.job for row in self.batch.rows),
                *(one.job for one in self.batch.reading),
                *self._waiting,
            }
            for job in [job for job in self._started if job not in under_way]:
                took = time.monotonic() - self._started.pop(job)
                self._seconds += 0.1 * (took - self._seconds)
