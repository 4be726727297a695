"""Conversations to ids: the end of an answer, what is too long, what a template drops or refuses, and that all is said."""

import json

import pytest

from plumbline.align.data.encoding import IGNORED, Encoder, check_lengths, dpo_rows, sft_rows
from plumbline.align.data.formats import PreferencePair, read_training_pairs
from plumbline.align.data.rows import read_prompts, read_sft
from plumbline.align.dpo import without_ties
from plumbline.align.rl.rollouts import encode_fitting
from plumbline.policy_models.chat import end_ids, lost_in_template, render, takes_system
from plumbline.policy_models.loading import load_tokenizer

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALLS = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {}}}],
    },
    {"role": "tool", "content": "14:05", "tool_call_id": "c1"},
]
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<s>{{ m['role'] }} {{ m['content'] | trim }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer("bundled:tiny-llama")


def encoder(tokenizer, **options):
    return Encoder("sft", tokenizer, end_ids=end_ids("bundled:tiny-llama", tokenizer), **options)


def row(prompt=USER, answer=BOT, **more):
    return {"prompt": prompt if isinstance(prompt, list) else [prompt], "completion": [answer], **more}


def test_the_loss_is_on_the_answer_and_its_end(tokenizer, capsys):
    (found,) = sft_rows([row()], encoder(tokenizer))
    trained = [t for t in found["labels"] if t != IGNORED]
    assert tokenizer.decode(trained) == "Yo<|im_end|>\n" and capsys.readouterr().out == ""
    assert found["input_ids"] == tokenizer.apply_chat_template([USER, BOT], return_dict=True)["input_ids"]
    (whole,) = sft_rows([row()], encoder(tokenizer), completion_only=False)
    assert whole["labels"] == whole["input_ids"]
    turns = [USER, BOT, USER]
    (every,) = sft_rows([row(turns)], encoder(tokenizer), every_turn=True)
    assert tokenizer.decode([t for t in every["labels"] if t != IGNORED]) == "Yo<|im_end|>Yo<|im_end|>"
    tokenizer.chat_template = PLAIN
    with pytest.raises(ValueError, match="needs a chat template that marks"):
        sft_rows([row()], encoder(tokenizer), every_turn=True)


def test_a_template_without_an_end_token_gets_one_and_says_so(tokenizer, capsys):
    tokenizer.chat_template = PLAIN
    (found,) = sft_rows([row()], encoder(tokenizer))
    assert tokenizer.decode([t for t in found["labels"] if t != IGNORED]) == " Yo\n<|im_end|>"
    assert "puts no end token after 1 of 1 answers: '<|im_end|>' is appended" in capsys.readouterr().out
    pair = PreferencePair(prompt=[USER], chosen=[BOT], rejected=[{"role": "assistant", "content": "No"}])
    (pair_ids,) = dpo_rows([pair], encoder(tokenizer))
    assert pair_ids["chosen_ids"][-1] == pair_ids["rejected_ids"][-1] == tokenizer.eos_token_id


def test_one_start_and_one_end_where_the_tokenizer_adds_a_start_too(tokenizer):
    from tokenizers import processors

    tokenizer.chat_template = "{{ bos_token }}" + PLAIN.replace("\n", "{{ eos_token }}")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    (found,) = sft_rows([row()], encoder(tokenizer))
    ids = found["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert (
        ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 2
    )  # of the user's turn, the answer's


def test_rows_that_are_too_long_are_left_out_or_cut_and_said(tokenizer, capsys):
    long = row(answer={"role": "assistant", "content": "x" * 100})
    asked = row({"role": "user", "content": "y" * 200})
    kept = sft_rows([row(), long, asked], encoder(tokenizer, max_length=80))
    out = capsys.readouterr().out
    assert len(kept) == 1 and "1 of 3 rows are kept; left out: 2 longer than max_length=80 tokens" in out
    lengths = [len(one["input_ids"]) for one in sft_rows([row(), long, asked], encoder(tokenizer))]
    assert f"max_length={max(lengths)} would keep all" in out
    cut = sft_rows([row(), long, asked], encoder(tokenizer, max_length=80), cut_answers=True)
    assert [len(one["input_ids"]) for one in cut] == [lengths[0], 80] and tokenizer.eos_token_id not in cut[1]["labels"]
    assert "1 answers are cut at max_length=80 tokens, and do not end" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=rf"all 2 rows are longer than max_length=9 tokens.* shortest has {lengths[0]}"
    ):
        sft_rows([row(), long], encoder(tokenizer, max_length=9))
    pair = PreferencePair(prompt=[USER], chosen=[BOT], rejected=long["completion"])
    with pytest.raises(ValueError, match="all 1 rows are longer than max_length=80 tokens"):
        dpo_rows([pair], encoder(tokenizer, max_length=80))
    with pytest.raises(ValueError, match="truncation_mode='keep_end': sft cuts no prompt"):
        check_lengths("sft", type("Args", (), {"truncation_mode": "keep_end"}))


def test_calls_are_shown_by_the_bundled_template_and_otherwise_the_row_is_left_out(tokenizer, capsys):
    tools = [{"type": "function", "function": {"name": "tide"}}]
    text = render(tokenizer, [*CALLS, BOT], tools=tools)
    assert '<tool_call>\n{"name": "tide", "arguments": {}}\n</tool_call><|im_end|>' in text and "<tools>" in text
    assert lost_in_template(tokenizer, [*CALLS, BOT], tools) == {"tool_call_id"}
    assert len(sft_rows([row(CALLS, tools=tools)], encoder(tokenizer))) == 1
    assert "1 rows hold tool_call_id, which the chat template does not show" in capsys.readouterr().out
    tokenizer.chat_template = PLAIN
    kept = sft_rows([row(), row(CALLS), row(tools=tools)], encoder(tokenizer))
    out = capsys.readouterr().out
    assert len(kept) == 1 and "1 because the chat template does not show their tool_calls" in out
    assert "1 because the chat template does not show their tools" in out
    with pytest.raises(ValueError, match="none of 1 rows can be trained on: 1 because the chat template does not show"):
        sft_rows([row(CALLS)], encoder(tokenizer))


def test_a_template_without_a_system_role_takes_it_in_the_first_turn(tokenizer, capsys):
    assert takes_system(tokenizer)
    tokenizer.chat_template = GEMMA
    assert not takes_system(tokenizer)
    assert render(tokenizer, [SYSTEM, USER, BOT]) == "<s>user Be brief.\n\nHi<|im_end|><s>assistant Yo<|im_end|>"
    two = row([USER, USER])
    assert len(sft_rows([row([SYSTEM, USER]), two], encoder(tokenizer))) == 1
    out = capsys.readouterr().out
    assert "takes no system role: in 1 rows its text opens the user's first turn" in out
    assert (
        "left out: 1 because the chat template refuses them (the chat template does not take the roles user, user"
        in out
    )


def test_a_tokenizer_without_a_template_is_told_so_by_us(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template, .*start from a chat model"):
        encoder(tokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        encode_fitting(tokenizer, [[USER]], 99, what="ppo")


def test_prompts_that_are_dropped_are_counted(tokenizer, capsys):
    long = [{"role": "user", "content": "y" * 200}]
    prompts, ids = encode_fitting(tokenizer, [[USER], long, long], 64, what="ppo")
    assert prompts == [[USER]] and len(ids) == 1
    assert "ppo: 2 of 3 prompts are longer than max_prompt_tokens=64 tokens: left out; " in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="max_prompt_tokens=64: all 1 prompts are longer; raise the limit: the shortest"
    ):
        encode_fitting(tokenizer, [long], 64, what="ppo")


# The readers of the stages


def write(tmp_path, rows, name="a.jsonl"):
    file = tmp_path / name
    file.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(one) + "\n" for one in rows))
    return file


def test_sft_rows_say_what_they_were_read_as(tmp_path, capsys):
    file = write(tmp_path, [{"messages": [SYSTEM, USER, BOT]}, {"messages": [USER, BOT | {"weight": 0}]}])
    assert read_sft(file) == [{"prompt": [SYSTEM, USER], "completion": [BOT]}]
    out = capsys.readouterr().out
    assert f"read 1 row of {file} as messages" in out and "1 rows of" in out and "weight 0: left out" in out


def test_prompts_with_tools_are_left_out(tmp_path, capsys):
    file = write(
        tmp_path, [{"prompt": "Hi"}, {"messages": [*CALLS, USER]}, {"prompt": "x", "tools": [{"name": "tide"}]}]
    )
    assert read_prompts(file) == [[USER]]
    assert "2 prompts of" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_a_chosen_answer_that_repeats_the_prompt_is_read_once_in_every_file(name, tmp_path, capsys):
    rows = [{"system": "Be brief.", "prompt": "Hi", "chosen": [USER, BOT], "rejected": "No"}] * 2
    pairs = read_training_pairs(write(tmp_path, rows, name))
    assert [m["role"] for m in [*pairs[0].prompt, *pairs[0].chosen]] == ["system", "user", "assistant"]
    assert "1 pairs repeat an earlier one" in capsys.readouterr().out


def test_pairs_that_contradict_each_other_are_said(tmp_path, capsys):
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "chosen": "b", "rejected": "a"}]
    assert len(read_training_pairs(write(tmp_path, rows))) == 2
    assert "1 comparisons are also there the other way round" in capsys.readouterr().out


def test_ties_rank_nothing_for_dpo(capsys):
    tie, soft, won = (
        PreferencePair(prompt=[USER], chosen=[BOT], rejected=[USER], p_chosen=share) for share in (0.5, 0.75, 1.0)
    )
    assert without_ties([tie, soft, won]) == [soft, won]
    out = capsys.readouterr().out
    assert (
        "1 of 3 pairs are ties (p_chosen 0.5), which rank nothing: left out" in out
        and "1 pairs were preferred by a share" in out
    )
    with pytest.raises(ValueError, match="all 1 pairs are ties"):
        without_ties([tie])
