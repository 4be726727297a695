"""Direct preference optimisation on TRL's trainer.

Launch: `accelerate launch align/dpo.py --config configs/dpo/debug.yaml`

Pairs longer than `max_length` and ties are left out, and counted. `resume`, or `resume_from_checkpoint`, goes on from a
checkpoint.

The offline baseline that PPO is compared with: the same pairs that train the reward model, the same start. With LoRA
the reference is the start with adapters off, and `model/` holds the adapter.
"""

import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from plumbline.align.data.encoding import Encoder, check_lengths, dpo_rows
from plumbline.align.data.formats import PreferencePair, read_training_pairs
from plumbline.align.data.rows import split_pairs
from plumbline.align.models.answer_head import score_answers_only
from plumbline.align.models.start import ModelSettings, load_start
from plumbline.align.runtime.launch import launched, parse_settings, replacing, trainer_defaults
from plumbline.align.runtime.tracking import StopOnNonFinite
from plumbline.align.runtime.trainer_runs import ExactResume, TrainerRun
from plumbline.paths import STARTER
from plumbline.policy_models.chat import end_ids
from plumbline.policy_models.loading import load_tokenizer, model_summary, resolve_model_source
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.router import RouterBalance
from plumbline.rows import data_source


@dataclass(kw_only=True)
class DPOSettings(ModelSettings):
    """What DPO takes beside TRL's own DPOConfig."""

    train_file: str = field(
        default=str(STARTER / "preferences.jsonl"),
        metadata={"help": "pairs in any form of align/data/formats.py: file, folder or hub id"},
    )
    holdout_every: int = field(default=5, metadata={"help": "one prompt in this many is held out; 0: none"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout_every < 0 or self.holdout_every == 1:
            raise ValueError(f"holdout_every={self.holdout_every}: must be 0 (none) or at least 2")


class _Trainer(ExactResume, StopOnNonFinite, DPOTrainer):
    def _prepare_dataset(self, dataset, *_args, **_kwargs):
        return dataset  # holds ids already, by plumbline.align.data.encoding, which says what it leaves out


def train(settings: DPOSettings, args: DPOConfig) -> Path:
    """Trains and returns the run folder; the policy (an adapter with LoRA) is in `model/`."""
    pairs = read_training_pairs(data_source(settings.train_file))
    train_pairs, held_out = split_pairs(without_ties(pairs), settings.holdout_every)
    if not train_pairs:
        raise ValueError(
            f"{settings.train_file}: {len(pairs)} pairs split into 0 for training and {len(held_out)} held out with "
            f"holdout_every={settings.holdout_every}; add pairs or change it"
        )
    settings.check_precision(args)
    check_lengths("dpo", args)
    resolve_model_source(settings.model)
    tokenizer = load_tokenizer(settings.model)
    ends = end_ids(settings.model, tokenizer)
    encoded = dpo_rows(train_pairs, Encoder("dpo", tokenizer, end_ids=ends, max_length=args.max_length))
    evaluated = None
    if held_out and args.eval_strategy != "no":
        evaluated = dpo_rows(held_out, Encoder("dpo: held out", tokenizer, end_ids=ends, max_length=args.max_length))
    run = TrainerRun("dpo", settings, args, folder=args.output_dir or "runs/dpo", data={"train_file": encoded})
    with run.writing():
        model = load_start(settings.model, dtype=settings.weight_dtype, quantise=settings.quantise)
        trainer = _Trainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(encoded),
            eval_dataset=Dataset.from_list(evaluated) if evaluated else None,
            processing_class=tokenizer,
            peft_config=settings.lora_config(model),
            callbacks=[*run.callbacks(), RouterBalance()],
        )
        trained: Any = trainer.model
        score_answers_only(trained)
        split_expert_adapters(trained)
        print(f"dpo: {model_summary(trained)}")
        run.train(trainer)
        with replacing(run.folder / "model") as folder:
            trainer.save_model(str(folder))
            tokenizer.save_pretrained(folder)
    return run.folder


def without_ties(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Pairs whose chosen answer won. DPO's loss is that of a win: a tie has none, and a share of votes is taken for one."""
    won = [pair for pair in pairs if pair.p_chosen > 0.5]
    if not won:
        raise ValueError(
            f"all {len(pairs)} pairs are ties (p_chosen 0.5): they rank nothing for DPO; the reward model can use them"
        )
    if len(won) < len(pairs):
        print(
            f"dpo: {len(pairs) - len(won)} of {len(pairs)} pairs are ties (p_chosen 0.5), which rank nothing: left out"
        )
    if soft := sum(pair.p_chosen < 1 for pair in won):
        print(
            f"dpo: {soft} pairs were preferred by a share of people (p_chosen below 1); DPO's loss takes each for a win"
        )
    return won


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    settings, args = parse_settings((DPOSettings, DPOConfig), argv, stage="dpo", defaults=trainer_defaults())
    run = train(settings, args)
    print(f"dpo: finished, the policy is in {run / 'model'}")


if __name__ == "__main__":
    launched(main, "dpo")
