"""Gates at the end of a training run: the suites that a gate file names, asked of the trained model, and its verdicts.

The start of the run is asked too where a gate compares with it (`rises_at_most`, `falls_at_most`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plumbline.eval.gates.bounds import BOUNDS, Gates, GateVerdict, check_gates, read_gates
from plumbline.eval.pages.suite_page import write_report
from plumbline.eval.runner import ReplyStore, run_suites
from plumbline.eval.stats.suite_rates import figures
from plumbline.eval.suites import load_suites
from plumbline.eval.targets.specs import open_target
from plumbline.eval.tasks import EvalTask


def gate_suites(path: str | Path, *, limit: int | None = None) -> tuple[Gates, list[EvalTask]]:
    """A gate file and its suites; ValueError for what cannot be used, before any model is loaded."""
    gates = read_gates(path)
    known = ("", "start", "trained")
    for gate in gates.gates:
        if gate.target not in known:
            raise ValueError(f"{path}: target {gate.target!r}; a training run has the targets start and trained")
    return gates, load_suites(list(dict.fromkeys(gate.suite for gate in gates.gates)), limit=limit)


def run_gates(
    path: str | Path, start: str, trained: str, out: str | Path, *, dtype: torch.dtype, device: str = "cpu",
    limit: int | None = None, max_new_tokens: int = 128, quiet: bool = False,
) -> list[GateVerdict]:  # fmt: skip
    """Asks the model `trained` (a source, run folder or adapter), writes a report into `out`, and checks the gates.

    The start is graded only as the side that `trained` is compared with: no gate fails because of it.
    """
    gates, tasks = gate_suites(path, limit=limit)
    specs = [f"trained={trained}"]
    if any(gate.bound not in BOUNDS or gate.target == "start" for gate in gates.gates):
        specs.insert(0, f"start={start}")
    begun, opened = time.perf_counter(), [open_target(spec, dtype=dtype, device=device) for spec in specs]
    store = ReplyStore(Path(out) / "cache")
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "seed": 0}
    graded = run_suites(opened, tasks, store, quiet=quiet, **asked)
    results = figures(graded) | {
        "targets": [target.name for target in opened],
        "fingerprints": {target.name: target.fingerprint for target in opened},
        "settings": asked
        | {"gates": str(path), "limit": limit, "dtype": str(dtype), "suites": [t.name for t in tasks]},
        "wall_s": round(time.perf_counter() - begun, 1),
    }
    write_report(Path(out), results, graded)
    of_trained = [replace(gate, target=gate.target or "trained") for gate in gates.gates]
    return check_gates(Gates(of_trained), results)
