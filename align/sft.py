"""Supervised fine-tuning on TRL's trainer.

Launch: `accelerate launch align/sft.py --config configs/sft/debug.yaml`

The loss is on the answers only; `assistant_only_loss` puts it on every turn of the assistant, and
`completion_only_loss: false` on prompts too. A row longer than `max_length` is left out, since an answer that is cut does
not end; `cut_answers` cuts it. `resume`, or `resume_from_checkpoint`, goes on from a checkpoint. With LoRA the adapter is
merged at the end, so that what the run leaves in `model/` is a plain model folder from which the later stages start: their
reference is then that model with adapters off.
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

from plumbline.align.data.encoding import Encoder, check_lengths, sft_rows
from plumbline.align.data.rows import read_sft
from plumbline.align.models.answer_head import score_answers_only
from plumbline.align.models.start import ModelSettings, load_start, save_merged
from plumbline.align.runtime.launch import launched, parse_settings, trainer_defaults
from plumbline.align.runtime.tracking import StopOnNonFinite
from plumbline.align.runtime.trainer_runs import ExactResume, TrainerRun
from plumbline.paths import STARTER
from plumbline.policy_models.chat import end_ids
from plumbline.policy_models.loading import load_tokenizer, model_summary, resolve_model_source
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.router import RouterBalance
from plumbline.rows import data_source, read_text


@dataclass(kw_only=True)
class SFTSettings(ModelSettings):
    """What SFT takes beside TRL's own SFTConfig."""

    train_file: str = field(
        default=str(STARTER / "sft.jsonl"),
        metadata={"help": "prompt and answer, messages, and so on: file, folder or hub id"},
    )
    eval_file: str | None = field(default=None, metadata={"help": "the same, held out"})
    cut_answers: bool = field(
        default=False,
        metadata={"help": "cut answers at max_length, without their end; false: leave such rows out"},
    )


class _Trainer(ExactResume, StopOnNonFinite, SFTTrainer):
    pass


def train(settings: SFTSettings, args: SFTConfig) -> Path:
    """Trains and returns the run folder; the model is in `model/`."""
    train_rows = read_sft(data_source(settings.train_file))
    eval_rows = read_sft(data_source(settings.eval_file)) if settings.eval_file else None
    settings.check_precision(args)
    check_lengths("sft", args)
    resolve_model_source(settings.model)
    tokenizer = load_tokenizer(settings.model)
    if args.chat_template_path is not None:
        tokenizer.chat_template = read_template(args.chat_template_path)
        args.chat_template_path = None  # or the trainer would read it once more
    encoded = encode_rows("sft", train_rows, tokenizer, settings, args)
    encoded_eval = encode_rows("sft: eval_file", eval_rows, tokenizer, settings, args) if eval_rows else None
    run = TrainerRun("sft", settings, args, folder=args.output_dir or "runs/sft", data={"train_file": encoded})
    with run.writing():
        model = load_start(settings.model, dtype=settings.weight_dtype, quantise=settings.quantise)
        trainer = _Trainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(encoded),
            eval_dataset=Dataset.from_list(encoded_eval) if encoded_eval else None,
            processing_class=tokenizer,
            peft_config=settings.lora_config(model),
            callbacks=[*run.callbacks(), RouterBalance()],
        )
        trained: Any = trainer.model
        score_answers_only(trained)
        split_expert_adapters(trained)
        print(f"sft: {model_summary(trained)}")
        run.train(trainer)
        save_merged(trainer, settings, run.folder, tokenizer)
    return run.folder


def encode_rows(
    what: str, rows: Sequence[dict[str, Any]], tokenizer: Any, settings: SFTSettings, args: SFTConfig
) -> list[dict[str, list[int]]]:
    """Rows of `read_sft` as the ids and labels that are trained on; says what is left out."""
    encoder = Encoder(what, tokenizer, end_ids=end_ids(settings.model, tokenizer), max_length=args.max_length)
    return sft_rows(
        rows,
        encoder,
        cut_answers=settings.cut_answers,
        completion_only=args.completion_only_loss is not False,
        every_turn=args.assistant_only_loss,
    )


def read_template(path: str) -> str:
    """A chat template from a file; ValueError for what is none."""
    if not Path(path).is_file():
        raise ValueError(f"chat_template_path={path!r}: no such file; name a Jinja file with a chat template")
    return read_text(path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    settings, args = parse_settings((SFTSettings, SFTConfig), argv, stage="sft", defaults=trainer_defaults())
    run = train(settings, args)
    print(f"sft: finished, the model is in {run / 'model'}")


if __name__ == "__main__":
    launched(main, "sft")
