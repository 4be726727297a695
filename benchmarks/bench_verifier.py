"""The fact checker on any folder of sets: balanced accuracy, retrieval, citations, planted number and date swaps.

    python benchmarks/bench_verifier.py --data DIR [--limit 300] [--entailment HUB_ID]

Reads what is there of: factcheck_gpt (claim and web evidence), climate_fever (claim and sentence), fever (only where rows carry
the text of their evidence), halueval (question, answer, knowledge), xquad_en and knowledge_corpus (claims made from questions and
answers; retrieval over the whole corpus). What is not there is listed. Nothing is fitted here: thresholds are those of
`VerifierSettings`.

- balanced accuracy: mean recall of "supported" and "not supported" at P(supported) >= 0.5 without a veto, given the evidence.
- `refuted_recall`, `refuted_false`: of pairs that are refuted, and of the others, how many the embedded tier calls refuted.
- R@1, R@5: the right document among the first passages' documents.
- swaps: one number, year or date of a sentence of the corpus is changed; the whole pipeline (retrieval included) must refute it.
  `untouched_refuted` is how many of the same sentences it refutes unchanged.

Appends to benchmarks/results/verifier.csv and ends with a line of JSON.
"""

import argparse
import gzip
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.records import append_measures
from plumbline.eval.stats.intervals import wilson
from plumbline.safety.verifier.claims import Claim, sentence_spans
from plumbline.safety.verifier.entailment import EntailmentModel, load_entailment
from plumbline.safety.verifier.facts import FactChecker, FactVerdict, VerifierSettings, judge
from plumbline.safety.verifier.knowledge import Document, Hit, KnowledgeBase, Passage
from plumbline.safety.verifier.vetoes import quantities, same

RESULTS = Path(__file__).parent / "results" / "verifier.csv"
COLUMNS = "commit tier set measure value low high n".split()
Pair = tuple[str, str, str]  # evidence, claim, "supported" | "refuted" | "other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="rows a set, drawn with --seed")
    parser.add_argument("--entailment", help="hub id or folder; the embedded tier if left out")
    parser.add_argument("--only", nargs="*", help="sets to read")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data}: no such folder")
    sets = {name: list(read(args.data)) for name, read in PAIR_SETS.items() if not args.only or name in args.only}
    model = load_entailment(args.entailment)
    rows, missing = [], [name for name, pairs in sets.items() if not pairs]
    for name, pairs in sets.items():
        if pairs:
            random.Random(args.seed).shuffle(pairs)
            rows += pair_figures(name, pairs[: args.limit], model, args.seed)
    if not args.only or "corpus" in args.only:
        corpus = [Document(row["doc_id"], row["text"]) for row in lines(args.data, "knowledge_corpus", "documents")]
        if corpus:
            rows += corpus_figures(corpus, list(lines(args.data, "xquad_en", "qa")), model, args.limit, args.seed)
        else:
            missing.append("knowledge_corpus")
    append_measures(RESULTS, COLUMNS, f"{model.name} ({model.quality})", rows)
    for name, measure, value, low, high, n in rows:
        print(f"{name:16} {measure:22} {value:7.3f} [{low:.3f}, {high:.3f}] n={n}")
    figures = {f"{name}_{measure}": round(value, 4) for name, measure, value, *_ in rows}
    print(json.dumps({"tier": f"{model.name} ({model.quality})", **figures, "missing": missing}))


# Given evidence


def factcheck_gpt(data: Path) -> Iterator[Pair]:
    label = {"completely-support": "supported", "refute": "refuted", "irrelevant": "other"}
    for row in lines(data, "factcheck_gpt", "claim_evidence_stance"):
        if row["stance"] in label:  # "partially-support" is neither
            yield row["evidence"], row["claim"], label[row["stance"]]


def climate_fever(data: Path) -> Iterator[Pair]:
    label = {"SUPPORTS": "supported", "REFUTES": "refuted", "NOT_ENOUGH_INFO": "other"}
    for row in lines(data, "climate_fever", "claims"):
        for evidence in row["evidences"]:
            yield evidence["evidence"], row["claim"], label[evidence["evidence_label"]]


def fever(data: Path) -> Iterator[Pair]:
    label = {"SUPPORTS": "supported", "REFUTES": "refuted", "NOT ENOUGH INFO": "other"}
    for row in lines(data, "fever", "paper_dev"):
        if isinstance(row.get("evidence_text"), str):
            yield row["evidence_text"], row["claim"], label[row["label"]]


def halueval_qa(data: Path) -> Iterator[Pair]:
    for file in ("qa_one_turn_500", "qa_multi_turn_500"):
        for row in lines(data, "halueval", file):
            question = row["question"].strip()
            if row["right_answer"].strip(" .").lower() in ("yes", "no"):
                continue  # no claim without its question
            yield row["knowledge"], statement(question, row["right_answer"]), "supported"
            yield row["knowledge"], statement(question, row["hallucinated_answer"]), "other"


def xquad(data: Path) -> Iterator[Pair]:
    """Right answers, and answers to other questions of the same paragraph."""
    rows = list(lines(data, "xquad_en", "qa"))
    for row in rows:
        right = row["answers"][0]["text"]
        yield row["context"], statement(row["question"], right), "supported"
        rivals = [r["answers"][0]["text"] for r in rows if r["context"] == row["context"]]
        wrong = next(
            (text for text in rivals if text.lower() not in right.lower() and right.lower() not in text.lower()), None
        )
        if wrong:
            yield row["context"], statement(row["question"], wrong), "other"


PAIR_SETS = {
    "factcheck_gpt": factcheck_gpt,
    "climate_fever": climate_fever,
    "fever": fever,
    "halueval_qa": halueval_qa,
    "xquad": xquad,
}


def statement(question: str, answer: str) -> str:
    """A question and its answer as one text; an answer that is a sentence says it alone."""
    return answer if len(answer.split()) >= 8 else f"{question.rstrip('? ')}: {answer}"


def pair_figures(name: str, pairs: list[Pair], model: EntailmentModel, seed: int) -> list[tuple]:
    """Balanced accuracy with a bootstrap interval over pairs, and recall and false alarms of "refuted"."""
    scores = model.score([(evidence, claim) for evidence, claim, _ in pairs])
    settings = VerifierSettings()
    verdicts = []
    for (evidence, claim, _), score in zip(pairs, scores.tolist(), strict=True):
        passage = Passage(Document("given", evidence), 0, len(evidence))
        hit = Hit(passage, 1.0, 1.0, 1.0)  # the evidence is given: it is about the claim
        verdicts.append(judge(Claim(claim, 0, len(claim), claim), [(hit, score)], settings).verdict)
    gold = np.array([label for *_, label in pairs])
    yes = np.array([verdict is FactVerdict.SUPPORTED for verdict in verdicts])
    refuted = np.array([verdict is FactVerdict.REFUTED for verdict in verdicts])
    rng = np.random.default_rng(seed)
    drawn = [balanced(yes[at], gold[at]) for at in rng.integers(len(pairs), size=(2000, len(pairs)))]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    rows = [(name, "balanced_accuracy", balanced(yes, gold), float(low), float(high), len(pairs))]
    for measure, chosen in (("refuted_recall", gold == "refuted"), ("refuted_false", gold == "supported")):
        if chosen.any():
            rows.append(share(name, measure, refuted[chosen]))
    return rows


def balanced(yes: np.ndarray, gold: np.ndarray) -> float:
    positive = gold == "supported"
    if positive.all() or not positive.any():
        return float("nan")
    return float((yes[positive].mean() + (~yes[~positive]).mean()) / 2)


# Over a corpus


def corpus_figures(
    corpus: list[Document], questions: list[dict], model: EntailmentModel, limit: int, seed: int
) -> list[tuple]:
    """R@1 and R@5, planted swaps, the same sentences untouched, verbatim citations, milliseconds a claim."""
    base = KnowledgeBase(corpus)
    checker = FactChecker(base, entailment=model)
    rng = random.Random(seed)
    rows = []
    by_text = {document.text: document.doc_id for document in corpus}
    known = [row for row in questions if row["context"] in by_text]
    rng.shuffle(known)
    known = known[:limit]
    if known:
        hits = base.search([statement(row["question"], row["answers"][0]["text"]) for row in known])
        found = [[hit.passage.document.doc_id for hit in some] for some in hits]
        want = [by_text[row["context"]] for row in known]
        rows.append(share("corpus", "R@1", np.array([w in f[:1] for f, w in zip(found, want, strict=True)])))
        rows.append(share("corpus", "R@5", np.array([w in f for f, w in zip(found, want, strict=True)])))
    sentences = [d.text[a:b] for d in corpus for a, b in sentence_spans(d.text) if 40 <= b - a <= 300]
    rng.shuffle(sentences)
    swapped = [(s, wrong) for s in sentences if (wrong := swap(s, rng)) is not None][:limit]
    verbatim, caught, untouched, supported, timings = [], [], [], [], []
    for right, wrong in swapped:
        started = time.perf_counter()
        reports = checker.check(wrong), checker.check(right)
        timings.append((time.perf_counter() - started) / sum(len(r.claims) for r in reports))
        bad, good = ([claim.verdict for claim in report.claims] for report in reports)
        caught.append(FactVerdict.REFUTED in bad or FactVerdict.CONFLICTING in bad)
        untouched.append(FactVerdict.REFUTED in good or FactVerdict.CONFLICTING in good)
        supported.append(all(v in (FactVerdict.SUPPORTED, FactVerdict.NOT_CHECKABLE) for v in good))
        for evidence in (e for report in reports for claim in report.claims for e in claim.evidence):
            verbatim.append(base.documents[evidence.doc_id].text[evidence.start : evidence.end] == evidence.quote)
    rows.append(share("corpus", "swaps_caught", np.array(caught)))
    rows.append(share("corpus", "untouched_refuted", np.array(untouched)))
    rows.append(share("corpus", "untouched_supported", np.array(supported)))
    rows.append(share("corpus", "citations_verbatim", np.array(verbatim)))
    p50, p95 = np.percentile(np.array(timings) * 1000, [50, 95])
    rows.append(("corpus", "p50_ms_per_claim", float(p50), float(p50), float(p95), len(timings)))
    return rows


def swap(sentence: str, rng: random.Random) -> str | None:
    """The sentence with one of its numbers, years or dates changed to another that it does not hold."""
    there = [q for q in quantities(sentence) if re.search(r"\d", q.text)]
    if not there:
        return None
    chosen = rng.choice(there)
    digits = re.search(r"\d+(?:,\d{3})*", chosen.text)
    assert digits is not None
    value = int(digits[0].replace(",", ""))
    new = (
        value + rng.choice([-30, -9, -4, 5, 11, 40])
        if 1000 <= value <= 2100 and "," not in digits[0]
        else value * 2 + 3
    )
    if chosen.kind == "date":
        new = value % 28 + 1
    if chosen.kind == "share" and new > 100:
        new = value // 2
    text = chosen.text.replace(digits[0], f"{new:,}" if "," in digits[0] else str(new), 1)
    wrong = sentence[: chosen.start] + text + sentence[chosen.end :]
    changed = [q for q in quantities(wrong) if not any(same(q, other) for other in there)]
    return wrong if changed else None


def share(name: str, measure: str, hits: np.ndarray) -> tuple:
    interval = wilson(int(hits.sum()), len(hits))
    return name, measure, float(hits.mean()) if len(hits) else float("nan"), interval.low, interval.high, len(hits)


def lines(data: Path, folder: str, file: str) -> Iterator[dict]:
    """Rows of DIR/folder/file.jsonl or .jsonl.gz; none where there is no such file."""
    for path in (data / folder / f"{file}.jsonl", data / folder / f"{file}.jsonl.gz"):
        if path.is_file():
            opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
            with opened as stream:
                yield from (json.loads(line) for line in stream if line.strip())
            return


if __name__ == "__main__":
    main()
