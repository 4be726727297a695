"""Reward-model training: tokens a second of `align/runtime/pair_trainer.py` against plain TRL RewardTrainer, same data, CPU.

Both train the same weights with the same adapters in the same precision on the same pairs, `--pairs` of them in batches
of `--batch-size`, and take turns, epoch by epoch. Tokens are those of the conversations, padding not counted and a
prompt that two answers share counted twice, so the ratio is one of times. Providers:

    plumbline            shared prompts, like lengths in a batch, `packed` attention
    trl                  RewardTrainer as it comes, but without gradient checkpointing (its default), which would slow it
    trl_grouped          the same with transformers' own length grouping

Before the clock starts, the scores of the two ways are compared. The first epoch of each is not counted.

    python benchmarks/rewards/bench_reward_model.py

Appends to benchmarks/results/reward_model.csv and ends with a line of JSON: `ratio_vs_trl`, of the median epochs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

from benchmarks.records import append, commit, device_name
from plumbline.align.data.rows import read_preferences
from plumbline.align.runtime.launch import pick_dtype, trainer_defaults
from plumbline.align.runtime.pair_trainer import PairCollator, PairTrainer, shared_row_scores
from plumbline.paths import STARTER
from plumbline.policy_models.attention import default_attention
from plumbline.policy_models.loading import load_scalar_model, load_tokenizer

RESULTS = Path(__file__).parent / "results" / "reward_model.csv"
COLUMNS = "commit device threads provider shape p20 p50 p80".split()


class EpochTimes(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=STARTER / "preferences.jsonl")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--providers", nargs="+", default=["plumbline", "trl", "trl_grouped"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = load_tokenizer(args.model)
    pairs = [p for p in read_preferences(args.data)]
    step = max(1, len(pairs) // args.pairs)  # spread over the file, which is sorted by kind
    ids = [
        {
            side: tokenizer.apply_chat_template(p.prompt + getattr(p, name), return_dict=True)["input_ids"]
            for side, name in (("chosen_ids", "chosen"), ("rejected_ids", "rejected"))
        }
        for p in pairs[::step]
    ]
    data = Dataset.from_list([row for row in ids if max(map(len, row.values())) <= args.max_length][: args.pairs])
    tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in data)
    seconds: dict[str, list[float]] = {name: [] for name in args.providers}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make(name, args, data, tokenizer, folder) for name in args.providers}
        result = {"score_difference": compare(args.model, tokenizer.pad_token_id, data)}
        for turn in range(args.repeats + 1):
            for name, trainer in trainers.items():
                times = EpochTimes()
                trainer.add_callback(times)
                trainer.train()
                trainer.remove_callback(times)
                if turn:
                    seconds[name] += times.seconds
    rates = {name: tokens / statistics.median(spent) for name, spent in seconds.items()}
    shape = f"{args.model.split(':')[-1]} {len(data)} pairs of {tokens / len(data):.0f} tokens b{args.batch_size}"
    for name, spent in seconds.items():
        print(f"{name:12} {rates[name]:8.0f} tokens/s  epochs {[round(s, 2) for s in spent]}  {shape}")
    record(seconds, tokens, shape)
    result |= {f"{name}_tokens_per_s": rates[name] for name in rates} | {
        "ratio_vs_trl": rates["plumbline"] / rates["trl"]
    }
    if "trl_grouped" in rates:
        result["ratio_vs_trl_grouped"] = rates["plumbline"] / rates["trl_grouped"]
    print(json.dumps({name: round(value, 6) for name, value in result.items()}))


def make(name: str, args: argparse.Namespace, data: Dataset, tokenizer: Any, folder: str) -> RewardTrainer:
    ours = name == "plumbline"
    dtype = pick_dtype("auto")
    model = load_scalar_model(args.model, dtype=dtype, attn_implementation=default_attention() if ours else "sdpa")
    options = {"gradient_checkpointing": False, "logging_steps": 1000, "disable_tqdm": True, "max_length": None}
    if name == "trl_grouped":
        options |= {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
        lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in data]
        data = data.add_column("length", lengths)  # type: ignore[call-arg]
    config = RewardConfig(
        output_dir=f"{folder}/{name}",
        **trainer_defaults()
        | {
            "per_device_train_batch_size": args.batch_size,
            "num_train_epochs": 1,
            "remove_unused_columns": not name == "trl_grouped",
        }
        | options,
    )
    return (PairTrainer if ours else RewardTrainer)(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
    )


@torch.no_grad()
def compare(source: str, pad_id: int, data: Dataset) -> float:
    """Largest difference of a score between a shared row and a row of its own, in fp32; ValueError above rounding."""
    model = load_scalar_model(source, dtype=torch.float32, attn_implementation=default_attention()).eval()
    examples = sorted(data, key=lambda row: len(row["chosen_ids"]))[:4]
    one_B2 = shared_row_scores(model, PairCollator(pad_id=pad_id, shared=True)(examples))
    batch = PairCollator(pad_id=pad_id, shared=False)(examples)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    difference = float((one_B2 - torch.stack(logits[:, 0].chunk(2), dim=1)).abs().max())
    if difference > 1e-3:
        raise ValueError(f"shared rows score differently, by {difference}: {one_B2.tolist()}")
    return difference


def record(seconds: dict[str, list[float]], tokens: int, shape: str) -> None:
    """Rows of tokens a second; p20 is the slow end."""
    rows = []
    for name, spent in seconds.items():
        slow, middle, fast = (tokens / sorted(spent)[round(q * (len(spent) - 1))] for q in (0.8, 0.5, 0.2))
        rates = [round(rate, 1) for rate in (slow, middle, fast)]
        rows.append([commit(), device_name(), torch.get_num_threads(), name, shape, *rates])
    append(RESULTS, COLUMNS, rows)


if __name__ == "__main__":
    main()
