"""An SFT set in a model's own voice: its own best answers to harmless prompts, declines in its own words to harmful ones.

Launch: `plumbline self-answers --config configs/self_answers/demo.yaml`

A small model that is taught to decline in an author's words learns neither the words nor when to use them: forty
declines have forty different first tokens, and an author's prose is far from its own. So

1. the opening of every decline is the one that the model itself finds likeliest: it is asked harmful prompts, its answers
   that decline (by the head in `safety/verifier/refusal.py`) offer their first sentence, common ways to decline stand beside
   them, and the sentence with the highest mean log-probability a token after the prompts wins. The reason and the way out that
   follow come from the data: the sentences of the written decline that do not decline themselves, as many as fit;
2. harmless prompts, those that sound harmful among them, get answers that the model draws itself. Left out are answers
   that never ended, that decline, that loop or say nothing; of the rest the best by the composite reward is kept. With
   `hint` the model is asked for short answers while it draws, and the hint is left out of the row: what it does when told
   to be brief it then does untold (context distillation, Askell et al. 2021, arXiv:2112.00861);
3. rows are mixed by shares: how much of the set is harmful, a harmless twin, ordinary. A kind with too few prompts is
   gone through again.

What the run leaves: `sft.jsonl` (prompt, answer, kind); `answers.jsonl` (the kept own answers, one a prompt, to be handed
to a later run as `answers_file`); `pairs.jsonl` for a reward model that is to know both sides: on harmful prompts the decline
over the rejected answer of the data, where it has one, on harmless ones the own answer over a decline that was written for
another prompt; and `report.json` (the opening and its rivals, what was left out and why, counts by kind).
"""

import json
import random
import re
import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.align.data.rows import read_prompts, read_rows
from plumbline.align.rl.rollouts import pad_answers
from plumbline.align.runtime.launch import launched, open_run, parse_settings, pick_dtype
from plumbline.align.runtime.tracking import write_rows
from plumbline.eval.grading.text_checks import repetition
from plumbline.eval.samples import KINDS
from plumbline.messages import last_user_text, read_answer, read_prompt
from plumbline.paths import STARTER, resolve_path
from plumbline.policy_models.chat import encode_prompts, sample_answers
from plumbline.policy_models.devices import default_device
from plumbline.policy_models.loading import load_for_answers, load_tokenizer, resolve_model_source
from plumbline.policy_models.logprobs import answer_logprobs, pack_rows, token_budget_batches
from plumbline.reward import CompositeReward, default_composite
from plumbline.rows import is_sound
from plumbline.safety.verifier.refusal import load_refusal_head

STARTER_FILES = "sft preferences prompts harm_twins twins declines harmless".split()
Declines = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # P(the answer declines), one a row
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+|\n+")
HARMFUL_TOKENS, HARMFUL_TEMPERATURE = 32, 0.7  # of answers to harmful prompts: how they begin is what counts
WAYS = (  # in which instruction models decline; which of them, the model in question says
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that.",
    "Sorry, I can't help with that.",
    "I'm unable to assist with that.",
    "I can't help with that.",
    "I cannot help with that.",
    "I won't help with that.",
    "I must decline this request.",
    "I cannot fulfill your request.",
    "Unfortunately, I can't help with that.",
)
SURE = 0.8  # mean probability from which a sentence is a decline whatever was asked
OPENINGS_SCORED = 6  # most frequent ones
SCORED_ON = 8  # prompts


@dataclass(kw_only=True)
class SelfAnswerSettings:
    """Whose answers, to what, and how they are mixed."""

    model: str = field(default="bundled:tiny-moe", metadata={"help": "the model that answers: name, folder or hub id"})
    dtype: str = field(default="auto", metadata={"help": "of the computation: auto, bfloat16, float16 or float32"})
    output_dir: str = field(default="runs/self_answers", metadata={"help": "run folder"})
    prompts_files: str = field(
        default=",".join(str(STARTER / f"{name}.jsonl") for name in STARTER_FILES),
        metadata={
            "help": "JSON Lines with commas between: prompt, kind (harmful, twin, ordinary) and, where a harmful row "
            "has one, a written decline as answer or chosen"
        },
    )
    answers_file: str | None = field(
        default=None, metadata={"help": "answers.jsonl of an earlier run: these prompts are not answered again"}
    )
    new_prompts: int | None = field(
        default=None,
        metadata={"help": "prompts that are answered at most; none: all without an answer, 0: no new ones"},
    )
    answers_per_prompt: int = field(default=2, metadata={"help": "answers drawn for each, of which the best is kept"})
    max_new_tokens: int = field(default=64, metadata={"help": "answers that have not ended by then are left out"})
    max_prompt_tokens: int = field(default=160, metadata={"help": "longer prompts are left out"})
    temperature: float = field(default=0.5, metadata={"help": "of the draws"})
    hint: str = field(
        default="Answer in one or two short sentences.",
        metadata={"help": "added to harmless prompts while answers are drawn, not kept in the rows; empty: nothing"},
    )
    max_repetition: float = field(default=0.3, metadata={"help": "share of repeated 3-grams above which it is a loop"})
    min_words: int = field(default=4, metadata={"help": "shorter own answers are left out"})
    rank: bool = field(default=True, metadata={"help": "keep the best by the composite reward; false: the first"})
    opening: str | None = field(default=None, metadata={"help": "first words of declines; none: the model's own"})
    harmful_answers: int = field(
        default=160,
        metadata={
            "help": "harmful prompts that the model is asked: its declines offer the opening, the rest are rejected in pairs"
        },
    )
    decline_words: int = field(default=32, metadata={"help": "words of a decline at most, whole sentences"})
    rows: int | None = field(default=None, metadata={"help": "rows of the set; none: each prompt once"})
    harmful_share: float = field(default=0.4, metadata={"help": "of the rows, where rows is set"})
    twin_share: float = field(default=0.35, metadata={"help": "the same; the rest is ordinary"})
    max_pairs: int = field(default=120, metadata={"help": "pairs a kind in pairs.jsonl at most"})
    skip_prompts: str | None = field(
        default=None,
        metadata={"help": "JSON Lines whose prompts stay out of sft.jsonl, such as those of later rollouts"},
    )
    seed: int = field(default=0, metadata={"help": "of draws and order"})

    def __post_init__(self) -> None:
        at_least_one = "answers_per_prompt max_new_tokens max_prompt_tokens decline_words max_pairs"
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("rows", "new_prompts", "harmful_answers"):
            least = 1 if name == "rows" else 0
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        for name in ("harmful_share", "twin_share", "max_repetition"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        if self.harmful_share + self.twin_share > 1:
            raise ValueError(
                f"harmful_share={self.harmful_share} and twin_share={self.twin_share} add to more than 1: lower one"
            )
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0")
        if self.opening is not None and not self.opening.strip():
            raise ValueError("opening is empty: give words, or leave it out to find the model's own")
        if not self.prompts_files.strip():
            raise ValueError("prompts_files is empty: name at least one JSON Lines file")
        pick_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt; of a harmful one a written decline and a written answer that complies, "" where there is none."""

    text: str
    kind: str
    decline: str = ""
    complied: str = ""


# ---- reading ----------------------------------------------------------------------------------------------------------


def read_kinds(paths: Sequence[Path]) -> list[Prompt]:
    """The prompts of all files, each text once, the first with a decline before others.

    ValueError naming file and line for a row without prompt or kind, and for a text that is harmful in one place and
    harmless in another.
    """
    found: dict[str, Prompt] = {}
    place_of: dict[str, str] = {}
    for path in paths:
        for place, row in read_rows(path):
            text = last_user_text(read_prompt(place, row)[0])
            kind = row.get("kind")
            if kind not in KINDS:
                raise ValueError(f"{place}: kind={kind!r} must be one of {', '.join(KINDS)}")
            decline, complied = "", ""
            if kind == "harmful" and ("answer" in row or "chosen" in row):
                decline = read_answer(place, row, ("answer", "chosen"))
            if kind == "harmful" and "rejected" in row:
                complied = read_answer(place, row, ("rejected",))
            old = found.get(text)
            if old and (old.kind == "harmful") != (kind == "harmful"):
                raise ValueError(f"{place}: {text[:60]!r} is {kind} here and {old.kind} in {place_of[text]}; mend one")
            if old is None or (decline and not old.decline):
                found[text], place_of[text] = Prompt(text=text, kind=kind, decline=decline, complied=complied), place
    return list(found.values())


def read_own_answers(path: Path) -> dict[str, str]:
    """Answers by prompt, as an earlier run left them."""
    answers = {}
    for place, row in read_rows(path):
        prompt = last_user_text(read_prompt(place, row)[0])
        answers[prompt] = read_answer(place, row, ("answer",))
    return answers


# ---- declines ---------------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The sentences of a text, without space at their ends."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def find_opening(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    declined: Declines,
) -> list[tuple[str, int, float]]:
    """The model's likeliest ways to decline, best first: (sentence, answers that opened with it, log-probability a token).

    `answers` are the model's to harmful `prompts`. Its first sentence is a candidate when it is called a decline after its own
    prompt and, on average, after others: what declines is then the sentence and not the pair. A small model declines too
    seldom for its answers alone, so the ways in which other models decline (`WAYS`) are candidates too. All are scored after
    the same prompts, in nats a token: by the sum the shortest would win.
    """
    firsts = [(sentences(answer) or [""])[0] for answer in answers]
    likely = declined(list(prompts), firsts)
    counts = Counter(first for first, p in zip(firsts, likely, strict=True) if p > 0.5 and first[-1] in ".!")
    others = list(prompts[:SCORED_ON])
    own = [
        text
        for text in sorted(counts, key=lambda text: (-counts[text], text))[: 2 * OPENINGS_SCORED]
        if sum(declined(others, [text] * len(others))) > SURE * len(others)
    ][:OPENINGS_SCORED]
    candidates = list(dict.fromkeys([*own, *WAYS]))
    ids = encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in others])
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in candidates]
    scores = mean_logp(model, tokenizer, ids, candidates)
    rows = [
        (text, counts[text], score / length) for text, score, length in zip(candidates, scores, lengths, strict=True)
    ]
    return sorted(rows, key=lambda row: -row[2])


@torch.inference_mode()
def mean_logp(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[list[int]], texts: Sequence[str]
) -> list[float]:
    """Log-probability of each text as the beginning of an answer, in nats, mean over the prompts."""
    rows = [(ids, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts for ids in prompt_ids]
    asked, said = [list(ids) for ids, _ in rows], [answer for _, answer in rows]
    answer_ids = pad_answers(said, fill=tokenizer.pad_token_id, dtype=torch.long).to(model.device)
    keep = pad_answers([[1] * len(ids) for ids in said], fill=0, dtype=torch.bool).to(model.device)
    logp = torch.zeros(len(rows))
    for group in token_budget_batches(list(map(len, asked)), list(map(len, said)), 4096):
        packed = pack_rows(asked, answer_ids, keep, group, tokenizer.pad_token_id)
        logp[group] = answer_logprobs(model, packed, temperature=1.0)[0].sum(dim=1).float().cpu()
    return logp.view(len(texts), -1).mean(dim=1).tolist()


def own_declines(opening: str, prompts: Sequence[Prompt], *, declined: Declines, words: int) -> list[str]:
    """For each prompt the opening, then the sentences of its written decline that do not decline themselves, up to `words`."""
    rest = [(at, sentence) for at, prompt in enumerate(prompts) for sentence in sentences(prompt.decline)]
    likely = declined([prompts[at].text for at, _ in rest], [sentence for _, sentence in rest]) if rest else []
    texts, full = [opening] * len(prompts), [False] * len(prompts)
    for (at, sentence), p in zip(rest, likely, strict=True):
        if p > 0.5 or full[at]:
            continue
        longer = f"{texts[at]} {sentence}"
        full[at] = len(longer.split()) > words
        texts[at] = texts[at] if full[at] else longer
    return texts


# ---- own answers ------------------------------------------------------------------------------------------------------


def why_left_out(answer: str, *, finished: bool, declines: float, settings: SelfAnswerSettings) -> str | None:
    """The rule that an own answer breaks, None for a good one."""
    if not finished:
        return "unfinished"
    if len(answer.split()) < settings.min_words:
        return "short"
    if declines > 0.5:
        return "declines"
    if not is_sound(answer):
        return "no text"
    return "loops" if repetition(answer) > settings.max_repetition else None


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    settings: SelfAnswerSettings,
    declined: Declines,
    reward: CompositeReward | None,
) -> tuple[dict[str, str], Counter[str]]:
    """(best own answer by prompt, how many answers each rule left out). Without `reward` the first good one is best."""
    texts = [prompt.text for prompt in prompts for _ in range(settings.answers_per_prompt)]
    asked = [f"{text.rstrip()} {settings.hint}".rstrip() for text in texts]
    answers, said = sample_answers(
        model,
        tokenizer,
        encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in asked]),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        generator=torch.Generator(model.device).manual_seed(settings.seed),
    )
    said = [answer.strip() for answer in said]
    left_out: Counter[str] = Counter()
    good = []
    for row, p in enumerate(declined(texts, said)):
        why = why_left_out(said[row], finished=answers[row].finished, declines=p, settings=settings)
        if why is None:
            good.append(row)
        else:
            left_out[why] += 1
    worth: Sequence[float | None] = [0.0] * len(good)
    if reward is not None and good:
        raw = reward.raw([texts[row] for row in good], [said[row] for row in good])
        if len(good) > 1:
            reward.fit_raw(raw)
        worth = reward.combine(raw).total
    best: dict[str, tuple[float, str]] = {}
    for row, value in zip(good, worth, strict=True):
        if value is not None and (texts[row] not in best or value > best[texts[row]][0]):
            best[texts[row]] = (value, said[row])
    return {text: answer for text, (_, answer) in best.items()}, left_out


# ---- the set ----------------------------------------------------------------------------------------------------------


def mix(by_kind: dict[str, list[dict[str, str]]], settings: SelfAnswerSettings) -> list[dict[str, str]]:
    """Rows in random order; with `rows`, by the shares, each kind gone through in full before any row comes again.

    ValueError when a kind with a share has no row.
    """
    rng = random.Random(settings.seed)
    if settings.rows is None:
        rows = [row for kind in KINDS for row in by_kind.get(kind, [])]
        rng.shuffle(rows)
        return rows
    wanted = {
        "harmful": round(settings.rows * settings.harmful_share),
        "twin": round(settings.rows * settings.twin_share),
    }
    wanted["ordinary"] = settings.rows - sum(wanted.values())
    rows = []
    for kind, count in wanted.items():
        have = by_kind.get(kind, [])
        if count > 0 and not have:
            raise ValueError(f"no row of kind {kind} is left for its share of {count} rows; add prompts or set it to 0")
        taken: list[dict[str, str]] = []
        while len(taken) < count:
            taken += rng.sample(have, len(have))
        rows += taken[:count]
    rng.shuffle(rows)
    return rows


def pairs_of(
    rows: dict[str, list[dict[str, str]]], complied: dict[str, str], settings: SelfAnswerSettings
) -> list[dict[str, str]]:
    """Pairs that say which behaviour is right for a prompt, at most `max_pairs` a kind, ordinary prompts half as many.

    complied: an answer that complies, by harmful prompt.
    """
    rng = random.Random(settings.seed + 1)
    declines = [row["answer"] for row in rows["harmful"]]
    pairs = []
    for kind in KINDS:
        able = [row for row in rows[kind] if (row["prompt"] in complied if kind == "harmful" else declines)]
        most = settings.max_pairs if kind != "ordinary" else settings.max_pairs // 2
        for row in rng.sample(able, min(len(able), most)):
            other = complied[row["prompt"]] if kind == "harmful" else rng.choice(declines)
            if other != row["answer"]:
                pairs.append({"prompt": row["prompt"], "chosen": row["answer"], "rejected": other, "kind": kind})
    rng.shuffle(pairs)
    return pairs


def self_answers(
    settings: SelfAnswerSettings, *, reward: CompositeReward | None = None, declined: Declines | None = None
) -> Path:
    """Builds the set and returns the run folder. `reward` and `declined` replace the shipped ones."""
    prompts = read_kinds([resolve_path(part.strip()) for part in settings.prompts_files.split(",") if part.strip()])
    known = read_own_answers(resolve_path(settings.answers_file)) if settings.answers_file else {}
    _check_shares(settings, prompts)
    skipped: set[str] = set()
    if settings.skip_prompts:
        skipped = {last_user_text(prompt) for prompt in read_prompts(resolve_path(settings.skip_prompts))}
    resolve_model_source(settings.model)
    run = open_run(settings.output_dir, settings)
    tokenizer = load_tokenizer(settings.model)
    prompts = _short_enough(tokenizer, prompts, settings.max_prompt_tokens)
    harmful = [prompt for prompt in prompts if prompt.kind == "harmful"]
    harmless = [prompt for prompt in prompts if prompt.kind != "harmful"]
    order = random.Random(settings.seed)
    fresh = [prompt for prompt in harmless if prompt.text not in known and prompt.text not in skipped]
    fresh = order.sample(fresh, min(len(fresh), len(fresh) if settings.new_prompts is None else settings.new_prompts))
    declined = declined or load_refusal_head().at_once
    report: dict[str, Any] = {"opening": settings.opening, "openings": [], "left_out": {}}

    model: Any = None
    if fresh or (harmful and (settings.opening is None or settings.harmful_answers)):
        model = load_for_answers(settings.model, dtype=pick_dtype(settings.dtype))
        model.to(default_device())
    complied = {prompt.text: prompt.complied for prompt in harmful if prompt.complied}
    if harmful and (settings.harmful_answers or settings.opening is None):
        count = min(len(harmful), settings.harmful_answers or SCORED_ON)
        asked = order.sample([prompt.text for prompt in harmful], count)
        said = _answers_to_harm(model, tokenizer, asked, settings.seed + 1)
        complied |= {
            text: answer.strip()
            for text, answer, p in zip(asked, said, declined(asked, said), strict=True)
            if p < 0.5 and len(answer.split()) >= settings.min_words and is_sound(answer)
        }
        if settings.opening is None:
            rivals = find_opening(model, tokenizer, asked, said, declined=declined)
            report |= {
                "opening": rivals[0][0],
                "openings": [{"text": text, "answers": count, "logp": round(logp, 2)} for text, count, logp in rivals],
            }
    own = dict(known)
    if fresh:
        if settings.rank and settings.answers_per_prompt > 1:
            reward = reward or default_composite()
        else:
            reward = None
        drawn, left_out = answer_prompts(model, tokenizer, fresh, settings=settings, declined=declined, reward=reward)
        own |= drawn
        report["left_out"] = dict(left_out)
        report["drawn"] = {"prompts": len(fresh), "answers": len(fresh) * settings.answers_per_prompt}

    rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    texts = own_declines(str(report["opening"]), harmful, declined=declined, words=settings.decline_words)
    for prompt, text in zip(harmful, texts, strict=True):
        rows["harmful"].append({"prompt": prompt.text, "answer": text, "kind": "harmful"})
    for prompt in harmless:
        if prompt.text in own:
            rows[prompt.kind].append({"prompt": prompt.text, "answer": own[prompt.text], "kind": prompt.kind})
    pairs = pairs_of(rows, complied, settings)
    kept = {kind: [row for row in of if row["prompt"] not in skipped] for kind, of in rows.items()}
    mixed = mix(kept, settings)
    if not mixed:
        raise ValueError(
            "no row is left: every answer broke a rule; see report.json, raise max_new_tokens or the limits"
        )
    report |= {
        "prompts": {kind: len(rows[kind]) for kind in KINDS},
        "rows": {kind: sum(row["kind"] == kind for row in mixed) for kind in KINDS},
        "pairs": {kind: sum(pair["kind"] == kind for pair in pairs) for kind in KINDS},
        "own_answers": {"taken_over": len(own) - (len(drawn) if fresh else 0), "new": len(drawn) if fresh else 0},
    }
    write_rows(run / "sft.jsonl", mixed)
    write_rows(run / "pairs.jsonl", pairs)
    write_rows(run / "answers.jsonl", [row for kind in KINDS[1:] for row in rows[kind]])
    (run / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return run


def _check_shares(settings: SelfAnswerSettings, prompts: Sequence[Prompt]) -> None:
    if settings.rows is None and settings.opening is not None:
        return
    for kind, share in (("harmful", settings.harmful_share), ("twin", settings.twin_share)):
        if share and all(prompt.kind != kind for prompt in prompts):
            raise ValueError(f"{settings.prompts_files}: no prompt of kind {kind}, whose share is {share}")


def _answers_to_harm(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], seed: int) -> list[str]:
    _, said = sample_answers(
        model,
        tokenizer,
        encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in asked]),
        max_new_tokens=HARMFUL_TOKENS,
        temperature=HARMFUL_TEMPERATURE,
        generator=torch.Generator(model.device).manual_seed(seed),
    )
    return said


def _short_enough(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], limit: int) -> list[Prompt]:
    ids = encode_prompts(tokenizer, [[{"role": "user", "content": prompt.text}] for prompt in prompts])
    kept = [prompt for prompt, one in zip(prompts, ids, strict=True) if len(one) <= limit]
    if not kept:
        raise ValueError(f"max_prompt_tokens={limit}: all {len(prompts)} prompts are longer; raise the limit")
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    (settings,) = parse_settings((SelfAnswerSettings,), argv)
    run = self_answers(settings)
    report = json.loads((run / "report.json").read_text())
    counts = ", ".join(f"{count} {kind}" for kind, count in report["rows"].items())
    print(f"self_answers: declines open with {report['opening']!r}; left out {report['left_out']}")
    print(f"self_answers: finished, {counts} rows in {run / 'sft.jsonl'}")


if __name__ == "__main__":
    launched(main, "self_answers")
