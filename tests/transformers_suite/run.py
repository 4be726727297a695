"""Runs transformers' own common model tests on the policy model: `make test-transformers`, about four minutes.

They do not come with the wheel, so the source package of the installed version is fetched from the package index.
Arguments go to pytest: `python tests/transformers_suite/run.py -k TestSparse`.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "runs" / "transformers_suite"
# Parts of their tree that the common tests import and the source package lacks; what is tested by them is left out.
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def unpacked() -> Path:
    """The source tree of the installed transformers, fetched once."""
    name = f"transformers-{transformers.__version__}"
    tree = FOLDER / name
    if not tree.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(FOLDER), name.replace("-", "==")], check=True)
        with tarfile.open(FOLDER / f"{name}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    return tree


def main() -> int:
    tree = unpacked()
    tests = tree / "tests"
    for file, mixin in MISSING.items():
        (tests / file).parent.mkdir(exist_ok=True)
        (tests / file).write_text(f"class {mixin}:\n    pass\n", encoding="utf-8")
    suite = tests / "models" / "moe_policy"
    suite.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "policy_suite.py", suite / "test_modeling_moe_policy.py")
    for folder in (tests, *(file.parent for file in tests.rglob("*.py"))):
        (folder / "__init__.py").touch()
    (tests / "models" / "__init__.py").touch()
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tree), "-p", "no:cacheprovider", str(suite)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command + sys.argv[1:], cwd=tree, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
