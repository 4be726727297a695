"""Going on from a checkpoint in the stages on a Trainer: to the bit, refused with the differences, the newest whole one."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from transformers import TrainingArguments
from trl import DPOConfig, RewardConfig, SFTConfig

from plumbline.align import dpo, reward_model, sft
from plumbline.align.runtime import launch
from plumbline.align.runtime.launch import claim_run, open_run, parse_settings, replacing, trainer_defaults
from plumbline.align.runtime.resuming import (
    STAMP,
    asked_checkpoint,
    check_same_run,
    differences,
    numbered,
    stamp,
    trainer_fault,
)

STAGES = {
    "sft": (sft, sft.SFTSettings, SFTConfig, ["--lora", "false"]),  # a MoE policy, whose experts are saved one by one
    "dpo": (dpo, dpo.DPOSettings, DPOConfig, ["--holdout_every", "0"]),
    "reward_model": (reward_model, reward_model.RewardModelSettings, RewardConfig, ["--lora_experts", "true"]),
}
WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sft_rows = [{"prompt": f"Say {w}.", "answer": f"{w}!"} for w in WORDS]
    pairs = [{"prompt": f"Say {w}.", "chosen": f"{w}!", "rejected": "No."} for w in WORDS]
    for name, rows in (("sft", sft_rows), ("dpo", pairs), ("reward_model", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(stage, data, folder, *more, steps=4):
    module, settings_class, config_class, extra = STAGES[stage]
    flags = [
        *("--model", "bundled:tiny-moe", "--train_file", str(data / f"{stage}.jsonl"), "--output_dir", str(folder)),
        *("--dtype", "float32", "--bf16", "false", "--use_cpu", "true", "--lora_r", "2", "--learning_rate", "1e-3"),
        *(
            "--per_device_train_batch_size",
            "2",
            "--save_strategy",
            "steps",
            "--save_steps",
            "2",
            "--logging_steps",
            "1",
        ),
        *("--max_steps", str(steps), *extra, *more),
    ]
    return module.train(*parse_settings((settings_class, config_class), flags, defaults=trainer_defaults()))


def weights(folder):
    return {k: v for file in sorted((folder / "model").glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(stage, data, tmp_path, capsys):
    whole = run(stage, data, tmp_path / "whole")
    broken = shutil.copytree(whole, tmp_path / "broken")
    shutil.rmtree(broken / "checkpoint-4")
    shutil.rmtree(broken / "model")
    (broken / "checkpoint-old").mkdir()  # somebody's own
    run(stage, data, broken, "--resume", "true")
    assert "going on from" in capsys.readouterr().out
    want, got = weights(whole), weights(broken)
    assert want.keys() == got.keys() and all(tensor.equal(got[name]) for name, tensor in want.items())
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, broken)]
    assert [[row["loss"] for row in log if "loss" in row] for log in logs][0] == [
        row["loss"] for row in logs[1] if "loss" in row
    ]
    # by TRL's own flag, into another folder; and with a newest checkpoint that is cut off
    other = run(stage, data, tmp_path / "other", "--resume_from_checkpoint", str(whole / "checkpoint-2"))
    assert all(tensor.equal(weights(other)[name]) for name, tensor in want.items())
    file = whole / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-40])
    run(stage, data, whole, "--resume", "true")
    assert "checkpoint-4 is not whole (optimizer.pt is cut off): going on from checkpoint-2" in capsys.readouterr().out
    assert all(tensor.equal(weights(whole)[name]) for name, tensor in want.items())
    # another run's checkpoint
    rows = (data / f"{stage}.jsonl").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{stage}.jsonl").write_text(rows.replace("Say ten.", "Say eleven."))
    with pytest.raises(ValueError, match=r"train_file: .*/data0?/.* then, .*/data/.* now"):
        run(stage, tmp_path / "data", whole, "--resume", "true")
    flags = ["--seed", "5", "--learning_rate", "1e-2", "--lora_alpha", "8"]
    rule = r"belongs to another run: learning_rate: 0\.001 then, 0\.01 now; lora_alpha: 32 then, 8 now; seed: 42 then, 5 now"
    with pytest.raises(ValueError, match=rule):
        run(stage, data, whole, "--resume", "true", *flags)
    with pytest.raises(ValueError, match=r"max_steps: 4 then, 8 now \(its rate would jump"):
        run(stage, data, whole, "--resume", "true", steps=8)


def test_resuming_what_is_not_there_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"resume: no checkpoint in .*; leave it out to begin at the start"):
        run("sft", data, tmp_path / "none", "--resume", "true")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*nowhere: no such folder"):
        run("sft", data, tmp_path / "none", "--resume_from_checkpoint", str(tmp_path / "nowhere"))
    assert not (tmp_path / "none").exists()  # nothing was begun


def test_a_mixture_that_follows_losses_is_not_resumed(data, tmp_path):
    with pytest.raises(ValueError, match=r"mix_by_loss=0\.5: .* cannot go on from a checkpoint"):
        run("reward_model", data, tmp_path / "r", "--mix_by_loss", "0.5", "--resume", "true")


def test_asked_checkpoint_reads_both_flags(tmp_path):
    assert asked_checkpoint("sft", tmp_path, False, None) is None
    assert asked_checkpoint("sft", tmp_path, False, "false") is None
    with pytest.raises(ValueError, match="no checkpoint in"):
        asked_checkpoint("sft", tmp_path, False, "True")
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-1.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [folder.name for folder in numbered(tmp_path, "checkpoint")] == ["checkpoint-10", "checkpoint-9"]
    with pytest.raises(ValueError, match=r"checkpoint-10 is not whole \(it has no trainer_state.json\); checkpoint-9"):
        asked_checkpoint("sft", tmp_path, True, None)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert trainer_fault(tmp_path / "checkpoint-10") == "trainer_state.json is cut off"


def test_what_tells_one_run_from_another(tmp_path):
    args = TrainingArguments(output_dir="a", use_cpu=True)
    moved = TrainingArguments(output_dir="b", use_cpu=True, logging_steps=7, save_steps=3)
    one, same = (stamp([a], data={"rows": [1, 2]}, models={"model": "bundled:tiny-moe"}) for a in (args, moved))
    assert differences(one, same) == []
    other = stamp([args], data={"rows": [1, 3]}, models={"model": "bundled:tiny-llama"})
    assert len(differences(one, other)) == 2
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    check_same_run(folder, one)  # of an older version: says so
    (folder / STAMP).write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        check_same_run(folder, one)


# The folder of a run


def test_a_second_run_is_kept_out_of_the_folder(tmp_path):
    lock = claim_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: process \d+ is writing to this folder; name another output_dir"):
        claim_run(tmp_path / "run")
    lock.close()
    claim_run(tmp_path / "run").close()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        ValueError, match=r"cannot be written to \((Not a directory|File exists).*; give another output_dir"
    ):
        open_run(tmp_path / "file" / "run")


def test_a_full_disk_while_saving_leaves_no_half_checkpoint(data, tmp_path, monkeypatch):
    import errno

    import transformers.trainer

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.trainer.torch, "save", full)
    with pytest.raises(
        ValueError, match=r"cannot be written to \(No space left on device, \d+ MiB free\); what was saved"
    ):
        run("sft", data, tmp_path / "run", steps=2)
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "model").exists()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "model") as folder:
        (folder / "new").write_text("half")
        raise RuntimeError
    assert [f.name for f in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "old").is_file()
    with replacing(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert [f.name for f in (tmp_path / "model").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_faults_of_the_disk_are_told_from_others(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), launch.disk_faults(tmp_path):
        raise RuntimeError("something else")
    with pytest.raises(ValueError, match="cannot be written to"), launch.disk_faults(tmp_path):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0") from error
