"""Split adapters on experts against PEFT's own way: equal results, gradients and files, without the full-size sum."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from plumbline.policy_models import load_policy
from plumbline.policy_models.lora import split_expert_adapters

SOURCE = "bundled:tiny-moe"
IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(5))
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(split, rank=4, dtype="float32", targets=None, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets or TARGETS)
    model = get_peft_model(load_policy(SOURCE, dtype=dtype, **options), config)
    with torch.no_grad():  # a new adapter has B = 0, where A gets no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    if split:
        assert split_expert_adapters(model) == len(targets or TARGETS)
    return model


def results(model):
    out = model(IDS, labels=IDS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return out.logits, dict(zip(trained, torch.autograd.grad(out.loss, trained.values()), strict=True))


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[1:]], ids=["both", "down"])
def test_equals_peft_in_results_and_gradients(cache, rank, targets):
    (got, got_grads), (want, want_grads) = (results(adapted(split, rank, targets=targets)) for split in (True, False))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in got_grads.items():
        torch.testing.assert_close(grad, want_grads[name], atol=1e-6, rtol=1e-4, msg=name)


def test_no_tensor_of_the_size_of_the_stack_is_made(cache):
    """What PEFT's way allocates at every forward, however few tokens there are."""
    sizes = {}
    for split in (True, False):
        model = adapted(split)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
            with torch.no_grad():
                model(IDS[:1, :2])
        shapes = [
            tuple(shape) for event in seen.events() for shape in event.input_shapes if event.name == "aten::baddbmm"
        ]
        sizes[split] = len(shapes)
    assert sizes[False] > 0 and sizes[True] == 0


def test_saved_by_one_and_read_by_the_other(cache, tmp_path):
    model = adapted(split=True)
    with torch.no_grad():
        want = model(IDS).logits
        model.save_pretrained(tmp_path)
        theirs = PeftModel.from_pretrained(load_policy(SOURCE), tmp_path)
        torch.testing.assert_close(theirs(IDS).logits, want, atol=1e-5, rtol=1e-5)
        split_expert_adapters(theirs)
        assert torch.equal(theirs(IDS).logits, want)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, want, atol=1e-4, rtol=1e-4)


def test_adapters_switch_add_up_and_turn_off(cache):
    ours, theirs = adapted(split=True), adapted(split=False)
    base = load_policy(SOURCE)
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.second" in name:
                    parameter.normal_(std=0.05)
    with torch.no_grad():
        for active in ("default", "second"):
            ours.set_adapter(active)
            theirs.set_adapter(active)
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
        with ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("implementation", ["eager", "policy_triton", "policy_auto"])
def test_other_back_ends_give_the_same(cache, implementation):
    want = results(adapted(split=False))[0]
    got = results(adapted(split=True, experts_implementation=implementation))[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_checkpointing_and_autocast(cache):
    want = results(adapted(split=True))
    model = adapted(split=True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    got = results(model)
    for name, grad in got[1].items():
        torch.testing.assert_close(grad, want[1][name], atol=1e-6, rtol=1e-5, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        (low, _), (theirs, _) = results(adapted(split=True)), results(adapted(split=False))
    torch.testing.assert_close(low.float(), theirs.float(), atol=0.1, rtol=0.1)
