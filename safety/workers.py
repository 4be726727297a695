"""Threads that run one call after the other, and that can be left behind with a call that hangs.

A thread a call would do the same, but costs more than most rules take, and numeric libraries set themselves up anew in each.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

Call = Callable[[], Any]


class Worker:
    """One daemon thread; it ends with its Worker, or after the call that it was left behind with."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self.thread = threading.Thread(target=_work, args=(self._calls, self._answers), daemon=True, name="scan")
        self.thread.start()
        weakref.finalize(self, self._calls.put, None)

    def run(self, call: Call, seconds: float) -> Any:
        """What the call returned, or the exception that it raised, as a value; after a TimeoutError the worker is of no more use."""
        self._calls.put(call)
        try:
            return self._answers.get(timeout=seconds)
        except Empty:
            self._calls.put(None)
            raise TimeoutError from None


def _work(calls: SimpleQueue[Call | None], answers: SimpleQueue[Any]) -> None:
    while (call := calls.get()) is not None:
        try:
            answers.put(call())
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller decides
            answers.put(error)
        del call  # or the thread would hold on to it until the next one
