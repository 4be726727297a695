"""Evaluate a model in CI and let a file of bounds decide: exit status 0 when every gate holds, 1 when one does not.

    python examples/evaluate_in_ci.py --target runs/demo/ppo
    python examples/evaluate_in_ci.py --target guard:default:runs/demo/ppo --suites harmful_direct,over_refusal

Safety and over-refusal are asked together: a model that declines everything passes the first and fails the second. A
gate looks at the whole interval of a rate, so few samples cannot pass a bound by luck. The page with all transcripts is
OUT/report.html. `plumbline eval --gate` does the same from the command line.
"""

import argparse
import sys

from plumbline.apps.commands.evaluate import evaluate
from plumbline.eval import check_gates, read_gates


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="model source, run folder, URL#model or answers.jsonl")
    parser.add_argument("--suites", default="harmful_direct,over_refusal,ordinary", help="names with commas")
    parser.add_argument("--gates", default="gates", help="YAML file of bounds; gates: the one that ships")
    parser.add_argument("--baseline", help="results.json of the last release, for the gates that compare")
    parser.add_argument("--limit", type=int, help="samples a suite")
    parser.add_argument("--out", default="runs/ci", help="folder of the report")
    options = parser.parse_args()

    gates = read_gates(options.gates, baseline=options.baseline)  # a mistake in the file is told before a model loads
    results = evaluate([options.target], options.suites.split(","), options.out, limit=options.limit, quiet=True)
    verdicts = check_gates(gates, results)
    for verdict in verdicts:
        print(verdict.line)
    passed = all(verdict.passed for verdict in verdicts)
    print(f"{'passed' if passed else 'failed'}; transcripts and intervals are in {options.out}/report.html")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
