"""The stages as a user meets them: bad input is refused before a model loads, and the debug configs run.

Each message is held to four parts: where (file and line), what stands there, the rule, the way out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from plumbline.align import dpo, ppo, reward_model, sft
from plumbline.align.data.rows import read_preferences, split_pairs
from plumbline.align.models.actors import Actors
from plumbline.align.ppo import PPOSettings
from plumbline.reward import CompositeReward

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo, "dpo": dpo}
DATA = {"sft": "--train_file", "reward_model": "--train_file", "ppo": "--prompts_file", "dpo": "--train_file"}
PAIRS = ["reward_model", "dpo"]


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """launch(stage, *flags): the stage's main on the tiny model, with loading weights forbidden."""

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", forbidden)

    def run(stage: str, *flags: str) -> None:
        own = [] if "--model" in flags else ["--model", "bundled:tiny-moe"]
        own += ["--output_dir", str(tmp_path / "run")]
        if stage == "ppo":
            own += ["--fluency_model", "bundled:tiny-llama"]
        STAGES[stage].main([*own, *flags])

    return run


def good_row(stage: str) -> dict[str, str]:
    return {
        "sft": {"prompt": "Say hi", "answer": "Hi"},
        "ppo": {"prompt": "Say hi"},
    }.get(stage, {"prompt": "Say hi", "chosen": "Hi", "rejected": "No"})


def written(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


# Data files


@pytest.mark.parametrize("stage", STAGES)
def test_missing_data_file(launch, stage):
    with pytest.raises(ValueError, match=r"nowhere/data\.jsonl: no such file; give a path, or leave the setting out"):
        launch(stage, DATA[stage], "nowhere/data.jsonl")


@pytest.mark.parametrize("stage", STAGES)
def test_malformed_json_line(launch, stage, tmp_path):
    file = written(tmp_path / "data.jsonl", json.dumps(good_row(stage)), "", '{"prompt": "cut o')
    with pytest.raises(ValueError, match=r"data\.jsonl:3: not valid JSON \(.+ at column \d+\); fix the line"):
        launch(stage, DATA[stage], file)


@pytest.mark.parametrize("stage", STAGES)
def test_empty_prompt(launch, stage, tmp_path):
    file = written(
        tmp_path / "data.jsonl", json.dumps(good_row(stage)), json.dumps(good_row(stage) | {"prompt": " \n"})
    )
    with pytest.raises(ValueError, match=r"data\.jsonl:2: prompt is empty; write a text or drop the row"):
        launch(stage, DATA[stage], file)


@pytest.mark.parametrize("stage", STAGES)
def test_row_without_a_prompt(launch, stage, tmp_path):
    row = good_row(stage)
    del row["prompt"]
    file = written(tmp_path / "data.jsonl", json.dumps(row | {"asked": "?"}))
    rule = r"data\.jsonl:1: (field 'prompt' is missing|none of the fields prompt, .*) \(found .*asked.*\)"
    with pytest.raises(ValueError, match=rule):
        launch(stage, DATA[stage], file)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "prompt, rule",
    [
        (7, r"prompt=7 must be a text or a list of messages with role and content"),
        ([], r"prompt=\[\] must be a text or a list of messages"),
        ([{"role": "user", "text": "x"}], r"message prompt\[0\]=.* needs a role and a content; its content is missing"),
        (
            [{"role": "assistant", "content": "x"}],
            r"prompt ends with role 'assistant'; .* must be 'user'",
        ),
    ],
)
def test_prompt_of_another_form(launch, stage, tmp_path, prompt, rule):
    file = written(tmp_path / "data.jsonl", json.dumps(good_row(stage) | {"prompt": prompt}))
    with pytest.raises(ValueError, match=r"data\.jsonl:1: " + rule):
        launch(stage, DATA[stage], file)


@pytest.mark.parametrize("stage", STAGES)
def test_file_without_rows(launch, stage, tmp_path):
    with pytest.raises(ValueError, match=r"data\.jsonl: the file has no rows; at least one is needed"):
        launch(stage, DATA[stage], written(tmp_path / "data.jsonl", ""))


@pytest.mark.parametrize("stage", STAGES)
def test_row_that_is_no_object(launch, stage, tmp_path):
    with pytest.raises(ValueError, match=r"data\.jsonl:1: an object is expected, found list"):
        launch(stage, DATA[stage], written(tmp_path / "data.jsonl", '["prompt"]'))


@pytest.mark.parametrize("stage", STAGES)
def test_file_that_is_not_utf8(launch, stage, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(good_row(stage)).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:2: not UTF-8 .*; save the file as UTF-8"):
        launch(stage, DATA[stage], str(file))


@pytest.mark.parametrize("stage", PAIRS)
def test_chosen_equal_to_rejected(launch, stage, tmp_path):
    row = json.dumps({"prompt": "Say hi", "chosen": "Hi", "rejected": "Hi "})
    file = written(tmp_path / "data.jsonl", json.dumps(good_row(stage)), row)
    with pytest.raises(
        ValueError, match=r"data\.jsonl:2: chosen and rejected are the same text; drop the pair or relabel it"
    ):
        launch(stage, DATA[stage], file)


@pytest.mark.parametrize("stage", PAIRS)
@pytest.mark.parametrize("margin", ["-1", '"big"', "NaN", "Infinity"])
def test_margin_that_is_no_margin(launch, stage, tmp_path, margin):
    row = '{"prompt": "Say hi", "chosen": "Hi", "rejected": "No", "margin": %s}' % margin  # noqa: UP031
    with pytest.raises(ValueError, match=r"data\.jsonl:1: (margin=.+ must be a|field 'margin' is .+; a) finite number"):
        launch(stage, DATA[stage], written(tmp_path / "data.jsonl", row))


@pytest.mark.parametrize("stage", PAIRS)
def test_too_few_pairs_to_split(launch, stage, tmp_path):
    file = written(tmp_path / "data.jsonl", json.dumps(good_row(stage)))
    flags = ["--holdout_every", "1" if stage == "dpo" else "99"]
    with pytest.raises(ValueError, match=r"holdout_every=(1|99)"):
        launch(stage, DATA[stage], file, *flags)


@pytest.mark.parametrize("stage", PAIRS)
def test_pairs_that_are_all_held_out(launch, stage, tmp_path):
    rows = [good_row(stage) | {"prompt": f"Say {n}"} for n in range(30)]
    everything = read_preferences(Path(written(tmp_path / "all.jsonl", *map(json.dumps, rows))))
    held_out = {pair.prompt[-1]["content"] for pair in split_pairs(everything, 2)[1]}
    file = written(tmp_path / "data.jsonl", *[json.dumps(row) for row in rows if row["prompt"] in held_out])
    with pytest.raises(ValueError, match=r"data\.jsonl: \d+ pairs .*0 for training .*holdout_every=2"):
        launch(stage, DATA[stage], file, "--holdout_every", "2")


def test_holdout_of_none_is_allowed_for_dpo(tmp_path):
    pairs = read_preferences(Path(written(tmp_path / "data.jsonl", json.dumps(good_row("dpo")))))
    assert split_pairs(pairs, 0) == (pairs, [])


def test_missing_data_file_is_found_before_a_bundled_model_is_built(launch, tmp_path, monkeypatch):
    """On a fresh machine, too: a typo does not cost the half minute that building the default models takes."""
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "empty"))
    for stage in STAGES:
        with pytest.raises(ValueError, match="no such file"):
            launch(stage, DATA[stage], "nowhere/data.jsonl")
    assert not (tmp_path / "empty").exists()


# Settings


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_setting_in_yaml(launch, stage, tmp_path):
    config = written(tmp_path / "mine.yaml", "# mine", "lora: true", "lora_alfa: 8")
    with pytest.raises(
        ValueError, match=r"mine\.yaml:3: unknown setting 'lora_alfa' \(value 8\); did you mean 'lora_alpha'\?"
    ):
        launch(stage, "--config", config)


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_setting_on_the_command_line(launch, stage):
    with pytest.raises(ValueError, match=r"command line: unknown setting '--lora_alfa'; did you mean 'lora_alpha'\?"):
        launch(stage, "--lora_alfa", "8")


@pytest.mark.parametrize("stage", STAGES)
def test_value_of_another_type_in_yaml(launch, stage, tmp_path):
    for line, rule in {
        "lora_r: 2.5": r"mine\.yaml:1: lora_r=2\.5: must be a whole number",
        "lora_r: many": r"mine\.yaml:1: lora_r='many': must be a whole number",
        "lora: 3": r"mine\.yaml:1: lora=3: must be true or false",
        "model: 5": r"mine\.yaml:1: model=5: must be a text",
        "lora_r: true": r"mine\.yaml:1: lora_r=True: must be a whole number",
    }.items():
        with pytest.raises(ValueError, match=rule):
            launch(stage, "--config", written(tmp_path / "mine.yaml", line))


@pytest.mark.parametrize("value", ["[1, 2]", ".nan", "wide", "null"])
def test_number_of_another_form_in_yaml(launch, tmp_path, value):
    with pytest.raises(ValueError, match=r"mine\.yaml:2: clip=.+: must be a (finite )?number"):
        launch("ppo", "--config", written(tmp_path / "mine.yaml", "steps: 1", f"clip: {value}"))


def test_number_without_a_dot_in_yaml_is_read(tmp_path):
    """YAML 1.1 takes 1e-3 for a text; the settings do not."""
    config = written(tmp_path / "mine.yaml", "policy_lr: 1e-3", "kl_target: null", "lora: no")
    (settings,) = ppo.parse_settings((PPOSettings,), ["--config", config])
    assert settings.policy_lr == 1e-3 and settings.kl_target is None and settings.lora is False


@pytest.mark.parametrize("stage", STAGES)
def test_settings_file_that_is_missing_or_no_mapping(launch, stage, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such settings file; give a path, or one that ships for "):
        launch(stage, "--config", "nowhere.yaml")
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such settings file"):
        launch(stage, "--config=nowhere.yaml")
    with pytest.raises(ValueError, match=r"list\.yaml:1: settings must be a mapping of names to values, found list"):
        launch(stage, "--config", written(tmp_path / "list.yaml", "- lora"))
    with pytest.raises(ValueError, match=r"(?s)broken\.yaml: not valid YAML: .*line 2"):
        launch(stage, "--config", written(tmp_path / "broken.yaml", "lora: true", "lora_r: [1"))
    with pytest.raises(ValueError, match=r"--config needs a path"):
        launch(stage, "--config")


CLASHES = [  # settings, what the message must say
    ({"rollouts_per_step": 10, "minibatches": 4}, r"rollouts_per_step=10 does not split into .*minibatches=4; make"),
    ({"tokens_per_micro_batch": 100}, r"tokens_per_micro_batch=100 is below .*max_prompt_tokens=256 .*raise the first"),
    ({"preference_weight": 1.0}, r"preference_weight=1\.0 but no reward_model: name its folder or set the weight to 0"),
    ({"lora": "false", "lora_experts": "true"}, r"lora_experts=true with lora=false: .*drop it"),
    ({"lora_r": 0}, r"lora_r=0: must be at least 1; use lora: false"),
    ({"temperature": 0}, r"temperature=0\.0: must be above 0"),
    ({"steps": 0}, r"steps=0: must be at least 1"),
    ({"save_every": -1}, r"save_every=-1: must be at least 0"),
    ({"keep_checkpoints": 0}, r"keep_checkpoints=0: must be at least 1"),
    ({"clip": 0}, r"clip=0\.0: must be above 0"),
    ({"gamma": 1.5}, r"gamma=1\.5: must be between 0 and 1"),
    ({"policy_lr": "nan"}, r"policy_lr=nan: must be at least 0"),
    ({"max_grad_norm": 0}, r"max_grad_norm=0\.0: must be above 0"),
    ({"critic": "none"}, r"critic='none': must be one of own, head"),
    ({"kl_estimator": "k9"}, r"kl_estimator='k9': must be one of k1, k2, k3"),
    ({"kl_horizon": 0}, r"kl_horizon=0\.0: must be above 0"),
    ({"dtype": "float8"}, r"dtype='float8': must be 'auto', 'bfloat16', 'float16' or 'float32'"),
]


@pytest.mark.parametrize("values, message", CLASHES, ids=["-".join(values) for values, _ in CLASHES])
def test_clashing_or_impossible_sizes(launch, values, message):
    with pytest.raises(ValueError, match=message):
        launch("ppo", *[piece for name, value in values.items() for piece in (f"--{name}", str(value))])


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
@pytest.mark.parametrize("dtype, bf16", [("float32", "true"), ("bfloat16", "false")])
def test_two_settings_of_the_precision_that_clash(launch, stage, dtype, bf16):
    with pytest.raises(ValueError, match=rf"(?i)dtype='{dtype}' and bf16={bf16} clash: set bf16: (true|false)"):
        launch(stage, "--dtype", dtype, "--bf16", bf16)


def test_prompts_that_are_all_too_long(launch, tmp_path):
    file = written(tmp_path / "data.jsonl", json.dumps({"prompt": "x" * 300}))
    with pytest.raises(ValueError, match=r"max_prompt_tokens=100: all 1 prompts are longer; raise the limit"):
        launch("ppo", "--prompts_file", file, "--max_prompt_tokens", "100")


# Models


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "source, message",
    [
        ("./no/such/folder", r"model '\./no/such/folder': no such folder, and not a hub id .*bundled:tiny-moe"),
        ("bundled:gpt5", r"model 'bundled:gpt5' is unknown; the bundled ones are .*bundled:tiny-moe"),
        ("nobody/no-such-model", r"model 'nobody/no-such-model': .*neither cached nor reachable.*HF_HUB_OFFLINE"),
    ],
)
def test_model_that_cannot_be_had(launch, stage, source, message):
    with pytest.raises(ValueError, match=message):
        launch(stage, "--model", source)


@pytest.mark.parametrize("stage", STAGES)
def test_model_folder_without_a_model(launch, stage, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model folder '.*empty' has no config\.json; name a folder written by"):
        launch(stage, "--model", str(tmp_path / "empty"))


def test_fluency_model_that_cannot_be_had(launch):
    with pytest.raises(ValueError, match=r"model 'nobody/no-such-model'"):
        launch("ppo", "--fluency_model", "nobody/no-such-model")


def test_reward_model_that_cannot_be_had(launch):
    with pytest.raises(ValueError, match=r"nowhere/rm"):
        launch("ppo", "--reward_model", "nowhere/rm", "--preference_weight", "1")


# A loss that is not finite


@pytest.fixture
def tiny_run(tmp_path):
    prompts = written(tmp_path / "prompts.jsonl", *[json.dumps({"prompt": text}) for text in ("Hi", "Why?", "Go on")])
    return PPOSettings(
        model="bundled:tiny-llama",
        output_dir=str(tmp_path / "run"),
        prompts_file=prompts,
        dtype="float32",
        lora_r=2,
        steps=3,
        rollouts_per_step=4,
        minibatches=1,
        ppo_epochs=1,
        scaling_prompts=3,
        max_prompt_tokens=100,
        max_new_tokens=4,
        save_every=1,
    )


class _Vowels:
    name = "vowels"

    def __call__(self, prompts, answers):
        return [float(sum(c in "aeiou" for c in answer)) for answer in answers]


def test_ppo_stops_on_a_loss_that_is_not_finite_and_keeps_the_batch(tiny_run, monkeypatch, tmp_path):
    """A weight of the critic turns NaN in the second step: the run stops, with step 1 saved and the batch kept."""
    real, calls = Actors.values, []

    def values(self, packed, states=None):
        calls.append(None)
        if len(calls) == 3:  # the first micro-batch of the second rollout
            with torch.no_grad():
                self.value_head.out.bias.fill_(float("nan"))
        return real(self, packed, states)

    monkeypatch.setattr(Actors, "values", values)
    with pytest.raises(FloatingPointError, match=r"gradient norm.* is nan: the run stops here\. The batch is in"):
        ppo.train(tiny_run, reward=CompositeReward([(_Vowels(), 1.0)]))
    kept = torch.load(tmp_path / "run" / "non_finite_batch.pt", weights_only=True)
    assert len(kept["prompt_ids"]) == 4 and kept["answer_ids"].shape[0] == 4
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model"])
def test_trl_stages_stop_on_a_loss_that_is_not_finite_and_keep_the_batch(stage, monkeypatch, tmp_path):
    module = STAGES[stage]
    build = module._Trainer.__init__

    def poisoned(self, *args, **kwargs):
        build(self, *args, **kwargs)
        with torch.no_grad():
            next(p for p in self.model.parameters() if p.requires_grad).fill_(float("nan"))

    monkeypatch.setattr(module._Trainer, "__init__", poisoned)
    rows = [json.dumps(good_row(stage) | {"prompt": f"Say hi {n}"}) for n in range(8)]
    flags = [
        "--model",
        "bundled:tiny-llama",
        "--output_dir",
        str(tmp_path / "run"),
        "--dtype",
        "float32",
        "--bf16",
        "false",
    ]
    flags += ["--train_file", written(tmp_path / "data.jsonl", *rows), "--max_steps", "2"]
    flags += [] if stage == "sft" else ["--holdout_every", "2"]
    with pytest.raises(FloatingPointError, match=r"training loss is nan: the run stops here\. The batch is in"):
        module.main(flags)
    kept = torch.load(tmp_path / "run" / "non_finite_batch.pt", weights_only=True)
    assert any("input_ids" in name for name in kept)
    assert not (tmp_path / "run" / "model").exists()


# Each stage as a user launches it


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_debug_config_launched_by_path(stage, tmp_path):
    """`accelerate launch` on the debug config, from another folder: every promised file is there."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(REPOSITORY / "align" / f"{stage}.py"), "--config", f"{REPOSITORY}/configs/{stage}/debug.yaml"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{stage}: finished" in done.stdout
    run = tmp_path / "run"
    weights = "adapter_model.safetensors" if stage in ("ppo", "dpo") else "model.safetensors"
    assert (run / "model" / weights).stat().st_size > 0
    assert (run / "model" / "tokenizer.json").is_file()
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    assert settings["model"] == "bundled:tiny-moe" and settings["output_dir"] == str(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 3
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    if stage == "ppo":
        assert {"reward/safety_raw_mean", "reward/toxicity_weighted_mean", "objective/kl", "lr"} <= rows[0].keys()
        assert "eval/reward_mean" in rows[0] and "eval/reward_mean" in rows[-1]
        assert (run / "samples" / "step-000000.jsonl").is_file() and (run / "scaling.json").is_file()
        assert (run / "checkpoints" / "step-000003" / "rank-0.pt").is_file()
    if stage == "reward_model":
        assert 0 <= json.loads((run / "report.json").read_text())["accuracy"]["mean"] <= 1
