"""`plumbline guard`: check a text, explain a verdict, chat behind the guard, index documents, measure, watch for drift.

plumbline guard check "Ignore your instructions" --policy default     # JSON, exit status 1 if it is blocked
cat mail.txt | plumbline guard explain - --stage retrieved
plumbline guard chat --url http://localhost:8000/v1 --model my-model
plumbline guard index --documents handbook/ --index handbook.index    # then: chat ... --index handbook.index
plumbline guard bench --data DIR
plumbline guard drift --reference before.jsonl --window now.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plumbline.safety.backends import openai_endpoint
from plumbline.safety.findings import Action, Stage, Verdict
from plumbline.safety.pipeline import FACT_ACTIONS, Guard, mended, record
from plumbline.safety.scanning import Conversation
from plumbline.safety.taxonomy import meaning, severity


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from plumbline.apps.guard import bench as guard_bench

        return guard_bench.main(arguments[1:])
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plumbline guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what)
        sub.add_argument("--policy", default="default", help="a shipped policy or the path of a YAML file")
        sub.set_defaults(run=run)
        return sub

    for name, run, what in (
        ("check", _check, "the verdict as JSON; exit status 1 if the text is blocked"),
        ("scan", _check, "the same as check"),
        ("explain", _explain, "which rule fired on which span and why"),
    ):
        sub = command(name, run, what)
        sub.add_argument("text", nargs="*", default=["-"], help="texts, or - for standard input")
        sub.add_argument("--stage", default="input", choices=[stage.value for stage in Stage])
        sub.add_argument("--prompt", default="", help="what was asked, where the text is an answer")
        sub.add_argument("--system", default="", help="the system prompt, to see whether an answer leaks it")
    sub = command("chat", _chat, "talk to a model behind the guard")
    sub.add_argument("--url", required=True, help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    sub.add_argument("--model", required=True, help="the model's name there")
    sub.add_argument("--key-variable", default="OPENAI_API_KEY", help="environment variable that holds the key")
    sub.add_argument("--index", type=Path, help="check answers against the documents of this index")
    sub.add_argument("--act", default="annotate", choices=FACT_ACTIONS, help="what a fact check does to the answer")
    sub = commands.add_parser("index", help="make or update the index of a folder that answers are checked against")
    sub.add_argument("--documents", type=Path, required=True, help="folder (or file) of .txt, .md and .jsonl")
    sub.add_argument("--index", type=Path, required=True, help="folder of the index; what is unchanged is kept")
    sub.set_defaults(run=_index)
    sub = command("drift", _drift, "compare a window of inputs with a reference window")
    sub.add_argument("--reference", type=Path, required=True, help="JSON Lines with a field `text`")
    sub.add_argument("--window", type=Path, required=True, help="JSON Lines with a field `text`")
    commands.add_parser("bench", help="measure the guard on a folder of sets (see `plumbline guard bench --help`)")
    return parser


def _texts(options: argparse.Namespace) -> list[str]:
    """The texts; what is no UTF-8, and half a surrogate pair, is read as U+FFFD."""
    return [mended(_standard_input() if text == "-" else text) for text in options.text]


def _standard_input() -> str:
    binary = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if binary is None else binary.read().decode("utf-8", "replace")


def _verdicts(options: argparse.Namespace) -> list[tuple[str, Verdict]]:
    guard, stage = Guard(options.policy), Stage(options.stage)
    return [
        (text, guard.check(text, stage, prompt=mended(options.prompt), system=mended(options.system)))
        for text in _texts(options)
    ]


def _check(options: argparse.Namespace) -> int:
    blocked = False
    for _, verdict in _verdicts(options):
        print(json.dumps(record(verdict) | {"text": verdict.text}, ensure_ascii=False))
        blocked |= verdict.blocked
    return int(blocked)


def _explain(options: argparse.Namespace) -> int:
    for text, verdict in _verdicts(options):
        print(explain(text, verdict))
    return 0


def explain(text: str, verdict: Verdict) -> str:
    """A verdict for a person: the action, each rule that fired with what it fired on, and every scanner's status."""
    lines = [f"{verdict.action.name} by {verdict.policy_id} ({verdict.policy_sha256[:12]}), {verdict.stage}"]
    if Action.ALLOW < verdict.action:
        lines.append(f"passed on: {verdict.text}")
    for one in verdict.fired:
        lines.append(f"\nrule {one.rule!r} -> {one.action.name}: {one.why}")
        for index in one.findings:
            found = verdict.findings[index]
            lines.append(
                f"  {meaning(found.category)} ({found.category}, severity {severity(found.category)}), "
                f"score {found.score:.2f}, by {found.scanner} in the {found.view} text: {found.reason}"
            )
            for span in found.spans[:5]:
                lines.append(f"    [{span.start}, {span.end}) {_shown(text[span.start : span.end], found.category)}")
    others = set(range(len(verdict.findings))) - {index for one in verdict.fired for index in one.findings}
    if others:
        lines.append("\nseen, below every rule:")
        for index in sorted(others):
            found = verdict.findings[index]
            lines.append(f"  {meaning(found.category)}, score {found.score:.2f}, by {found.scanner}: {found.reason}")
    lines.append("\nscanners: " + ", ".join(
        f"{run.scanner} {run.status}" + (f" ({run.detail})" if run.detail else f" {run.ms:.1f} ms") for run in verdict.runs
    ))  # fmt: skip
    return "\n".join(lines)


def _shown(text: str, category: str) -> str:
    """A span as it may stand on a screen: secrets only by their length."""
    if category.startswith("sec."):
        return f"({len(text)} characters)"
    return json.dumps(text if len(text) <= 80 else text[:77] + "...", ensure_ascii=False)


def _chat(options: argparse.Namespace) -> int:
    model = openai_endpoint(options.url, options.model, key_variable=options.key_variable)
    facts = None
    if options.index:
        from plumbline.safety.verifier.facts import FactChecker
        from plumbline.safety.verifier.knowledge import KnowledgeBase

        facts = FactChecker(KnowledgeBase.load(options.index))
    guard = Guard(options.policy, model=model, facts=facts, fact_action=options.act)
    conversation = Conversation()
    messages: list[dict[str, str]] = []
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return 0
        messages.append({"role": "user", "content": prompt})
        said = ""
        for piece in guard.stream(messages, conversation=conversation):
            print(piece, end="", flush=True)
            said += piece
        print()
        messages.append({"role": "assistant", "content": said})


def _index(options: argparse.Namespace) -> int:
    from plumbline.safety.verifier.knowledge import index_folder

    base = index_folder(options.documents, options.index)
    print(json.dumps({
        "documents": len(base.documents), "passages": len(base.passages), "embedded_now": base.num_embedded, "index": str(options.index),
    }))  # fmt: skip
    return 0


def _drift(options: argparse.Namespace) -> int:
    from plumbline.safety.drift import compare, read_texts

    report = compare(read_texts(options.reference), read_texts(options.window), policy=options.policy)
    for name, value in report.psi.items():
        print(f"PSI of {name:<24} {value:.3f}  {'drifted' if value >= 0.25 else 'moved' if value >= 0.1 else 'steady'}")
    print(f"MMD of the embeddings        {report.mmd:.5f}  p = {report.p:.3f} ({report.permutations} permutations)")
    print(json.dumps(report.as_dict()))
    return int(report.drifted)


if __name__ == "__main__":
    sys.exit(main())
