"""Grammars by both engines: every answer of a random model is valid, rows are their own, the second check is independent."""

import math

import pytest
import torch

from plumbline.policy_models.chat import stop_ids
from plumbline.policy_models.rollout.generation import DecodeRow, generate
from plumbline.safety.constrained.grammar import Grammar, GrammarProcessor, _llguidance, _xgrammar

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {
        "verdict": {"enum": ["safe", "unsafe"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
        "why": {"type": "string", "maxLength": 6},
    },
    "required": ["verdict", "score", "why"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json": Grammar.json_schema(SCHEMA),
    "regex": Grammar.regex(r"(yes|no), [0-9]{1,3}%"),
    "lark": Grammar.lark('start: "(" start ")" | /[a-c]{1,4}/'),
}
ENGINES = ["llguidance", "xgrammar"]


# without ("json", "xgrammar"): 0.2.8 lets control characters into strings, which the check after decoding finds
@pytest.mark.parametrize("kind, engine", [("json", "llguidance"), ("regex", "llguidance"), ("regex", "xgrammar")])
def test_answers_of_a_random_model_are_valid(tiny, engine, kind):
    pytest.importorskip(engine)
    model, tokenizer = tiny
    ends = [*stop_ids(model, tokenizer), tokenizer.bos_token_id]  # a second stop id
    processor = GrammarProcessor(GRAMMARS[kind], tokenizer, ends, model.config.vocab_size, engine)
    prompts = [tokenizer.encode(text) for text in ("Judge this.", "And this, which is longer than the first.", "x")]
    answers = generate(
        model,
        prompts * 3,
        max_new_tokens=120,
        stop_ids=ends,
        pad_id=0,
        temperature=1.5,
        batch_size=4,
        generator=torch.Generator().manual_seed(0),
        processors=[processor],
    )
    for answer in answers:
        text = tokenizer.decode([token for token in answer.ids if token not in ends], skip_special_tokens=True)
        assert answer.finished and GRAMMARS[kind].problem(text) is None, text
    assert len({tuple(a.ids) for a in answers}) > 3


PROBLEMS = [
    ("json", '{"verdict":"safe","score":3,"why":"ok"}', None),
    ("json", '{"verdict":"safe","score":11,"why":"ok"}', "maximum"),
    ("json", '{"verdict":"safe"', "not JSON"),
    ("json", '{"verdict":"safe","score":NaN,"why":""}', "not JSON"),
    ("regex", "yes, 12%", None),
    ("regex", "yes, 12%!", "does not match"),
    ("lark", "((abc))", None),
    ("lark", "((abc)", "ends before"),
    ("lark", "(d)", "does not follow"),
]


@pytest.mark.parametrize("kind, text, want", PROBLEMS)
def test_the_check_after_decoding(kind, text, want):
    problem = GRAMMARS[kind].problem(text)
    assert problem is None if want is None else want in problem
    assert "limit" in GRAMMARS[kind].problem(text, finished=False)


def test_a_row_goes_on_from_its_own_answer(tiny):
    model, tokenizer = tiny
    ends, size = stop_ids(model, tokenizer), model.config.vocab_size
    processor = GrammarProcessor(Grammar.regex("ab*"), tokenizer, ends, size)
    a, b = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("ab", add_special_tokens=False)
    rows = [DecodeRow(0, [1], []), DecodeRow(1, [1], a), DecodeRow(2, [1], b)]
    left = processor(rows, torch.zeros(3, size)) > -math.inf
    assert not left[0, ends].any() and left[1, ends].all() and left[2, ends].all()
    with pytest.raises(ValueError, match="leaves the grammar"):
        processor([DecodeRow(0, [1], b + a)], torch.zeros(1, size))


def test_what_cannot_be_held_is_refused_before_decoding(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="not a JSON schema"):
        Grammar.json_schema({"type": "objet"})
    with pytest.raises(ValueError, match="regular expression"):
        Grammar.regex("(")
    with pytest.raises(ValueError, match="cannot hold"):
        GrammarProcessor(Grammar.lark("start: nothing"), tokenizer, [2], model.config.vocab_size)
    with pytest.raises(ValueError, match="engine"):
        GrammarProcessor(GRAMMARS["regex"], tokenizer, [2], model.config.vocab_size, "outlines")


def _object(**why):
    return Grammar.json_schema(
        {"type": "object", "properties": {"why": why}, "required": ["why"], "additionalProperties": False}
    )


EDGES = [  # schema of a field, text, whether it is valid
    (_object(type="string"), r'{"why":"a\nb \"q\" \\ /"}', True),
    (_object(type="string", maxLength=40), r'{"why":"a\nb \"q\" \\ /"}', True),
    (_object(type="string", maxLength=2), r'{"why":"\"\""}', True),
    (_object(type="string", maxLength=2), r'{"why":"\"\"\""}', False),
    (_object(type="string", maxLength=40), '{"why":"ok \U0001f44d \u05e2\u05d1"}', True),
    (_object(type="string", maxLength=40), '{"why":"a\tb"}', False),
    (_object(type="string"), '{"why":"a\tb"}', False),
    (_object(type="string", pattern="b"), '{"why":"abc"}', True),
    (_object(type="string", pattern="^[a-z]+$"), '{"why":"abc"}', True),
    (_object(type="string", pattern="^[a-z]+$"), '{"why":"aBc"}', False),
    (_object(enum=["n\u00e9", "ja"]), '{"why":"n\u00e9"}', True),
    (_object(type="array"), '{"why":[1,"a",{"x":1,"y":[2,3]}]}', True),
]


def _takes(engine, grammar, text, model, tokenizer):
    make = {"llguidance": _llguidance, "xgrammar": _xgrammar}[engine]
    matcher = make(grammar, tokenizer, stop_ids(model, tokenizer), model.config.vocab_size)()
    return all(map(matcher.accept, tokenizer.encode(text, add_special_tokens=False))) and matcher.complete()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grammar, text, valid", EDGES)
def test_both_engines_take_what_the_check_calls_valid(tiny, engine, grammar, text, valid):
    pytest.importorskip(engine)
    assert (grammar.problem(text) is None) == valid == _takes(engine, grammar, text, *tiny)


def test_escapes_of_letters_are_valid_and_xgrammar_takes_them(tiny):
    pytest.importorskip("xgrammar")  # llguidance asks for the letters themselves
    for text in (r'{"why":"caf\u00e9"}', r'{"why":"\ud83d\udc4d"}'):
        for grammar in (_object(type="string"), _object(type="string", maxLength=20)):
            assert grammar.problem(text) is None and _takes("xgrammar", grammar, text, *tiny)


def test_a_pattern_that_cannot_be_written_for_the_whole_text_is_refused(tiny):
    pytest.importorskip("xgrammar")
    with pytest.raises(ValueError, match="whole text"):
        _takes("xgrammar", _object(type="string", pattern="^a|b$"), '{"why":"a"}', *tiny)
