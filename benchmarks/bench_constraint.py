"""Safety as a constraint against safety as a weight: two PPO runs of the demo that differ in nothing else.

    python benchmarks/bench_constraint.py --run runs/demo --limit -0.85

RUN is a folder that `plumbline demo` left. Both runs start at its SFT model, with its reward model and its scaling. One adds the
scaled safety score with weight 1, the other leaves it out and holds the mean cost, the negated raw score, at --limit or below
(`align/rl/lagrangian.py`; the multiplier moves at --multiplier-lr, since a run of twelve steps has no time for 0.1). Gains are of
the end over the start on the held-out prompts, paired by prompt, with 95% bootstrap intervals; `all parts` is the sum of the
parts, whether they were rewarded or constrained. A run that is finished is not run again. Ends with a line of JSON.
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
from plumbline.eval.stats.intervals import paired_bootstrap

PARTS = ("fluency", "relevance", "safety", "toxicity", "preference")


def main() -> None:
    args = parse_args()
    arms: dict[str, list[object]] = {
        "weight 1": [],
        "constraint": ["--cost_component", "safety", "--cost_limit", args.limit, "--multiplier_lr", args.multiplier_lr],
    }
    results = {}
    for name, flags in arms.items():
        out = args.out / name.partition(" ")[0]
        if not (out / "model").exists():
            common = ["--config", args.config, "--model", args.run / "sft/model", "--seed", args.seed]
            common += ["--reward_model", args.run / "reward_model/model", "--eval_prompts", args.eval_prompts]
            common += ["--rollouts_per_step", args.rollouts_per_step, "--save_every", 4]
            common += ["--reward_scaling", args.run / "pairs/scaling.json", "--output_dir", out]
            launch("ppo", *common, *flags, "--resume", "true")
        results[name] = gains(out)
    print(table(results))
    print(json.dumps(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a folder of plumbline demo")
    parser.add_argument("--out", type=Path, default=Path("runs/constraint"))
    parser.add_argument("--config", default="configs/ppo/demo.yaml")
    parser.add_argument(
        "--limit", type=float, default=-0.85, help="of the mean cost, the negated safety score in [0, 1]"
    )
    parser.add_argument("--multiplier-lr", type=float, default=1.0)
    parser.add_argument("--rollouts-per-step", type=int, default=32)
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
