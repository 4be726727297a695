"""PPO with layers sharded over two gloo processes: the same run as with whole models, resumed to the bit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from plumbline.align.parallel.sharding import asks_for_shards, mesh_of
from plumbline.align.rl.inputs import check_sharding

REPOSITORY = Path(__file__).resolve().parents[3]

# Trains as a user's script would; notes how many micro-batches each rank had, and what share of the layers it held.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from plumbline.align import ppo
from plumbline.align.runtime.launch import parse_settings
from plumbline.align.parallel.sharding import is_shard
from plumbline.policy_models.rollout import generation
from plumbline.reward import CompositeReward

class Share:
    name = "share"
    def __call__(self, prompts, answers):
        return [sum(c.islower() for c in a) / max(len(a), 1) for a in answers]

noted = {"packs": [], "slow": []}
class PPO(ppo.PPO):
    def fill_up(self, packs):
        noted["packs"].append(len(packs))
        filled = super().fill_up(packs)
        noted["held"] = [(p.to_local() if is_shard(p) else p).numel() for p in self.actors.lm.base_model.layers.parameters()]
        noted["of"] = [p.numel() for p in self.actors.lm.base_model.layers.parameters()]
        return filled
ppo.PPO = PPO
generation._tell_once = noted["slow"].append

(settings,) = parse_settings((ppo.PPOSettings,))
ppo.train(settings, reward=CompositeReward([(Share(), 1.0)]))
Path(settings.output_dir, f"noted-{os.environ['RANK']}.json").write_text(json.dumps(noted))
"""


def launch(folder: Path, values: dict, *, sharded: bool) -> list[dict]:
    """Two processes; what each of them noted."""
    (folder / "train.py").write_text(SCRIPT)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    flags = [piece for name, value in values.items() for piece in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if sharded:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    done = subprocess.run(
        [*command, str(folder / "train.py"), *flags],
        env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((Path(values["output_dir"]) / f"noted-{rank}.json").read_text()) for rank in (0, 1)]


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "moe"])
def test_F11_sharded_layers_learn_what_whole_models_learn_and_resume_to_the_bit(model, tiny, tmp_path, prompts_file):
    values = {
        "model": tiny(model), "prompts_file": prompts_file, "eval_prompts_file": prompts_file, "lora": "false",
        "dtype": "float32", "steps": 3, "rollouts_per_step": 8, "minibatches": 1, "ppo_epochs": 2, "save_every": 1,
        "max_prompt_tokens": 120, "max_new_tokens": 24, "tokens_per_micro_batch": 144, "scaling_prompts": 8,
        "fluency_weight": 0, "policy_lr": 1e-3, "keep_checkpoints": 3, "gradient_checkpointing": "true",
    }  # fmt: skip
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    launch(tmp_path, values | {"output_dir": whole}, sharded=False)
    noted = launch(tmp_path, values | {"output_dir": shards}, sharded=True)
    assert noted[0]["packs"] != noted[1]["packs"]  # so that a collective inside a forward would have hung
    assert not noted[0]["slow"] and not noted[1]["slow"]  # answers came from the rollout engine
    assert all(sum(rank["held"]) < 0.6 * sum(rank["of"]) for rank in noted)
    expected, found = (metrics(run) for run in (whole, shards))
    assert len(expected) == len(found) == 4
    for row, other in zip(expected, found, strict=True):
        numbers = {name for name, value in row.items() if isinstance(value, float)}
        assert {n: other[n] for n in numbers} == pytest.approx({n: row[n] for n in numbers}, rel=1e-3, abs=1e-5)
    weights, same = (load_file(run / "model" / "model.safetensors") for run in (whole, shards))
    start = load_file(Path(tiny(model)) / "model.safetensors")
    assert weights.keys() == same.keys()
    assert all(torch.allclose(weights[name], same[name], atol=2e-6) for name in weights)
    assert not torch.allclose(
        start["model.layers.0.mlp.up_proj.weight"], same["model.layers.0.mlp.up_proj.weight"], atol=1e-4
    )

    shutil.copytree(shards, tmp_path / "resumed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-00000{step}")
    launch(tmp_path, values | {"output_dir": tmp_path / "resumed", "resume": "true"}, sharded=True)
    resumed = load_file(tmp_path / "resumed" / "model" / "model.safetensors")
    assert all(torch.equal(same[name], resumed[name]) for name in same)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"lora": True}, "lora=true"),
        ({"lora": False, "optimizer": "adamw_8bit"}, "adamw_8bit"),
        ({"lora": False, "gradient_rank": 4}, "gradient_rank=4"),
        ({"lora": False, "adaptive_clip": 0.1}, "adaptive_clip=0.1"),
        ({"lora": False, "dtype": "float16"}, "float16"),
    ],
)
def test_what_shards_do_not_take_is_refused(values, why, settings):
    with pytest.raises(ValueError, match=why):
        check_sharding(settings(**values))


@pytest.mark.parametrize(
    ("kind", "version"),
    [(DistributedType.DEEPSPEED, "2"), (DistributedType.FSDP, "1"), (DistributedType.MULTI_CPU, "1")],
)
def test_deepspeed_and_fsdp1_are_refused(kind, version, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match=r"fsdp2\.yaml"):
        asks_for_shards(SimpleNamespace(distributed_type=kind))


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_nothing_is_sharded_unasked(kind, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert mesh_of(SimpleNamespace(distributed_type=kind)) is None
