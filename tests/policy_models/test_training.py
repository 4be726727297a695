"""The policy in the hands of PEFT and TRL: adapters attach where they should, trainers take it as it is."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from plumbline.policy_models import load_policy, load_scalar_model, load_tokenizer

SOURCE = "bundled:tiny-moe"
IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(5))
RANK = 4


def adapted(**options):
    config = LoraConfig(r=RANK, lora_dropout=0.0, task_type=TaskType.CAUSAL_LM, **options)
    return get_peft_model(load_policy(SOURCE), config)


def trainable(model):
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def test_lora_on_attention_and_dense_mlp(cache):
    model = adapted(target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    attention = 2 * RANK * ((64 + 64) + (64 + 32))  # two layers: q 64 -> 64, v 64 -> 32
    dense_mlp = RANK * ((64 + 128) + (128 + 64))  # layer 0 alone has a dense MLP
    assert sum(trainable(model).values()) == attention + dense_mlp
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_on_all_linear_spares_the_router(cache):
    names = trainable(adapted(target_modules="all-linear"))
    assert names and not any(".mlp.gate." in name for name in names)


@pytest.mark.parametrize("implementation", ["policy_grouped_mm", "eager"])
def test_lora_on_experts(cache, implementation, tmp_path):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(target_modules=["q_proj"], target_parameters=targets)
    model.get_base_model().set_experts_implementation(implementation)
    attention = 2 * RANK * (64 + 64)
    experts = 4 * RANK * ((64 + 256) + (128 + 64))  # four experts: 64 -> 2 * 128, 128 -> 64
    assert sum(trainable(model).values()) == attention + experts
    with torch.no_grad():  # a new adapter has B = 0, where A gets no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter) * 0.02
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)

    with torch.no_grad():
        want = model(IDS).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load_policy(SOURCE, experts_implementation=implementation), tmp_path)
        assert torch.equal(again(IDS).logits, want)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, want, atol=1e-4, rtol=1e-4)


# trainers

OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
TALKS = [
    [{"role": "user", "content": f"Count to {n}"}, {"role": "assistant", "content": " ".join(map(str, range(n)))}]
    for n in range(1, 9)
]

REFUSAL = [{"role": "assistant", "content": "no"}]
PAIRS = [{"prompt": talk[:1], "chosen": talk[1:], "rejected": REFUSAL} for talk in TALKS]


def check_trained(trainer, before):
    """Two steps ran, every logged loss is finite, and router and experts moved."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    after = dict(trainer.model.named_parameters())
    for name, value in before.items():
        assert not torch.equal(after[name], value), name


def watched(model):
    names = ("mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj", "q_proj.weight")
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(names)}


@pytest.mark.parametrize("packing, bf16", [(False, False), (True, True)])
def test_sft_trainer(cache, tmp_path, packing, bf16):
    model = load_policy(SOURCE)
    before = watched(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=True,
            packing=packing,
            max_length=256,
            gradient_accumulation_steps=2,
            **(OPTIONS | {"bf16": bf16}),
        ),
        train_dataset=Dataset.from_dict({"messages": TALKS * 8}),
        processing_class=load_tokenizer(SOURCE),
    )
    trainer.train()
    check_trained(trainer, before)
    assert any("aux_loss" in entry for entry in trainer.state.log_history)  # TRL saw a Mixture of Experts


def test_reward_trainer(cache, tmp_path):
    model = load_scalar_model(SOURCE)
    before = watched(model)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=load_tokenizer(SOURCE),
    )
    trainer.train()
    check_trained(trainer, before)


def test_dpo_trainer(cache, tmp_path):
    model = load_policy(SOURCE)
    before = watched(model)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=load_tokenizer(SOURCE),
    )
    trainer.train()
    check_trained(trainer, before)
