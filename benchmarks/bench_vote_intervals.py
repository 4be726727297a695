"""How often 95 % intervals of Bradley-Terry strengths hold the truth, by number of votes: two models, sides at random.

    python -m benchmarks.bench_vote_intervals --runs 300

Prints a row a number of votes (each on an item of its own, and two a time on one item) and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

import numpy as np

from plumbline.apps.label.study.agreement import Comparison, bradley_terry


def coverage(votes: int, gap: float, *, runs: int, per_item: int = 1, seed: int = 0) -> float:
    """Share of runs in which the interval of `a` holds its strength, half of `gap`; votes on one item are all alike."""
    rng, held = np.random.default_rng([seed, votes, per_item]), 0
    for _ in range(runs):
        cast = []
        for item in range(max(1, votes // per_item)):
            left, right = ("a", "b") if rng.random() < 0.5 else ("b", "a")
            wins = rng.random() < 1 / (1 + math.exp(-gap if left == "a" else gap))
            cast += [Comparison(left=left, right=right, outcome=float(wins), item=item)] * per_item
        interval = bradley_terry(cast).strength["a"]
        held += not (interval.low > gap / 2 or interval.high < gap / 2)
    return held / runs


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--votes", type=int, nargs="+", default=[1, 2, 3, 4, 6, 10, 30])
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    cases = {"equal": (0.0, 1), "gap of 1": (1.0, 1), "equal, two votes an item": (0.0, 2)}
    found: dict[str, dict[str, float]] = {name: {} for name in cases}
    for votes in args.votes:
        for name, (gap, per_item) in cases.items():
            if votes >= per_item:
                found[name][str(votes)] = coverage(votes, gap, runs=args.runs, per_item=per_item)
        print(
            f"{votes:4} votes   "
            + "   ".join(f"{name} {100 * of[str(votes)]:.0f} %" for name, of in found.items() if str(votes) in of),
            flush=True,
        )
    print(json.dumps({"runs": args.runs, "coverage": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
