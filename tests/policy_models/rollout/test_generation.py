"""The rollout engine against transformers: tiny random models, the fast decoder and the slow path."""

import logging

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from plumbline.policy_models.configuration import MoEPolicyConfig
from plumbline.policy_models.modeling import MoEPolicyForCausalLM
from plumbline.policy_models.rollout import decoder as decoder_module
from plumbline.policy_models.rollout import generation
from plumbline.policy_models.rollout.decoder import Decoder, supports_fast_path
from plumbline.policy_models.rollout.generation import generate, sample

VOCAB = 97
NEVER = [VOCAB]  # a stop id that is never drawn
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # logits a few nats apart, so that rounding does not decide which is the largest
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    # every bias there is, tied embeddings, a head size that is not width / heads, scaled frequencies
    "llama_odd": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            head_dim=12,
            rope_parameters=LLAMA3_ROPE,
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    # experts in some layers only, both kinds of bias, head norms
    "moe": lambda: MoEPolicyForCausalLM(
        MoEPolicyConfig(**SIZES, num_experts=4, moe_layers=[0, 2], attention_bias=True, qk_norm=True)
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return randomised(MODELS[request.param]())


def randomised(model: nn.Module) -> nn.Module:
    """No bias left at zero and no norm at one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def llama() -> LlamaForCausalLM:
    return randomised(MODELS["llama"]())


def with_lora(model: nn.Module, **options) -> nn.Module:
    """LoRA on every linear layer of the decoder, with a B that is not zero."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], **options}
    return filled(get_peft_model(model, LoraConfig(**settings)))


def filled(peft_model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return peft_model.eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(1, VOCAB, (length,)).tolist() for length in lengths]


MIXED = (5, 1, 9, 5, 14, 2, 5, 9)


def greedy_by_transformers(model, prompts, max_new_tokens, stop_ids):
    """Left-padded batch through `model.generate`, cut after the first stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=0,
    )
    answers = []
    for row in out[:, width:].tolist():
        ends = [at for at, token in enumerate(row) if token in stop_ids]
        answers.append(row[: ends[0] + 1] if ends else row)
    return answers


@torch.no_grad()
def logp_by_forward(model, prompt, answer, temperature=1.0):
    logits = model(input_ids=torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]


def assert_logp(model, prompts, answers, temperature=1.0, atol=1e-4):
    for prompt, answer in zip(prompts, answers, strict=True):
        want = logp_by_forward(model, prompt, answer, temperature)
        torch.testing.assert_close(torch.tensor(answer.logp), want, atol=atol, rtol=0)


def seeded_generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(model, prompts, **options):
    settings = {"max_new_tokens": 20, "stop_ids": [3, 50, 51, 52], "pad_id": 0, "generator": seeded_generator()}
    return generate(model, prompts, **settings | options)


# --- the same answers as transformers


def test_greedy_tokens_equal_transformers(model):
    assert supports_fast_path(model) is None
    prompts, stop_ids = prompts_of(*MIXED), [3, 50, 51, 52, 60, 61]
    answers = generate(model, prompts, max_new_tokens=20, stop_ids=stop_ids, pad_id=0, temperature=0)
    assert [a.ids for a in answers] == greedy_by_transformers(model, prompts, 20, stop_ids)
    assert [a.finished for a in answers] == [a.ids[-1] in stop_ids for a in answers]
    assert_logp(model, prompts, answers)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_of_drawn_tokens_equals_a_full_forward(model, temperature):
    prompts = prompts_of(*MIXED)
    answers = draw(model, prompts, temperature=temperature)
    assert_logp(model, prompts, answers, temperature)


def test_unknown_architecture_runs_through_forward(caplog):
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, prompts = GPT2LMHeadModel(config).eval(), prompts_of(*MIXED)
    generation._told.clear()
    with caplog.at_level(logging.WARNING, logger="plumbline.policy_models.rollout.generation"):
        for _ in range(2):
            answers = generate(model, prompts, max_new_tokens=8, stop_ids=[3, 50], pad_id=0, temperature=0)
    messages = [
        record.message for record in caplog.records if record.name == "plumbline.policy_models.rollout.generation"
    ]
    assert len(messages) == 1 and "GPT2LMHeadModel is not one of" in messages[0]
    assert [a.ids for a in answers] == greedy_by_transformers(model, prompts, 8, [3, 50])
    assert_logp(model, prompts, draw(model, prompts))


def test_both_paths_draw_the_same(model, monkeypatch):
    prompts = prompts_of(*MIXED)
    fast = draw(model, prompts, batch_size=3)
    monkeypatch.setattr(generation, "supports_fast_path", lambda *args: "switched off")
    slow = draw(model, prompts, batch_size=3)
    assert_same(fast, slow)


def assert_same(answers, others):
    assert [(a.ids, a.finished) for a in answers] == [(b.ids, b.finished) for b in others]
    for a, b in zip(answers, others, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=2e-5)


# --- batching


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_answers_do_not_depend_on_batch_mates(batch_size, monkeypatch):
    moves = []
    move = Decoder._move_to_front
    monkeypatch.setattr(Decoder, "_move_to_front", lambda self: (moves.append(self.column), move(self)))
    model, prompts = llama(), prompts_of(*MIXED * 4)
    answers = draw(model, prompts, max_new_tokens=24, batch_size=batch_size)
    assert bool(moves) == (batch_size < 40)  # few rows, many prompts: the cache was moved while rows were under way
    lengths = {len(a.ids) for a in answers}
    assert len(lengths) > 5 and max(lengths) == 24  # rows did come and go at different times
    assert_logp(model, prompts, answers)
    for at in (0, 3, 20):  # a prompt keeps its stream of random numbers whoever follows it
        assert_same(draw(model, prompts[: at + 1], max_new_tokens=24)[-1:], answers[at : at + 1])


def test_prefill_in_parts(monkeypatch):
    model, prompts = llama(), prompts_of(*MIXED)
    whole = draw(model, prompts)
    monkeypatch.setattr(decoder_module, "_PREFILL_TOKENS", 11)
    assert_same(draw(model, prompts), whole)


def test_first_token_may_end_everything():
    model, prompts = llama(), prompts_of(*MIXED)
    first = {a.ids[0] for a in generate(model, prompts, max_new_tokens=1, stop_ids=NEVER, pad_id=0, temperature=0)}
    answers = generate(model, prompts, max_new_tokens=9, stop_ids=sorted(first), pad_id=0, temperature=0, batch_size=3)
    assert [(len(a.ids), a.finished) for a in answers] == [(1, True)] * len(prompts)


def test_limit_of_one_token():
    answers = draw(llama(), prompts_of(*MIXED), max_new_tokens=1, stop_ids=NEVER, batch_size=2)
    assert [(len(a.ids), len(a.logp), a.finished) for a in answers] == [(1, 1, False)] * len(MIXED)


def test_no_prompts():
    assert draw(llama(), []) == []


def test_state_of_model_and_rng_is_left_alone():
    model = llama().train()
    state = torch.get_rng_state()
    first = draw(model, prompts_of(4, 6), generator=seeded_generator())
    torch.set_rng_state(state)
    second = draw(model, prompts_of(4, 6), generator=seeded_generator())
    assert model.training and first == second
    torch.set_rng_state(state)
    prompts_of(4, 6)
    after_prompts = torch.get_rng_state()
    draw(model, [[1, 2]], generator=seeded_generator())
    assert torch.equal(torch.get_rng_state(), after_prompts)


# --- adapters


@pytest.fixture(params=["llama_odd", "qwen3", "moe"])
def adapted(request):
    options = {"target_modules": ["q_proj", "v_proj", "o_proj"]} if request.param == "moe" else {}
    return with_lora(randomised(MODELS[request.param]()), **options)


def test_lora_stays_beside_the_base(adapted):
    prompts = prompts_of(*MIXED)
    assert supports_fast_path(adapted) is None
    answers = draw(adapted, prompts)
    assert_logp(adapted, prompts, answers)
    assert draw(adapted.get_base_model(), prompts) == answers  # the inner model, whose layers hold the adapters
    assert [a.ids for a in draw(adapted, prompts, temperature=0)] == greedy_by_transformers(
        adapted, prompts, 20, [3, 50, 51, 52]
    )


def test_adapters_off_is_the_base():
    model, prompts = llama(), prompts_of(*MIXED)
    base = draw(model, prompts)
    adapted = with_lora(model)
    assert draw(adapted, prompts) != base
    with adapted.disable_adapter():
        assert draw(adapted, prompts) == base
        assert draw(adapted.get_base_model(), prompts) == base


def test_the_active_adapters_answer():
    prompts = prompts_of(*MIXED)
    adapted = with_lora(llama())
    adapted.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=["k_proj", "up_proj", "lm_head"]))
    filled(adapted)
    first = draw(adapted, prompts)
    adapted.set_adapter("second")
    second = draw(adapted, prompts)
    assert second != first
    assert_logp(adapted, prompts, second)
    adapted.base_model.set_adapter(["default", "second"])
    both = draw(adapted, prompts)
    assert both != first and both != second
    assert_logp(adapted, prompts, both)


def test_merged_adapter():
    prompts = prompts_of(*MIXED)
    adapted = with_lora(llama())
    unmerged = draw(adapted, prompts)
    adapted.merge_adapter()
    assert_same(draw(adapted, prompts), unmerged)


def test_lora_on_experts():
    prompts = prompts_of(*MIXED)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    adapted = with_lora(randomised(MODELS["moe"]()), **targets)
    assert supports_fast_path(adapted) is None
    assert_logp(adapted, prompts, draw(adapted, prompts))


# --- bf16: packed weights where the CPU has them


def in_bf16(name: str) -> nn.Module:
    model = randomised(MODELS[name]())
    for parameter in model.parameters():  # not model.to(): it would round the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("name", ["llama_odd", "qwen3", "moe"])
def test_bf16_logp_is_as_near_to_fp32_as_that_of_the_model(name):
    model, prompts = in_bf16(name), prompts_of(*MIXED * 4)
    answers = draw(model, prompts, batch_size=8)
    forward = torch.cat([logp_by_forward(model, p, a) for p, a in zip(prompts, answers, strict=True)])
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    exact = torch.cat([logp_by_forward(model, p, a) for p, a in zip(prompts, answers, strict=True)])
    drawn = torch.tensor([logp for a in answers for logp in a.logp])
    assert (drawn - exact).abs().mean() < 1.25 * (forward - exact).abs().mean()


@pytest.mark.parametrize("how", ["autocast", "dtype"])
def test_fp32_weights_compute_in_bf16(how):
    model, prompts = in_bf16("moe"), prompts_of(*MIXED)
    want = draw(model, prompts)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    if how == "dtype":
        assert draw(model, prompts, dtype=torch.bfloat16) == want
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert draw(model, prompts) == want


def change_by_optimizer(model):
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def change_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def swap_two_experts(model):
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[:2] = experts.down_proj[:2].flip(0)


def change_one_element(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 20.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [change_by_optimizer, change_through_data, swap_two_experts, change_one_element])
def test_changed_weights_are_seen(change, dtype):
    model, prompts = randomised(MODELS["moe"]()), prompts_of(*MIXED)
    before = draw(model, prompts, dtype=dtype)
    change(model)
    after = draw(model, prompts, dtype=dtype)
    assert after != before
    fresh = randomised(MODELS["moe"]())
    fresh.load_state_dict(model.state_dict())
    assert after == draw(fresh, prompts, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchanged_weights_are_packed_once(monkeypatch, dtype):
    model, prompts = llama(), prompts_of(4)
    if not decoder_module._packing_pays(model.lm_head.weight, dtype):
        pytest.skip(f"this CPU has no units for {dtype}: nothing is packed")
    packed = []
    reorder = decoder_module._reorder
    monkeypatch.setattr(decoder_module, "_reorder", lambda weight: packed.append(weight.shape) or reorder(weight))
    draw(model, prompts, dtype=dtype)
    assert len(packed) == 3 * 4 + 1
    draw(model, prompts, dtype=dtype)
    assert len(packed) == 3 * 4 + 1
    change_one_element(model)
    draw(model, prompts, dtype=dtype)
    assert packed[3 * 4 + 1 :] == [(96, 32)]


def test_fp32_of_many_rows_is_multiplied_by_the_plain_weights(model, monkeypatch):
    if not decoder_module._packing_pays(model.lm_head.weight, torch.float32):
        pytest.skip("no oneDNN on this CPU: nothing is packed")
    rows = []
    packed_linear = decoder_module._packed_linear
    monkeypatch.setattr(decoder_module, "_PACKED_ROWS", {torch.float32: 4})
    monkeypatch.setattr(
        decoder_module, "_packed_linear", lambda x_TD, *rest: rows.append(len(x_TD)) or packed_linear(x_TD, *rest)
    )
    prompts = prompts_of(7, 7, 7)
    answers = draw(model, prompts, temperature=0.0, stop_ids=NEVER)
    assert [a.ids for a in answers] == greedy_by_transformers(model, prompts, 20, NEVER)
    assert_logp(model, prompts, answers)
    prefill = 3 * 7
    assert 3 in rows and prefill not in rows


# --- what the fast path leaves to `forward`


def add_hook(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)


def replace_forward(model):
    model.model.norm.forward = lambda x: x


def resize_window(model):
    model.config.sliding_window = 16
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]


def dynamic_rope(model):
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def other_attention(model):
    model.config._attn_implementation = "flex_attention"


def gate_attention(model):
    model.model.layers[0].self_attn.gate_proj = nn.Linear(4, 4)


def other_linear(model):
    model.model.layers[2].mlp.up_proj = nn.Sequential(nn.Linear(32, 48))


def integer_weights(model):
    model.model.layers[2].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "change, reason",
    [
        (add_hook, "layers.1 has a forward hook"),
        (replace_forward, "forward of model.norm was replaced"),
        (resize_window, "sliding window of 16"),
        (dynamic_rope, "'dynamic'"),
        (other_attention, "'flex_attention'"),
        (gate_attention, "the attention has gate_proj"),
        (other_linear, "up_proj is a Sequential"),
        (integer_weights, "uint8"),
    ],
)
def test_reasons_against_the_fast_path(change, reason):
    model = llama()
    change(model)
    assert reason in supports_fast_path(model, num_positions=17)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_dora": True}, "variant of LoRA"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "variant of LoRA"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head is a ModulesToSaveWrapper"),
    ],
)
def test_adapters_that_the_fast_path_does_not_know(options, reason):
    model = randomised(MODELS["llama_odd"]()) if "lora_bias" in options else llama()
    adapted, prompts = with_lora(model, **options), prompts_of(*MIXED)
    assert reason in supports_fast_path(adapted)
    assert_logp(adapted, prompts, draw(adapted, prompts))


def test_prompt_tuning_is_left_to_forward():
    adapted = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "prompt-learning" in supports_fast_path(adapted)


def test_short_sequences_fit_a_sliding_window():
    model = randomised(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    assert supports_fast_path(model, 16) is None
    assert "sliding window" in supports_fast_path(model, 17)
    prompts = prompts_of(6, 12)
    assert_logp(model, prompts, draw(model, prompts))  # 12 + 20 positions: through forward


def test_idle_hooks_of_transformers_do_not_matter():
    model = llama()
    model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)  # installs the recorders
    model.enable_input_require_grads()
    assert supports_fast_path(model) is None


# --- sampling


@pytest.mark.parametrize("vocab", [2, 12, 97])  # 97 is prime: one level only
def test_sample_follows_softmax(vocab):
    logits = torch.randn(vocab) * 1.5
    logits[1] = -torch.inf
    uniform = torch.rand(20_000, generator=seeded_generator())
    for temperature in (1.0, 0.5):
        token, logp = sample(logits.expand(20_000, -1), temperature, uniform)
        want = (logits / temperature).softmax(-1)
        counts = torch.bincount(token, minlength=vocab)
        assert counts[1] == 0
        likely = want * 20_000 >= 5  # below, the chi-square approximation is bad: pooled
        observed = [*counts[likely].tolist(), counts[~likely].sum().item()]
        expected = [*(want[likely] * 20_000).tolist(), (want[~likely] * 20_000).sum().item()]
        if expected[-1] == 0:
            observed, expected = observed[:-1], expected[:-1]
        scale = sum(observed) / sum(expected)
        assert len(observed) == 1 or chisquare(observed, [e * scale for e in expected]).pvalue > 0.01
        torch.testing.assert_close(logp, want.log()[token], atol=1e-5, rtol=0)


def test_sample_by_hand():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3, 0.0]).log()  # blocks of 2 words
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.6999, 0.7001, 1 - 2**-24])
    token, logp = sample(logits.expand(8, -1), 1.0, uniform)
    assert token.tolist() == [0, 0, 1, 1, 3, 3, 4, 4]  # never 2 or 5, whose probability is 0
    torch.testing.assert_close(logp, logits[token])


def test_sample_is_right_for_a_whole_vocabulary():
    logits = (torch.randn(9, 49_152) * 4).bfloat16()
    uniform = torch.rand(9)
    token, logp = sample(logits, 1.0, uniform)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    for row in range(9):
        at = token[row]
        assert cumulative[row, at] - cumulative[row, at - 1] > 0
        assert cumulative[row, at - 1] - 1e-6 <= uniform[row] <= cumulative[row, at] + 1e-6
    torch.testing.assert_close(logp, logits.double().log_softmax(-1).gather(-1, token[:, None])[:, 0].float())


def test_sample_at_temperature_0():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    token, logp = sample(logits, 0, torch.tensor([0.9]))
    assert token.tolist() == [1]
    torch.testing.assert_close(logp, logits.log_softmax(-1)[0, :1].clone().fill_(logits.log_softmax(-1)[0, 1]))


# --- refusals


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1]], {"stop_ids": []}, "stop_ids is empty"),
        ([[1]], {"temperature": -0.1}, "temperature=-0.1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refusals(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        draw(llama(), prompts, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_are_not_numbers_are_an_error_not_an_answer(name, temperature):
    small = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(small) if name == "gpt2" else MODELS[name]()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, [[1, 2], [3]], max_new_tokens=3, stop_ids=NEVER, pad_id=0, temperature=temperature)
