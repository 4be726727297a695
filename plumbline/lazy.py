"""Public names of a package that load the module behind them when they are first used."""

import importlib
from collections.abc import Callable
from typing import Any

from plumbline.moved import refuse_old_name


def exports(package: str, names: dict[str, str]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` for a package: name -> the module, below the package, that defines it."""
    refuse_old_name(package)

    def get(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(f"{package}.{names[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return sorted(names), get, lambda: sorted(names)
