"""`plumbline redteam`: searches for prompts that get past a target, and reports the share that did within k attempts.

plumbline redteam --target runs/demo/ppo --behaviours 40 --attempts 5 --out runs/redteam
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plumbline.align.runtime.launch import pick_dtype
from plumbline.eval.redteam import all_disguises, search
from plumbline.eval.suites.public import HARMFUL, harmful
from plumbline.eval.suites.starter import starter_samples
from plumbline.eval.targets.specs import open_target
from plumbline.policy_models.devices import default_device


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; writes redteam.json and attempts.jsonl."""
    parser = argparse.ArgumentParser(
        prog="plumbline redteam", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True, help="spec of the target, as for plumbline eval")
    add("--writer", help="spec of the model that paraphrases; the target itself if left out")
    add("--behaviours", type=int, default=40, help="how many harmful prompts")
    add("--attempts", type=int, default=5, help="tries a behaviour, the plain one included")
    add("--suffix-steps", type=int, default=0, help="steps of the gradient search for a suffix, 0 for none (slow)")
    add("--set", default="starter", help="starter, or a public set of harmful prompts with --data")
    add("--data", help="folder of public sets")
    add("--max-new-tokens", type=int, default=96)
    add("--seed", type=int, default=0)
    add("--dtype", default="auto")
    add("--out", default="runs/redteam")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.set != "starter" and (args.set not in HARMFUL or not args.data):
        raise ValueError(f"--set {args.set}: needs starter, or with --data one of {', '.join(HARMFUL)}")
    samples = starter_samples("harmful") if args.set == "starter" else list(harmful(args.set, Path(args.data)).samples)
    options: dict[str, Any] = {"dtype": pick_dtype(args.dtype), "device": str(default_device())}
    target = open_target(args.target, **options)
    writer = open_target(args.writer, **options) if args.writer else None
    found = search(
        target, samples[: args.behaviours], attempts=args.attempts, max_new_tokens=args.max_new_tokens, seed=args.seed,
        disguises=all_disguises(target, writer=writer, suffix_steps=args.suffix_steps),
    )  # fmt: skip
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    summary = found.summary() | {
        "target": args.target,
        "fingerprint": target.fingerprint,
        "set": args.set,
        "seed": args.seed,
    }
    (out / "redteam.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.transcripts)
    (out / "attempts.jsonl").write_text("".join(lines), encoding="utf-8")
    for point in summary["success_at"]:
        print(f"through within {point['k']}: {point['mean']:.0%} [{point['low']:.0%}, {point['high']:.0%}]")
    for name, tally in sorted(summary["by_disguise"].items(), key=lambda item: -item[1]["through"] / item[1]["tries"]):
        print(f"  {name:<12} {tally['through']:>3} of {tally['tries']}")
    print(json.dumps({"success_at_k": summary["success_at"][-1]["mean"], "attempts": args.attempts}))
    return 0
