"""Runs code that a model wrote: in a process of its own, without environment, in an empty folder, with hard limits.

This stops accidents (endless loops, full memory or disk, stray files). It is no jail: code that means harm can still read
what the user can read, and open connections. Run untrusted models in a container.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from plumbline.eval.samples import Sample
from plumbline.eval.tasks import Reply, Score, Scorer

SECONDS, MEMORY, FILE_BYTES = 6, 512 << 20, 1 << 20


def run_program(program: str, *, seconds: float = SECONDS) -> str:
    """ "" if the program ends by itself without an error, else what went wrong in a few words."""
    with tempfile.TemporaryDirectory(prefix="plumbline-code-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-"], input=program.encode(), cwd=folder, timeout=seconds,
                env={"PATH": "", "HOME": folder}, capture_output=True, preexec_fn=_limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"ran longer than {seconds:g} s"
    if done.returncode == 0:
        return ""
    last = done.stderr.decode(errors="replace").strip().splitlines()
    return last[-1][:200] if last else f"ended with status {done.returncode}"


def passes() -> Scorer:
    """The prompt and its continuation, followed by `details["tests"]`, run without an error."""

    def grade(samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Score]:
        programs = [f"{s.input}{r.text}\n\n{s.details['tests']}\n" for s, r in zip(samples, replies, strict=True)]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
            problems = list(pool.map(run_program, programs))
        return [Score(float(not problem), problem) for problem in problems]

    return Scorer(name="passes", grade=grade, better="high", about="the tests pass in a sandbox")


def _limit() -> None:
    """Runs in the child before Python starts."""
    os.setsid()
    for what, most in (
        (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))
