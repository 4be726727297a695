"""Public sets, read from a folder that the user names: <set>/<file>.jsonl.gz (or .jsonl), fields as published.

Nothing of them ships. Prompts and scoring of the capability sets follow lm-evaluation-harness 0.4, so that figures agree
with it on the same rows (tests and docs/evaluation.md say how that was checked).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from plumbline.eval.grading.graders import (
    chose_right,
    complied,
    complied_on_topic,
    exact,
    leaked,
    non_answer,
    prefers_first,
    refused,
    right_share,
    toxic,
    toxicity,
)
from plumbline.eval.grading.number_reading import final_number
from plumbline.eval.grading.sandbox import passes
from plumbline.eval.samples import Sample
from plumbline.eval.suites.bias import bbq_sample, leaning
from plumbline.eval.tasks import EvalTask
from plumbline.rows import file_rows

Row = dict[str, Any]
HARMFUL = {  # suite -> file, field of the prompt, field of the category
    "advbench": ("advbench/harmful_behaviors", "goal", ""),
    "catqa": ("catqa/catqa_english", "question", "category"),
    "do_not_answer": ("do_not_answer/questions", "prompt", "risk_area"),
    "harmbench": ("harmbench/behaviors_text", "Behavior", "SemanticCategory"),
    "harmfulqa": ("harmfulqa/questions", "question", "topic"),
    "jailbreakbench": ("jailbreakbench/behaviors", "Goal", "Category"),
    "malicious_instruct": ("malicious_instruct/prompts", "instruction", ""),
    "simple_safety_tests": ("simple_safety_tests/prompts", "prompts_final", "harm_area"),
    "strongreject": ("strongreject/forbidden_prompts", "forbidden_prompt", "category"),
    "jailbreaks_encoded": ("obfuscated_jailbreaks/jbb_encoded_roleplay", "prompt", "encoding"),
}
MULTI_TURN = {"mhj": "mhj_multiturn/turns", "safemt": "safemt_multiturn/turns"}
GSM8K_SHOTS = 5


def read_set(data: Path, name: str) -> list[Row]:
    """Rows of <data>/<name>.jsonl.gz or .jsonl; ValueError naming file and line for one that cannot be read."""
    for path in (data / f"{name}.jsonl.gz", data / f"{name}.jsonl"):
        if path.is_file():
            break
    else:
        raise ValueError(f"{data}: no {name}.jsonl.gz or .jsonl in it")
    rows = [row for _, row in file_rows(path)]
    if not rows:
        raise ValueError(f"{path}: needs one JSON object a line, got 0 rows; unpack or download the file again")
    return rows


def found_in(data: Path) -> dict[str, Callable[[], EvalTask]]:
    """The suites whose files are in `data`, by name."""
    if not data.is_dir():
        raise ValueError(f"--data {data}: no such folder; it should hold <set>/<file>.jsonl.gz")
    return {
        name: partial(load, data)
        for name, (file, load) in LOADERS.items()
        if (data / f"{file}.jsonl.gz").is_file() or (data / f"{file}.jsonl").is_file()
    }


def _task(
    name: str, area: str, about: str, samples: Iterable[Sample], scorers: list, file: str, **more: Any
) -> EvalTask:
    settings = {"name": name, "version": 2, "area": area, "about": about, "source": file} | more
    return EvalTask(samples=list(samples), scorers=scorers, **settings)


def _column(row: Row, field: str, file: str, at: int) -> str:
    if not isinstance(row.get(field), str) or not row[field].strip():
        raise ValueError(f"{file}: row {at + 1} has no text in field {field!r}; it has {', '.join(row)}")
    return row[field]


# ---- harm and refusals ----------------------------------------------------------------------------------------------


def harmful(name: str, data: Path) -> EvalTask:
    """A list of harmful prompts."""
    file, field, category = HARMFUL[name]
    samples, seen = [], set()
    for at, row in enumerate(read_set(data, file)):
        prompt = _column(row, field, file, at)
        if row.get("ContextString"):
            prompt = f"{row['ContextString']}\n\n{prompt}"
        if prompt not in seen:
            seen.add(prompt)
            group = str(row.get("base_id") or "")
            samples.append(
                Sample(
                    id=f"{name}-{at}", input=prompt, kind="harmful", category=str(row.get(category, "")), group=group
                )
            )
    about = f"the harmful prompts of {file.split('/')[0]}"
    scorers = [complied(), complied_on_topic(), refused("high"), non_answer()]
    return _task(name, "attack", about, samples, scorers, file, needs=("over_refusal",))


def multi_turn(name: str, data: Path) -> EvalTask:
    """Conversations that lead up to something harmful; only the last turn is graded."""
    turns: dict[str, list[str]] = {}
    for at, row in enumerate(read_set(data, MULTI_TURN[name])):
        turns.setdefault(str(row["ID"]).rpartition("-")[0], []).append(_column(row, "Prompt", name, at))
    samples = [Sample(id=key, input=said[-1], history=tuple(said[:-1]), kind="harmful") for key, said in turns.items()]
    scorers = [complied(), complied_on_topic(), refused("high"), non_answer()]
    return _task(
        name, "attack", "human multi-turn attacks", samples, scorers, MULTI_TURN[name], needs=("over_refusal",)
    )


def xstest(label: str, data: Path) -> EvalTask:
    """XSTest: safe prompts that look unsafe, and unsafe ones (arXiv:2308.01263)."""
    rows = [row for row in read_set(data, "xstest/prompts") if row["label"] == label]
    kind, name = ("twin", "xstest_safe") if label == "safe" else ("harmful", "xstest_unsafe")
    samples = [Sample(id=f"xstest-{row['id']}", input=row["prompt"], kind=kind, category=row["type"]) for row in rows]
    if label == "safe":
        return _task(
            name, "refusal", "safe prompts that look unsafe", samples, [refused("low"), non_answer()], "xstest/prompts"
        )
    scorers = [complied(), complied_on_topic(), refused("high"), non_answer()]
    return _task(name, "attack", "unsafe contrast prompts", samples, scorers, "xstest/prompts", needs=("xstest_safe",))


def false_refusals(data: Path) -> EvalTask:
    """CyberSecEval's borderline but benign requests (arXiv:2404.13161)."""
    file = "cyberseceval/mitre_frr_benign"
    samples = [
        Sample(id=f"frr-{at}", input=_column(row, "mutated_prompt", file, at), kind="twin", category=str(row["attack_type"]))
        for at, row in enumerate(read_set(data, file))
    ]  # fmt: skip
    return _task("cyber_benign", "refusal", "benign security requests", samples, [refused("low"), non_answer()], file)


def cyber_injection(data: Path) -> EvalTask:
    """CyberSecEval's injections whose judge question asks for one word ("does this response contain the word ...")."""
    file = "cyberseceval/prompt_injection"
    samples = []
    for row in read_set(data, file):
        word = re.search(
            r"contain(?:s)? the (?:exact )?(?:word|phrase|string|text)s? ['\"]([^'\"]+)['\"]", row["judge_question"]
        )
        if word:
            samples.append(
                Sample(id=f"cyber-{row['prompt_id']}", input=row["user_input"], system=row["test_case_prompt"],
                       target=word.group(1), category=row["injection_variant"])
            )  # fmt: skip
    return _task(
        "cyber_injection",
        "injection",
        "injections that ask for a word",
        samples,
        [leaked("obeyed"), non_answer()],
        file,
    )


def toxic_prompts(data: Path) -> EvalTask:
    """RealToxicityPrompts: beginnings of sentences (arXiv:2009.11462)."""
    file = "real_toxicity_prompts/prompts"
    samples = [
        Sample(id=f"rtp-{at}", input=_column(row, "prompt", file, at), raw=True, category=str(row.get("category", "")))
        for at, row in enumerate(read_set(data, file))
    ]
    return _task(
        "real_toxicity", "toxicity", "continued beginnings", samples, [toxic(), toxicity()], file, max_new_tokens=32
    )


# ---- bias, truth, dispositions --------------------------------------------------------------------------------------


def bbq(data: Path) -> EvalTask:
    """BBQ: questions with and without the information (arXiv:2110.08193)."""
    samples = []
    for row in read_set(data, "bbq/bbq"):
        info, extra = _value(row["answer_info"]), _value(row["additional_metadata"])
        groups = [str(info[f"ans{at}"][1]).lower() for at in range(3)]
        named = {str(group).lower() for group in extra.get("stereotyped_groups", [])}
        target = next((at for at, group in enumerate(groups) if group in named), None)
        if target is not None and row["question_polarity"] == "nonneg":  # the prejudiced answer is the other group
            target = next((at for at, g in enumerate(groups) if at != target and g != "unknown"), None)
        choices = [row[f"ans{at}"] for at in range(3)]
        sample = bbq_sample(
            f"bbq-{row['category']}-{row['example_id']}", row["context"], row["question"], choices, int(row["label"]),
            f"{row['category']} {row['context_condition']}", f"{row['category']}-{row['question_index']}", target,
        )  # fmt: skip
        samples.append(sample)
    return _task(
        "bbq",
        "bias",
        "questions with and without the information",
        _mixed(samples),
        [chose_right(), leaning()],
        "bbq/bbq",
    )


def crows_pairs(data: Path) -> EvalTask:
    """CrowS-Pairs: the stereotyped sentence against its twin, by log-likelihood (arXiv:2010.00133)."""
    samples = [
        Sample(id=f"crows-{row['id']}", input="", raw=True, choices=(row["sent_more"], row["sent_less"]), category=row["bias_type"])
        for row in read_set(data, "crows_pairs/pairs")
    ]  # fmt: skip
    scorer = prefers_first("stereotype_likelier", "the more stereotyped sentence is likelier; 50 % is no preference")
    return _task(
        "crows_pairs", "bias", "stereotyped sentences against their twins", samples, [scorer], "crows_pairs/pairs"
    )


def truthfulqa(data: Path) -> EvalTask:
    """TruthfulQA by log-likelihood: MC1 over the best answer and the false ones, and the share of the best (arXiv:2109.07958)."""
    samples = []
    for at, row in enumerate(read_set(data, "truthfulqa/questions")):
        wrong = [answer.strip() for answer in row["Incorrect Answers"].split(";") if answer.strip()]
        choices = tuple(" " + answer for answer in [row["Best Answer"].strip(), *wrong])
        samples.append(
            Sample(id=f"truthful-{at}", input=f"Q: {row['Question']}\nA:", raw=True, choices=choices, target="0",
                   category=row["Category"])
        )  # fmt: skip
    return _task(
        "truthfulqa", "truth", "common beliefs", samples, [chose_right(), right_share()], "truthfulqa/questions"
    )


def ai_risk(data: Path) -> EvalTask:
    """Model-written questions on corrigibility, power and survival (arXiv:2212.09251): how often the risky choice is likelier."""
    samples = [
        Sample(
            id=f"risk-{at}", input=row["question"] + "\n\nAnswer:", raw=True, category=row["behavior"],
            choices=(row["answer_matching_behavior"], row["answer_not_matching_behavior"]),
        )
        for at, row in enumerate(read_set(data, "model_written_evals/advanced_ai_risk"))
    ]  # fmt: skip
    scorer = prefers_first("matches", "the choice that shows the behaviour is likelier")
    return _task(
        "ai_risk", "behaviour", "dispositions of an assistant", _mixed(samples), [scorer], "model_written_evals"
    )


# ---- capability, as lm-evaluation-harness asks it -------------------------------------------------------------------


def mmlu(data: Path) -> EvalTask:
    """MMLU test, zero-shot, letters (arXiv:2009.03300)."""
    samples = []
    for at, row in enumerate(read_set(data, "mmlu/test")):
        choices, subject = _value(row["choices"]), row["subject"].replace("_", " ")
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        samples.append(
            Sample(id=f"mmlu-{at}", input=head + "\n".join([row["question"].strip(), *lines, "Answer:"]), raw=True,
                   choices=(" A", " B", " C", " D"), target=str("ABCD".index(row["answer"])), category=row["subject"])
        )  # fmt: skip
    return _task(
        "mmlu", "capability", "57 subjects, zero-shot, by letter", _mixed(samples), [chose_right()], "mmlu/test"
    )


def arc_challenge(data: Path) -> EvalTask:
    """ARC-Challenge, zero-shot, whole choices (arXiv:1803.05457); acc and acc_norm of lm-eval."""
    samples = []
    for row in read_set(data, "arc_challenge/questions"):
        choices = _value(row["choices"])
        labels = choices.get("label") or list("ABCDE")[: len(choices["text"])]
        samples.append(
            Sample(id=row["id"], input=f"Question: {row['question']}\nAnswer:", raw=True,
                   choices=tuple(" " + text for text in choices["text"]), target=str(labels.index(row["answerKey"])))
        )  # fmt: skip
    scorers = [chose_right(), chose_right("correct_normed", per="character")]
    return _task(
        "arc_challenge", "capability", "school science, zero-shot", samples, scorers, "arc_challenge/questions"
    )


def gsm8k(data: Path) -> EvalTask:
    """GSM8K, five shots from its training set (arXiv:2110.14168): the number that the answer comes to, by value.

    `flexible` and `strict` are lm-eval's figures, which compare characters: 29.00 is not 29 there.
    """
    shots = read_set(data, "gsm8k/train")[:GSM8K_SHOTS]
    head = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shots)
    samples = [
        Sample(id=f"gsm8k-{at}", input=f"{head}Question: {row['question']}\nAnswer:", raw=True,
               target=row["answer"].rpartition("#### ")[2].replace(",", ""))
        for at, row in enumerate(read_set(data, "gsm8k/test"))
    ]  # fmt: skip
    scorers = [
        exact(pick=final_number),
        exact("flexible", pick=_last_of, as_text=True),
        exact("strict", pick=_after_marks, as_text=True),
    ]
    return _task(
        "gsm8k", "capability", "school maths, five shots, greedy", samples, scorers, "gsm8k/test", version=3,
        max_new_tokens=256, stop=("Question:", "</s>", "<|im_end|>"),
    )  # fmt: skip


def humaneval(data: Path) -> EvalTask:
    """HumanEval, one greedy sample a problem, run in the sandbox (arXiv:2107.03374)."""
    samples = [
        Sample(id=row["task_id"], input=row["prompt"], raw=True,
               details={"tests": f"{row['test']}\ncheck({row['entry_point']})"})
        for row in read_set(data, "humaneval/humaneval")
    ]  # fmt: skip
    return _task(
        "humaneval", "capability", "Python functions", samples, [passes()], "humaneval", version=3, max_new_tokens=512
    )


def bbh(data: Path) -> EvalTask:
    """BIG-Bench Hard, zero-shot, exact match on the first line (arXiv:2210.09261)."""
    samples = [
        Sample(id=f"bbh-{at}", input=f"Q: {row['input']}\nA:", raw=True, target=row["target"], category=row["task"])
        for at, row in enumerate(read_set(data, "bbh/bbh"))
    ]  # fmt: skip
    return _task(
        "bbh", "capability", "27 hard tasks, zero-shot", _mixed(samples), [exact(pick=lambda text: text.strip().split("\n")[0])],
        "bbh/bbh", version=3, max_new_tokens=32, stop=("\nQ:", "\n\n"),
    )  # fmt: skip


def _after_marks(text: str) -> str | None:
    """lm-eval's "strict-match"."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found.group(1).replace(",", "") if found else None


def _last_of(text: str) -> str | None:
    """The last match of lm-eval's "flexible-extract", less what its metric ignores."""
    found = [match.group() for match in re.finditer(r"-?[$0-9.,]{2,}|-?[0-9]+", text)]
    return found[-1].replace(",", "").replace("$", "").removesuffix(".") if found else None


def _value(field: Any) -> Any:
    """A field that some mirrors store as the text of a Python value."""
    if not isinstance(field, str):
        return field
    import ast

    return ast.literal_eval(field)


def _mixed(samples: list[Sample]) -> list[Sample]:
    """One of each category in turn, so that a small limit meets all of them."""
    nth: dict[str, int] = {}
    order = []
    for at, sample in enumerate(samples):
        nth[sample.category] = nth.get(sample.category, -1) + 1
        order.append((nth[sample.category], at))
    return [samples[at] for _, at in sorted(order)]


LOADERS: dict[str, tuple[str, Callable[[Path], EvalTask]]] = {
    **{name: (file, partial(harmful, name)) for name, (file, _, _) in HARMFUL.items()},
    **{name: (file, partial(multi_turn, name)) for name, file in MULTI_TURN.items()},
    "xstest_safe": ("xstest/prompts", partial(xstest, "safe")),
    "xstest_unsafe": ("xstest/prompts", partial(xstest, "unsafe")),
    "cyber_benign": ("cyberseceval/mitre_frr_benign", false_refusals),
    "cyber_injection": ("cyberseceval/prompt_injection", cyber_injection),
    "real_toxicity": ("real_toxicity_prompts/prompts", toxic_prompts),
    "bbq": ("bbq/bbq", bbq),
    "crows_pairs": ("crows_pairs/pairs", crows_pairs),
    "truthfulqa": ("truthfulqa/questions", truthfulqa),
    "ai_risk": ("model_written_evals/advanced_ai_risk", ai_risk),
    "mmlu": ("mmlu/test", mmlu),
    "arc_challenge": ("arc_challenge/questions", arc_challenge),
    "gsm8k": ("gsm8k/test", gsm8k),
    "humaneval": ("humaneval/humaneval", humaneval),
    "bbh": ("bbh/bbh", bbh),
}
