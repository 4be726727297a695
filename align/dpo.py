"""Direct preference optimisation on TRL's trainer.

Launch: `accelerate launch align/dpo.py --config configs/dpo/debug.yaml`

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

from plumbline.align.data.rows import read_preferences, split_pairs
from plumbline.align.models.answer_head import score_answers_only
from plumbline.align.models.start import ModelSettings, load_start
from plumbline.align.runtime.launch import open_run, parse_settings, trainer_defaults
from plumbline.align.runtime.tracking import MetricsCallback, StopOnNonFinite
from plumbline.paths import STARTER, resolve_path
from plumbline.policy_models.loading import load_tokenizer, model_summary, resolve_model_source
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.router import RouterBalance


@dataclass(kw_only=True)
class DPOSettings(ModelSettings):
    """What DPO takes beside TRL's own DPOConfig."""

    train_file: str = field(
        default=str(STARTER / "preferences.jsonl"), metadata={"help": "JSON Lines: prompt, chosen, rejected"}
    )
    holdout_every: int = field(default=5, metadata={"help": "one prompt in this many is held out; 0: none"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout_every < 0 or self.holdout_every == 1:
            raise ValueError(f"holdout_every={self.holdout_every}: must be 0 (none) or at least 2")


class _Trainer(StopOnNonFinite, DPOTrainer):
    pass


def train(settings: DPOSettings, args: DPOConfig) -> Path:
    """Trains and returns the run folder; the policy (an adapter with LoRA) is in `model/`."""
    pairs = read_preferences(resolve_path(settings.train_file))
    train_pairs, held_out = split_pairs(pairs, settings.holdout_every)
    if not train_pairs:
        raise ValueError(
            f"{settings.train_file}: {len(pairs)} pairs split into 0 for training and {len(held_out)} held out with "
            f"holdout_every={settings.holdout_every}; add pairs or change it"
        )
    settings.check_precision(args)
    resolve_model_source(settings.model)
    run = open_run(args.output_dir or "runs/dpo", settings, args)
    tokenizer = load_tokenizer(settings.model)
    model = load_start(settings.model, dtype=settings.weight_dtype, quantise=settings.quantise)

    def dataset(chosen_pairs):
        return Dataset.from_list(
            [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in chosen_pairs]
        )

    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=dataset(train_pairs),
        eval_dataset=dataset(held_out) if held_out and args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=settings.lora_config(model),
        callbacks=[MetricsCallback(run), RouterBalance()],
    )
    trained: Any = trainer.model
    score_answers_only(trained)
    split_expert_adapters(trained)
    print(f"dpo: {model_summary(trained)}")
    trainer.train()
    trainer.save_model(str(run / "model"))
    tokenizer.save_pretrained(run / "model")
    return run


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    settings, args = parse_settings((DPOSettings, DPOConfig), argv, stage="dpo", defaults=trainer_defaults())
    run = train(settings, args)
    print(f"dpo: finished, the policy is in {run / 'model'}")


if __name__ == "__main__":
    main()
