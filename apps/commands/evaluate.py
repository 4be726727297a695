"""`plumbline eval`: targets x suites -> report.html and results.json, with error bars.

    plumbline eval --target start=runs/demo/sft,ppo=runs/demo/ppo --suite all --out runs/eval --limit 100

Stopped anywhere and started again it goes on where it was; one more suite or target asks only what is new.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plumbline.align.runtime.launch import pick_dtype
from plumbline.eval.gates.bounds import check_gates, read_gates, read_results
from plumbline.eval.grading.chat_judge import ChatJudge, with_judge
from plumbline.eval.pages.suite_page import write_report
from plumbline.eval.runner import ReplyStore, grade_all, run_suites
from plumbline.eval.stats.suite_rates import figures
from plumbline.eval.suites import known_suites, load_suites
from plumbline.eval.suites.public import LOADERS
from plumbline.eval.targets.endpoint import EndpointTarget
from plumbline.eval.targets.specs import open_target
from plumbline.eval.targets.target import Target
from plumbline.policy_models.devices import default_device


def evaluate(
    targets: Sequence[Target | str],
    suites: Sequence[str],
    out: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    timeout_s: float = 60,
    cache: str | Path | None = None,
    judge: Target | str | None = None,
    earlier: dict[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs suites on targets and writes results.json, transcripts and report.html into `out`. Returns the results.

    Targets are specs (see eval/targets/specs.py) or objects with reply(), logp() and close(). `cache` keeps replies, so that
    several runs share them; it is out/cache if not given. `judge`, a target, grades the harm of every attack as well.
    `earlier`, results of another run, adds what has changed since. `device` None is the GPU of this process, else the CPU.
    Everything is checked before a model loads.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    tasks = load_suites(suites, data=Path(data) if data else None, limit=limit)
    # PartialState alone does not look at the flag, and takes every process of a CPU run for the only one
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    options: dict[str, Any] = {
        "dtype": pick_dtype(dtype),
        "device": device or str(default_device()),
        "timeout_s": timeout_s,
    }
    opened = [open_target(t, **options) if isinstance(t, str) else t for t in targets]
    names = [target.name for target in opened]
    if not opened or len(set(names)) < len(names):
        raise ValueError(f"targets {names}: needs at least one, each under a name of its own (name=spec)")
    for target in opened:
        if isinstance(target, EndpointTarget):
            target.check()
    store = ReplyStore(Path(cache) if cache else Path(out) / "cache", rank=state.process_index)
    if judge is not None:
        asking = open_target(judge, **options) if isinstance(judge, str) else judge
        tasks = [with_judge(task, ChatJudge(asking, store)) if task.area == "attack" else task for task in tasks]
    begun, kept = time.perf_counter(), len(store.replies)
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    graded = run_suites(
        opened, tasks, store, rank=state.process_index, processes=state.num_processes, quiet=quiet, **asked
    )
    new = len(store.replies) - kept
    state.wait_for_everyone()
    if state.num_processes > 1:
        store.read()
        graded = grade_all(opened, tasks, store, **asked)
    results = figures(graded) | {
        "targets": names,
        "fingerprints": {target.name: target.fingerprint for target in opened},
        "settings": asked | {"limit": limit, "dtype": dtype, "suites": [task.name for task in tasks]},
        "wall_s": round(time.perf_counter() - begun, 1),
        "new_replies": new,
    }
    if state.is_main_process:
        write_report(Path(out), results, graded, earlier=earlier)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 0, 1 when a gate fails, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="plumbline eval", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--target", action="append", help="spec, or name=spec; several with commas or by repeating the flag")
    add("--suite", default="all", help="names with commas, or all; --list prints them")
    add("--out", default="runs/eval", help="folder of the report (runs/eval)")
    add("--data", help="folder of public sets, <set>/<file>.jsonl.gz")
    add("--limit", type=int, help="samples a suite")
    add("--gate", help="YAML file of bounds, or gates for the one that ships; exit status 1 when one fails")
    add("--baseline", help="results.json of an earlier run, for the gates that compare and the report")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--seed", type=int, default=0)
    add("--dtype", default="auto", help="auto, bfloat16 or float32")
    add("--device", help="such as cpu or cuda:1; the GPU of this process if there is one")
    add("--timeout", type=float, default=60, help="seconds a question to an endpoint")
    add("--judge", help="a target that grades the harm of answers to attacks: an endpoint or a model source")
    add("--cache", help="folder of replies shared by several runs (OUT/cache)")
    add("--list", action="store_true", help="print the suites and leave")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.list:
        print(suite_list())
        return 0
    specs = [spec for given in args.target or [] for spec in given.split(",") if spec]
    if not specs:
        raise ValueError("no --target; name a model source, run folder, adapter, URL or file of transcripts")
    if args.gate:
        gates = read_gates(args.gate, baseline=args.baseline)
    earlier = read_results(args.baseline) if args.baseline else None
    results = evaluate(
        specs, [name for name in args.suite.split(",") if name], args.out, data=args.data, limit=args.limit,
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed, dtype=args.dtype,
        device=args.device, timeout_s=args.timeout, cache=args.cache, judge=args.judge, earlier=earlier,
    )  # fmt: skip
    status = 0
    if args.gate:
        verdicts = check_gates(gates, results)
        print("\n".join(verdict.line for verdict in verdicts))
        status = int(not all(verdict.passed for verdict in verdicts))
    print(json.dumps(closing_line(results, args.out, status)))
    return status


def suite_list() -> str:
    """Suites that ship, with what they ask, and those that read public data."""
    lines = ["ship with the repository:"]
    for name, load in known_suites().items():
        task = load()
        lines.append(f"  {name:<20} {len(task.samples):>4} samples  {task.area:<10} {task.about}")
    lines += ["", "with --data DIR, where DIR holds the file:"]
    return "\n".join([*lines, *(f"  {name:<20} {file}" for name, (file, _) in LOADERS.items())])


def closing_line(results: dict[str, Any], out: str, status: int) -> dict[str, Any]:
    """The last line on standard output: headlines by suite and target, for other programs."""
    headlines = {
        suite: {target: found[entry["headline"]]["mean"] for target, found in entry["targets"].items()}
        for suite, entry in results["suites"].items()
    }
    return {"report": f"{out}/report.html", "headlines": headlines, "wall_s": results["wall_s"],
            "new_replies": results["new_replies"], "status": status}  # fmt: skip
