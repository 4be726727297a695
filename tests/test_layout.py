"""The house rules: which package may import which, no circles, rooms of a size to read, names that hide nothing.

`python tests/test_layout.py` prints the rooms, the arrows between packages, circles and back arrows.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # package -> which of ours it may import; apps may import everything
    "apps": {"align", "reward", "safety", "policy_models", "eval"},
    "align": {
        "reward",
        "safety",
        "policy_models",
        "eval",
    },  # safety: pairs by guided decoding, own answers by the refusal head
    "eval": {"safety", "reward", "policy_models"},
    "reward": {"safety", "policy_models"},
    "safety": {"policy_models"},  # and only for decoding: see below
    "policy_models": set(),
}
STAGES = {path.stem for path in (REPOSITORY / "align").glob("*.py")} - {"__init__"}  # launched; only apps import one
MOST_FILES = 15  # of Python at one level of a folder
MOST_LINES = 80  # of a function, unless its first comment says why


def module_of(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] in ("plumbline", "tests", "benchmarks") else ("plumbline", *parts))


def sources(package: str) -> list[Path]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files, f"{package}/ has no sources: is the list above out of date?"
    return files


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, inside functions too; relative ones made absolute."""
    package = module_of(file).split(".")
    depth = len(package) if file.name == "__init__.py" else len(package) - 1
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: depth - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def our_imports(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, package of ours, module below it) of every import of ours."""
    for line, module in imports(file):
        parts = module.split(".")
        if parts[0] == "plumbline" and len(parts) > 1 and parts[1] in MAY_IMPORT:
            yield line, parts[1], ".".join(parts[1:])


def back_arrows() -> set[str]:
    return {
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for package, allowed in MAY_IMPORT.items()
        for file in sources(package)
        for line, top, module in our_imports(file)
        if top not in allowed | {package}
    }


def circles() -> list[list[str]]:
    """Groups of modules that import each other, however long the way round (Tarjan 1972)."""
    files = {module_of(file): file for package in MAY_IMPORT for file in sources(package)}
    graph = {name: {m for _, m in imports(file) if m in files} - {name} for name, file in files.items()}
    for name, uses in graph.items():  # `from package import module` leans on the module, not on the package's face
        graph[name] = {m for m in uses if not any(other.startswith(f"{m}.") for other in uses)}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        path.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in path:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = path[path.index(name) :]
            del path[path.index(name) :]
            if len(group) > 1:
                found.append(group)

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_packages_import_only_what_the_rule_allows():
    assert not back_arrows()


def test_no_circles():
    assert not circles()


def test_safety_uses_the_policy_models_for_decoding_only():
    """The scanners work where no training code and no policy is installed or loaded."""
    broken = {
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for file in sources("safety")
        if "constrained" not in file.relative_to(REPOSITORY).parts
        for line, top, module in our_imports(file)
        if top == "policy_models"
    }
    assert not broken


def test_nothing_that_runs_imports_what_trains():
    """safety/training is for itself and for commands of apps/; stages are for apps/ alone."""
    stages = {f"align.{stage}" for stage in STAGES}
    broken = {
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for package in MAY_IMPORT
        if package != "apps"
        for file in sources(package)
        for line, _, module in our_imports(file)
        if ".".join(module.split(".")[:2]) in stages
        or (module.startswith("safety.training") and "training" not in file.relative_to(REPOSITORY).parts)
    }
    assert not broken


def test_modules_are_imported_by_one_name():
    """`import safety` would load a second copy of what `import plumbline.safety` loads."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    files = [REPOSITORY / name for name in tracked] or [f for package in MAY_IMPORT for f in sources(package)]
    broken = {
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for file in files
        if file.exists()
        for line, module in imports(file)
        if module.split(".")[0] in MAY_IMPORT
    }
    assert not broken


def test_imports_are_seen_wherever_they_stand(tmp_path, monkeypatch):
    """The reader itself: at the top, in a function, relative, `import a.b`, `from a import b`."""
    file = tmp_path / "eval" / "inner" / "thing.py"
    file.parent.mkdir(parents=True)
    file.write_text("import align.ppo\ndef f():\n    from reward import x\nfrom ..report import y\nfrom . import z\n")
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    assert set(imports(file)) == {
        (1, "align.ppo"),
        (3, "reward"),
        (3, "reward.x"),
        (4, "plumbline.eval.report"),
        (4, "plumbline.eval.report.y"),
        (5, "plumbline.eval.inner"),
        (5, "plumbline.eval.inner.z"),
    }


def test_a_circle_is_seen(tmp_path, monkeypatch):
    for name, text in {
        "a": "from plumbline.eval import b\n",
        "b": "def f():\n    from plumbline.eval.c import x\n",
        "c": "import plumbline.eval.a\n",
        "d": "from plumbline.eval.a import y\n",
        "__init__": "",
    }.items():
        (tmp_path / "eval").mkdir(exist_ok=True)
        (tmp_path / "eval" / f"{name}.py").write_text(text)
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    monkeypatch.setitem(globals(), "MAY_IMPORT", {"eval": set()})
    assert [sorted(group) for group in circles()] == [["plumbline.eval.a", "plumbline.eval.b", "plumbline.eval.c"]]


# Rooms that a person can take in


def crowded() -> dict[str, int]:
    """Folders that hold more Python files at one level than a person can take in."""
    ours = [*MAY_IMPORT, "plumbline", "benchmarks", "tests", "examples"]
    counts = Counter(file.parent for folder in ours for file in (REPOSITORY / folder).rglob("*.py"))
    return {str(folder.relative_to(REPOSITORY)): n for folder, n in counts.items() if n > MOST_FILES}


def test_no_room_is_crowded():
    assert not crowded()


def test_functions_can_be_read_in_a_sitting():
    long = {
        f"{file.relative_to(REPOSITORY)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for package in [*MAY_IMPORT, "plumbline", "benchmarks"]
        for file in sources(package)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES
        and "Long because" not in (ast.get_docstring(node) or "")
    }
    assert not long


def test_every_room_says_what_it_holds():
    """Each file of a package is named in docs/architecture.md, or its room is, by a docstring of its own."""
    silent = {
        str(folder.relative_to(REPOSITORY))
        for package in MAY_IMPORT
        for folder in {file.parent for file in sources(package)}
        if not (init := folder / "__init__.py").is_file() or not ast.get_docstring(ast.parse(init.read_text("utf-8")))
    }
    assert not silent
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    unnamed = {
        str(file.relative_to(REPOSITORY))
        for package in MAY_IMPORT
        for file in sources(package)
        if file.name != "__init__.py" and not re.search(rf"`{re.escape(file.stem)}`", page)
    }
    assert not unnamed


# A file launched by path has its folder, not the repository, first on sys.path until its own first lines have run: a
# module of that folder then wins over any other of the same name.


def taken_names() -> dict[str, str]:
    """Top-level names that mean something already -> whose they are."""
    names = {name: "an installed package" for name in importlib.metadata.packages_distributions()}
    names |= {name: "the standard library" for name in sys.stdlib_module_names}
    return names | {name: "a folder of this repository" for name in [*MAY_IMPORT, "plumbline"]}


@pytest.mark.parametrize("package", ["align", "eval", "apps"])
def test_file_names_hide_no_other_module(package):
    taken = taken_names()
    names = {path.stem if path.is_file() else path.name for path in (REPOSITORY / package).iterdir()} - {"__init__"}
    clashes = {f"{package}/{name}: {taken[name]}" for name in names if name in taken}
    assert not clashes


def test_taken_names_hold_the_usual_suspects():
    assert {"statistics", "types", "torch", "trl", "reward"} <= taken_names().keys()


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_launched_file_looks_from_the_repository_root_before_it_imports_ours(stage):
    lines = (REPOSITORY / "align" / f"{stage}.py").read_text(encoding="utf-8").splitlines()
    fix = next(at for at, line in enumerate(lines) if line.strip().startswith("sys.path[0] = "))
    first_of_ours = next(at for at, line in enumerate(lines) if line.startswith("from plumbline"))
    assert lines[fix - 1].startswith("if not __package__:") and fix < first_of_ours


# The package as it is installed


def test_the_wheel_lists_every_package():
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {
        module_of(file)
        for package in [*MAY_IMPORT, "plumbline"]
        for file in sources(package)
        if file.name == "__init__.py"
    }
    assert set(listed) == folders | {"plumbline.configs", "plumbline.data.starter"}


def in_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


def test_importing_plumbline_loads_nothing_heavy():
    done = in_python("import sys, plumbline, plumbline.reward, plumbline.safety, plumbline.eval, plumbline.align, plumbline.apps.cli\n"
                     "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))")  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_public_names_can_be_imported(package):
    done = in_python(f"import plumbline.{package} as p\nfor name in p.__all__: getattr(p, name)\nassert p.__all__")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "old, new",
    [
        ("import align.advantages", "plumbline.align.rl.advantages"),
        ("from reward import default_composite", "plumbline.reward.default_composite"),
        ("from safety.pipeline import Guard", "plumbline.safety.pipeline"),
        ("import policy_models.generation", "plumbline.policy_models.rollout.generation"),
        ("from apps import label_store", "plumbline.apps.label.store.store"),
    ],
)
def test_an_old_import_path_names_the_new_one(old, new):
    done = in_python(old)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].endswith(f"is now {new}")


def main() -> None:
    """Prints what the tests hold."""
    for package in MAY_IMPORT:
        rooms = Counter(str(file.parent.relative_to(REPOSITORY)) for file in sources(package))
        print(f"{package}: " + ", ".join(f"{room}/ {n}" for room, n in sorted(rooms.items())))
        arrows = Counter(top for file in sources(package) for _, top, _ in our_imports(file) if top != package)
        print(f"  imports {', '.join(f'{top} ({n})' for top, n in sorted(arrows.items())) or 'nothing of ours'}")
    print(f"{len(circles())} circles, {len(back_arrows())} back arrows, {len(crowded())} crowded rooms")


if __name__ == "__main__":
    main()
