"""Supervised fine-tuning on TRL's trainer.

Launch: `accelerate launch align/sft.py --config configs/sft/debug.yaml`

The loss is on the answers only. With LoRA the adapter is merged at the end, so that what the run leaves in `model/` is
a plain model folder from which the later stages start: their reference is then that model with adapters off.
"""

import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from plumbline.align.data.rows import read_sft
from plumbline.align.models.answer_head import score_answers_only
from plumbline.align.models.start import ModelSettings, load_start, save_merged
from plumbline.align.runtime.launch import open_run, parse_settings, trainer_defaults
from plumbline.align.runtime.tracking import MetricsCallback, StopOnNonFinite
from plumbline.paths import STARTER, resolve_path
from plumbline.policy_models.loading import load_tokenizer, model_summary, resolve_model_source
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.router import RouterBalance


@dataclass(kw_only=True)
class SFTSettings(ModelSettings):
    """What SFT takes beside TRL's own SFTConfig."""

    train_file: str = field(
        default=str(STARTER / "sft.jsonl"), metadata={"help": "JSON Lines: prompt and answer, or messages"}
    )
    eval_file: str | None = field(default=None, metadata={"help": "the same, held out"})


class _Trainer(StopOnNonFinite, SFTTrainer):
    pass


def train(settings: SFTSettings, args: SFTConfig) -> Path:
    """Trains and returns the run folder; the model is in `model/`."""
    train_rows = read_sft(resolve_path(settings.train_file))
    eval_rows = read_sft(resolve_path(settings.eval_file)) if settings.eval_file else None
    settings.check_precision(args)
    resolve_model_source(settings.model)
    run = open_run(args.output_dir or "runs/sft", settings, args)
    tokenizer = load_tokenizer(settings.model)
    model = load_start(settings.model, dtype=settings.weight_dtype, quantise=settings.quantise)
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=settings.lora_config(model),
        callbacks=[MetricsCallback(run), RouterBalance()],
    )
    trained: Any = trainer.model
    score_answers_only(trained)
    split_expert_adapters(trained)
    print(f"sft: {model_summary(trained)}")
    trainer.train()
    save_merged(trainer, settings, run, tokenizer)
    return run


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    settings, args = parse_settings((SFTSettings, SFTConfig), argv, stage="sft", defaults=trainer_defaults())
    run = train(settings, args)
    print(f"sft: finished, the model is in {run / 'model'}")


if __name__ == "__main__":
    main()
