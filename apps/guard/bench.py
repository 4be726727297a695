"""`plumbline guard bench`: the guard on a folder of public sets, with Wilson intervals, as tables and one line of JSON.

    plumbline guard bench --data DIR --out docs/results.md

DIR holds <set>/<file>.jsonl.gz with the field names of their publishers; a set that is not there is left out and named. What is measured
is the decision of the policy as it ships: nothing is tuned here but the thresholds that the "at x% false positives" rows
are defined by. At most --limit rows a set are taken, by the hash of their text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from plumbline.eval.stats.intervals import wilson
from plumbline.safety.classifier import SHIPPED, Head
from plumbline.safety.findings import Finding, ScanItem, Stage, Verdict
from plumbline.safety.policy import load_policy
from plumbline.safety.scanning import Scanning
from plumbline.safety.text.obfuscations import OBFUSCATIONS, hostile_texts
from plumbline.safety.training.head_data import Row, _number, read_jsonl
from plumbline.safety.training.train_heads import auroc

SECTIONS = ("harm", "attacks", "toxicity", "pii", "secrets", "obfuscations", "left_out", "hostile")
WITHOUT_DATA = ("left_out", "hostile")  # sections that read no sets
ATTACK = ("x_inj", "x_jbk", "x_spe", "x_exf")


@dataclass(frozen=True)
class TestSet:
    """Texts of one public set; `flag` says whether a guard should block them, `trained` how the heads know the set."""

    name: str
    file: str
    text: Callable[[Row], str]
    flag: bool
    trained: str = "no"
    keep: Callable[[Row], bool] = lambda row: True


def _field(name: str) -> Callable[[Row], str]:
    return lambda row: str(row[name])


def _with_input(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}".strip()


def _standard(row: Row) -> bool:
    return bool(row["FunctionalCategory"] == "standard")


HARM = (
    TestSet("AdvBench", "advbench/harmful_behaviors", _field("goal"), True, "yes"),
    TestSet("HarmBench standard", "harmbench/behaviors_text", _field("Behavior"), True, "yes", _standard),
    TestSet("StrongREJECT", "strongreject/forbidden_prompts", _field("forbidden_prompt"), True),
    TestSet("MaliciousInstruct", "malicious_instruct/prompts", _field("instruction"), True),
    TestSet("CatQA", "catqa/catqa_english", _field("question"), True, "yes"),
    TestSet("Do-Not-Answer", "do_not_answer/questions", _field("prompt"), True),
    TestSet("XSTest unsafe", "xstest/prompts", _field("prompt"), True, keep=lambda row: row["label"] == "unsafe"),
    TestSet("XSTest safe", "xstest/prompts", _field("prompt"), False, keep=lambda row: row["label"] == "safe"),
    TestSet("AlpacaEval", "alpaca_eval/alpaca_eval", _field("instruction"), False),
    TestSet("Dolly", "dolly_2k/train", _with_input, False),
    TestSet("CyberSecEval false refusals", "cyberseceval/mitre_frr_benign", _field("mutated_prompt"), False, "half"),
)  # fmt: skip
ORDINARY = ("AlpacaEval", "Dolly")
TRIO = ("AdvBench", "StrongREJECT", "HarmBench standard")
ATTACKS = (
    TestSet("jailbreaks in the wild", "jailbreaks_in_the_wild/prompts", _field("prompt"), True),
    TestSet("encoded jailbreaks, all", "obfuscated_jailbreaks/jbb_encoded_roleplay", _field("prompt"), True),
    TestSet("CyberSecEval injection", "cyberseceval/prompt_injection", _field("user_input"), True),
)
STRUCTURED = {  # entity of presidio-research -> category
    "EMAIL_ADDRESS": "pii.email", "PHONE_NUMBER": "pii.phone", "CREDIT_CARD": "pii.credit_card", "IBAN_CODE": "pii.iban",
    "IP_ADDRESS": "pii.ip_address", "DOMAIN_NAME": "pii.url", "US_SSN": "pii.national_id", "US_DRIVER_LICENSE": "pii.driver_licence",
}  # fmt: skip


class Seen:
    """What the guard made of one text."""

    def __init__(self, verdict: Verdict) -> None:
        def highest(chosen: Callable[[Finding], bool]) -> float:
            return max((found.score for found in verdict.findings if chosen(found)), default=0.0)

        self.blocked = verdict.blocked
        self.harm = highest(lambda found: found.scanner == "harm")
        self.attack = highest(lambda found: found.category in ATTACK)
        self.toxicity = highest(lambda found: found.category == "tox")
        self.secret = highest(lambda found: found.category.startswith("sec."))
        self.personal = [  # (category, start, end)
            (found.category, span.start, span.end)
            for found in verdict.findings
            if found.category.startswith("pii.") and found.score >= 0.5 and found.view == "raw"
            for span in found.spans
        ]


class Bench:
    """Runs the sections; `tables` collects Markdown, `figures` the numbers of the JSON line."""

    def __init__(self, data: Path, policy: str, limit: int, seed: int) -> None:
        self.data, self.limit, self.seed = data, limit, seed
        # Every scanner runs, so that scores exist for blocked texts too; the decision is the same.
        # And without time limits, so that a busy machine does not count as a guard that blocks.
        self.as_shipped = loaded = load_policy(policy)
        unhurried = tuple(replace(entry, timeout_ms=600_000.0) for entry in loaded.scanners)
        loaded = replace(loaded, stop_early=False, scanners=unhurried)
        self.scanning = Scanning(loaded)
        of_data = tuple(entry for entry in loaded.scanners if entry.use in ("pii", "secrets"))
        self.data_scanning = Scanning(replace(loaded, scanners=of_data))
        self.tables: dict[str, list[str]] = {}
        self.section = ""
        self.figures: dict[str, Any] = {
            "policy": self.scanning.policy.id,
            "policy_sha256": self.scanning.policy.sha256[:12],
        }
        self.missing: list[str] = []
        self.known: dict[tuple[bool, Stage, str], Seen] = {}

    def rows(self, file: str, keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
        path = self.data / f"{file}.jsonl.gz"
        if not path.is_file():
            self.missing.append(file)
            return []
        rows = [row for row in read_jsonl(path) if keep(row)]
        return sorted(rows, key=lambda row: _number(json.dumps(row, sort_keys=True)))[: self.limit]

    def texts(self, test: TestSet) -> list[str]:
        return [test.text(row) for row in self.rows(test.file, test.keep)]

    def see(self, texts: Sequence[str], stage: Stage = Stage.INPUT, *, data_only: bool = False) -> list[Seen]:
        """What the guard makes of each text; a text that several sections ask for is checked once.

        `data_only` asks the scanners of personal data and secrets alone: the others do not change what they find.
        """
        scanning = self.data_scanning if data_only else self.scanning
        new = [text for text in dict.fromkeys(texts) if (data_only, stage, text) not in self.known]
        for start in range(0, len(new), 16):
            batch = new[start : start + 16]
            verdicts = scanning.check_batch([ScanItem(text=text, stage=stage) for text in batch])
            for text, verdict in zip(batch, verdicts, strict=True):
                self.known[data_only, stage, text] = Seen(verdict)
        return [self.known[data_only, stage, text] for text in texts]

    def run(self, section: str, hostile: int) -> None:
        self.section = section
        if section == "hostile":
            self.hostile(hostile)
        else:
            getattr(self, section)()

    def table(self, title: str, head: str, lines: Sequence[str]) -> None:
        columns = head.count("|") + 1
        page = [f"#### {title}\n", f"| {head} |", "|" + "---|" * columns, *(f"| {line} |" for line in lines)]
        self.tables.setdefault(self.section, []).append("\n".join(page))
        print("\n" + "\n".join(page), flush=True)

    # -------------------------------------------------------------------------------------------------------- sections

    def harm(self) -> None:
        lines, ordinary = [], []
        without = Head.load(SHIPPED / "harm.safetensors").card.details.get("left_out", {})
        unseen: dict[str, float] = {}  # recall by a head that never saw the source
        for test in HARM:
            seen = self.see(self.texts(test))
            if seen:
                flagged = sum(one.blocked for one in seen)
                what = "recall" if test.flag else "false positives"
                self.figures[f"{test.name} {what}"] = flagged / len(seen)
                left_out = without.get(test.file.split("/")[0], {}).get("recall")
                unseen[test.name] = flagged / len(seen) if left_out is None else left_out
                trained = test.trained if left_out is None else f"yes; a head without it: {left_out:.3f}"
                lines.append(f"{test.name} | {what} | {interval(flagged, len(seen))} | {len(seen)} | {trained}")
                ordinary += seen if test.name in ORDINARY else []
        if ordinary:
            blocked = sum(one.blocked for one in ordinary)
            self.figures["ordinary_fpr"] = blocked / len(ordinary)
            lines.append(
                f"{' and '.join(ORDINARY)} | false positives | {interval(blocked, len(ordinary))} | {len(ordinary)} | no"
            )
        self.table(
            "Harmful requests: share blocked by the policy",
            "set | what | share [95%] | texts | the harm head was trained on (another half of) the set",
            lines,
        )
        if all(name in unseen for name in TRIO):
            self.figures["harm_recall_mean"] = float(np.mean([self.figures[f"{name} recall"] for name in TRIO]))
            self.figures["harm_recall_mean_unseen"] = float(np.mean([unseen[name] for name in TRIO]))
        rows = self.rows("openai_moderation/samples")
        if rows:
            seen = self.see([row["prompt"] for row in rows])
            lines = []
            for code in ("S", "H", "V", "HR", "SH", "H2", "V2"):
                known = [
                    (one, int(float(row[code])))
                    for one, row in zip(seen, rows, strict=True)
                    if str(row.get(code, "")) not in ("", "None")
                ]
                y = np.array([label for _, label in known])
                if y.sum() >= 5:
                    harm, tox = (np.array([getattr(one, what) for one, _ in known]) for what in ("harm", "toxicity"))
                    lines.append(
                        f"{code} | {area(harm, y)} | {area(tox, y)} | {area(np.maximum(harm, tox), y)} | {int(y.sum())} of {len(y)}"
                    )
            self.table(
                "OpenAI moderation: AUROC by category",
                "category | harm head | toxicity head | higher of both | positives",
                lines,
            )

    def attacks(self) -> None:
        ordinary = [one for test in HARM if test.name in ORDINARY for one in self.see(self.texts(test))]
        if not ordinary:
            return
        quiet = np.array([max(one.attack, 0.0) for one in ordinary])
        cut = {rate: threshold_at(quiet, rate) for rate in (0.01, 0.02)}
        sets: list[tuple[str, list[Seen]]] = [(test.name, self.see(self.texts(test))) for test in ATTACKS]
        encoded = self.rows("obfuscated_jailbreaks/jbb_encoded_roleplay")
        for code in sorted({row["encoding"] for row in encoded}):
            sets.append(
                (f"encoded jailbreaks, {code}", self.see([row["prompt"] for row in encoded if row["encoding"] == code]))
            )
        attacks, mails = self.rows("bipia/text_attack_train"), self.rows("bipia/email_context_train")
        if attacks and mails:
            poisoned = [f"{mails[i % len(mails)]['context']}\n{row['attack']}" for i, row in enumerate(attacks)]
            sets.append(("BIPIA attacks in e-mails", self.see(poisoned, Stage.RETRIEVED)))
            sets.append(("BIPIA attacks alone", self.see([row["attack"] for row in attacks], Stage.RETRIEVED)))
        lines = []
        for name, seen in sets:
            if seen:
                counts = [sum(one.attack > cut[rate] for one in seen) for rate in cut] + [
                    sum(one.blocked for one in seen)
                ]
                either = sum(one.attack > cut[0.02] or one.blocked for one in seen)
                lines.append(" | ".join([name, *(interval(n, len(seen)) for n in counts), str(len(seen))]))
                self.figures |= {f"{name} recall_at_1%": counts[0] / len(seen), f"{name} recall_at_2%": counts[1] / len(seen),
                                 f"{name} blocked": counts[2] / len(seen), f"{name} either": either / len(seen)}  # fmt: skip
        clean = self.see([row["context"] for row in mails], Stage.RETRIEVED)
        if clean:
            lines.append(
                " | ".join(
                    [
                        "clean e-mails (false positives)",
                        *(interval(sum(one.attack > c for one in clean), len(clean)) for c in cut.values()),
                        interval(sum(one.blocked for one in clean), len(clean)),
                        str(len(clean)),
                    ]
                )
            )
        blocked = sum(one.blocked for one in ordinary)
        lines.append(
            f"ordinary instructions (false positives) | 1% | 2% | {interval(blocked, len(ordinary))} | {len(ordinary)}"
        )
        self.table("Injection and jailbreak: recall at 1% and 2% false positives on ordinary instructions, and share blocked",
                   "set | at 1% | at 2% | blocked by the policy | texts", lines)  # fmt: skip

    def toxicity(self) -> None:
        lines = []
        sets: list[tuple[str, str, Callable[[Row], str], Callable[[Row], int], str]] = [
            (
                "HateCheck",
                "hatecheck/test_suite_cases",
                _field("test_case"),
                lambda row: int(row["label_gold"] == "hateful"),
                "no",
            ),
            (
                "ToxiGen, people's labels",
                "toxigen_human/toxigen",
                _field("text"),
                lambda row: int(row["label"] == "hate"),
                "yes",
            ),
        ]
        for name, file, text, label, trained in sets:
            rows = self.rows(file)
            if rows:
                scores, y = (
                    np.array([one.toxicity for one in self.see([text(row) for row in rows])]),
                    np.array([label(row) for row in rows]),
                )
                self.figures[f"{name} auroc"] = auroc(scores, y)
                lines.append(f"{name} | {area(scores, y)} | {len(y)} | {trained}")
        prefixes = self.rows("real_toxicity_prompts/prompts")
        calm = [test for test in HARM if test.name == "AlpacaEval"]
        if prefixes and calm:
            toxic, plain = self.see([row["prompt"] for row in prefixes]), self.see(self.texts(calm[0]))
            scores = np.array([one.toxicity for one in [*toxic, *plain]])
            y = np.array([1] * len(toxic) + [0] * len(plain))
            self.figures["RealToxicityPrompts auroc"] = auroc(scores, y)
            lines.append(f"RealToxicityPrompts prefixes against AlpacaEval | {area(scores, y)} | {len(y)} | no")
        self.table("Toxicity: AUROC", "set | AUROC [95%] | texts | trained on", lines)

    def pii(self) -> None:
        counts: dict[str, list[int]] = {
            category: [0, 0, 0, 0] for category in STRUCTURED.values()
        }  # strict, overlap, said, true
        for file in ("presidio_pii/synth_dataset_v2", "presidio_pii/generated_large"):
            for row in self.rows(file):
                true = [
                    (STRUCTURED[s["entity_type"]], s["start_position"], s["end_position"])
                    for s in row["spans"]
                    if s["entity_type"] in STRUCTURED
                ]
                (seen,) = self.see([row["full_text"]], data_only=True)
                for category in counts:
                    mine, theirs = ([span for span in spans if span[0] == category] for spans in (seen.personal, true))
                    counts[category][0] += len(set(mine) & set(theirs))
                    counts[category][1] += sum(any(a[1] < b[2] and b[1] < a[2] for b in theirs) for a in mine)
                    counts[category][2] += len(mine)
                    counts[category][3] += len(theirs)
        lines = []
        for category, (strict, overlap, said_n, true_n) in [
            *counts.items(),
            ("all", [sum(c) for c in zip(*counts.values(), strict=True)]),
        ]:
            if true_n:
                f1, loose = 2 * strict / max(1, said_n + true_n), 2 * overlap / max(1, said_n + true_n)
                precision = interval(strict, said_n) if said_n else "none said"
                lines.append(
                    f"{category} | {f1:.3f} | {loose:.3f} | {precision} | {interval(strict, true_n)} | {true_n}"
                )
                self.figures[f"pii f1 {category}"] = f1
        self.table(
            "Personal data with a structure: spans",
            "type | F1, exact span | F1, any overlap | precision | recall | spans",
            lines,
        )

    def secrets(self) -> None:
        rows = [row for row in self.rows("secrets/detector_cases") if row["detector"] != "ip_public"]
        if not rows:
            return
        hit = [one.secret >= 0.5 for one in self.see([row["payload"] for row in rows], data_only=True)]
        true = [bool(row["is_secret"]) for row in rows]
        right = sum(a and b for a, b in zip(hit, true, strict=True))
        self.figures |= {"secrets recall": right / max(1, sum(true)), "secrets precision": right / max(1, sum(hit))}
        ordinary = [text for test in HARM if test.name in ORDINARY for text in self.texts(test)]
        false = sum(one.secret >= 0.5 for one in self.see(ordinary, data_only=True))
        self.table("Secrets: test strings of detect-secrets, public IP addresses left out", "figure | share [95%]", [
            f"recall | {interval(right, sum(true))}", f"precision | {interval(right, sum(hit))}",
            f"ordinary instructions with a finding | {interval(false, len(ordinary))}" if ordinary else "ordinary instructions | not there",
        ])  # fmt: skip

    def obfuscations(self) -> None:
        texts = [
            text
            for test in HARM
            if test.name in ("AdvBench", "StrongREJECT")
            for text in self.texts(test)[: min(150, self.limit)]
        ]
        if not texts:
            return
        plain = [one.blocked for one in self.see(texts)]
        lines, worst = [f"plain | {interval(sum(plain), len(plain))} | "], 0.0
        calm = [text for test in HARM if test.name == "AlpacaEval" for text in self.texts(test)[: min(150, self.limit)]]
        for name, change in OBFUSCATIONS.items():
            hit = sum(one.blocked for one in self.see([change(text) for text in texts]))
            false = sum(one.blocked for one in self.see([change(text) for text in calm]))
            loss = (sum(plain) - hit) / len(texts)
            worst = max(worst, loss)
            self.figures[f"recall {name}"] = hit / len(texts)
            lines.append(
                f"{name} | {interval(hit, len(texts))} | {100 * loss:+.1f} points | {interval(false, len(calm)) if calm else ''}"
            )
        lines[0] += f" | {interval(sum(one.blocked for one in self.see(calm)), len(calm)) if calm else ''}"
        self.figures["worst_obfuscation_loss"] = worst
        self.table(
            "Obfuscated harmful requests (AdvBench, StrongREJECT), and AlpacaEval in the same disguise",
            "disguise | blocked | loss | false positives",
            lines,
        )

    def left_out(self) -> None:
        lines = []
        for path in sorted(SHIPPED.glob("*.safetensors")):
            card = Head.load(path).card
            for name, figures in sorted(dict(card.details).get("left_out", {}).items()):
                if card.name != "harm_kind":
                    lines.append(
                        f"{card.name} | {name} | "
                        + ", ".join(f"{key} {value:.3f}" for key, value in figures.items() if value == value)
                    )
        self.table("Heads trained without one of their sources, on that source", "head | left out | figures", lines)

    def hostile(self, count: int = 1000) -> None:
        scanning = Scanning(self.as_shipped)  # with its time limits
        scanning.check("a first text, which loads the models")
        slowest, crashes, opened = 0.0, 0, 0
        for text in hostile_texts(count, self.seed):
            started = time.process_time()
            try:
                verdict = scanning.check(text)
                opened += not verdict.blocked and any(
                    run.status in ("error", "timeout") for run in verdict.runs if run.scanner != "toxicity"
                )
            except Exception:  # noqa: BLE001  counted, and shown below
                crashes += 1
            slowest = max(slowest, time.process_time() - started)
        self.figures |= {
            "hostile": count,
            "hostile_crashes": crashes,
            "hostile_open": opened,
            "hostile_slowest_s": slowest,
        }
        self.table(
            "Random and hostile inputs",
            "inputs | crashes | failed open | slowest",
            [f"{count} | {crashes} | {opened} | {slowest:.2f} CPU s"],
        )


def threshold_at(quiet: np.ndarray, rate: float) -> float:
    """The lowest score that at most `rate` of the texts to be left alone lie above."""
    ordered = np.sort(quiet)[::-1]
    return float(ordered[int(rate * len(ordered))])


def interval(hits: int, n: int) -> str:
    mean, low, high = wilson(hits, n)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def area(scores: np.ndarray, y: np.ndarray) -> str:
    """AUROC with the interval of Hanley and McNeil (1982)."""
    value, n, m = auroc(scores, y), int(y.sum()), int((1 - y).sum())
    if not n or not m:
        return "n/a"
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    half = 1.96 * float(
        np.sqrt((value * (1 - value) + (n - 1) * (q1 - value**2) + (m - 1) * (q2 - value**2)) / (n * m))
    )
    return f"{value:.3f} [{max(0.0, value - half):.3f}, {min(1.0, value + half):.3f}]"


def write(path: Path, section: str, text: str) -> None:
    """Puts the tables of a section between its marks on the page, and leaves the rest of the page as it is."""
    page = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    first, last = f"<!-- guard bench {section}: begin -->", f"<!-- guard bench {section}: end -->"
    block = f"{first}\n{text}\n{last}"
    if first in page and last in page:
        page = page[: page.index(first)] + block + page[page.index(last) + len(last) :]
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    path.write_text(page, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="plumbline guard bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder of sets as <set>/<file>.jsonl.gz; hostile and left_out read none"
    )
    parser.add_argument("--policy", default="default", help="a shipped policy or the path of a YAML file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    parser.add_argument("--limit", type=int, default=400, help="rows a set, at most")
    parser.add_argument("--hostile", type=int, default=1000, help="random and hostile inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--out", type=Path, help="a Markdown page to put the tables into, such as docs/results.md")
    options = parser.parse_args(arguments)
    if options.data is None and not set(options.only) <= set(WITHOUT_DATA):
        raise ValueError(f"--data is missing: give a folder of sets, or --only {' '.join(WITHOUT_DATA)}")
    if options.data is not None and not options.data.is_dir():
        raise ValueError(f"--data {options.data} is not a folder; it must hold <set>/<file>.jsonl.gz")
    if options.limit < 1 or options.hostile < 1:
        raise ValueError(f"--limit {options.limit} and --hostile {options.hostile} must be at least 1")
    bench = Bench(options.data or Path(), options.policy, options.limit, options.seed)
    for section in options.only:
        bench.run(section, options.hostile)
    if bench.missing:
        print(f"\nnot there, so left out: {', '.join(sorted(set(bench.missing)))}")
    bench.figures["missing"] = sorted(set(bench.missing))
    if options.out:
        policy = f"{bench.figures['policy']} ({bench.figures['policy_sha256']})"
        for section, tables in bench.tables.items():
            count = f"--hostile {options.hostile}" if section == "hostile" else f"--limit {options.limit}"
            data = "" if section in WITHOUT_DATA else "--data DIR "
            command = f"plumbline guard bench {data}--policy {options.policy} --only {section} {count}"
            note = f"### Guard: {section.replace('_', ' ')}\n\nMade by `{command}`; policy {policy}."
            write(options.out, section, "\n\n".join([note, *tables]))
    print(
        json.dumps(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in bench.figures.items()}
        )
    )
    return 0
