"""Train a reward model on preference pairs, then PPO a language model against it.

    python examples/ppo_hub_model.py                                               # a tiny bundled model, a minute
    python examples/ppo_hub_model.py --model Qwen/Qwen2.5-0.5B-Instruct --config demo

`--model` takes a bundled name, a folder or a hub id. `--config debug` runs a few steps and shows that everything fits
together; `--config demo` is the size of a real run on a laptop. The reward is the composite of fluency, relevance,
safety and toxicity with the learned preference as its fifth part; every part is logged by itself.
"""

import argparse
import json
from pathlib import Path

from plumbline.align import ppo, reward_model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:tiny-llama", help="bundled name, folder or hub id")
    parser.add_argument("--fluency-model", default="bundled:tiny-llama", help="frozen model that judges fluency")
    parser.add_argument("--config", default="debug", help="settings of both stages: debug or demo")
    parser.add_argument("--steps", default=2, type=int, help="PPO steps")
    parser.add_argument("--out", default="runs/ppo_hub_model", type=Path)
    options = parser.parse_args()

    # The same words as on the command line: plumbline reward-model --config debug --model ...
    shared = ["--config", options.config, "--model", options.model]
    reward_model.main([*shared, "--output_dir", str(options.out / "reward_model")])
    report = json.loads((options.out / "reward_model" / "report.json").read_text(encoding="utf-8"))
    accuracy = report["accuracy"]
    print(f"held-out pairs right: {accuracy['mean']:.0%} [{accuracy['low']:.0%}, {accuracy['high']:.0%}]")

    ppo.main([
        *shared, "--output_dir", str(options.out / "ppo"), "--steps", str(options.steps),
        "--fluency_model", options.fluency_model,
        "--reward_model", str(options.out / "reward_model" / "adapter"), "--preference_weight", "1.0",
    ])  # fmt: skip
    for line in (options.out / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "reward/total_mean" in row:
            parts = ("fluency", "relevance", "safety", "toxicity", "preference")
            means = ", ".join(f"{part} {row[f'reward/{part}_weighted_mean']:+.2f}" for part in parts)
            print(f"step {row['step']}: reward {row['reward/total_mean']:+.2f} ({means}), KL {row['objective/kl']:.2f}")


if __name__ == "__main__":
    main()
