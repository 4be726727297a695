"""Tiny models, toy rewards and one PPO step at a time, for the checklist tests of this folder.

Fixtures that return a function build what a test asks for; models are written once a session.
"""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from plumbline.align.ppo import PPO, PPOSettings
from plumbline.align.rl.evaluation import fit_scaling
from plumbline.align.rl.rollouts import RolloutBatch
from plumbline.align.runtime.tracking import Metrics
from plumbline.policy_models import MoEPolicyConfig
from plumbline.policy_models.loading import load_tokenizer
from plumbline.reward import CompositeReward, Reward

VOCABULARY = 259  # the byte tokenizer of the bundled tiny models: pad 0, bos 1, eos 2, then the bytes
# A random model ends an answer once in 259 tokens; with 60 stop tokens, answers have lengths from 1 to the limit.
STOP_IDS = [2, *range(200, VOCABULARY)]
PROMPTS = [
    "Hi",
    "Name a tree.",
    "What is 2 + 2?",
    "Sing!",
    "Tell me about rice and beans",
    "Why?",
    "Go on",
    "A long day",
]

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.25,  # large: answers differ, and a wrong position or mask shows in every logit
    **_SPECIAL,
}
CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.25, **_SPECIAL
    ),
    "llama": lambda: LlamaConfig(**_ROTARY),
    "qwen2": lambda: Qwen2Config(**_ROTARY),
    "mixtral": lambda: MixtralConfig(**_ROTARY, num_local_experts=4, num_experts_per_tok=2),
    "moe": lambda: MoEPolicyConfig(**_ROTARY, num_experts=4, num_experts_per_tok=2, moe_layers=[1]),
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """Share of the answer's characters that are among `letters`, times `scale`; None where `skip` says so."""

    letters: str = "abcdefghijklmnopqrstuvwxyz "
    name: str = "share"
    scale: float = 1.0
    skip: frozenset[int] = field(default_factory=frozenset)  # rows without an opinion

    def __call__(self, prompts, answers):
        return [
            None if row in self.skip else self.scale * sum(c in self.letters for c in text) / max(len(text), 1)
            for row, text in enumerate(answers)
        ]


@dataclass(frozen=True, kw_only=True)
class Length:
    """Characters of the answer."""

    name: str = "length"

    def __call__(self, prompts, answers):
        return [float(len(text)) for text in answers]


@pytest.fixture
def share():
    """The class of a toy component in [0, 1]."""
    return Share


@pytest.fixture
def length():
    """The class of a toy component with a large unit."""
    return Length


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name -> model folder: gpt2 (learned positions), llama and qwen2 (rotary), mixtral and moe (experts, rotary)."""
    folders: dict[str, str] = {}

    def build(name: str) -> str:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
            model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=STOP_IDS)
            model.save_pretrained(folder)
            load_tokenizer("bundled:tiny-llama").save_pretrained(folder)
            folders[name] = str(folder)
        return folders[name]

    return build


@pytest.fixture
def prompts_file(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), encoding="utf-8")
    return str(path)


@pytest.fixture
def settings(tiny, tmp_path, prompts_file):
    """PPOSettings of a small fp32 run on `model` ("llama" unless named), every value open to a keyword."""

    def make(model: str = "llama", **overrides) -> PPOSettings:
        values = {
            "output_dir": str(tmp_path / "run"),
            "prompts_file": prompts_file,
            "dtype": "float32",
            "lora_r": 4,
            "steps": 2,
            "rollouts_per_step": 8,
            "minibatches": 1,
            "ppo_epochs": 1,
            "max_prompt_tokens": 120,
            "max_new_tokens": 6,
            "scaling_prompts": 8,
            "missing_eos_penalty": 0.0,
            "policy_lr": 1e-2,
            "critic_lr": 1e-2,
        }
        return PPOSettings(model=tiny(model), **(values | overrides))

    return make


@dataclass
class Rank:
    """What PPO reads of an Accelerator, for one rank of a world that lives in threads of this process."""

    process_index: int = 0
    num_processes: int = 1
    world: "World | None" = None

    device = torch.device("cpu")
    distributed_type = DistributedType.NO

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def reduce(self, totals, reduction):
        assert reduction == "sum"
        return totals if self.world is None else self.world.add_up(self.process_index, totals)


class World:
    """`size` ranks as threads; `add_up` is the all_reduce between them, in the order of ranks."""

    def __init__(self, size: int) -> None:
        self.ranks = [Rank(rank, size, self) for rank in range(size)]
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: list = [None] * size

    def add_up(self, rank: int, totals: torch.Tensor) -> torch.Tensor:
        self._given[rank] = totals.clone()
        self._barrier.wait()
        total = torch.stack(self._given).sum(dim=0)
        self._barrier.wait()
        return total

    def run(self, work) -> list:
        """[work(rank) for each rank], at the same time; the first error of any rank is raised."""
        results: list = [None] * len(self.ranks)
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


@pytest.fixture
def world():
    """world(2).run(lambda rank: ...): simulated ranks with a working all_reduce."""
    return World


@pytest.fixture
def make_ppo(settings, tmp_path):
    """make_ppo(model, components=[(component, weight), ...], **settings) -> PPO with a fitted reward.

    `perturb` adds noise to every trained parameter, so that policy, reference and critic differ.
    """

    def make(model: str = "llama", *, components=None, rank=None, perturb: float = 0.0, fit: bool = False, **overrides):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        reward = CompositeReward(components or [(Share(), 1.0)])
        ppo = PPO(settings(model, **overrides), rank or Rank(), run, reward)
        if fit:
            fit_scaling(ppo)
        if perturb:
            noise = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in [*ppo.groups[0], *ppo.groups[1]]:
                    parameter += perturb * torch.randn(parameter.shape, generator=noise)
        return ppo

    return make


@pytest.fixture
def one_step(tmp_path):
    """one_step(ppo, step) does what the loop of train does between two checkpoints, and keeps the parts."""

    def run(ppo: PPO, step: int = 0) -> SimpleNamespace:
        batch, scored = ppo.rollout(ppo.prompts_of_step(step), Metrics(tmp_path, enabled=False))
        keep, advantage, returns, measured = ppo.advantages(batch, scored)
        updated = ppo.update(step, batch, keep, advantage, returns)
        return SimpleNamespace(
            batch=batch,
            scored=scored,
            keep=keep,
            advantage=advantage,
            returns=returns,
            measured=measured,
            updated=updated,
        )

    return run


@pytest.fixture
def rolled_out(tmp_path):
    """rolled_out(ppo) -> (batch, reward) of the first step."""
    return lambda ppo, step=0: ppo.rollout(ppo.prompts_of_step(step), Metrics(tmp_path, enabled=False))


@pytest.fixture
def score_of():
    """A Reward with the given totals and nothing else in it."""
    from plumbline.reward import Parts

    return lambda totals: Reward(
        total=list(totals), parts=Parts(raw={}, scaled={}, weighted={}), why=[None] * len(totals)
    )


@pytest.fixture
def take_rows():
    """take_rows(batch, rows) -> the same rollout with only those rows, widths unchanged."""

    def take(batch: RolloutBatch, rows: list[int]) -> RolloutBatch:
        def cut(value):
            if value is None:
                return None
            return value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]

        return RolloutBatch(**{name: cut(getattr(batch, name)) for name in RolloutBatch.__dataclass_fields__})

    return take


@pytest.fixture
def read_metrics():
    """Rows of metrics.jsonl of a run folder."""
    return lambda run: [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def policy_tensors():
    """Copies of everything trained, by name: flat dict over the parts of Actors.state_dict()."""

    def copy(ppo: PPO) -> dict[str, torch.Tensor]:
        return {
            f"{part}.{name}": tensor.clone()
            for part, tensors in ppo.actors.state_dict().items()
            for name, tensor in tensors.items()
        }

    return copy
