"""The first thing that runs inside the sandbox: limits, then the program, then its tests.

`sandbox.py` passes this text to `python -c`. It needs the standard library alone, and nothing of this project: none of it is
there. The job comes as JSON on standard input.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import types

_RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 4096, 16384, 1 << 18  # flags of mount(2)
_PDEATHSIG, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 24, 36, 38  # options of prctl(2)


def main() -> None:
    """Runs the job: {"program", "tests", "nonce", "report", "limits", "root", "uid", "drop", "reap"}."""
    job = json.loads(sys.stdin.buffer.read())
    report, nonce = job["report"], job["nonce"].encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if job["root"]:
        _enter_root(libc, job["root"], job["disk"])
    if job["reap"]:
        _supervise(libc)
    for name, most in job["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    if job["uid"]:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    if job["drop"]:
        _drop_capabilities(libc)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.write(report, b"ready\n")
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["answer.py"]
    for what in ("program", "tests"):
        exec(compile(job[what], f"<{what}>", "exec", dont_inherit=True), module.__dict__)
    os.write(report, nonce)  # only here: leaving earlier, with whatever status, does not get as far
    os._exit(0)


def _enter_root(libc: ctypes.CDLL, paths: list[str], disk: int) -> None:
    """A root of its own, in memory: `paths` to read, a few devices, /tmp to write, no /proc. For a mount namespace."""

    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        if libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode() or None):
            raise OSError(ctypes.get_errno(), f"mount {source} on {target}")

    mount("none", "/", "", _REC | _PRIVATE)
    root = "/tmp"  # any folder will do: what is mounted here is seen in this namespace alone
    mount("tmpfs", root, "tmpfs", 0, f"size={disk},mode=755")
    for path in paths:
        inside = root + path
        os.makedirs(os.path.dirname(inside), mode=0o755, exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, mode=0o755, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, inside, "", _BIND | _REC)
        if os.path.isdir(path):
            was = os.statvfs(inside).f_flag  # flags that the mount has must stay, or the kernel refuses
            keep = was & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
            keep |= (1 << 21) if was & os.ST_RELATIME else 0
            mount(path, inside, "", _REMOUNT | _BIND | _RDONLY | keep)
    os.mkdir(root + "/tmp")
    os.chmod(root + "/tmp", 0o1777)
    os.chroot(root)
    os.chdir("/tmp")


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Gives up what a user is allowed inside a namespace of their own, such as taking mounts away again."""
    for capability in range(64):
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def _supervise(libc: ctypes.CDLL) -> None:
    """Goes on in a child; the parent becomes the heir of whatever it leaves behind, ends all of it, and ends as it did.

    For machines without a PID namespace: a process that leaves its group is still found. SIGTERM ends everything at once.
    """
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(_end_all() or 124))
    _, status = os.waitpid(child, 0)
    _end_all()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _end_all() -> int:
    """Kills every descendant until there is none; 0."""
    while True:
        for name in os.listdir("/proc"):
            if name.isdigit() and _parent_of(name) == os.getpid():
                os.kill(int(name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # the next round looks for what these have left
        except ChildProcessError:
            return 0


def _parent_of(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return -1


if __name__ == "__main__":
    main()
