"""PPO checklist, A: tokens, padding, positions."""

import pytest
import torch

from plumbline.align.rl.advantages import gae, token_rewards, whiten
from plumbline.align.rl.losses import clipped_policy_loss, clipped_value_loss
from plumbline.align.rl.rollouts import drop_long_prompts, pad_answers
from plumbline.policy_models.loading import load_policy, load_scalar_model, load_tokenizer
from plumbline.policy_models.logprobs import answer_logprobs, pack_rows, token_budget_batches
from plumbline.policy_models.rollout.generation import generate
from plumbline.reward.learned import LearnedPreference

ALL_MODELS = ["gpt2", "llama", "qwen2", "mixtral", "moe"]  # learned positions first, then rotary; the last two sparse
NEVER = 258  # a stop id that greedy decoding below does not reach


def answers_of(lengths, *, seed=3, width=None):
    """Random byte tokens right-padded with id 0: (ids (B, R), keep (B, R))."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]
    ids = pad_answers(rows, fill=0, dtype=torch.long)
    keep = pad_answers([[1] * n for n in lengths], fill=0, dtype=torch.bool)
    extra = (width or ids.shape[1]) - ids.shape[1]
    return torch.nn.functional.pad(ids, (0, extra)), torch.nn.functional.pad(keep, (0, extra))


PROMPT_IDS = [[5, 6, 7], list(range(10, 40)), [9], list(range(60, 71))]
ANSWER_LENGTHS = [4, 1, 6, 3]


# A1: pad is never told from an answer by its id


def test_A1_one_stop_token_is_kept_where_pad_equals_eos(make_ppo, rolled_out):
    """As GPT-2 and Llama tokenizers often come: the id that pads is one that answers here do end with."""
    options = {"max_new_tokens": 4, "rollouts_per_step": 32}
    before, _ = rolled_out(make_ppo(**options))
    pad = int(before.answer_ids[before.finished][0, before.keep[before.finished][0]][-1])
    ppo = make_ppo(**options)
    ppo.tokenizer.pad_token = ppo.tokenizer.eos_token = ppo.tokenizer.convert_ids_to_tokens(pad)
    batch, _ = rolled_out(ppo)
    stops = set(ppo.actors.lm.generation_config.eos_token_id)
    assert pad in stops and batch.finished.any() and not batch.finished.all()
    for row, (ids, keep) in enumerate(zip(batch.answer_ids, batch.keep, strict=True)):
        kept = ids[keep].tolist()
        assert sum(token in stops for token in kept) == int(batch.finished[row])
        assert (kept[-1] in stops) == bool(batch.finished[row])
    assert (batch.answer_ids[batch.keep] == pad).any()
    pack = pack_rows(batch.prompt_ids, batch.answer_ids, batch.keep, range(len(batch)), pad)
    lengths = [len(p) + n for p, n in zip(batch.prompt_ids, batch.answer_lengths(), strict=True)]
    assert pack.attention_mask.sum(dim=1).tolist() == lengths
    for pad_id in (pad, 0):  # and what the model reads does not depend on the padding's id
        ppo.tokenizer.pad_token = ppo.tokenizer.convert_ids_to_tokens(pad_id)
        logp, *_ = ppo.log_probabilities(batch.prompt_ids, batch.answer_ids, batch.keep)
        torch.testing.assert_close(logp, batch.old_logp, atol=1e-6, rtol=1e-6)


def test_A1_the_last_kept_token_gets_a_gradient_where_it_is_the_pad_id(tiny):
    model = load_policy(tiny("llama"))
    ids, keep = torch.tensor([[8, 2]]), torch.tensor([[True, True]])
    logp, _ = answer_logprobs(model, pack_rows([[5, 6]], ids, keep, [0], pad_id=2), temperature=1.0)
    logp[0, 1].backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_A1_tokenizer_with_pad_equal_to_eos_gets_a_pad_of_its_own(tmp_path):
    tokenizer = load_tokenizer("bundled:tiny-llama")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id != loaded.eos_token_id


# A2, A3: padding and positions


def test_A2_layout_prompts_left_answers_right_by_hand():
    ids = torch.tensor([[7, 2, 0], [8, 9, 2]])
    keep = torch.tensor([[True, True, False], [True, True, True]])
    pack = pack_rows([[3, 4, 5], [6]], ids, keep, [0, 1], pad_id=1)
    assert pack.input_ids.tolist() == [[3, 4, 5, 7, 2, 1], [1, 1, 6, 8, 9, 2]]
    assert pack.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]


def test_A2_pack_is_no_wider_than_its_rows():
    ids, keep = answers_of(ANSWER_LENGTHS, width=20)
    pack = pack_rows(PROMPT_IDS, ids, keep, [0, 3], pad_id=0)
    assert pack.input_ids.shape == (2, 11 + 4)


@pytest.mark.parametrize("critic", ["own", "head"])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_A2_padding_invariance(make_ppo, name, critic):
    """Policy, reference and critic say the same of a row alone and beside a longer prompt and a longer answer."""
    ppo = make_ppo(name, critic=critic, perturb=0.05)
    ids, keep = answers_of(ANSWER_LENGTHS)
    ppo.settings.tokens_per_micro_batch = 4 * 36  # all rows in one padded batch
    together = ppo.log_probabilities(PROMPT_IDS, ids, keep)
    ppo.settings.tokens_per_micro_batch = 1  # every row alone
    alone = ppo.log_probabilities(PROMPT_IDS, ids, keep)
    for part, a, b in zip(("policy", "reference", "value"), together, alone, strict=False):
        torch.testing.assert_close(a[keep], b[keep], atol=2e-5, rtol=1e-5, msg=lambda m, p=part: f"{p}: {m}")
        assert (a[~keep] == 0).all()
    assert (together[0] - together[1])[keep].abs().max() > 1e-3  # the perturbed policy is not the reference


@pytest.mark.parametrize("name", ALL_MODELS)
def test_A3_positions_gpt2_and_rope(tiny, name):
    """Left padding shifts nothing: what a padded row gives is what the bare tokens give, without masks or positions."""
    model = load_policy(tiny(name))
    ids, keep = answers_of(ANSWER_LENGTHS)
    logp, _ = answer_logprobs(model, pack_rows(PROMPT_IDS, ids, keep, range(4), 0), temperature=1.0)
    torch.testing.assert_close(logp, naive_logprobs(model, PROMPT_IDS, ids, keep), atol=2e-5, rtol=1e-5)


def test_A3_learned_positions_notice_a_shift(tiny):
    """The check above has teeth: with positions counted over the padding, GPT-2 says something else."""
    model = load_policy(tiny("gpt2"))
    ids, keep = answers_of(ANSWER_LENGTHS)
    pack = pack_rows(PROMPT_IDS, ids, keep, range(4), 0)
    right, _ = answer_logprobs(model, pack, temperature=1.0)
    counted = torch.arange(pack.input_ids.shape[1]).expand_as(pack.input_ids)
    wrong, _ = answer_logprobs(
        model, type(pack)(**{**pack.__dict__, "position_ids": counted.contiguous()}), temperature=1.0
    )
    assert (right - wrong)[keep].abs().max() > 0.1


def test_A3_position_ids_are_the_exclusive_sum_of_the_mask():
    ids, keep = answers_of([2, 3])
    pack = pack_rows([[3, 4, 5], [6]], ids, keep, [0, 1], pad_id=0)
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "moe"])
def test_A3_positions_while_sampling(make_ppo, rolled_out, name):
    """The engine's log-probabilities, drawn from a batch of mixed lengths, are those of the training forward."""
    batch, _ = rolled_out(make_ppo(name, perturb=0.05))
    torch.testing.assert_close(batch.sample_logp[batch.keep], batch.old_logp[batch.keep], atol=5e-5, rtol=1e-5)


# A4: an answer ends after its first stop token


def greedy(model, prompt, stop_ids, limit=8):
    (answer,) = generate(model, [prompt], max_new_tokens=limit, stop_ids=stop_ids, pad_id=0, temperature=0.0)
    return answer


def first_new_token(ids):
    """Index >= 2 of a token that did not occur before, so that stopping at it is stopping there."""
    return next(at for at in range(2, len(ids)) if ids[at] not in ids[:at])


@pytest.fixture
def untied(tiny):
    """A tiny GPT-2 whose greedy answers do not settle on one token."""
    model = load_policy(tiny("gpt2"))
    with torch.no_grad():  # a head of its own: with a tied one, a random model repeats its last token for ever
        generator = torch.Generator().manual_seed(11)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(259, 32, generator=generator))
    return model


@pytest.mark.parametrize("which", [0, 1, 2])
def test_A4_answer_ends_after_its_first_stop_token(untied, which):
    free = greedy(untied, [5, 6, 7], [NEVER]).ids
    assert len(free) == 8 and NEVER not in free
    at = first_new_token(free)
    later = next((i for i in range(at + 1, 8) if free[i] not in free[:i]), at)
    stop_ids = {0: [NEVER], 1: [NEVER, free[at]], 2: [free[later], free[at]]}[which]
    answer = greedy(untied, [5, 6, 7], stop_ids)
    if which == 0:  # never ended: no stop token is made up
        assert (answer.ids, answer.finished) == (free, False)
    else:
        assert (answer.ids, answer.finished) == (free[: at + 1], True)
    assert len(answer.logp) == len(answer.ids)


def test_A4_stop_token_may_be_id_0_which_is_the_pad_too(untied):
    """Words renamed so that the stop token is id 0: the same answer under its new names."""
    free = greedy(untied, [5, 6, 7], [NEVER]).ids
    stop = free[first_new_token(free)]
    expected = greedy(untied, [5, 6, 7], [stop])
    rename = torch.arange(259)
    rename[0], rename[stop] = stop, 0
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.lm_head.weight[rename].clone())
        untied.transformer.wte.weight.copy_(untied.transformer.wte.weight[rename].clone())
    answer = greedy(untied, rename[torch.tensor([5, 6, 7])].tolist(), [0])
    assert answer.finished and answer.ids[-1] == 0
    assert answer.ids == rename[torch.tensor(expected.ids)].tolist()


def test_A4_rows_of_a_batch_end_on_their_own(untied):
    """Each row of a batch is the row alone, whichever rows ended before it."""
    prompts = [[n, n + 1, n + 2] for n in range(10, 22)]
    stop_ids = sorted({greedy(untied, p, [NEVER]).ids[2 + row % 5] for row, p in enumerate(prompts)})
    together = generate(untied, prompts, max_new_tokens=8, stop_ids=stop_ids, pad_id=0, temperature=0.0)
    assert len({len(answer.ids) for answer in together}) > 2  # lengths differ, or the test shows nothing
    for prompt, answer in zip(prompts, together, strict=True):
        one = greedy(untied, prompt, stop_ids)
        assert (answer.ids, answer.finished) == (one.ids, one.finished)


# A5: log-probability and value of position t come from the state at t - 1


def naive_logprobs(model, prompt_ids, answer_ids, keep, temperature=1.0):
    """One row at a time, no padding, no mask, full softmax."""
    result = torch.zeros(keep.shape)
    with torch.no_grad():
        for row, prompt in enumerate(prompt_ids):
            answer = answer_ids[row][keep[row]].tolist()
            logits = model(torch.tensor([prompt + answer])).logits[0].float() / temperature
            for t, token in enumerate(answer):
                result[row, t] = logits[len(prompt) + t - 1].log_softmax(-1)[token]
    return result


@pytest.mark.parametrize("name", ["gpt2", "moe"])
def test_A5_logprobs_and_values_equal_a_naive_loop(make_ppo, name):
    ppo = make_ppo(name, perturb=0.05)
    ids, keep = answers_of(ANSWER_LENGTHS)
    policy, reference, value, _ = ppo.log_probabilities(PROMPT_IDS, ids, keep)
    with ppo.actors.policy() as model:
        torch.testing.assert_close(policy, naive_logprobs(model, PROMPT_IDS, ids, keep), atol=2e-5, rtol=1e-5)
    with ppo.actors.reference() as model:
        torch.testing.assert_close(reference, naive_logprobs(model, PROMPT_IDS, ids, keep), atol=2e-5, rtol=1e-5)
    fresh = load_policy(ppo.settings.model)  # adapters off is the model that the run started from
    torch.testing.assert_close(reference, naive_logprobs(fresh, PROMPT_IDS, ids, keep), atol=2e-5, rtol=1e-5)
    for row, prompt in enumerate(PROMPT_IDS):
        kept = ids[row][keep[row]]
        alone = pack_rows([prompt], kept[None], torch.ones_like(kept, dtype=torch.bool)[None], [0], 0)
        with torch.no_grad():
            last = ppo.actors.values(alone)  # sets the critic's adapter
            states = ppo.actors.lm.base_model(torch.tensor([prompt + kept.tolist()])).last_hidden_state[0]
            by_hand = ppo.actors.value_head(states[len(prompt) - 1 : -1])
        torch.testing.assert_close(value[row][keep[row]], by_hand, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(last[0], by_hand, atol=2e-5, rtol=1e-5)


# A6: a scalar model reads its last real token


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "moe"])
def test_A6_scalar_score_does_not_depend_on_padding(tiny, name):
    model = load_scalar_model(tiny(name)).eval()
    row = list(range(20, 32))

    def score(left, right):
        ids = torch.tensor([[0] * left + row + [0] * right])
        mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits[0, 0]

    bare = score(0, 0)
    assert bare.abs() > 1e-3
    torch.testing.assert_close(score(0, 7), bare, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score(7, 0), bare, rtol=1e-5, atol=1e-6)


def test_A6_learned_reward_of_a_row_does_not_depend_on_its_batch(tiny):
    scorer = LearnedPreference(tiny("moe"))
    prompts = ["Hi", "Tell me about rice and beans", "Why?"]
    answers = ["Yes.", "They go well together.", ""]
    together = scorer(prompts, answers)
    alone = [scorer([prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert len(set(together)) == 3


# A7: what is too long, and what is empty


def test_A7_long_prompts_are_left_out_and_never_cut():
    prompts = [[{"role": "user", "content": str(n)}] for n in (2, 5, 3)]
    kept, ids = drop_long_prompts(prompts, [[1] * 2, [1] * 5, [1] * 3], limit=3)
    assert [p[0]["content"] for p in kept] == ["2", "3"] and [len(i) for i in ids] == [2, 3]


def test_A7_no_prompt_short_enough_is_an_error():
    with pytest.raises(ValueError, match=r"max_prompt_tokens=1: all 2 prompts are longer; raise the limit"):
        drop_long_prompts([[{}], [{}]], [[1, 2], [3, 4]], limit=1)


def test_A7_engine_refuses_an_empty_prompt(tiny):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(load_policy(tiny("llama")), [[3], []], max_new_tokens=2, stop_ids=[2], pad_id=0)


@pytest.mark.parametrize("seed", range(8))
def test_A7_empty_answers_give_no_nan(tiny, seed):
    """Random masks, some rows and sometimes all rows without a token: finite everywhere, and no gradient from them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (5,), generator=generator).tolist()
    lengths[seed % 5] = 0
    if seed == 7:
        lengths = [0] * 5
    ids, keep = answers_of(lengths, seed=seed, width=5)
    prompts = [list(range(3, 4 + n)) for n in torch.randint(0, 9, (5,), generator=generator).tolist()]
    model = load_policy(tiny("moe"))
    logp = torch.zeros(keep.shape)
    for rows in token_budget_batches([len(p) for p in prompts], lengths, 40):
        part, entropy = answer_logprobs(model, pack_rows(prompts, ids, keep, rows, 0), temperature=1.0)
        assert part.isfinite().all() and entropy.isfinite().all()
        logp[rows, : part.shape[1]] = part
    score = torch.randn(5, generator=generator)
    old, value = torch.randn(2, 5, 5, generator=generator)
    reward = token_rewards(score, logp.detach() - old, keep, kl_coef=0.1)
    assert reward.sum(dim=1)[[n == 0 for n in lengths]].eq(0).all()
    advantage, returns = gae(reward, value, keep, gamma=1.0, lam=0.95)
    white = whiten(advantage, keep)
    num_tokens = keep.sum().clamp(min=1)
    loss, sums = clipped_policy_loss(logp, old, white, keep, clip=0.2, num_tokens=num_tokens)
    value_loss, value_sums = clipped_value_loss(logp * 0.1, value, returns, keep, clip=0.2, num_tokens=num_tokens)
    (loss + value_loss).backward()
    for number in [loss, value_loss, *sums.values(), *value_sums.values()]:
        assert number.detach().isfinite()
    for tensor in (reward, advantage, returns, white):
        assert tensor.isfinite().all() and (tensor[~keep] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
