"""Reward model on TRL's trainer.

Launch: `accelerate launch align/reward_model.py --config configs/reward_model/debug.yaml`

Bradley-Terry on preference pairs (Ouyang et al. 2022, eq. 1) with margins, soft labels and ties, and a centring term; or
a cost model (Dai et al. 2023) from pairs whose answers people called harmful or not. What the run leaves:
`adapter/`            the LoRA adapter and head alone, for a PPO run that holds one set of weights
`model/`              the backbone with a scalar head, LoRA merged, and `reward_scaling.json`: mean and standard deviation
                      of the scores of training answers, so that scores can be read as "standard deviations above usual"
`report.json`         accuracy on held-out pairs with its interval, by kind and length-controlled, beside the baseline
                      "the longer answer is better"; calibration, margins, mistakes made with confidence, leaked prompts
`report.png`          its calibration and margins
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
from trl import RewardConfig

from plumbline.align.data.encoding import Encoder
from plumbline.align.data.formats import cost_pairs, read_training_pairs
from plumbline.align.data.mixture import DomainMixture
from plumbline.align.data.rows import PreferencePair, last_user_text, split_pairs
from plumbline.align.models.start import ModelSettings, save_merged
from plumbline.align.runtime.launch import launched, parse_settings, pick_dtype, trainer_defaults
from plumbline.align.runtime.pair_trainer import PairTrainer
from plumbline.align.runtime.tracking import StopOnNonFinite
from plumbline.align.runtime.trainer_runs import ExactResume, TrainerRun
from plumbline.eval.plotting.pair_plots import plot_pair_reports
from plumbline.eval.stats.intervals import wilson
from plumbline.eval.stats.pair_accuracy import pair_report, shared_prompts
from plumbline.paths import STARTER
from plumbline.policy_models.attention import default_attention
from plumbline.policy_models.compression.quantise import quantise
from plumbline.policy_models.loading import load_scalar_model, load_tokenizer, model_summary, resolve_model_source
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.router import RouterBalance
from plumbline.reward.learned import SCALING_FILE, LearnedPreference
from plumbline.rows import data_source


@dataclass(kw_only=True)
class RewardModelSettings(ModelSettings):
    """What the reward stage takes beside TRL's own RewardConfig."""

    train_file: str = field(
        default=str(STARTER / "preferences.jsonl"),
        metadata={"help": "pairs in any form of align/data/formats.py: file, folder or hub id; several with commas"},
    )
    holdout_every: int = field(default=5, metadata={"help": "one prompt in this many is held out for the report"})
    report_pairs: int | None = field(
        default=None, metadata={"help": "held-out pairs in the report at most, spread over the file; none: all"}
    )
    use_margins: bool = field(default=False, metadata={"help": "ask for a difference of at least the pair's margin"})
    mix_by_loss: float = field(
        default=0.0, metadata={"help": "rate at which the shares of sources follow their losses; 0: as in the data"}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "share of labels taken to be wrong, below 0.5"})
    target: str = field(
        default="preference",
        metadata={"help": "preference; or cost: higher is more harmful, from chosen_harmful and so on"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5")
        if self.target not in ("preference", "cost"):
            raise ValueError(f"target={self.target!r}: must be preference or cost")
        if self.holdout_every < 2:
            raise ValueError(f"holdout_every={self.holdout_every}: must be at least 2, or nothing is left to train on")
        if self.report_pairs is not None and self.report_pairs < 1:
            raise ValueError(f"report_pairs={self.report_pairs}: must be at least 1")
        if not 0 <= self.mix_by_loss <= 10:
            raise ValueError(f"mix_by_loss={self.mix_by_loss}: must be from 0 (off) to 10; 0.5 is a good start")


class _Trainer(ExactResume, StopOnNonFinite, PairTrainer):
    pass


def train(settings: RewardModelSettings, args: RewardConfig) -> Path:
    """Trains, reports on held-out pairs and returns the run folder; the reward model is in `model/`."""
    pairs = read_training_pairs(data_source(settings.train_file))
    if settings.target == "cost":
        pairs = cost_pairs(pairs)
    train_pairs, held_out = split_pairs(pairs, settings.holdout_every)
    if not train_pairs or not held_out:
        raise ValueError(
            f"{settings.train_file}: {len(pairs)} pairs split into {len(train_pairs)} for training and {len(held_out)} "
            f"held out with holdout_every={settings.holdout_every}; both must have some: add pairs or change it"
        )
    if all(pair.p_chosen == 0.5 for pair in held_out):
        raise ValueError(
            f"{settings.train_file}: all {len(held_out)} held-out pairs are ties; there is nothing to measure"
        )
    settings.check_precision(args)
    if settings.mix_by_loss and (settings.resume or args.resume_from_checkpoint):
        raise ValueError(
            f"mix_by_loss={settings.mix_by_loss}: a run whose mixture follows its losses cannot go on from a checkpoint, "
            "which does not hold where the mixture was; start it anew"
        )
    resolve_model_source(settings.model)
    tokenizer = load_tokenizer(settings.model)
    rows, too_long = pair_rows(train_pairs, tokenizer, settings, args.max_length)
    mixture = None
    if settings.mix_by_loss:
        mixture = DomainMixture([row.pop("source") for row in rows], rate=settings.mix_by_loss)
        rows = [row | {"domain": at} for row, at in zip(rows, mixture.domain, strict=True)]
    folder = args.output_dir or "runs/reward_model"
    run = TrainerRun("reward_model", settings, args, folder=folder, data={"train_file": rows})
    with run.writing():
        _fit(settings, args, run, rows, tokenizer, mixture)
        _report(settings, run.folder, train_pairs, held_out, len(rows), too_long)
    return run.folder


def _fit(
    settings: RewardModelSettings,
    args: RewardConfig,
    run: TrainerRun,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    mixture: DomainMixture | None,
) -> None:
    """Trains on the rows and saves the model."""
    model = load_scalar_model(settings.model, dtype=settings.weight_dtype, attn_implementation=default_attention())
    if settings.quantise != "none":
        quantise(model, settings.quantise)
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=settings.lora_config(model, task_type="SEQ_CLS"),
        callbacks=[*run.callbacks(), RouterBalance()],
        label_smoothing=settings.label_smoothing,
        mixture=mixture,
    )
    trained: Any = trainer.model
    split_expert_adapters(trained)
    for parameter in trained.parameters():  # the head of a bf16 model too: AdamW's steps are below its rounding
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    print(f"reward_model: {model_summary(trained)}")
    run.train(trainer)
    trained.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    save_merged(trainer, settings, run.folder, tokenizer, scalar=True)


def _report(
    settings: RewardModelSettings,
    run: Path,
    train_pairs: Sequence[PreferencePair],
    held_out: list[PreferencePair],
    num_rows: int,
    too_long: int,
) -> None:
    """Writes the scaling of the scores, and how the model does on held-out pairs."""
    scorer = LearnedPreference(str(run / "model"), dtype=pick_dtype(settings.dtype))
    # 128 answers pin a mean and a spread well enough; scoring every training pair would take as long as training
    chosen, rejected = score_pairs(scorer, train_pairs[:64])
    scores = np.concatenate([chosen, rejected])
    scaling = {"mean": float(np.nanmean(scores)), "std": float(max(np.nanstd(scores), 1e-6))}
    for folder in {run / "model", run / "adapter"}:
        if folder.is_dir():
            (folder / SCALING_FILE).write_text(json.dumps(scaling, indent=2) + "\n", encoding="utf-8")
    # no label says which of two tied answers is better
    held_out = [pair for pair in held_out if pair.p_chosen > 0.5]
    held_out = held_out[:: -(-len(held_out) // (settings.report_pairs or len(held_out)))]
    report = accuracy_report(held_out, *score_pairs(scorer, held_out))
    leaks = shared_prompts(
        [last_user_text(p.prompt) for p in train_pairs], [last_user_text(p.prompt) for p in held_out]
    )
    report |= {"train_pairs": num_rows, "train_pairs_too_long": too_long, "leaked_prompts": len(leaks)}
    (run / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_pair_reports({"reward model": report}).savefig(run / "report.png")


def pair_rows(
    pairs: Sequence[PreferencePair], tokenizer: Any, settings: RewardModelSettings, max_length: int | None
) -> tuple[list[dict[str, Any]], int]:
    """(rows for the trainer, how many pairs were left out because an answer would not fit `max_length`).

    ValueError when none is left. Columns that say nothing (no soft label anywhere) are left out.
    """
    rows = []
    soft = any(pair.p_chosen < 1 for pair in pairs)
    encoder = Encoder("reward_model", tokenizer, max_length=max_length)
    for pair in pairs:
        found = encoder.answers(pair.prompt, [pair.chosen, pair.rejected], pair.tools)
        if found is None:
            continue
        prompt, (chosen, rejected) = found
        if not encoder.fits(len(prompt) + max(len(chosen), len(rejected))):
            continue
        row: dict[str, Any] = {"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected]}
        if settings.mix_by_loss:
            row["source"] = pair.tags.get("kind") or pair.source
        if settings.use_margins:
            row["margin"] = pair.margin
        if soft:
            row["p_chosen"] = pair.p_chosen
        if settings.target == "cost":
            row["chosen_harm"], row["rejected_harm"] = (1.0 if harmful else -1.0 for harmful in pair.harm)
        rows.append(row)
    encoder.report(len(rows))
    if ties := sum(pair.p_chosen == 0.5 for pair in pairs):
        print(f"reward_model: {ties} of {len(pairs)} pairs are ties: trained to get equal scores")
    return rows, len(encoder.too_long)


def score_pairs(scorer: LearnedPreference, pairs: Sequence[PreferencePair]) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the chosen answers, scores of the rejected ones), each (len(pairs),); NaN for too long a one."""
    texts = [[*p.prompt, *p.chosen] for p in pairs] + [[*p.prompt, *p.rejected] for p in pairs]
    tools = [p.tools for p in pairs] * 2
    scores = np.array([np.nan if s is None else s for s in scorer.score_conversations(texts, tools)], dtype=float)
    return scores[: len(pairs)], scores[len(pairs) :]


def accuracy_report(pairs: Sequence[PreferencePair], chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """`plumbline.eval.stats.pair_accuracy.pair_report` of the margins, with the length baseline and texts of confident mistakes.

    `by_kind` has both for each kind of pair. `calibration` rows are (confidence, share ranked right, pairs), the
    confidence scaled by a temperature that other prompts gave; absent where there are too few.
    """
    margin = chosen - rejected
    scored = np.isfinite(margin)
    if not scored.all():
        print(f"reward_model: {(~scored).sum()} of {len(pairs)} held-out pairs are too long to score; left out")
    if not scored.any():
        raise ValueError("no held-out pair could be scored: their answers are longer than the model's positions")
    pairs, margin = [pair for pair, known in zip(pairs, scored, strict=True) if known], margin[scored]
    extra = np.array([len(p.chosen[-1]["content"]) - len(p.rejected[-1]["content"]) for p in pairs])
    kinds = [p.tags.get("kind") or p.source for p in pairs]
    report = pair_report(
        margin,
        subsets=kinds,
        extra_length=extra,
        groups=[last_user_text(p.prompt) for p in pairs],
        agreement=[p.tags.get("agreement", "") for p in pairs],
    )
    longer = extra > 0
    by_kind = report.pop("by_subset")
    report |= {
        "length_baseline": _share(longer),
        "by_kind": {
            kind: {"accuracy": share, "length_baseline": _share(longer[[k == kind for k in kinds]])}
            for kind, share in by_kind.items()
        },
        "unscored": int((~scored).sum()),
    }
    if isinstance(report["calibration"], str):
        report["calibration_note"] = report["calibration"]
        report["calibration"] = []
    report["confident_mistakes"] = [
        {
            "prompt": last_user_text(pairs[row].prompt),
            "chosen": pairs[row].chosen[-1]["content"],
            "rejected": pairs[row].rejected[-1]["content"],
            "margin": float(margin[row]),
        }
        for row in report.get("confident_mistakes", [])
    ]
    return report


def _share(hits: np.ndarray) -> dict[str, float | int]:
    return wilson(int(hits.sum()), len(hits))._asdict() | {"n": len(hits)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    settings, args = parse_settings(
        (RewardModelSettings, RewardConfig), argv, stage="reward_model", defaults=trainer_defaults()
    )
    run = train(settings, args)
    accuracy = json.loads((run / "report.json").read_text())["accuracy"]
    share, pairs = accuracy["mean"], accuracy["n"]
    print(f"reward_model: finished, held-out accuracy {share:.3f} on {pairs} pairs; {run / 'report.json'}")


if __name__ == "__main__":
    launched(main, "reward_model")
