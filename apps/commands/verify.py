"""`plumbline verify`: an answer against a folder of documents; verdicts with citations as JSON.

    plumbline verify --documents handbook/ --answer "The office opens at 9." --act annotate
    echo "The office opens at 9." | plumbline verify --documents handbook/ --index .index/

`--index` keeps the embedded passages in a folder: the next run embeds what has changed only. Exit status: 0, or 1 where a claim
is refuted or conflicting, 2 for bad input.
"""

import argparse
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one JSON object: tier, counts, claims, and `text` after `--act`."""
    parser = argparse.ArgumentParser(
        prog="plumbline verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", required=True, help="folder (or file) of .txt, .md and .jsonl")
    parser.add_argument("--answer", help="the answer; standard input if left out")
    parser.add_argument("--index", help="folder that keeps the index between runs")
    parser.add_argument("--entailment", help="hub id or folder of a fact checker; the embedded tier if left out")
    parser.add_argument(
        "--act", choices=["annotate", "correct", "drop", "abstain"], help="also print the answer after it"
    )
    parser.add_argument("--top", type=int, default=5, help="passages read a claim")
    args = parser.parse_args(argv)
    from plumbline.safety.verifier.entailment import load_entailment
    from plumbline.safety.verifier.facts import FactChecker, VerifierSettings, act
    from plumbline.safety.verifier.knowledge import index_folder, read_documents

    settings = VerifierSettings(top=args.top)
    read_documents(args.documents)  # before any model loads
    answer = sys.stdin.read() if args.answer is None else args.answer
    if not answer.strip():
        raise ValueError("the answer is empty; pass --answer or pipe it in")
    base = index_folder(args.documents, args.index)
    report = FactChecker(base, entailment=load_entailment(args.entailment), settings=settings).check(answer)
    result = report.to_json()
    if args.act:
        result["text"] = act(report, args.act)
    print(json.dumps(result, ensure_ascii=False, indent=1))
    counts = report.counts()
    return int(counts["refuted"] + counts["conflicting"] > 0)


if __name__ == "__main__":
    sys.exit(main())
