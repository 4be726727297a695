"""Every example of docs/extend.md, run as it stands there.

A code block whose first line is `# file: NAME` is written to that file; the other Python blocks of a section are run in
order, beside those files. A pyproject.toml is installed as pip would: its entry points are found.
"""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from plumbline.apps import cli
from plumbline.eval.suites import load_suites
from plumbline.policy_models import configuration, router
from plumbline.safety import Guard

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend.md"
SECTIONS = {
    part.split("\n", 1)[0]: re.findall(r"^```(\w+)\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
}
FILE = re.compile(r"# file: (\S+)\n")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty folder that Python imports from; what the examples import and register is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in configuration.ROUTER_NAMES[5:]:
        configuration.ROUTER_NAMES.remove(name)
        del router.ROUTERS[name]
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write_files(title: str, folder: Path) -> None:
    for _, code in SECTIONS[title]:
        if found := FILE.match(code):
            (folder / found.group(1)).write_text(code)
    importlib.invalidate_caches()


def install(folder: Path) -> None:
    """What pip leaves of the section's pyproject.toml: metadata with entry points."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"].items()
    (info / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in added.items()) for group, added in points
        )
    )
    importlib.invalidate_caches()


def test_the_page_has_a_section_for_each_kind():
    kinds = {"A reward part", "A scanner", "A suite", "A grader", "A router", "A stage", "A command"}
    assert set(SECTIONS) == kinds and all(SECTIONS.values())


@pytest.mark.parametrize("title", SECTIONS)
def test_an_example_runs_as_it_stands(title, workspace):
    write_files(title, workspace)
    for at, (language, code) in enumerate(SECTIONS[title]):
        if language == "python" and not FILE.match(code):
            exec(compile(code, f"{PAGE.name}: {title}, block {at + 1}", "exec"), {"__name__": "example"})


def test_the_scanner_is_found_by_its_entry_point(workspace):
    write_files("A scanner", workspace)
    install(workspace)
    rule = {"name": "no projects", "if": {"category": "x_project", "score": 0.5}, "action": "block"}
    policy = {"id": "o/1", "scanners": [{"use": "project_names", "settings": {"names": ["Stork"]}}], "rules": [rule]}
    guard = Guard(policy, model=lambda messages: "fine")
    assert guard.chat("about project stork").blocked and guard.chat("about project falcon").text == "fine"


def test_the_suite_is_found_by_its_entry_point(workspace):
    write_files("A suite", workspace)
    install(workspace)
    assert [task.name for task in load_suites(["opening_hours"])] == ["opening_hours"]


def test_the_command_is_found_by_its_entry_point(workspace, capsys):
    write_files("A command", workspace)
    install(workspace)
    (workspace / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert cli.main(["count", "rows.jsonl"]) == 0 and capsys.readouterr().out == "2\n"
    assert cli.main(["count"]) == 2 and "usage: plumbline count FILE" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0 and "from row-counter" in capsys.readouterr().out
