"""Every command on a page exists, takes the flags that the page gives it, and says what it needs beyond a clone.

Nothing is trained here: the command's own `--help` says what it knows.
"""

import contextlib
import functools
import importlib
import io
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from plumbline.apps import cli

sys.path.insert(0, str(Path(__file__).parent))
from pages import HISTORY, PAGES, REPOSITORY, commands, name  # noqa: E402

# What part of a command asks for -> the words near it that tell the reader so.
NEEDS = {
    "make bench-gpu": "GPU",
    "bench_gpu": "GPU",
    "accelerate/ddp.yaml": "GPU",
    "accelerate/fsdp2.yaml": "GPU",
    "--rollout_server": "vLLM",
    "lm_eval_adapter": "lm-eval",
    "lm_eval_agreement": "lm-eval",
    "postgresql://": "PostgreSQL",
}
# Flags that are the launcher's: they come before the file.
LAUNCHERS = {"accelerate launch": ("--config_file",), "torchrun": ("--nproc_per_node", "--standalone", "-m")}
COMMANDS = sorted(
    {(name(page), line, near) for page in PAGES if page.name not in HISTORY for line, near in commands(page)}
)


@functools.cache
def help_of(command: str, *verbs: str) -> str | None:
    """What `plumbline COMMAND VERBS --help` prints; None when it refuses the verbs."""
    main = importlib.import_module(cli.COMMANDS[command][0]).main
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([*verbs, "--help"])
        except SystemExit as exit:
            return said.getvalue() if not exit.code else None
        except ValueError as error:  # a command without a parser says how it is called
            return str(error) if "usage" in str(error) else None
    return said.getvalue()


def flags(words: list[str]) -> list[str]:
    return [re.split(r"[=]", word)[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


def problem(line: str) -> str:
    """Why the command cannot be as it stands on the page; "" if nothing is wrong."""
    line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.replace("[", "").replace("]", "") if "pip" not in line else line)
    words = shlex.split(line)
    if words[0] == "plumbline":
        return of_plumbline(words[1:])
    if line == "accelerate launch":  # spoken of, not given
        return ""
    if line.startswith("accelerate launch"):
        return of_launch(words[2:], LAUNCHERS["accelerate launch"])
    if words[0] == "torchrun":
        return of_launch(words[1:], LAUNCHERS["torchrun"])
    if words[0] == "make":
        known = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        targets = [word for word in words[1:] if "=" not in word]
        return "" if set(targets) <= {*known} else f"no target {targets}"
    if words[0] == "pip":
        extras = set(re.findall(r"\[([\w-]+)\]", line))
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        return "" if extras <= project["optional-dependencies"].keys() else f"no extra {extras}"
    return of_python(words[1:])


def of_plumbline(words: list[str]) -> str:
    if not words or words[0].isupper() or words[0].startswith("-"):  # `plumbline`, `plumbline COMMAND`
        return ""
    for command in words[0].split("|"):
        if command not in cli.COMMANDS:
            return f"no command {command!r}"
        named = [word for word in words[1:] if word != "..."]
        first_flag = next((at for at, word in enumerate(named) if word.startswith("-")), len(named))
        verbs = [word for word in named[:first_flag] if re.fullmatch(r"[a-z-]+(\|[a-z-]+)*", word)]
        later = [word for word in named[first_flag:] if re.fullmatch(r"[a-z][a-z-]{3,}", word)]  # verbs after flags
        for several in {tuple(v.split("|")[at % len(v.split("|"))] for v in verbs[:2]) for at in range(6)}:
            if help_of(command, *several) is None and help_of(command, *several[:1]) is None:
                return f"{command} does not know {several}"
            known = "".join(
                help_of(command, *part) or "" for part in {(), several[:1], several, *((word,) for word in later[:3])}
            )
            known += " --config" * hasattr(importlib.import_module(cli.COMMANDS[command][0]), "parse_settings")
            if unknown := [flag for flag in flags(named) if not knows(known, flag)]:
                return f"{command} {' '.join(several)} does not know {unknown}"
    return missing_files(words)


def knows(text: str, flag: str) -> bool:
    return bool(re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text))


def missing_files(words: list[str]) -> str:
    """Settings files that a command names and that do not ship."""
    named = [word for word in words if re.match(r"configs/.*\.yaml$", word)]
    return "".join(f"no file {word}" for word in named if not (REPOSITORY / word).is_file())


def of_launch(words: list[str], own: tuple[str, ...]) -> str:
    at = next((at for at, word in enumerate(words) if word.endswith(".py") or word == "plumbline.apps.cli"), None)
    if at is None:
        return "launches nothing"
    if unknown := [flag for flag in flags(words[:at]) if flag not in own]:
        return f"the launcher's flags {unknown} are not among {own}"
    if words[at] == "plumbline.apps.cli":
        return of_plumbline(words[at + 1 :])
    if not (REPOSITORY / words[at]).is_file():
        return f"no file {words[at]}"
    stage = Path(words[at]).stem.replace("_", "-")
    return missing_files(words) or of_plumbline([stage, *words[at + 1 :]])


def of_python(words: list[str]) -> str:
    if words[0] == "-c":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(words[1], {})
        return ""
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words[2:] if word.startswith("tests")]
        return "".join(f"no {path}" for path in paths if not (REPOSITORY / path).exists())
    module = words[1] if words[0] == "-m" else words[0]
    path = module.removeprefix("plumbline.").replace(".", "/") + ".py" if words[0] == "-m" else module
    if not (REPOSITORY / path).is_file():
        return f"no file {path}"
    source = (REPOSITORY / path).read_text()
    source += "".join(f"--{word}" for word in re.findall(r"^    (\w+): .*field\(", source, re.MULTILINE))
    asked = [flag for flag in flags(words[1:]) if flag != "-m"]
    written = {
        flag: {flag, flag.replace("-", "_").replace("__", "--", 1), flag.replace("--no-", "--")} for flag in asked
    }
    if unknown := [flag for flag in asked if not any(knows(source, one) for one in written[flag])]:
        return f"{path} does not know {unknown}"
    return ""


@pytest.mark.parametrize("page", sorted({page for page, _, _ in COMMANDS}))
def test_commands_are_as_the_page_says(page):
    found = {line: why for where, line, _ in COMMANDS if where == page and (why := problem(line))}
    assert not found


def test_what_a_command_needs_stands_beside_it():
    silent = [
        (page, line)
        for page, line, near in COMMANDS
        for part, word in NEEDS.items()
        if part in line and word not in near
    ]
    assert not silent


@pytest.mark.parametrize(
    "line, why",
    [
        ("plumbline sfft --config configs/sft/debug.yaml", "no command 'sfft'"),
        ("plumbline sft --confg configs/sft/debug.yaml", "sft  does not know ['--confg']"),
        ("plumbline label frobnicate", "label does not know ('frobnicate',)"),
        ("plumbline guard check TEXT --polcy default", "guard check does not know ['--polcy']"),
        ("accelerate launch align/sft.py --config configs/sft/none.yaml", "no file configs/sft/none.yaml"),
        ("accelerate launch align/sftt.py", "no file align/sftt.py"),
        ("torchrun --nprocs 2 align/ppo.py", "the launcher's flags ['--nprocs'] are not among"),
        ("make tests", "no target ['tests']"),
        ("python benchmarks/bench_ppo.py --turn 1", "benchmarks/bench_ppo.py does not know ['--turn']"),
        ("pip install '.[uii]'", "no extra {'uii'}"),
    ],
)
def test_a_wrong_command_is_seen(line, why):
    assert problem(line).startswith(why)


def test_commands_are_found_wherever_they_stand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```sh\nmake demo   # all\nplumbline eval \\\n    --list\n```\n\n    plumbline doctor\n\n"
        "Say `plumbline sft\n--help` or `sft`.\n"
    )
    assert [line for line, _ in commands(page)] == [
        "make demo",
        "plumbline eval --list",
        "plumbline doctor",
        "plumbline sft --help",
    ]
