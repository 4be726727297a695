"""Where the files that ship are: settings, starter data, documents of a clone. The only place that knows."""

from pathlib import Path

import plumbline

# Settings and data lie inside the package in a wheel and at the root of the repository in a clone; `__path__` has both.
HOME = next(Path(folder) for folder in plumbline.__path__ if (Path(folder) / "configs").is_dir())
CONFIGS = HOME / "configs"
STARTER = HOME / "data" / "starter"


def resolve_path(path: str | Path) -> Path:
    """A data path as given, else the same path among the files that ship; ValueError when neither exists."""
    for candidate in (Path(path), HOME / path):
        if candidate.exists():
            return candidate
    raise ValueError(f"{path}: no such file; give a path, or leave the setting out to use data/starter")


def resolve_config(name: str | Path, stage: str) -> Path:
    """A settings file: a path, or the bare name of one that ships for this stage (`debug` is configs/<stage>/debug.yaml).

    ValueError names the files that ship when there is neither.
    """
    path = Path(name)
    shipped = CONFIGS / stage / f"{name}.yaml"
    if path.is_file():
        return path
    if path.parent == Path() and not path.suffix and shipped.is_file():
        return shipped
    if (HOME / path).is_file():
        return HOME / path
    known = sorted(file.stem for file in (CONFIGS / stage).glob("*.yaml"))
    raise ValueError(f"{name}: no such settings file; give a path, or one that ships for {stage}: {', '.join(known)}")
