"""Where models go and in what type: the four kinds of machine, played by hand."""

import pytest
import torch

from plumbline.align.runtime.launch import pick_dtype, trainer_defaults
from plumbline.policy_models.attention import PACKED, default_attention
from plumbline.policy_models.devices import default_device, fast_dtype


@pytest.fixture
def machine(monkeypatch):
    """Plays a machine: `machine(gpu=..., gpu_bf16=..., amx=..., avx512_bf16=...)`; a GPU without bf16 emulates it."""

    def play(*, gpu=False, gpu_bf16=False, amx=False, avx512_bf16=False, use_cpu=False):
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(use_cpu).lower())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu and (gpu_bf16 or including_emulation)
        )
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)

    return play


def test_the_gpu_of_this_process_where_there_is_one(machine):
    machine(gpu=True)
    assert default_device() == torch.device("cuda", 1)
    machine()
    assert default_device() == torch.device("cpu")


def test_accelerates_flag_keeps_everything_on_the_cpu(machine):
    machine(gpu=True, gpu_bf16=True, use_cpu=True)
    assert default_device() == torch.device("cpu")
    assert pick_dtype("auto") == torch.float32, "the type of the device that is used, not of the one that is there"
    assert trainer_defaults()["use_cpu"] and default_attention() == PACKED
    machine(gpu=True)
    assert not trainer_defaults()["use_cpu"] and default_attention() == "sdpa"


@pytest.mark.parametrize("flag", ["amx", "avx512_bf16"])
def test_bf16_on_a_cpu_that_multiplies_it(machine, flag):
    machine(**{flag: True})
    assert fast_dtype("cpu") == pick_dtype("auto") == torch.bfloat16
    machine()
    assert fast_dtype("cpu") == pick_dtype("auto") == torch.float32


def test_a_gpu_that_emulates_bf16_computes_in_fp32(machine):
    machine(gpu=True, amx=True)
    assert fast_dtype("cuda") == pick_dtype("auto") == torch.float32
    machine(gpu=True, gpu_bf16=True)
    assert fast_dtype("cuda") == pick_dtype("auto") == torch.bfloat16


def models_of(source):
    """What each place that loads a model by itself holds after loading it, without a word on where or in what type."""
    from plumbline.apps.chat.conversation import LocalSpeaker
    from plumbline.reward.components.fluency import Fluency
    from plumbline.reward.learned import LearnedPreference

    return {
        "fluency": Fluency.load(source).model,
        "preference": LearnedPreference(source).model,
        "chat": LocalSpeaker(source)._load()[0],
    }


@pytest.mark.parametrize("place", ["meta", "cpu"])  # meta: a device that models can go to everywhere
def test_models_go_to_the_device_and_take_its_type(machine, monkeypatch, place):
    machine(amx=True)
    for module in ("plumbline.policy_models.devices", "plumbline.policy_models.loading"):
        monkeypatch.setattr(f"{module}.default_device", lambda: torch.device(place))
    models = models_of("bundled:tiny-llama")
    assert {name: model.device.type for name, model in models.items()} == dict.fromkeys(models, place)
    assert models["fluency"].dtype == models["chat"].dtype == torch.bfloat16
    machine()
    assert {model.dtype for model in models_of("bundled:tiny-llama").values()} == {torch.float32}
