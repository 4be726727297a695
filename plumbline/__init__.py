"""Plumbline: align a language model, guard it, evaluate it, and label its answers.

    from plumbline.safety import Guard
    from plumbline.reward import default_composite

Importing this package loads nothing else; each of its packages loads a name when it is first asked for.

In a clone the packages lie beside this folder (align/, reward/, safety/ ...), where `accelerate launch align/ppo.py`
finds them, and are added to this package's path. In an installed wheel they lie inside it.
"""

from pathlib import Path

__version__ = "0.2.0"
__all__ = ["align", "apps", "eval", "policy_models", "reward", "safety"]

_clone = Path(__file__).resolve().parents[1]
if not (Path(__file__).parent / "align").is_dir() and (_clone / "align").is_dir():
    __path__.append(str(_clone))
del _clone


def __getattr__(name: str):
    if name in __all__:
        from importlib import import_module

        return import_module(f"plumbline.{name}")
    raise AttributeError(f"module 'plumbline' has no attribute {name!r}; it holds the packages {', '.join(__all__)}")
