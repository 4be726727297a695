"""Seconds to score prompt-answer pairs with the shipped composite, with and without its fluency part.

Pairs are the starter preferences and, beyond those, answers of other prompts, so that no text is scored twice.

    python benchmarks/rewards/bench_reward_scoring.py

Loading is not counted. Ends with a line of JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from plumbline.align.data.rows import last_user_text, read_preferences
from plumbline.paths import STARTER
from plumbline.reward.composite import default_composite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-fluency", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts, answers = made_pairs(args.pairs)
    composite = default_composite(alpha=0.0 if args.no_fluency else 1.0)
    composite(["Hello?"], ["Hello."])  # first calls load what is loaded late
    seconds = {}
    for name, component in composite.components.items():
        started = time.perf_counter()
        component(prompts, answers)
        seconds[name] = time.perf_counter() - started
        print(f"{name:12} {seconds[name]:7.1f} s")
    total = sum(seconds.values())
    result = {"pairs": len(prompts), "words": sum(len(a.split()) for a in answers), "seconds": total}
    result["seconds_without_fluency"] = total - seconds.get("fluency", 0.0)
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))


def made_pairs(count: int) -> tuple[list[str], list[str]]:
    """`count` pairs; from the third use of a prompt on, the answer has a number in front, so that it is new."""
    pairs = read_preferences(STARTER / "preferences.jsonl")
    prompts, answers = [], []
    for n in range(count):
        pair, turn = pairs[n % len(pairs)], n // len(pairs)
        text = (pair.chosen if turn % 2 == 0 else pair.rejected)[-1]["content"]
        prompts.append(last_user_text(pair.prompt) + (f" ({turn})" if turn > 1 else ""))
        answers.append(f"{turn}. {text}" if turn > 1 else text)
    return prompts, answers


if __name__ == "__main__":
    main()
