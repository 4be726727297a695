import gc
import threading

import pytest

from plumbline.safety.workers import Worker


def test_calls_run_one_after_the_other_in_one_thread():
    worker = Worker()
    threads = {worker.run(threading.get_ident, 5.0) for _ in range(5)}
    assert threads == {worker.thread.ident} and threading.get_ident() not in threads


def test_an_exception_comes_back_as_a_value_and_the_worker_lives_on():
    worker = Worker()
    assert isinstance(worker.run(lambda: 1 / 0, 5.0), ZeroDivisionError)
    assert isinstance(worker.run(lambda: exec("raise SystemExit"), 5.0), SystemExit)
    assert worker.run(lambda: 7, 5.0) == 7


def test_a_worker_that_ran_out_of_time_ends_once_its_call_comes_back():
    worker, gate = Worker(), threading.Event()
    with pytest.raises(TimeoutError):
        worker.run(lambda: gate.wait(60), 0.01)
    assert worker.thread.is_alive()
    gate.set()
    worker.thread.join(5.0)
    assert not worker.thread.is_alive()


def test_the_thread_ends_with_its_worker():
    worker = Worker()
    worker.run(int, 5.0)
    thread = worker.thread
    del worker
    gc.collect()
    thread.join(5.0)
    assert not thread.is_alive()
