"""Versions of trained models: what each was made from, how it did, which one is in use, and the way back.

    plumbline models list                      plumbline models show NAME
    plumbline models promote NAME              plumbline models roll-back --kind reward-model

A registry is a folder with one append-only file, `registry.jsonl`; the state is what its lines come to. Models stay where
they were trained, are never changed or deleted, and are recognised by the hash of their weights.
"""

import argparse
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "registry.jsonl"
DEFAULT_FOLDER = "runs/registry"


@dataclass(frozen=True, kw_only=True)
class Version:
    """One trained model. `parents`: versions or sources it started from; `data`: file name -> SHA-256."""

    name: str
    kind: str
    path: str
    parents: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0


class Registry:
    """The versions in one folder. Processes may append at the same time; a line is written whole or not at all."""

    def __init__(self, folder: str | Path = DEFAULT_FOLDER) -> None:
        self.folder = Path(folder)

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / FILE
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line without its end was cut off by a crash
        return [json.loads(line) for line in whole.split("\n") if line]

    def _append(self, line: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / FILE).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            content = (self.folder / FILE).read_bytes()
            file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(line).encode() + b"\n")

    def versions(self, kind: str | None = None) -> list[Version]:
        """Versions in the order in which they were registered."""
        found = [Version(**line["version"]) for line in self._lines() if "version" in line]
        return [version for version in found if kind in (None, version.kind)]

    def get(self, name: str) -> Version:
        """The version of that name; ValueError where there is none."""
        for version in self.versions():
            if version.name == name:
                return version
        raise ValueError(f"{self.folder}: no version {name!r}; there are {[v.name for v in self.versions()]}")

    def register(
        self,
        kind: str,
        path: Path,
        *,
        name: str | None = None,
        parents: Sequence[str] = (),
        data: Iterable[Path] = (),
        metrics: dict[str, Any] | None = None,
    ) -> Version:
        """Adds a version, by default named KIND-1, KIND-2...; ValueError for a taken name or a folder without weights."""
        name = name or f"{kind}-{len(self.versions(kind)) + 1}"
        if not re.fullmatch(r"[\w.-]{1,80}", name):
            raise ValueError(f"name {name!r}: 1 to 80 letters, digits, dots, dashes and underscores")
        if any(version.name == name for version in self.versions()):
            raise ValueError(
                f"{self.folder}: a version {name!r} exists; versions are never replaced, choose another name"
            )
        weights = {file.name: sha256(file) for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*.npz"))}
        if not weights:
            raise ValueError(f"{path}: no .safetensors file; register the folder that the model was saved into")
        version = Version(
            name=name,
            kind=kind,
            path=str(path),
            parents=list(parents),
            data={file.name: sha256(file) for file in data},
            weights=weights,
            metrics=metrics or {},
            at=time.time(),
        )
        self._append({"version": asdict(version)})
        return version

    def promote(self, name: str) -> Version:
        """Puts a version into use; ValueError when its weights are gone or are not those that were registered."""
        version = self.get(name)
        for file, digest in version.weights.items():
            path = Path(version.path) / file
            if not path.is_file() or sha256(path) != digest:
                raise ValueError(f"{path}: missing, or not the weights that {name!r} was registered with")
        self._append({"promote": name, "kind": version.kind, "at": time.time()})
        return version

    def roll_back(self, kind: str) -> Version:
        """Puts the version into use that was so before the current one."""
        history = self._history(kind)
        if len(history) < 2:
            raise ValueError(f"{self.folder}: nothing to roll back to; {len(history)} {kind!r} was in use so far")
        version = self.promote(history[-2])
        self._append({"rolled_back": history[-1], "kind": kind, "at": time.time()})
        return version

    def current(self, kind: str) -> Version | None:
        """The version in use."""
        history = self._history(kind)
        return self.get(history[-1]) if history else None

    def _history(self, kind: str) -> list[str]:
        """Versions that were put into use, as a stack: rolling back takes off the last one."""
        stack: list[str] = []
        for line in self._lines():
            if line.get("kind") != kind:
                continue
            if "promote" in line and line["promote"] not in stack[-1:]:
                stack.append(line["promote"])
            elif "rolled_back" in line:  # it follows the promotion of the one before
                stack = stack[:-2]
        return stack


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="plumbline models", description="Versions of trained models.")
    parser.add_argument("--registry", default=DEFAULT_FOLDER)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all versions; * marks those in use")
    for command, what in (("show", "everything about one"), ("promote", "put one into use")):
        commands.add_parser(command, help=what).add_argument("name")
    commands.add_parser("roll-back", help="put the one before into use").add_argument("--kind", default="reward-model")
    args = parser.parse_args(argv)
    registry = Registry(args.registry)
    if args.command == "list":
        for version in registry.versions():
            current = registry.current(version.kind)
            mark = "*" if current and current.name == version.name else " "
            numbers = {k: round(v, 3) for k, v in version.metrics.items() if isinstance(v, float)}
            print(f"{mark} {version.name}\t{version.path}\t{numbers}")
    elif args.command == "show":
        print(json.dumps(asdict(registry.get(args.name)), indent=2))
    elif args.command == "promote":
        print(f"{registry.promote(args.name).name} is in use")
    else:
        print(f"{registry.roll_back(args.kind).name} is in use again")
    return 0
