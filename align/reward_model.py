"""Reward model on TRL's trainer.

Launch: `accelerate launch align/reward_model.py --config configs/reward_model/debug.yaml`

Bradley-Terry on preference pairs (Ouyang et al. 2022, eq. 1), with a centring term. What the run leaves:
`adapter/`            the LoRA adapter and head alone, for a PPO run that holds one set of weights
`model/`              the backbone with a scalar head, LoRA merged, and `reward_scaling.json`: mean and standard
deviation
                      of the scores of training answers, so that scores can be read as "standard deviations above usual"
`report.json`         accuracy on held-out pairs with its interval, beside the baseline "the longer answer is better"
"""

import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from align.actors import ModelSettings, save_merged
from align.launch import STARTER, open_run, parse_settings, pick_dtype, resolve_path, trainer_defaults
from align.preferences import PreferencePair, last_user_text, read_preferences, split_pairs
from align.tracking import MetricsCallback, StopOnNonFinite
from eval.intervals import wilson
from policy_models.attention import default_attention
from policy_models.loading import load_scalar_model, load_tokenizer, resolve_model_source
from policy_models.router import RouterBalance
from reward.learned import SCALING_FILE, LearnedPreference


@dataclass(kw_only=True)
class RewardModelSettings(ModelSettings):
    """What the reward stage takes beside TRL's own RewardConfig."""

    train_file: str = field(
        default=str(STARTER / "preferences.jsonl"), metadata={"help": "JSON Lines: prompt, chosen, rejected"}
    )
    holdout_every: int = field(default=5, metadata={"help": "one prompt in this many is held out for the report"})
    use_margins: bool = field(default=False, metadata={"help": "ask for a difference of at least the pair's margin"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout_every < 2:
            raise ValueError(f"holdout_every={self.holdout_every}: must be at least 2, or nothing is left to train on")


class _Trainer(StopOnNonFinite, RewardTrainer):
    pass


def train(settings: RewardModelSettings, args: RewardConfig) -> Path:
    """Trains, reports on held-out pairs and returns the run folder; the reward model is in `model/`."""
    pairs = read_preferences(resolve_path(settings.train_file))
    train_pairs, held_out = split_pairs(pairs, settings.holdout_every)
    if not train_pairs or not held_out:
        raise ValueError(
            f"{settings.train_file}: {len(pairs)} pairs split into {len(train_pairs)} for training and {len(held_out)} "
            f"held out with holdout_every={settings.holdout_every}; both must have some: add pairs or change it"
        )
    settings.check_precision(args)
    resolve_model_source(settings.model)
    run = open_run(args.output_dir or "runs/reward_model", settings, args)
    tokenizer = load_tokenizer(settings.model)
    model = load_scalar_model(settings.model, dtype=settings.weight_dtype, attn_implementation=default_attention())
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
        | ({"margin": p.margin} if settings.use_margins else {})
        for p in train_pairs
    ]
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=settings.lora_config(model, task_type="SEQ_CLS"),
        callbacks=[MetricsCallback(run), RouterBalance()],
    )
    trainer.train()
    save_merged(trainer, settings, run, tokenizer, scalar=True)
    del trainer, model

    scorer = LearnedPreference(str(run / "model"), dtype=pick_dtype(settings.dtype))
    # 128 answers pin a mean and a spread well enough; scoring every training pair would take as long as training
    chosen, rejected = score_pairs(scorer, train_pairs[:64])
    scores = np.concatenate([chosen, rejected])
    scaling = {"mean": float(scores.mean()), "std": float(max(scores.std(), 1e-6))}
    for folder in {run / "model", run / "adapter"}:
        if folder.is_dir():
            (folder / SCALING_FILE).write_text(json.dumps(scaling, indent=2) + "\n", encoding="utf-8")
    report = accuracy_report(held_out, *score_pairs(scorer, held_out))
    (run / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return run


def score_pairs(scorer: LearnedPreference, pairs: Sequence[PreferencePair]) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the chosen answers, scores of the rejected ones), each (len(pairs),)."""
    prompts = [last_user_text(p.prompt) for p in pairs]
    texts = [p.chosen[-1]["content"] for p in pairs] + [p.rejected[-1]["content"] for p in pairs]
    scores = np.asarray(scorer(prompts + prompts, texts), dtype=float)
    return scores[: len(pairs)], scores[len(pairs) :]


def accuracy_report(pairs: Sequence[PreferencePair], chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """Share of pairs ranked right, with 95% Wilson intervals: in all, by kind, and by "the longer answer is better".

    A tie counts as half right, rounded down in the counts of the interval. `calibration` rows are (mean predicted
    probability that the first answer of a randomly ordered pair wins, observed share, pairs) in five equal bins.
    """
    right = chosen > rejected
    longer = np.array([len(p.chosen[-1]["content"]) > len(p.rejected[-1]["content"]) for p in pairs])
    kinds = sorted({p.tags.get("kind", "") for p in pairs} - {""})
    return {
        "accuracy": _share(right),
        "length_baseline": _share(longer),
        "by_kind": {
            kind: {
                "accuracy": _share(right[[p.tags.get("kind") == kind for p in pairs]]),
                "length_baseline": _share(longer[[p.tags.get("kind") == kind for p in pairs]]),
            }
            for kind in kinds
        },
        "calibration": _calibration(chosen - rejected),
    }


def _share(hits: np.ndarray) -> dict[str, float | int]:
    return wilson(int(hits.sum()), len(hits))._asdict() | {"n": len(hits)}


def _calibration(margin: np.ndarray, bins: int = 5) -> list[list[float]]:
    """Pairs in random order (fixed seed), so that "first wins" happens half the time."""
    swap = np.random.default_rng(0).random(len(margin)) < 0.5
    predicted = 1 / (1 + np.exp(-np.where(swap, -margin, margin)))
    won = ~swap
    at = np.minimum((predicted * bins).astype(int), bins - 1)
    return [
        [float(predicted[at == b].mean()), float(won[at == b].mean()), int((at == b).sum())]
        for b in range(bins)
        if (at == b).any()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    settings, args = parse_settings((RewardModelSettings, RewardConfig), argv, defaults=trainer_defaults())
    run = train(settings, args)
    accuracy = json.loads((run / "report.json").read_text())["accuracy"]
    share, pairs = accuracy["mean"], accuracy["n"]
    print(f"reward_model: finished, held-out accuracy {share:.3f} on {pairs} pairs; {run / 'report.json'}")


if __name__ == "__main__":
    main()
