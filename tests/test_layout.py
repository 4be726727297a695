"""The import rule between packages, read from the sources, and file names that would hide other modules."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # package -> which of ours it may import; apps may import everything
    "apps": {"align", "reward", "safety", "policy_models", "eval"},
    "align": {"reward", "policy_models", "eval"},
    "eval": {"safety", "reward", "policy_models"},
    "reward": {"safety", "policy_models"},
    "safety": {"policy_models"},  # and only for decoding: see below
    "policy_models": set(),
}
STAGES = {"sft", "reward_model", "ppo", "dpo"}  # launched; only tests and apps import one


def sources(package: str) -> list[Path]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files, f"{package}/ has no sources: is the list above out of date?"
    return files


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, inside functions too; relative ones made absolute."""
    package = file.relative_to(REPOSITORY).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_the_rule_allows(package):
    allowed = MAY_IMPORT[package] | {package}
    broken = {
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for file in sources(package)
        for line, module in imports(file)
        if (top := module.split(".")[0]) in MAY_IMPORT and top not in allowed
    }
    assert not broken


def test_safety_uses_the_policy_models_for_decoding_only():
    """The scanners work where no training code and no policy is installed or loaded."""
    broken = {
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for file in sources("safety")
        if "constrained" not in file.relative_to(REPOSITORY).parts
        for line, module in imports(file)
        if module.split(".")[0] == "policy_models"
    }
    assert not broken


def test_nothing_but_apps_imports_a_stage():
    stages = {f"align.{stage}" for stage in STAGES}
    broken = {
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for package in MAY_IMPORT
        if package != "apps"
        for file in sources(package)
        for line, module in imports(file)
        if ".".join(module.split(".")[:2]) in stages
    }
    assert not broken


def test_imports_are_seen_wherever_they_stand(tmp_path, monkeypatch):
    """The reader itself: at the top, in a function, relative, `import a.b`, `from a import b`."""
    file = tmp_path / "eval" / "inner" / "thing.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import plumbline.align.ppo\ndef f():\n    from reward import x\nfrom ..report import y\nfrom . import z\n"
    )
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    assert set(imports(file)) == {
        (1, "plumbline.align.ppo"),
        (3, "reward"),
        (3, "reward.x"),
        (4, "plumbline.eval.pages.run_page"),
        (4, "plumbline.eval.pages.run_page.y"),
        (5, "eval.inner"),
        (5, "eval.inner.z"),
    }


# A file launched by path has its folder, not the repository, first on sys.path until its own first lines have run: a
# module of that folder then wins over any other of the same name.


def taken_names() -> dict[str, str]:
    """Top-level names that mean something already -> whose they are."""
    names = {name: "an installed package" for name in importlib.metadata.packages_distributions()}
    names |= {name: "the standard library" for name in sys.stdlib_module_names}
    return names | {name: "a folder of this repository" for name in MAY_IMPORT}


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
    first_of_ours = next(
        at for at, line in enumerate(lines) if line.startswith(tuple(f"from {package}" for package in MAY_IMPORT))
    )
    assert lines[fix - 1].startswith("if not __package__:") and fix < first_of_ours
