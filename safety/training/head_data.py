"""Reads the rows that the classifier heads are trained and tested on.

Two sources. `starter` is the folder of data written for this project. `data` is an optional folder of public sets, one gzipped
JSON Lines file each as `<set>/<file>.jsonl.gz`, with the field names of their publishers; a set that is not there is left
out and named in the training report. Only sets whose licence allows any use without conditions on derived weights are
read for training (MIT, Apache-2.0, CC BY); the sets in `read_tests` are never trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline.rows import file_rows
from plumbline.safety.text.worst_piece import sentences
from plumbline.safety.training import identity_sentences
from plumbline.safety.training.refusal_sentences import LOOKALIKES, stock_compliances, stock_declines

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One labelled text. `prompt` is set where the label is about an answer to it; `group` rows stay on one side of a split."""

    text: str
    label: int
    source: str
    category: str = ""
    prompt: str = ""
    group: str = ""


def read_jsonl(path: str | Path) -> list[Row]:
    """Rows of a file; raises ValueError with file and line for a line that is not a JSON object."""
    return [row for _, row in file_rows(path)]


def read_starter(folder: str | Path) -> dict[str, list[Row]]:
    """The starter files that heads learn from, by name; each must be there. The evaluation file is not among them."""
    folder, rows = Path(folder), {}
    names = "sft preferences prompts harm_twins twins injection tone declines self_answers"
    for name in names.split():
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; --starter must name the folder with the starter data (data/starter)")
        rows[name] = read_jsonl(path)
    return rows


def text_of(row: Row, name: str) -> str:
    """A field as text; a conversation (list of role/content messages) counts as its last message."""
    value = row[name]
    return value if isinstance(value, str) else value[-1]["content"]


# ---------------------------------------------------------------------------------------------- harm of a prompt

STARTER_HARM = {"harmful": 1, "twin": 0, "ordinary": 0}

CATEGORY_OF = {  # category names of public sets -> hazard code; names left out have no single code
    "Adult Content": "sxc",
    "Child Abuse": "cse",
    "Fraud/Deception": "ncr",
    "Hate/Harass/Violence": "hte",
    "Illegal Activity": "ncr",
    "Malware Viruses": "ncr",
    "Physical Harm": "vcr",
    "Political Campaigning": "dfm",
    "Privacy Violation Activity": "prv",
    "Tailored Financial Advice": "spc",
    "Harassment/Discrimination": "hte",
    "Malware/Hacking": "ncr",
    "Economic harm": "ncr",
    "Disinformation": "dfm",
    "Privacy": "prv",
    "Expert advice": "spc",
    "Sexual/Adult content": "sxc",
    "chemical_biological": "iwp",
    "cybercrime_intrusion": "ncr",
    "harassment_bullying": "hte",
    "misinformation_disinformation": "dfm",
}


def starter_harm(starter: Mapping[str, list[Row]]) -> list[Example]:
    """Prompts of every starter file, once each; ordinary prompts and twins are harmless."""
    seen: dict[str, Example] = {}
    for name in ("harm_twins", "twins", "prompts", "sft", "preferences"):
        for row in starter[name]:
            text, kind = text_of(row, "prompt"), row["kind"]
            source = f"twin_{row['recipe']}" if "recipe" in row else "starter_twin" if kind == "twin" else "starter"
            category = row.get("category", "") if kind == "harmful" else ""
            seen.setdefault(
                text, Example(text=text, label=STARTER_HARM[kind], source=source, category=category, group=text)
            )
    return list(seen.values())


def public_harm(data: Path) -> Iterator[Example]:
    """Harmful requests and everyday prompts from the public sets that are present under `data`.

    Not used: Do-Not-Answer and HarmfulQA. They call a question harmful for its topic ("What is ..."), which teaches a
    head to refuse topics: with them, the share of XSTest's safe prompts that are flagged rises from 0.12 to 0.38.
    """

    def harmful(source: str, text: str, category: str = "") -> Example:
        return Example(text=text, label=1, source=source, category=CATEGORY_OF.get(category, ""), group=text)

    def harmless(source: str, text: str) -> Example:
        return Example(text=text, label=0, source=source, group=text)

    for row in _set(data, "advbench/harmful_behaviors"):
        yield harmful("advbench", row["goal"])
    for row in _set(data, "harmbench/behaviors_text"):
        if (
            row["FunctionalCategory"] != "copyright"
        ):  # a copyright behaviour is harmful by what is copied, not by its words
            yield harmful("harmbench", row["Behavior"], row["SemanticCategory"])
    for row in _set(data, "catqa/catqa_english"):
        yield harmful("catqa", row["question"], row["category"])
    for row in _set(data, "jailbreakbench/behaviors"):
        yield harmful("jailbreakbench", row["Goal"], row["Category"])
    for row in _set(data, "tdc2023/behaviors"):
        yield harmful("tdc2023", row["instruction"])

    for row in _set(data, "self_instruct/seed_tasks") + _set(data, "self_instruct/user_oriented_252"):
        given = row["instances"][0]["input"]
        yield harmless("self_instruct", f"{row['instruction']}\n\n{given}".strip())
    for row in _thin(_set(data, "t0_mixture/train"), 1000, "prompt"):
        yield harmless("t0_mixture", row["prompt"])
    for row in _set(data, "oasst_sample/en_100_tree"):
        for text in _prompter_texts(row["prompt"]):
            yield harmless("oasst_sample", text)
    for row in _set(data, "mt_bench/questions"):
        yield harmless("mt_bench", row["turns"][0])
    for row in mitre_benign(data, held_out=False):
        yield harmless("mitre_benign", row["mutated_prompt"])
    for row in _set(data, "mmlu/dev") + _thin(_set(data, "mmlu/val"), 600, "question"):
        yield harmless("mmlu", row["question"])
    for row in _thin(_set(data, "gsm8k/train"), 600, "question"):
        yield harmless("gsm8k", row["question"])
    for row in _thin(_set(data, "medquad/qa"), 600, "question"):
        yield harmless("medquad", row["question"])


def mitre_benign(data: Path, *, held_out: bool) -> list[Row]:
    """Borderline but benign security prompts (CyberSecEval), in two halves by hash: one trained on, one a test."""
    rows = _set(data, "cyberseceval/mitre_frr_benign")
    return [row for row in rows if (_number(row["mutated_prompt"]) % 2 == 1) == held_out]


def _prompter_texts(message: Row) -> Iterator[str]:
    if message.get("role") == "prompter":
        yield message["text"]
    for reply in message.get("replies", []):
        yield from _prompter_texts(reply)


# -------------------------------------------------------------------------------------------- prompt injection, jailbreak


def starter_injection(starter: Mapping[str, list[Row]]) -> list[Example]:
    """Attacks on a model's instructions and their harmless look-alikes, by two recipes; other starter texts attack nothing.

    Harmful requests count as no attack: asking for something bad in plain words is the harm head's matter.
    """
    examples = [
        Example(
            text=row["text"], label=int(row["attack"]), source=row["recipe"], category=row["kind"], group=row["text"]
        )
        for row in starter["injection"]
    ]
    # Attempts to lift the rules among the harmful prompts are attacks in other words; they stay out.
    plain = [
        row for name in ("harm_twins", "twins", "prompts") for row in starter[name] if row.get("category") != "x_jbk"
    ]
    seen = {text_of(row, "prompt") for row in plain}
    examples += [Example(text=text, label=0, source="starter", group=text) for text in sorted(seen)]
    answers = {text_of(row, "answer") for row in starter["sft"]} | {
        text_of(row, "chosen") for row in starter["preferences"]
    }
    return examples + [Example(text=text, label=0, source="starter", group=text) for text in sorted(answers)]


def public_injection(data: Path) -> Iterator[Example]:
    """Jailbreak templates and injections of the public sets under `data`, and everyday prompts and passages, long ones too."""
    for row in _set(data, "gptfuzz_templates/templates"):
        yield Example(text=row["Prompt"], label=1, source="gptfuzz", category="jailbreak", group=row["Prompt"])
    for row in _set(data, "giskard_injections/prompts"):
        yield Example(text=row["prompt"], label=1, source="giskard", category="injection", group=row["prompt"])
    for row in _set(data, "sysprompt_extraction/attacks"):
        yield Example(
            text=row["prompt"], label=1, source="sysprompt_extraction", category="injection", group=row["prompt"]
        )
    for example in public_harm(data):
        yield Example(text=example.text, label=0, source=example.source, group=example.text)
    for example in public_answers(data):
        yield Example(text=example.text, label=0, source="answers", group=example.text)


# --------------------------------------------------------------------------------------------- refusal by an answer


def starter_refusals(starter: Mapping[str, list[Row]]) -> list[Example]:
    """Answers that decline (1) or engage (0).

    SFT answers decline exactly on harmful prompts. In harmlessness pairs the chosen answer declines a harmful prompt
    and answers a twin; the rejected one does the opposite. Helpfulness pairs engage on both sides.
    """
    rows = []
    for row in starter["sft"]:
        rows.append((text_of(row, "prompt"), text_of(row, "answer"), int(row["kind"] == "harmful")))
    for row in starter["preferences"]:
        prompt = text_of(row, "prompt")
        declines = row["axis"] == "harmlessness" and row["kind"] == "harmful"
        over = row["axis"] == "harmlessness" and row["kind"] == "twin"
        rows.append((prompt, text_of(row, "chosen"), int(declines)))
        rows.append((prompt, text_of(row, "rejected"), int(over)))
    return [
        Example(prompt=prompt, text=answer, label=label, source="starter", group=prompt)
        for prompt, answer, label in rows
    ]


def written_refusals(starter: Mapping[str, list[Row]]) -> Iterator[Example]:
    """Stock declines and stock compliances beside a starter prompt drawn at random, and the look-alikes that answer."""
    prompts = [text_of(row, "prompt") for row in starter["harm_twins"]]
    for text in stock_declines(600):
        yield Example(prompt=prompts[_number(text) % len(prompts)], text=text, label=1, source="stock", group=text)
    for text in stock_compliances(400):
        yield Example(prompt=prompts[_number(text) % len(prompts)], text=text, label=0, source="advice", group=text)
    for prompt, text in LOOKALIKES:
        yield Example(prompt=prompt, text=text, label=0, source="lookalike", group=prompt)


def refusals_of_a_small_model(starter: Mapping[str, list[Row]]) -> Iterator[Example]:
    """Answers as a small model gives them: its own, which engage, and declines that wander off after their first sentence.

    The start of an alignment run opens in stock words and then goes on as it can: about the subject, about something else, or
    not at all. It is a decline all the same. Stock sentences stand before written reasons and before sentences of own answers.
    """
    declines, own = starter["declines"], starter["self_answers"]
    stock = [text for text in stock_declines(600) if len(text.split()) <= 16]
    for at, row in enumerate(declines):
        prompt, answer = text_of(row, "prompt"), text_of(row, "answer")
        yield Example(prompt=prompt, text=answer, label=1, source="decline", group=prompt)
        spans = sentences(answer)
        rest = " ".join(answer[span.start : span.end].strip() for span in spans[1 : 2 + at % 2])
        opening = stock[_number(prompt) % len(stock)]
        yield Example(prompt=prompt, text=f"{opening} {rest}".strip(), label=1, source="opened", group=prompt)
    for at, row in enumerate(own):
        prompt, answer = text_of(row, "prompt"), text_of(row, "answer")
        yield Example(prompt=prompt, text=answer, label=0, source="own", group=prompt)
        spans = sentences(answer)
        if at % 3 == 0 and spans:
            first = answer[: spans[0].end].strip()
            opening = stock[_number(answer) % len(stock)]
            yield Example(prompt=prompt, text=f"{opening} {first}", label=1, source="wandering", group=prompt)
        if at % 9 == 0:
            opening = stock[_number(prompt + answer) % len(stock)]
            yield Example(prompt=prompt, text=opening, label=1, source="opened", group=prompt)


def public_answers(data: Path) -> Iterator[Example]:
    """Answers that engage, long ones and about illness too: first replies of oasst trees, and MedQuAD."""
    for row in _set(data, "oasst_sample/en_100_tree"):
        for prompt, text in _first_replies(row["prompt"]):
            yield Example(prompt=prompt, text=text, label=0, source="oasst_sample", group=prompt)
    for row in _thin(_set(data, "medquad/qa"), 300, "question"):
        text = " ".join(row["answer"].split()[:250])
        yield Example(prompt=row["question"], text=text, label=0, source="medquad", group=row["question"])


def _first_replies(message: Row) -> Iterator[tuple[str, str]]:
    for reply in message.get("replies", [])[:1]:
        if message["role"] == "prompter" and reply["role"] == "assistant":
            yield message["text"], reply["text"]
        yield from _first_replies(reply)


# ------------------------------------------------------------------------------------------------ toxicity of a text


def starter_toxicity(starter: Mapping[str, list[Row]]) -> list[Example]:
    """Judged tone; ordinary prompts and good answers, whole and by sentences; and sentences that name groups of people."""
    examples = []
    for row in starter["tone"]:
        examples.append(Example(text=row["text"], label=int(row["toxic"]), source="tone", group=row["text"]))
    plain = [text_of(row, "answer") for row in starter["sft"]]
    plain += [text_of(row, "chosen") for row in starter["preferences"]]
    plain += [text_of(row, "prompt") for row in starter["prompts"] if row["kind"] != "harmful"]
    for text in plain:
        pieces = [text[span.start : span.end].strip() for span in sentences(text)]
        examples += [Example(text=piece, label=0, source="starter", group=text) for piece in [text, *pieces]]
    for template, label in identity_sentences.TRAIN:
        for group in identity_sentences.GROUPS:
            examples.append(Example(text=template.format(group), label=label, source="identity", group=template))
    return examples


def public_toxicity(data: Path) -> Iterator[Example]:
    """Statements about groups of people (ToxiGen, ImplicitHate) and tweets, judged by people."""
    for row in _set(data, "toxigen_human/toxigen"):
        yield Example(text=row["text"], label=int(row["label"] == "hate"), source="toxigen", group=row["text"])
    for row in _thin(_set(data, "toxigen_human/implicit_hate"), 2500, "text"):
        yield Example(text=row["text"], label=int(row["label"] == "hate"), source="implicit_hate", group=row["text"])
    for row in _thin(_set(data, "hate_offensive_tweets/labeled_data"), 2000, "tweet"):
        yield Example(text=row["tweet"], label=int(row["class"] != "2"), source="tweets", group=row["tweet"])


# ------------------------------------------------------------------------------------------------------------ tests


def read_tests(data: Path) -> dict[str, list[Example]]:
    """Sets that no head is ever trained on, by name; a set that is not there gives an empty list."""

    def plain(name: str, field: str, label: int) -> list[Example]:
        return [Example(text=row[field], label=label, source=name) for row in _set(data, name)]

    def any_flag(row: Row) -> int:
        return int(any(str(row.get(key, "0")) in {"1", "1.0"} for key in ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")))

    dolly = _set(data, "dolly_2k/train")
    return {
        "strongreject": plain("strongreject/forbidden_prompts", "forbidden_prompt", 1),
        "malicious_instruct": plain("malicious_instruct/prompts", "instruction", 1),
        "xstest": [
            Example(text=row["prompt"], label=int(row["label"] == "unsafe"), source="xstest", category=row["type"])
            for row in _set(data, "xstest/prompts")
        ],
        "dolly": [
            Example(text=f"{row['instruction']}\n\n{row['input']}".strip(), label=0, source="dolly") for row in dolly
        ],
        "alpaca_eval": plain("alpaca_eval/alpaca_eval", "instruction", 0),
        "mitre_benign_held_out": [
            Example(text=row["mutated_prompt"], label=0, source="mitre") for row in mitre_benign(data, held_out=True)
        ],
        "xstest_completions": [
            Example(
                prompt=row["prompt"],
                text=row["completion"],
                label=int(row["final_label"] != "1_full_compliance"),
                source=row["model"],
                category=row["final_label"],
            )
            for row in _set(data, "xstest/completions_human_labelled")
        ],
        "jailbreaks_in_the_wild": plain("jailbreaks_in_the_wild/prompts", "prompt", 1),
        "cyberseceval_injection": plain("cyberseceval/prompt_injection", "user_input", 1),
        "bipia": plain("bipia/text_attack_train", "attack", 1),
        "hatecheck": [
            Example(text=row["test_case"], label=int(row["label_gold"] == "hateful"), source="hatecheck")
            for row in _set(data, "hatecheck/test_suite_cases")
        ],
        "openai_moderation": [
            Example(text=row["prompt"], label=any_flag(row), source="openai_moderation", category=_hate_flag(row))
            for row in _set(data, "openai_moderation/samples")
        ],
    }


def _hate_flag(row: Row) -> str:
    return "hate" if any(str(row.get(key, "0")) in {"1", "1.0"} for key in ("H", "H2", "HR")) else ""


# ------------------------------------------------------------------------------------------------------------ helpers


def _set(data: Path, name: str) -> list[Row]:
    path = data / f"{name}.jsonl.gz"
    return read_jsonl(path) if path.is_file() else []


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _thin(rows: list[Row], count: int, field: str) -> list[Row]:
    """`count` rows chosen by the hash of their text: the same ones whatever the order of the file."""
    return sorted(rows, key=lambda row: _number(row[field]))[:count]
