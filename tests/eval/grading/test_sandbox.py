"""Programs in the sandbox: right ones pass, however they are wrapped, and each attack is tried as somebody would try it."""

import json
import os
import time
import uuid
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from plumbline.eval.grading import sandbox
from plumbline.eval.grading.code_answers import program_of
from plumbline.eval.grading.sandbox import SandboxError, isolation, passes, run_program
from plumbline.eval.samples import Sample
from plumbline.eval.suites.public import humaneval
from plumbline.eval.tasks import Reply, grade

PROMPT = 'def add_two(n):\n    """Return n plus two."""\n'
TESTS = "assert add_two(1) == 3\nassert add_two(-2) == 0"
WHOLE = "def add_two(n):\n    return n + 2\n"
ANSWERS = {
    "continued": "    return n + 2\n",
    "Windows line ends": "    return n + 2\r\n",
    "whole in a fence": f"Here it is:\n\n```python\n{WHOLE}```\n\nIt adds two.",
    "body in a fence": "```python\n    return n + 2\n```",
    "body without indent": "```\nreturn n + 2\n```",
    "fence left open": f"Sure!\n```python\n{WHOLE}",
    "only the end of a fence": "    return n + 2\n```\n\nThis adds two.",
    "tildes": f"~~~python\n{WHOLE}~~~",
    "fence in a list": "1. Do:\n\n   ```python\n   def add_two(n):\n       return n + 2\n   ```\n",
    "use shown after it": f"```python\n{WHOLE}```\nUse:\n```python\nprint(add_two(3))\nexit(1)\n```",
    "helper in a fence before": "```python\ndef two():\n    return 2\n```\nand\n```py\ndef add_two(n):\n    return n + two()\n```",
    "mended": f"```python\ndef add_two(n):\n    return n\n```\nThat is wrong:\n```python\n{WHOLE}```",
    "shell before": f"```bash\npip install numpy\n```\n```python\n{WHOLE}```",
    "no fence": f"Here is the function:\n\n{WHOLE}\nIt adds two.",
    "prompt said again": PROMPT + "    return n + 2\n",
    "first indent lost": "m = n + 2\n    return m",
    "runs on": "    return n + 2\n\n\ndef other(x):\n    return (",
    "sentence after": "    return n + 2\n\nThis function returns n plus two.",
    "lambda": "```python\nadd_two = lambda n: n + 2\n```",
    "imports": "import math\n\ndef add_two(n):\n    return math.floor(n + 2)\n",
}
WRONG = {
    "nothing": "", "docstring alone": "\n\n", "sentence": "I cannot do that.", "cut": "    return (\n",
    "wrong in a fence": "```python\ndef add_two(n):\n    return n\n```",
    "another name": "```python\ndef add_three(n):\n    return n + 2\n```",
}  # fmt: skip


def score(answer: str, prompt: str = PROMPT, tests: str = TESTS):
    return passes().grade(
        [Sample(id="1", input=prompt, raw=True, details={"tests": tests})], [Reply(answers=(answer,))]
    )[0]


def runs(program: str) -> bool:
    """Without the sandbox, for the many forms."""
    names: dict = {}
    try:
        exec(program + "\n" + TESTS, names)
    except BaseException:
        return False
    return True


@pytest.mark.parametrize(
    "prompt", [PROMPT, f"import math\n\n\ndef one():\n    return 1\n\n\n{PROMPT}"], ids=["alone", "behind a helper"]
)
@pytest.mark.parametrize("how", ANSWERS)
def test_a_right_program_is_found_in_the_answer(how, prompt):
    assert runs(program_of(prompt, ANSWERS[how])), program_of(prompt, ANSWERS[how])


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_makes_no_right_program(how):
    assert not runs(program_of(PROMPT, WRONG[how]))


def test_a_chat_model_that_writes_every_function_right_has_all_of_humaneval(tmp_path):
    (tmp_path / "humaneval").mkdir()
    rows = [
        {"task_id": f"t/{i}", "prompt": f'def add_{i}(n):\n    """Add {i}."""\n', "entry_point": f"add_{i}",
         "test": f"def check(f):\n    assert f(1) == {i + 1}\n"}
        for i in (2, 3)
    ]  # fmt: skip
    (tmp_path / "humaneval" / "humaneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = humaneval(tmp_path)
    said = [f"Here:\n\n```python\ndef add_{i}(n):\n    return n + {i}\n```\n\nIt adds {i}." for i in (2, 3)]
    found = grade("chat", task, [Reply(answers=(text,)) for text in said])
    assert [one.value for one in found.scores["passes"]] == [1, 1] and not task.stop  # a stop would cut the fence away


# ---- attacks, each on every way to isolate that works here ----------------------------------------------------------


@lru_cache
def ways() -> dict:
    found = {}
    for make in (sandbox._bubblewrap, sandbox._unshare, sandbox._own_user, sandbox._limits_only):
        try:
            way = make()
            if not sandbox._run(sandbox._PROBE, "", 10, way):
                found[way.name] = way
        except SandboxError:
            continue
    return found


@pytest.fixture(params=["bubblewrap", "unshare", "limits and a user of its own", "limits only"])
def way(request):
    if request.param not in ways():
        pytest.skip(f"{request.param} does not work on this machine")
    return ways()[request.param]


def attack(way, program: str, tests: str = "assert True", seconds: float = 5) -> str:
    return sandbox._run(program, tests, seconds, way)


def test_a_program_and_its_tests_pass_and_fail(way):
    assert attack(way, WHOLE, TESTS) == ""
    assert attack(way, WHOLE.replace("2", "3"), TESTS) == "AssertionError"
    assert "SyntaxError" in attack(way, "def f(:")


@pytest.mark.parametrize(
    "program",
    ["import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()", "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
     "import os, threading; threading.Timer(0.01, os._exit, [0]).start(); import time; time.sleep(3)",
     "import os; os.abort()"],
)  # fmt: skip
def test_leaving_before_the_tests_ran_is_no_pass(way, program):
    assert attack(way, program) != ""


def test_leaving_within_the_tests_is_no_pass(way):
    assert "before its tests had run" in attack(way, "def f():\n    import os; os._exit(0)", "f()\nassert False")
    assert (
        attack(way, "print('0' * 32)\nimport sys; print('ready', file=sys.stderr); raise SystemExit(0)", "assert False")
        != ""
    )


def alive(mark: str) -> list[str]:
    """Command lines of processes that carry the mark."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if mark in line and "pytest" not in line]


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(1)", "while True: pass"], ids=["success", "failure", "time-out"]
)
def test_no_process_outlives_the_program(way, ending):
    mark = uuid.uuid4().hex
    program = (
        "import os, sys\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"  # out of the group and the session
        "    if os.fork() == 0:\n"
        f"        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)', '{mark}'])\n"
        "    os._exit(0)\n"
        "import time; time.sleep(0.4)\n" + ending
    )
    attack(way, program, seconds=1.5)
    until = time.monotonic() + 5  # the kernel ends a namespace's processes while we go on
    while alive(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(mark)


def test_the_environment_of_no_process_is_readable(way, monkeypatch):
    if way.name == "limits only":
        assert "environment" in " ".join(way.missing)  # it says so
        return
    monkeypatch.setenv("PLUMBLINE_TEST_SECRET", "hunter2-in-the-environment")
    program = (
        "import os, glob\nassert 'PLUMBLINE_TEST_SECRET' not in os.environ\n"
        "for path in glob.glob('/proc/*/environ') + ['/proc/%d/environ' % os.getppid()]:\n"
        "    try:\n        held = open(path, 'rb').read()\n    except OSError:\n        continue\n"
        "    assert b'PLUMBLINE_TEST' not in held\n"
    )
    assert attack(way, program) == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_fills_no_memory_and_ends_in_time(way, stream):
    before, began = sandbox_memory(), time.monotonic()
    problem = attack(way, f"import sys\nwhile True:\n    sys.{stream}.write('x' * 1000000)", seconds=1.5)
    assert problem and len(problem) <= 200
    assert time.monotonic() - began < 15 and sandbox_memory() - before < 32 << 20


def sandbox_memory() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "program, reason",
    [
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('f', 'wb').write(bytes(1 << 22))", "large"),
        ("while True: pass", "ran longer than 1 s"),
        ("import time; time.sleep(60)", "ran longer than 1 s"),
        ("files = [open('f%d' % i, 'w') for i in range(100)]", "Too many open files"),
    ],
)
def test_limits_hold(way, program, reason):
    assert reason in attack(way, program, seconds=1)


def test_processes_are_bounded(way):
    if way.name == "limits only" and os.geteuid() == 0:
        assert "not counted" in " ".join(way.missing)
        return
    program = "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(20); os._exit(0)"
    assert "BlockingIOError" in attack(way, program)


def test_the_network_and_the_users_files_are_cut_off(way, tmp_path):
    if way.missing:
        assert "network" in " ".join(way.missing)
        return
    (tmp_path / "secret").write_text("secret")
    os.chmod(tmp_path / "secret", 0o644)
    assert "FileNotFoundError" in attack(way, f"open({str(tmp_path / 'secret')!r})")
    assert "unreachable" in attack(way, "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)")
    problem = attack(way, "import os, sys\nopen(os.path.join(sys.base_prefix, 'new-file'), 'w')")
    assert "Read-only" in problem or "Permission denied" in problem


def test_programs_in_parallel_do_not_count_against_each_other():
    samples = [Sample(id=str(i), input=PROMPT, raw=True, details={"tests": TESTS}) for i in range(4)]
    assert [s.value for s in passes().grade(samples, [Reply(answers=("    return n + 2",))] * 4)] == [1] * 4


def test_a_sandbox_that_does_not_start_leaves_rows_unscored(monkeypatch):
    broken = replace(isolation(), command=("/no/such/command",))
    monkeypatch.setattr(sandbox, "isolation", lambda: broken)
    found = score("    return n + 2")
    assert found.value is None and "/no/such/command" in found.why
    with pytest.raises(SandboxError, match="does not start: no such option"):
        sandbox._run("1", "", 5, replace(broken, command=("/bin/sh", "-c", "echo no such option >&2; exit 2")))


def test_what_is_missing_is_said_where_namespaces_are(monkeypatch, capsys):
    def none():
        raise SandboxError("bubblewrap is not installed")

    monkeypatch.setattr(sandbox, "_bubblewrap", none)
    monkeypatch.setattr(sandbox, "_unshare", none)
    found = isolation.__wrapped__()
    assert found.missing and "bubblewrap is not installed" in found.missing[0]
    monkeypatch.setattr(sandbox, "isolation", lambda: found)
    sandbox._say_what_is_missing.cache_clear()
    score("    return n + 2")
    score("    return n + 2")
    assert capsys.readouterr().err.count("network is not cut off") == 1
    assert run_program("1 / 0") == "ZeroDivisionError: division by zero"
