"""From a model's answer to the program that it means: a continuation, or code between sentences and Markdown fences."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator

_FENCED = re.compile(
    r"^[ \t]*(?:`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*(?:`{3,}|~{3,})[ \t]*(?:$|<)|\Z)",
    re.DOTALL | re.MULTILINE,
)
_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```", "\n~~~", "\n<|", "<|im_end|>", "</s>")
_MOST_LINES = 400  # of an answer without fences that are tried one by one as its end


def program_of(prompt: str, answer: str) -> str:
    """The program that an answer makes of a prompt, which is the beginning of a function (signature, docstring, imports before it).

    The first of these that Python can parse and that holds the prompt's function:

    1. the prompt and the answer behind it, whole or up to where a text model begins something else
    2. fenced blocks of Python: up to the last one that defines the function, behind what stands before the function in the prompt;
       else the first as its body; a fence that is not closed ends with the answer
    3. the same of an answer without fences: from its first line of code to the last line with which it can be parsed

    None of them: the prompt and the answer as they are, which then fail with the error that they have.
    """
    answer = answer.replace("\r\n", "\n").replace("\r", "\n")
    name = _last_function(prompt)
    for program in _candidates(prompt, answer, name):
        if _holds(program, name):
            return program
    return prompt + answer


def _candidates(prompt: str, answer: str, name: str) -> Iterator[str]:
    begun = _begun(answer)
    body = begun is None and bool(answer.strip())
    if body:
        yield prompt + answer
        yield from _as_body(
            prompt, answer[: min([at for at in map(answer.find, _ENDS) if at > 0], default=len(answer))]
        )
        outside = re.search(r"\n(?=[^\s])", answer)  # where the body's indent ends
        yield from _as_body(prompt, answer[: outside.start() if outside else len(answer)])
    blocks = [code for language, code in _FENCED.findall(answer) if language.lower() in ("", "python", "python3", "py")]
    blocks = [textwrap.dedent(code) for code in blocks if code.strip()]
    before = _before_function(prompt, name)
    if defining := [at for at, code in enumerate(blocks) if _defines(code, name)]:
        parsed = [code for code in blocks[: defining[-1]] if _parses(code)]
        yield "\n\n".join([before, *parsed, blocks[defining[-1]]])
    for code in blocks:
        yield from _as_body(prompt, code)
    if not blocks and begun is not None:
        lines = answer[begun:].split("\n")[:_MOST_LINES]
        for end in range(len(lines), 0, -1):
            code = "\n".join(lines[:end])
            if _defines(code, name):
                yield before + "\n\n" + code
                return
    if not body:
        yield prompt + answer


def _begun(answer: str) -> int | None:
    """Where an answer that is not a continuation has its first line of code; None for a continuation."""
    found = re.search(r"^(?:def |async def |import |from \w|class |@\w)", answer, re.MULTILINE)
    inside = answer[: found.start()] if found else ""
    return found.start() if found and not re.search(r"^[ \t]+\S", inside, re.MULTILINE) else None


def _as_body(prompt: str, code: str) -> Iterator[str]:
    """The prompt with `code` as the function's body: as it is, with its first line's lost indent, all of it indented."""
    yield prompt + code
    yield prompt + "    " + code.lstrip(" \t\n")
    yield prompt + textwrap.indent(textwrap.dedent(code), "    ")


def _last_function(prompt: str) -> str:
    found = re.findall(r"^(?:async\s+)?def\s+(\w+)", prompt, re.MULTILINE)
    return found[-1] if found else ""


def _before_function(prompt: str, name: str) -> str:
    """Imports and helpers in front of the function that the prompt begins."""
    at = max(
        re.finditer(rf"^(?:@.*\n)*(?:async\s+)?def\s+{name}\b", prompt, re.MULTILINE),
        key=lambda m: m.start(),
        default=None,
    )
    return prompt[: at.start()] if at and name else ""


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parses(code: str) -> bool:
    return _tree(code) is not None


def _defines(code: str, name: str) -> bool:
    tree = _tree(code)
    return tree is not None and any(name in _names(node) for node in tree.body)


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines: a function, a class, a name that a value is given."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]


def _holds(program: str, name: str) -> bool:
    """Whether a program can be parsed and, where the prompt begins a function, that is more than a docstring."""
    tree = _tree(program)
    if tree is None or not name:
        return tree is not None
    last = next((node for node in reversed(tree.body) if name in _names(node)), None)
    return last is not None and not (hasattr(last, "body") and _only_docstring(last.body))


def _only_docstring(body: list[ast.stmt]) -> bool:
    return len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
