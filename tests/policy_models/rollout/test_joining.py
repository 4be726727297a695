"""Sequences that join and leave: every one of them gets the tokens that it gets alone."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from plumbline.policy_models.loading import load_policy
from plumbline.policy_models.rollout.forward_rows import ForwardRows
from plumbline.policy_models.rollout.generation import sample
from plumbline.policy_models.rollout.joining import JoiningDecoder, only_adapter
from plumbline.policy_models.rollout.row_sampling import RowSampling, log_probabilities, sample_rows

POSITIONS = 96
PROMPTS = [[5 + (7 * n * i + n) % 250 for i in range(3 + 11 * n)] for n in range(5)]


@functools.cache
def model_of(source: str):
    """A tiny model, and for "+adapters" two LoRA adapters that change its answers."""
    name, _, with_adapters = source.partition("+")
    model = load_policy(f"bundled:{name}")
    if with_adapters:
        targets = ["q_proj", "v_proj", "o_proj"] + ["gate_proj", "down_proj"] * (name == "tiny-llama")
        experts = {"target_parameters": ["mlp.experts.gate_up_proj"]} if name == "tiny-moe" else {}
        config = LoraConfig(r=4, lora_alpha=64, target_modules=targets, **experts)
        torch.manual_seed(1)
        model = get_peft_model(model, config, adapter_name="red")
        model.add_adapter("blue", config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def alone(source: str, prompt: tuple[int, ...], adapter: str | None, count: int = 24) -> list[int]:
    """transformers' greedy answer."""
    model = model_of(source)
    ids = torch.tensor([prompt])
    with only_adapter(model, adapter), torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, suppress_tokens=[2],
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def pick(logits_BV):
    logits_BV = logits_BV.clone()
    logits_BV[:, 2] = -torch.inf  # as `suppress_tokens` above: answers do not end by themselves
    return logits_BV.argmax(-1)


def run(decoder, arrivals, chunk):
    """Serves (step, prompt, adapter, tokens wanted) in turn, `chunk` prompt tokens a step; the answers in order."""
    answers = [[] for _ in arrivals]
    waiting, reading, rows, at = list(range(len(arrivals))), [], [], 0
    while waiting or reading or rows:
        while waiting and arrivals[waiting[0]][0] <= at and len(reading) + len(rows) < decoder.max_rows:
            who = waiting.pop(0)
            reading.append((who, decoder.stage(arrivals[who][1], arrivals[who][2])))
        work = [(s, min(chunk, len(s.ids) - s.done)) for _, s in reading]
        if work:
            over = [
                (who, s, logits)
                for (who, s), logits in zip(reading, decoder.extend(work), strict=True)
                if s.done == len(s.ids)
            ]
            reading = [(who, s) for who, s in reading if s.done < len(s.ids)]
            for who, _, logits in over:
                answers[who].append(int(pick(logits[None])))
            decoder.admit([s for _, s, _ in over])
            rows += [who for who, _, _ in over]
        if rows:
            tokens = pick(decoder.step(torch.tensor([answers[who][-1] for who in rows])))
            for who, token in zip(rows, tokens.tolist(), strict=True):
                answers[who].append(token)
            stay = [row for row, who in enumerate(rows) if len(answers[who]) < arrivals[who][3]]
            if len(stay) < len(rows):
                origin = decoder.keep(stay)
                rows = [rows[row] for row in origin]
        at += 1
    return [answer[: arrival[3]] for answer, arrival in zip(answers, arrivals, strict=True)]


@functools.cache
def decoder_of(source: str, kind: str = "joining"):
    adapters = ["red", "blue"] if "+" in source else []
    with torch.inference_mode():
        if kind == "forward":
            return ForwardRows(model_of(source), max_rows=4, num_positions=POSITIONS)
        return JoiningDecoder(
            model_of(source), max_rows=4, num_positions=POSITIONS, dtype=torch.float32, adapters=adapters
        )


ARRIVAL = st.tuples(st.integers(0, 30), st.integers(0, 4), st.sampled_from([None, "red", "blue"]), st.integers(1, 24))


@pytest.mark.parametrize("source", ["tiny-llama", "tiny-moe", "tiny-llama+adapters", "tiny-moe+adapters"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(drawn=st.lists(ARRIVAL, min_size=1, max_size=9), chunk=st.sampled_from([1, 7, 64]))
def test_whoever_joins_or_leaves_each_gets_its_own_answer(source, drawn, chunk):
    arrivals = [
        (at, PROMPTS[n], adapter if "+" in source else None, wanted)
        for at, n, adapter, wanted in sorted(drawn, key=lambda d: d[0])
    ]
    with torch.inference_mode():
        got = run(decoder_of(source), arrivals, chunk)
    for (_, prompt, adapter, wanted), answer in zip(arrivals, got, strict=True):
        assert answer == alone(source, tuple(prompt), adapter)[:wanted]


def test_the_forward_of_the_model_does_the_same():
    arrivals = [(0, PROMPTS[3], "red", 9), (1, PROMPTS[0], None, 12), (4, PROMPTS[1], "blue", 5)]
    source = "tiny-llama+adapters"
    with torch.inference_mode():
        got = run(decoder_of(source, "forward"), arrivals, 8)
    assert got == [alone(source, tuple(p), a)[:n] for _, p, a, n in arrivals]


def test_adapters_differ_in_this_test():
    answers = {tuple(alone("tiny-llama+adapters", tuple(PROMPTS[2]), name)) for name in (None, "red", "blue")}
    assert len(answers) == 3


@pytest.mark.parametrize("adapter", [None, "red"])
def test_a_shared_prefix_changes_nothing(adapter):
    """From a prompt that was read, and from a row under way in a batch of others."""
    source = "tiny-llama+adapters"
    with torch.inference_mode():
        decoder = JoiningDecoder(
            model_of(source), max_rows=3, num_positions=POSITIONS, dtype=torch.float32, adapters=["red"]
        )
        staged = decoder.stage(PROMPTS[3], adapter)
        other = decoder.stage(PROMPTS[4], None)
        first, logits = decoder.extend([(other, len(other.ids)), (staged, len(staged.ids))])
        decoder.admit([other, staged])
        token = int(logits.argmax())
        decoder.step(torch.tensor([int(first.argmax()), token]))
        row = decoder.copy_row(1, [*PROMPTS[3], token])
        longer = [*PROMPTS[3], token, 77, 78, 79]
        for prefix in (decoder.prefix_of(staged), row):
            again = decoder.stage(longer, adapter, prefix, len(prefix.ids))
            assert again.reused == len(prefix.ids)
            (shared,) = decoder.extend([(again, len(longer) - again.done)])
            fresh = decoder.stage(longer, adapter)
            (whole,) = decoder.extend([(fresh, len(longer))])
            torch.testing.assert_close(shared, whole, atol=1e-4, rtol=1e-4)


def test_rows_sample_each_in_their_own_way():
    torch.manual_seed(0)
    logits = torch.randn(6, 259) * 3
    how = [RowSampling(temperature=0), RowSampling(), RowSampling(temperature=0.5), RowSampling(top_k=1), RowSampling(top_p=1e-6),
           RowSampling(temperature=2, top_k=5, top_p=0.7)]  # fmt: skip
    uniform = torch.rand(6)
    got = sample_rows(logits, how, uniform).tolist()
    best = logits.argmax(-1).tolist()
    assert [got[0], got[3], got[4]] == [best[0], best[3], best[4]]
    assert got[1] == int(sample(logits[1:2], 1.0, uniform[1:2])[0]) and got[2] == int(
        sample(logits[2:3], 0.5, uniform[2:3])[0]
    )
    assert got == [int(sample_rows(logits[i : i + 1], how[i : i + 1], uniform[i : i + 1])[0]) for i in range(6)]


@pytest.mark.parametrize("top_k, top_p", [(0, 0.3), (0, 0.95), (7, 1.0), (7, 0.6), (300, 0.9), (0, 0.9999)])
@pytest.mark.parametrize("vocab", [50, 4000])
def test_top_k_and_top_p_leave_what_transformers_leaves(top_k, top_p, vocab):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(vocab)
    logits = torch.randn(1, vocab)
    want = TopKLogitsWarper(min(top_k, vocab))(None, logits) if top_k else logits
    want = TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    allowed = set(want[0].isfinite().nonzero()[:, 0].tolist())
    uniform = torch.linspace(0, 0.9999, 400)
    drawn = sample_rows(logits.expand(400, -1), [RowSampling(top_k=top_k, top_p=top_p)] * 400, uniform)
    assert set(drawn.tolist()) <= allowed
    if len(allowed) < 20:
        assert len(set(drawn.tolist())) > len(allowed) / 3


def test_log_probabilities_by_hand():
    logp, top = log_probabilities(torch.tensor([0.0, 1.0, 1.0, 0.0]).log(), 1, 2)
    assert logp == pytest.approx(-0.6931, abs=1e-4) and {i for i, _ in top} == {1, 2}


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}])
def test_samplings_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RowSampling(**wrong)
