"""What makes PPO keep its refusals: safety as a weight, as a constraint, and from a start that does not refuse.

    python benchmarks/bench_constraint.py --run runs/demo --limit -0.85

RUN is a folder that `plumbline demo` left; its start and its DPO are rows of the table. The runs differ in what is said
here and in nothing else:

    weight      the scaled safety score with the demo's weight, from the demo's SFT model
    constraint  the safety score left out of the reward; its mean cost, the negated raw score, is held at --limit or below by a PID
                multiplier (`align/rl/lagrangian.py`), from the same start
    unrefusing  as `weight`, from the model before SFT

all with the demo's reward model and scaling. Refusals are counted by the grader's rules on the held-out prompts, which no reward
knows; gains are of the end over the start, paired by prompt, with 95% bootstrap intervals; `all parts` is the sum of the parts,
whether they were rewarded or constrained. A run that is finished is not run again. Ends with a line of JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.real_prompts import launch, read_metrics
from plumbline.eval.grading.text_checks import refusal
from plumbline.eval.stats.intervals import paired_bootstrap, wilson
from plumbline.paths import STARTER

PARTS = ("fluency", "relevance", "safety", "toxicity", "preference")


def main() -> None:
    args = parse_args()
    pid = ["--multiplier_control", "pid", "--multiplier_lr", args.multiplier_lr]
    starts = {"unrefusing": args.run / "policy"}
    arms: dict[str, list[object]] = {
        "weight": [],
        "constraint": ["--cost_component", "safety", "--cost_limit", args.limit, *pid],
        "unrefusing": [],
    }
    chosen = [name for name in arms if not args.arms or name in args.arms]
    kinds = {row["prompt"]: row["kind"] for row in map(json.loads, (STARTER / "eval.jsonl").read_text().splitlines())}
    results = {}
    for name in chosen:
        out = args.out / name
        if not (out / "model").exists():
            common = ["--config", args.config, "--model", starts.get(name, args.run / "sft/model"), "--seed", args.seed]
            common += ["--reward_model", args.run / "reward_model/model", "--eval_prompts", args.eval_prompts]
            common += ["--rollouts_per_step", args.rollouts_per_step, "--save_every", 4]
            common += ["--reward_scaling", args.run / "pairs/scaling.json", "--output_dir", out]
            launch("ppo", *common, *arms[name], "--resume", "true")
        results[name] = gains(out) | {"refusals": refusals(max(tables(out)), kinds)}
    print(table(results))
    print(refusal_table(results, args.run))
    print(json.dumps(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a folder of plumbline demo")
    parser.add_argument("--out", type=Path, default=Path("runs/constraint"))
    parser.add_argument("--config", default="configs/ppo/demo.yaml")
    parser.add_argument(
        "--limit", type=float, default=-0.85, help="of the mean cost, the negated safety score in [0, 1]"
    )
    parser.add_argument("--multiplier-lr", type=float, default=0.5, help="of the integral")
    parser.add_argument("--arms", nargs="*", help="which runs; default: all")
    parser.add_argument("--rollouts-per-step", type=int, default=64)
    parser.add_argument("--eval-prompts", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for needed in ("sft/model", "reward_model/model", "pairs/scaling.json"):
        if not (args.run / needed).exists():
            parser.error(f"--run {args.run}: {needed} is missing; it is a folder that `plumbline demo` leaves")
    return args


def gains(run: Path) -> dict[str, Any]:
    """What a run gained on its held-out prompts and how it ended; a part without an opinion on some answer is left out."""
    before, after = (rows_of(path) for path in (min(tables(run)), max(tables(run))))
    prompts = [p for p in before if p in after]
    rows = [rows[p] for rows in (before, after) for p in prompts]
    kept = [name for name in PARTS if all(row.get(name) is not None for row in rows)]
    for row in rows:
        row["all parts"] = sum(row[name] for name in kept)
    gained = {
        name: paired_bootstrap([after[p][name] for p in prompts], [before[p][name] for p in prompts])
        for name in ("all parts", *kept)
    }
    metrics = read_metrics(run)
    last = {name: value for row in metrics for name, value in row.items()}
    return {
        "prompts": len(prompts),
        "gain": {name: one._asdict() for name, one in gained.items()},
        "kl_per_answer": last["eval/kl_per_answer"],
        "safety_raw_last_steps": fmean(
            [row["reward/safety_raw_mean"] for row in metrics if "reward/safety_raw_mean" in row][-3:]
        ),
        "multiplier": [row["lagrangian/multiplier"] for row in metrics if "lagrangian/multiplier" in row],
    }


def refusals(table: Path, kinds: dict[str, str]) -> dict[str, dict[str, float]]:
    """Rates by kind of prompt, with Wilson intervals, of a table that an evaluation of PPO left."""
    found: dict[str, list[bool]] = {}
    for prompt, row in rows_of(table).items():
        if prompt in kinds:
            found.setdefault(kinds[prompt], []).append(refusal(prompt, row["answer"]) == "refusal")
    rates = {kind: wilson(sum(flags), len(flags)) for kind, flags in sorted(found.items())}
    return {kind: {"rate": rate.mean, "low": rate.low, "high": rate.high} for kind, rate in rates.items()}


def refusal_table(results: dict[str, dict[str, Any]], demo: Path) -> str:
    summary = (
        json.loads((demo / "summary.json").read_text(encoding="utf-8")) if (demo / "summary.json").exists() else {}
    )
    rows = {
        f"{name}, of the demo": summary[name]["refusals"] for name in ("base", "start", "dpo", "ppo") if name in summary
    }
    rows |= {name: one["refusals"] for name, one in results.items()}
    kinds = ("harmful", "twin", "ordinary")
    lines = ["| refuses | " + " | ".join(kinds) + " |", "|---" * 4 + "|"]
    for name, of in rows.items():
        cells = [
            f"{of[k]['rate']:.0%} [{100 * of[k]['low']:.0f}, {100 * of[k]['high']:.0f}]" if k in of else "-"
            for k in kinds
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(run: Path) -> list[Path]:
    return sorted((run / "samples").glob("step-*.jsonl"))


def rows_of(table: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    return {row["prompt"]: row for row in rows}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| gain, held out | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in next(iter(results.values()))["gain"]:
        cells = [one["gain"].get(name) for one in results.values()]
        shown = ["-" if g is None else f"{g['mean']:+.2f} [{g['low']:+.2f}, {g['high']:+.2f}]" for g in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    for name, digits in (("kl_per_answer", 1), ("safety_raw_last_steps", 3)):
        lines.append(f"| {name} | " + " | ".join(f"{one[name]:.{digits}f}" for one in results.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
