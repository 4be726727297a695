"""PPO on the prompts of public preference sets: does the held-out reward rise, at what KL, and does a grader agree?

    python benchmarks/real_prompts.py --data DIR --out runs/real_prompts --seeds 0 1 2

DIR holds `rmb` and `hh_rlhf_harmless` with their files as published. Prompts are split by a hash of their text into three
parts that share none: prompts to train on, prompts to evaluate on, and pairs for the grader, a reward model that the
policy never sees. Half of the prompts to train on, and half of those to evaluate on, are from sets about harmlessness.
The fifth part of the reward is a reward model trained on pairs of the prompts to train on; --preference-weight 0 leaves it out.

Leaves one PPO run a seed, `summary.json` and `curves.png`, and prints the table of docs/results.md. A stage that is
finished is not run again; a PPO run that was stopped goes on from its last checkpoint. Other settings want another --out.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from plumbline.align.data.formats import read_pairs
from plumbline.align.data.rows import PreferencePair, last_user_text
from plumbline.align.runtime.launch import pick_dtype
from plumbline.eval.plotting.axes import LIGHT, legend_above, new_figure
from plumbline.eval.stats.intervals import paired_bootstrap
from plumbline.policy_models.loading import resolve_model_source
from plumbline.reward.learned import LearnedPreference

ROOT = Path(__file__).resolve().parents[1]
SETS = ("rmb", "hh_rlhf_harmless")
LONGEST = 400  # characters of a prompt; the settings leave out what has too many tokens


def main() -> None:
    args = parse_args()
    out: Path = args.out
    if args.grader:
        resolve_model_source(args.grader)  # asked for last: a wrong path should not wait for the runs
    if not (out / "eval.jsonl").exists():
        split_prompts(args.data, out, args.prompts)
    grader, learned = out / "grader", out / "reward_model"
    wanted = ([] if args.grader else [grader]) + ([learned] if args.preference_weight else [])
    for folder in wanted:
        if not (folder / "report.json").exists():
            flags = ["--config", args.reward_config, "--model", args.model, "--train_file", f"{folder}.jsonl"]
            flags += ["--max_steps", args.reward_steps, "--report_pairs", 100, "--output_dir", folder]
            launch("reward_model", *flags)
    for seed in args.seeds:
        run = out / f"seed{seed}"
        if not (run / "model").exists():
            flags = ["--config", args.config, "--model", args.model, "--seed", seed, "--output_dir", run]
            flags += ["--prompts_file", out / "train.jsonl", "--eval_prompts_file", out / "eval.jsonl"]
            if args.preference_weight:
                flags += ["--reward_model", learned / "model", "--preference_weight", args.preference_weight]
            launch("ppo", *flags, "--resume", "true")
    judge = LearnedPreference(str(args.grader or grader / "model"), dtype=pick_dtype("auto"))
    results = [of_run(out / f"seed{seed}", seed, judge) for seed in args.seeds]
    (out / "summary.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(out, args.seeds)
    print(table(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds one folder a set")
    parser.add_argument("--out", type=Path, default=Path("runs/real_prompts"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--config", default="configs/ppo/real_prompts.yaml")
    parser.add_argument("--grader", help="a reward model that is there already, in place of one trained here")
    parser.add_argument("--reward-config", default="configs/reward_model/demo.yaml", help="of both reward models")
    parser.add_argument("--reward-steps", type=int, default=120, help="of both reward models")
    parser.add_argument("--preference-weight", type=float, default=4.0, help="the other four parts have a weight of 1")
    parser.add_argument("--prompts", type=int, default=1000, help="to train on; a tenth as many to evaluate on")
    args = parser.parse_args()
    if missing := [name for name in SETS if not (args.data / name).is_dir()]:
        parser.error(f"--data {args.data} has no {' and no '.join(missing)}: it must hold the sets as folders")
    return args


def launch(stage: str, *flags: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "align" / f"{stage}.py"), *map(str, flags)], check=True, cwd=ROOT)


def split_prompts(data: Path, out: Path, count: int) -> None:
    """Writes prompts (train.jsonl, eval.jsonl) and pairs (grader.jsonl; reward_model.jsonl, of the prompts to train on).

    Which part a prompt is in, its hash says.
    """
    kinds: dict[str, dict[str, PreferencePair]] = {"harmless": {}, "helpful": {}}
    pairs_of: dict[str, list[PreferencePair]] = {"grader": [], "reward_model": []}
    for name in SETS:
        for pair in read_pairs(data / name)[0]:
            text = last_user_text(pair.prompt)
            if len(pair.prompt) > 1 or len(text) > LONGEST:
                continue
            share = place(text)
            if share >= 0.15:
                pairs_of["grader" if share < 0.5 else "reward_model"].append(pair)
            if not 0.15 <= share < 0.5:
                harmless = name == "hh_rlhf_harmless" or "Harmless" in pair.tags.get("category", "")
                kinds["harmless" if harmless else "helpful"].setdefault(text, pair)
    out.mkdir(parents=True, exist_ok=True)
    for file, wanted, low, high in (("train", count, 0.5, 1.0), ("eval", count // 10, 0.0, 0.15)):
        rows: list[dict[str, Any]] = []
        for kind, texts in kinds.items():
            chosen = sorted((t for t in texts if low <= place(t) < high), key=place)[: wanted // 2]
            rows += [{"prompt": text, "kind": kind} for text in chosen]
        write(out / f"{file}.jsonl", sorted(rows, key=lambda row: place(row["prompt"], "order")))
    for name, pairs in pairs_of.items():
        pairs.sort(key=lambda pair: place(last_user_text(pair.prompt) + pair.chosen[-1]["content"], "order"))
        write(out / f"{name}.jsonl", [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs])


def place(text: str, salt: str = "split") -> float:
    """Where a text falls in [0, 1), by itself alone."""
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:6]) / 2**48


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def of_run(run: Path, seed: int, judge: LearnedPreference) -> dict[str, Any]:
    """Gains of one run on the held-out prompts, paired by prompt, with 95% bootstrap intervals."""
    tables = sorted((run / "samples").glob("step-*.jsonl"))
    before, after = (graded(table, judge) for table in (tables[0], tables[-1]))
    metrics = read_metrics(run)
    last = [row for row in metrics if "eval/kl_per_answer" in row][-1]
    gains = {}
    for name, key in (("reward", "total"), ("grader", "grader")):
        both = [p for p in before if before[p].get(key) is not None and after.get(p, {}).get(key) is not None]
        gain = paired_bootstrap([after[p][key] for p in both], [before[p][key] for p in both])
        gains[name] = {**gain._asdict(), "n": len(both)}
    return {
        "seed": seed,
        **gains,
        "kl_per_answer": last["eval/kl_per_answer"],
        "answer_tokens": [next(r for r in metrics if "eval/answer_tokens_mean" in r)["eval/answer_tokens_mean"]]
        + [last["eval/answer_tokens_mean"]],
        "parts": {
            name: last[key] - metrics[0][key]
            for key in last
            if (name := key.removeprefix("eval/").removesuffix("_weighted_mean")) + "_weighted_mean" in key
            and key.startswith("eval/")
            and key in metrics[0]
        },
    }


def graded(table: Path, judge: LearnedPreference) -> dict[str, dict[str, Any]]:
    """The rows of a sample table by their prompt, with the grader's score of each answer."""
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    scores = judge([row["prompt"] for row in rows], [row["answer"] for row in rows])
    return {row["prompt"]: row | {"grader": score} for row, score in zip(rows, scores, strict=True)}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | reward gain, held out | grader gain | KL, nats per answer | tokens an answer | by part |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        gains = [f"{r[g]['mean']:+.2f} [{r[g]['low']:+.2f}, {r[g]['high']:+.2f}]" for g in ("reward", "grader")]
        parts = ", ".join(f"{name} {gain:+.2f}" for name, gain in r["parts"].items())
        before, after = r["answer_tokens"]
        lines.append(
            f"| {r['seed']} | {gains[0]} | {gains[1]} | {r['kl_per_answer']:.1f} | {before:.0f} to {after:.0f} | {parts} |"
        )
    return "\n".join(lines)


def draw(out: Path, seeds: list[int]) -> None:
    """curves.png: reward and KL by step, a colour a seed; faint on the rollouts, dots on the held-out prompts."""
    figure, (reward, kl) = new_figure(LIGHT, panels=2, size=(7.2, 5.0))
    for seed, colour in zip(seeds, LIGHT.series, strict=False):
        rows = read_metrics(out / f"seed{seed}")
        for ax, rollout, held_out in (
            (reward, "objective/scores", "eval/reward_mean"),
            (kl, "objective/kl", "eval/kl_per_answer"),
        ):
            steps = [row for row in rows if rollout in row]
            ax.plot([r["step"] for r in steps], [r[rollout] for r in steps], color=colour, lw=1.2, alpha=0.5)
            points = [row for row in rows if held_out in row]
            label = f"seed {seed}"
            ax.plot([r["step"] for r in points], [r[held_out] for r in points], "o-", color=colour, lw=2, label=label)
    reward.set_ylabel("reward")
    kl.set_ylabel("KL, nats per answer")
    kl.set_xlabel("PPO step")
    kl.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(reward, LIGHT, columns=3)
    figure.savefig(out / "curves.png", dpi=130)


if __name__ == "__main__":
    main()
