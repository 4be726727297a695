"""JSON schemas, regular expressions and Lark grammars, held token by token and checked once more at the end.

Two engines do the work (extra `[grammar]`): llguidance, the default (a mask in under a millisecond, no start-up to speak of), and
xgrammar. Both make mistakes at the edges of JSON Schema, so a text counts as valid only when `Grammar.problem` agrees, which
asks neither of them for JSON and for regular expressions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plumbline.policy_models.rollout.generation import DecodeRow
from plumbline.safety.constrained.rows import StateByRow

_TOKENS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, Any]] = WeakKeyDictionary()  # of llguidance
_EXTRA = "is missing; install the extra: pip install 'plumbline-rlhf[grammar]'"


@dataclass(frozen=True)
class Grammar:
    """What a text must be. Make one with `json_schema`, `regex` or `lark`."""

    kind: Literal["json", "regex", "lark"]
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """A JSON value of this schema (draft 2020-12), written without blanks. ValueError for a schema that is none."""
        jsonschema = _jsonschema()
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message} at {error.json_path}") from None
        return cls("json", json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that matches the pattern from end to end. ValueError for a pattern that does not compile."""
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"regular expression {pattern!r}: {error}") from None
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A text of a context-free grammar in Lark's notation, from its rule `start`."""
        return cls("lark", text)

    def problem(self, text: str, *, finished: bool = True) -> str | None:
        """Why a text is not valid, or None. `finished` False (the limit of tokens was reached) never is."""
        if not finished:
            return "cut at the limit of tokens: raise max_new_tokens, or bound strings and arrays in the schema"
        if self.kind == "regex":
            return None if re.fullmatch(self.source, text) else "does not match the regular expression"
        if self.kind == "json":
            try:
                value = json.loads(text, parse_constant=_no_constant)
            except ValueError as error:
                return f"not JSON: {error}"
            errors = _jsonschema().Draft202012Validator(json.loads(self.source)).iter_errors(value)
            first = next(iter(errors), None)
            return None if first is None else f"{first.json_path}: {first.message}"
        matcher = _llguidance(self, None, [], 0)()
        for byte in text.encode():
            if not matcher.accept(byte):
                return "does not follow the grammar"
        return None if matcher.complete() else "ends before the grammar does"


class Matcher(Protocol):
    """One engine's reading of one answer."""

    def accept(self, token: int) -> bool: ...
    def fill(self, mask: np.ndarray) -> None: ...  # (words,) int32, a bit a token
    def complete(self) -> bool: ...


class GrammarProcessor:
    """Processor: only tokens after which the text can still become one of the grammar; a stop id only when it is one.

    Args:
        stop_ids: every id that ends an answer (`plumbline.policy_models.chat.stop_ids`), not only the tokenizer's.
        vocab_size: of the logits, `model.config.vocab_size`; ids that the tokenizer does not have are forbidden.

    Raises:
        ValueError: for a grammar that the engine cannot compile.
    """

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        vocab_size: int,
        engine: Literal["llguidance", "xgrammar"] = "llguidance",
    ) -> None:
        if engine not in ("llguidance", "xgrammar"):
            raise ValueError(f"engine={engine!r} must be 'llguidance' or 'xgrammar'")
        make = (_llguidance if engine == "llguidance" else _xgrammar)(grammar, tokenizer, stop_ids, vocab_size)
        self.vocab_size = vocab_size
        self._states: StateByRow[Matcher] = StateByRow(make, self._read)

    def __call__(self, rows: Sequence[DecodeRow], logits_BV: Tensor) -> Tensor:
        if logits_BV.shape[1] != self.vocab_size:
            raise ValueError(f"logits over {logits_BV.shape[1]} tokens, but vocab_size={self.vocab_size}")
        words = np.zeros((len(rows), (self.vocab_size + 31) // 32), dtype=np.int32)
        for mask, row in zip(words, rows, strict=True):
            self._states.at(row).fill(mask)
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : self.vocab_size]
        return logits_BV.masked_fill(torch.from_numpy(bits == 0).to(logits_BV.device), -math.inf)

    @staticmethod
    def _read(matcher: Matcher, token: int) -> Matcher:
        if not matcher.accept(token):
            raise ValueError(f"the answer so far leaves the grammar at token {token}; was it begun without it?")
        return matcher


def _llguidance(
    grammar: Grammar, tokenizer: PreTrainedTokenizerBase | None, stop_ids: Sequence[int], vocab_size: int
) -> Callable[[], Matcher]:
    """Makes matchers; without a tokenizer the tokens are the 256 bytes."""
    try:
        import llguidance.hf
        import llguidance.numpy
    except ImportError as error:
        raise ImportError(f"llguidance {_EXTRA}") from error
    if grammar.kind == "json":
        options: Any = {"whitespace_flexible": False}
        compiled = llguidance.LLMatcher.grammar_from_json_schema(grammar.source, overrides=options)
    elif grammar.kind == "regex":
        compiled = llguidance.LLMatcher.grammar_from_regex(grammar.source)
    else:
        compiled = llguidance.LLMatcher.grammar_from_lark(grammar.source)
    if tokenizer is None:
        tokens = llguidance.LLTokenizer("byte")
    else:
        ends = tuple(sorted(set(stop_ids)))
        known = _TOKENS.setdefault(tokenizer, {})
        if (vocab_size, ends) not in known:  # reading a vocabulary takes as long as drawing a short answer
            known[vocab_size, ends] = llguidance.hf.from_tokenizer(
                cast(Any, tokenizer), n_vocab=vocab_size, eos_token=list(ends)
            )
        tokens = known[vocab_size, ends]
    if problem := llguidance.LLMatcher.validate_grammar(compiled, tokens):
        raise ValueError(f"llguidance cannot hold this {grammar.kind} grammar: {problem}")

    class LLGuidance:
        def __init__(self) -> None:
            self.matcher = llguidance.LLMatcher(tokens, compiled, log_level=0)

        def accept(self, token: int) -> bool:
            return self.matcher.consume_token(token)

        def fill(self, mask: np.ndarray) -> None:
            llguidance.numpy.fill_next_token_bitmask(self.matcher, mask[None])

        def complete(self) -> bool:
            return self.matcher.is_accepting()

    return LLGuidance


def _xgrammar(
    grammar: Grammar, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], vocab_size: int
) -> Callable[[], Matcher]:
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError(f"xgrammar {_EXTRA}") from error
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(set(stop_ids))
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    try:
        if grammar.kind == "json":
            compiled = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(_xgrammar_rules(grammar.source)))
        elif grammar.kind == "regex":
            compiled = compiler.compile_regex(grammar.source)
        else:
            compiled = compiler.compile_lark(grammar.source)
    except RuntimeError as error:
        raise ValueError(f"xgrammar cannot hold this {grammar.kind} grammar: {error}") from error

    class XGrammar:
        def __init__(self) -> None:
            self.matcher = xgrammar.GrammarMatcher(compiled)

        def accept(self, token: int) -> bool:
            return self.matcher.accept_token(token)

        def fill(self, mask: np.ndarray) -> None:
            row = torch.full((1, len(mask)), -1, dtype=torch.int32)
            self.matcher.fill_next_token_bitmask(row)
            mask[:] = row[0].numpy()

        def complete(self) -> bool:
            return self.matcher.is_completed()

    return XGrammar


def _xgrammar_rules(schema: str) -> str:
    """xgrammar's rules for a schema, with what 0.2.8 leaves out put right, so that it takes what llguidance takes.

    Bounded strings take no escapes there (issue 800), patterns are read as if they were anchored, and lists and objects of any kind
    have blanks behind their commas.
    """
    import xgrammar

    source = json.dumps(_anchored(json.loads(schema)))
    rules = str(xgrammar.Grammar.from_json_schema(source, any_whitespace=False, separators=(",", ":")))
    character = r"""(([^\"\\\0-\x1f]) | ("\\" basic_escape))"""
    rules = rules.replace(r"""(([^\"\\\r\n]))""", character)
    return rules.replace('((", " basic_any))', '(("," basic_any))').replace('((", " basic_string', '(("," basic_string')


def _anchored(schema: Any) -> Any:
    """The schema with each pattern, which JSON Schema looks for anywhere in a text, written as one for the whole text."""
    if isinstance(schema, list):
        return [_anchored(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    whole = {
        name: _anchored(value) for name, value in schema.items() if name not in ("enum", "const", "default", "examples")
    }
    whole |= {name: schema[name] for name in ("enum", "const", "default", "examples") if name in schema}
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        if "|" in _top_level(pattern) and re.search(r"[$^]", pattern):
            raise ValueError(
                f"xgrammar cannot hold the pattern {pattern!r}: write it as one for the whole text, ^(...)$"
            )
        begin, end = "" if pattern.startswith("^") else ".*", "" if pattern.endswith("$") else ".*"
        whole["pattern"] = f"^{begin}({pattern.removeprefix('^').removesuffix('$')}){end}$"
    return whole


def _top_level(pattern: str) -> str:
    """A regular expression without escapes, character classes and groups."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "", pattern)
    while (less := re.sub(r"\([^()]*\)", "", bare)) != bare:
        bare = less
    return bare


def _jsonschema() -> Any:
    try:
        import jsonschema
    except ImportError as error:
        raise ImportError(f"jsonschema {_EXTRA}") from error
    return jsonschema


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
