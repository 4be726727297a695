"""Runs code that a model wrote, in a sandbox that the kernel keeps.

What it holds, with bubblewrap or with `unshare` (util-linux), whichever works here, in this order:

    processes   a PID namespace: whatever the program started ends with it, or at the time limit; their number is bounded
    secrets     an empty environment; no /proc, so that nobody else's can be read; a root of its own without the user's files
    network     none
    resources   CPU seconds, memory, size of a file, open files, processes; all files together fit into a small file system in memory
    output      standard output goes nowhere, errors into a file of bounded size: a flood fills neither memory nor disk
    honesty     a program passes only if a random number comes back that is written after its tests: leaving early, even with
                status 0, is no pass

Where neither works (a container that forbids namespaces), limits and a supervisor that ends all descendants are left, and
`isolation()` says what is missing; so does `plumbline doctor`, and the first evaluation that runs code.

What no sandbox of this kind can hold: program and tests share one interpreter, so that a program that looks for the random number in the
interpreter's own frames can find it. That is deliberate forgery, not an accident, and shows in the transcript.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from plumbline.eval.grading.code_answers import program_of
from plumbline.eval.samples import Sample
from plumbline.eval.tasks import Reply, Score, Scorer

SECONDS, MEMORY, FILE_BYTES, DISK_BYTES, PROCESSES = 6, 512 << 20, 1 << 20, 16 << 20, 16
ERRORS_READ = 1 << 16  # bytes from the end of what the program wrote as errors
_CHILD = Path(__file__).with_name("sandbox_child.py")
_PROBE = "import collections, heapq, random, typing\nassert random.random() < 1"


class SandboxError(RuntimeError):
    """The sandbox itself could not be started: nothing is known about the program."""


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How programs are kept apart here. `missing`: what is not held, in words; empty with namespaces."""

    name: str
    command: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    job: dict[str, Any] = field(default_factory=dict, compare=False)


@lru_cache(maxsize=1)
def isolation() -> Isolation:
    """The strongest isolation that works on this machine; each is tried with a program that must pass."""
    reasons = []
    for make in (_bubblewrap, _unshare, _own_user, _limits_only):
        try:
            way = make()
            problem = _run(_PROBE, "", 10, way)
        except SandboxError as error:
            problem = str(error)
        if not problem:
            return replace(way, missing=tuple(f"{one} ({'; '.join(reasons)})" if at == 0 and reasons else one
                                              for at, one in enumerate(way.missing)))  # fmt: skip
        reasons.append(problem)
    raise SandboxError(f"no program can be run here: {'; '.join(reasons)}")


def run_program(program: str, tests: str = "", *, seconds: float | None = None) -> str:
    """ "" if program and tests run to their end without an error, else what went wrong in a few words.

    seconds: of the clock, `SECONDS` if None. SandboxError where the sandbox does not start.
    """
    return _run(program, tests, SECONDS if seconds is None else seconds, isolation())


def passes() -> Scorer:
    """The program that the answer makes of the prompt (eval/grading/code_answers.py) runs, and `details["tests"]` after it."""

    def one(sample: Sample, reply: Reply) -> Score:
        try:
            problem = run_program(program_of(sample.input, reply.text), f"{sample.details['tests']}\n")
        except SandboxError as error:
            return Score(None, f"sandbox: {error}")
        return Score(float(not problem), problem)

    def grade(samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Score]:
        _say_what_is_missing()
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
            return list(pool.map(one, samples, replies))

    return Scorer(name="passes", grade=grade, better="high", about="the tests pass in a sandbox")


# ---- ways to isolate ------------------------------------------------------------------------------------------------


def _bubblewrap() -> Isolation:
    command = shutil.which("bwrap")
    if not command:
        raise SandboxError("bubblewrap is not installed")
    argv = [
        command,
        "--die-with-parent",
        "--new-session",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
    ]
    for path in _readable_paths():
        for parent in [*reversed(Path(path).parents)][1:]:  # else a folder that others may not enter stays so inside
            argv += ["--perms", "0755", "--dir", str(parent)]
        argv += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    argv += ["--dev", "/dev", "--size", str(DISK_BYTES), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    if os.geteuid() == 0:  # the child then takes a user of its own, whose processes can be counted
        argv += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        argv += ["--unshare-user"]
    return Isolation(name="bubblewrap", command=tuple(argv), job={"own_user": os.geteuid() == 0})


def _unshare() -> Isolation:
    command = shutil.which("unshare")
    if not command:
        raise SandboxError("unshare is not installed")
    argv = [command, "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts"]
    root = [*_readable_paths(), *(path for path in ("/dev/null", "/dev/zero", "/dev/urandom") if os.path.exists(path))]
    if os.geteuid():
        argv += ["--user", "--map-root-user"]
    own_user = os.geteuid() == 0
    return Isolation(
        name="unshare", command=(*argv, "--"), job={"root": root, "own_user": own_user, "drop": not own_user}
    )


def _own_user() -> Isolation:
    if os.geteuid():
        raise SandboxError("another user takes root")
    missing = ("no namespaces: the network is not cut off, world-readable files can be read",)
    return Isolation(name="limits and a user of its own", missing=missing, job={"own_user": True, "reap": True})


def _limits_only() -> Isolation:
    missing = (
        "no namespaces: the network is not cut off, and what this user can read is open, other processes' environment in /proc too",
        "processes of this user can be signalled" + (", and root's are not counted" if os.geteuid() == 0 else ""),
    )
    return Isolation(name="limits only", missing=missing, job={"reap": True})


def _readable_paths() -> list[str]:
    """What Python needs: system libraries and its own installation."""
    base = os.path.realpath(sys.base_prefix)
    paths = [path for path in ("/usr", "/lib", "/lib64", "/lib32", "/bin") if os.path.lexists(path)]
    return paths if base == "/usr" or base.startswith("/usr/") else [*paths, base]


@lru_cache(maxsize=1)
def _say_what_is_missing() -> None:
    """Once a process, and only where something is missing."""
    try:
        found = isolation()
    except SandboxError:
        return  # every row says so
    if found.missing:
        print(
            f"sandbox: {found.name}; {'; '.join(found.missing)}. Run models that you do not trust in a container.",
            file=sys.stderr,
        )


# ---- one run --------------------------------------------------------------------------------------------------------

_next_user = threading.Lock(), [0]


def _run(program: str, tests: str, seconds: float, way: Isolation) -> str:
    nonce = secrets.token_hex(16)
    # As root each run has a user of its own: processes are counted by user, and none can signal another's.
    uid = _fresh_uid() if way.job.get("own_user") else 0
    limits = {
        "CPU": math.ceil(seconds) + 1, "AS": MEMORY, "FSIZE": FILE_BYTES, "NOFILE": 32, "CORE": 0,
        "NPROC": PROCESSES if uid or way.command else _processes_of_user() + PROCESSES,
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="plumbline-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as errors,
    ):  # fmt: skip
        if uid and not way.command:
            os.chown(folder, uid, uid)
        plan = {
            "program": program,
            "tests": tests,
            "nonce": nonce,
            "report": report.fileno(),
            "limits": limits,
            "uid": uid,
        }
        plan |= {"disk": DISK_BYTES} | {name: way.job.get(name) for name in ("root", "drop", "reap")}
        job.write(json.dumps(plan).encode())
        job.seek(0)
        python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _CHILD.read_text(encoding="utf-8")]
        try:
            process = subprocess.Popen(
                [*way.command, *python], stdin=job, stdout=subprocess.DEVNULL, stderr=errors, cwd=folder, env={},
                start_new_session=True, pass_fds=(report.fileno(),),
            )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"{way.name}: {error}") from None
        late = _ends_late(process, seconds, way)
        said, last = _end_of(report), _end_of(errors).strip().split("\n")[-1][:200]
    if not said.startswith("ready\n"):
        raise SandboxError(f"{way.name} does not start: {last or f'status {process.returncode}'}")
    if late:
        return f"ran longer than {seconds:g} s"
    if said.removeprefix("ready\n") == nonce:
        return ""
    return last or f"ended with status {process.returncode} before its tests had run"


def _ends_late(process: subprocess.Popen[bytes], seconds: float, way: Isolation) -> bool:
    """Waits for the end, and makes it one at the time limit; whether it had to."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        if process.returncode is None and way.job.get("reap"):
            process.terminate()  # the supervisor ends all descendants, wherever they went
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # and with it, by the kernel, its PID namespace
            process.wait()


def _end_of(file: BinaryIO) -> str:
    """The last bytes of a file that others wrote."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), ERRORS_READ, max(0, size - ERRORS_READ)).decode(errors="replace")


def _fresh_uid() -> int:
    lock, count = _next_user
    with lock:
        count[0] += 1
        return 100_000 + (os.getpid() * 997 + count[0]) % 900_000


def _processes_of_user() -> int:
    """How many tasks the user has now: their limit counts all of them."""
    total = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                total += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has ended
    return total
