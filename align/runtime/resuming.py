"""Going on from a checkpoint: which one, whether it is whole, and whether it belongs to the run that asks for it.

Every checkpoint holds `resume.json`: the settings that decide what is trained, digests of the rows trained on, and a
fingerprint of the start model. A run that differs in any of these is another run; it is refused, with the differences.
Settings that decide only when and where something is written (`FREE`) may differ.
"""

import dataclasses
import enum
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from plumbline.policy_models.loading import resolve_model_source

STAMP = "resume.json"
# Named by their digests instead: a file may lie elsewhere, or a folder have another name
SOURCES = {"train_file", "eval_file", "prompts_file", "model", "reward_model", "fluency_model", "reward_scaling"}
FREE = {
    *("output_dir", "resume", "resume_from_checkpoint", "run_name", "project", "trackio_space_id", "log_with"),
    *("keep_checkpoints", "eval_prompts", "eval_prompts_file", "eval_every", "gate", "gate_samples", "report_pairs"),
    *(
        "grader_model",
        "tokens_per_micro_batch",
        "gradient_checkpointing",
        "rollout_server",
        "report_to",
        "disable_tqdm",
    ),
    *(
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "batch_eval_metrics",
        "do_train",
        "do_eval",
        "do_predict",
    ),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "include_for_metrics", "local_rank"),
    *("skip_memory_metrics", "ignore_data_skip", "restore_callback_states_from_checkpoint", "prediction_loss_only"),
    *("activation_offloading", "include_num_input_tokens_seen", "dataset_num_proc", "batch_eval_metrics"),
}
FREE_STARTS = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "hub_",
    "push_to_hub",
    "dataloader_",
    "ddp_",
    "gradient_checkpointing",
)
# What the rate follows: another number moves the whole schedule
SCHEDULE = ("steps", "max_steps", "num_train_epochs")


def stamp(settings: Sequence[Any], *, data: Mapping[str, Any], models: Mapping[str, str | None]) -> dict[str, Any]:
    """What a run is, as plain JSON: its settings, the digest of each list of rows in `data`, of each model in `models`."""
    named: dict[str, Any] = {}
    for one in settings:
        named |= one.to_dict() if hasattr(one, "to_dict") else dataclasses.asdict(one)
    kept = {
        name: value
        for name, value in named.items()
        if name not in FREE and name not in SOURCES and not name.startswith(FREE_STARTS)
    }
    digests = {name: digest(rows) for name, rows in data.items()}
    digests |= {name: model_fingerprint(source) for name, source in models.items() if source}
    sources = {name: str(named.get(name)) for name in digests}
    plain = {"settings": kept, "sources": sources, "digests": digests}
    return json.loads(
        json.dumps(plain, default=lambda value: value.value if isinstance(value, enum.Enum) else str(value))
    )


def digest(rows: Any) -> str:
    """Of anything JSON holds."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def model_fingerprint(source: str) -> str:
    """Of a model's files: their names, sizes, first and last 64 KiB, which tells two trainings of one shape apart.

    Hub ids, whose files may not be here, stand for themselves.
    """
    folder = Path(source)
    if not (folder / "adapter_config.json").is_file():
        try:
            folder = Path(resolve_model_source(source))
        except ValueError:
            return source
    if not folder.is_dir():
        return source
    seen = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".bin") and f.is_file()):
        seen.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            seen.update(stream.read(2**16))
            stream.seek(max(0, file.stat().st_size - 2**16))
            seen.update(stream.read())
    return seen.hexdigest()[:16]


def differences(then: Mapping[str, Any], now: Mapping[str, Any], *, schedule: bool = True) -> list[str]:
    """One line a setting, file or model that is not what it was; `schedule` asks for the number of steps too."""
    found = []
    for name in sorted(then["settings"].keys() | now["settings"].keys()):
        if name in SCHEDULE and not schedule:
            continue
        if name not in then["settings"] or name not in now["settings"]:
            continue  # of another version, which had no such setting
        old, new = then["settings"][name], now["settings"][name]
        if old != new:
            why = " (its rate would jump: it follows the number of steps)" if name in SCHEDULE else ""
            found.append(f"{name}: {old} then, {new} now{why}")
    for name in sorted(then["digests"].keys() | now["digests"].keys()):
        if then["digests"].get(name) != now["digests"].get(name):
            old, new = then["sources"].get(name), now["sources"].get(name)
            what = "weights" if name in ("model", "reward_model", "fluency_model") else "rows"
            found.append(f"{name}: {old} then, {new} now" if old != new else f"{name}: {new} holds other {what} now")
    return found


def check_same_run(checkpoint: Path, now: Mapping[str, Any], *, schedule: bool = True) -> None:
    """ValueError that lists what differs between the run of a checkpoint and this one; says when nothing is known."""
    file = checkpoint / STAMP
    if not file.is_file():
        print(f"{checkpoint}: has no {STAMP}, so whether it belongs to these settings is not known")
        return
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        found = differences(then, now, schedule=schedule)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); resume from another checkpoint") from None
    if found:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(found)}. Resume with what it was made with, "
            "or start a new run in another output_dir"
        )


def planned_steps(checkpoint: Path) -> int | None:
    """How many steps the run of a checkpoint was to have; None where it does not say."""
    try:
        return int(json.loads((checkpoint / STAMP).read_text(encoding="utf-8"))["settings"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class StampCheckpoints(TrainerCallback):
    """Puts the stamp of the run into each checkpoint of a transformers Trainer."""

    def __init__(self, what: Mapping[str, Any]) -> None:
        self.text = json.dumps(what, indent=1, sort_keys=True) + "\n"

    def on_save(self, args, state, control, **_kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / STAMP).write_text(self.text, encoding="utf-8")


# Which checkpoint


def asked_checkpoint(stage: str, run: Path, resume: bool, named: Any) -> Path | None:
    """The checkpoint of a transformers Trainer that `resume`, or `resume_from_checkpoint`, asks for; None for none.

    `resume` (or "true") takes the newest whole one in `run`, and says which newer ones are not whole.

    Raises:
        ValueError: when there is none, or the named one does not exist or is not whole.
    """
    said = "" if named is None else str(named)
    if said.lower() in ("", "false", "none"):
        if not resume:
            return None
    elif said.lower() != "true":
        folder = Path(said)
        if not folder.is_dir():
            raise ValueError(f"resume_from_checkpoint={said}: no such folder; name a checkpoint-N folder of a run")
        if fault := trainer_fault(folder):
            raise ValueError(f"resume_from_checkpoint={said}: {fault}; name another checkpoint-N folder")
        return folder
    found = newest_whole(stage, run, "checkpoint", trainer_fault)
    if found is None:
        raise ValueError(
            f"resume: no checkpoint in {run}; leave it out to begin at the start, and set save_strategy: steps (and "
            "save_steps) so that a run leaves some"
        )
    return found


def newest_whole(stage: str, folder: Path, prefix: str, fault_of: Any) -> Path | None:
    """The newest `prefix-N` folder without a fault; says why newer ones are passed by. None where there are none.

    ValueError when there are some, and none is whole.
    """
    folders = numbered(folder, prefix)
    passed: list[str] = []
    for candidate in folders:
        fault = fault_of(candidate)
        if fault is None:
            if passed:
                print(f"{stage}: {'; '.join(passed)}: going on from {candidate.name}, the newest that is whole")
            return candidate
        passed.append(f"{candidate.name} is not whole ({fault})")
    if passed:
        raise ValueError(f"{folder}: {'; '.join(passed)}; no checkpoint to go on from: start anew")
    return None


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The folders `prefix-N`, newest first; others, such as `prefix-old`, are somebody's own."""
    found = [(re.fullmatch(rf"{prefix}-(\d+)", path.name), path) for path in folder.glob(f"{prefix}-*")]
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def trainer_fault(folder: Path) -> str | None:
    """What a Trainer's checkpoint lacks to be resumed to the bit; None for nothing."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no trainer_state.json"
    except (OSError, ValueError):
        return "trainer_state.json is cut off"
    for needed in ("optimizer.pt", "scheduler.pt"):
        if not (folder / needed).is_file() and not list(folder.glob("*optim*")):  # sharded runs have folders of them
            return f"it has no {needed}, as with save_only_model"
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*")]
    if not weights:
        return "it has no weights"
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" and (fault := safetensors_fault(file)):
            return fault
        if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
    return None


def safetensors_fault(file: Path) -> str | None:
    """What is wrong with a safetensors file; None for nothing."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError, ValueError):
        return f"{file.name} is cut off"
