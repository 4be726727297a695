"""Items in, labels out: JSON Lines and TRL's formats, the starter pairs, hub data sets, generated pairs, data cards."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from plumbline.apps.label.store.answers import CRITERIA
from plumbline.apps.label.store.items import NewItem, NewResponse, check_item, log_event
from plumbline.apps.label.store.queue import FIRST
from plumbline.apps.label.store.store import LabelStore
from plumbline.apps.label.store.votes import Vote, for_training, read_votes, settle
from plumbline.messages import as_messages, with_system, without_prompt
from plumbline.rows import hub_rows, read_rows, rows_of_bytes

# In


def read_items(content: bytes, name: str, *, gold: bool = False) -> list[NewItem]:
    """Items of an uploaded file; ValueError with file, line, value and rule. `gold`: see `item_of`."""
    return [item_of(place, row, source=name, gold=gold) for place, row in rows_of_bytes(content, name)]


def item_of(place: str, row: dict[str, Any], *, source: str, gold: bool = False) -> NewItem:
    """One row as an item. Taken are rows of ours (`prompt`, `responses`, and any of `gold`, `warning`, `tags`,
    `target_labels`) and TRL's preference rows, explicit (`prompt`, `chosen`, `rejected`) or implicit in messages.

    An imported preference is not shown to anyone; with `gold` it makes the row a gold item.
    """
    try:
        prompt, responses, preferred = _texts(row)
        tags = row.get("tags", {})
        if not isinstance(tags, dict) or not all(isinstance(value, str) for value in tags.values()):
            raise ValueError(f"tags={tags!r:.80}: must map names to texts")
        for name in ("axis", "kind", "category", "topic"):
            if isinstance(row.get(name), str) and row[name]:
                tags = tags | {name: row[name]}
        marked = row.get("gold")
        if marked is None and gold:
            if not preferred:
                raise ValueError("a gold item needs `gold`, or `chosen` and `rejected`")
            marked = {"winner": 0}
        if marked is not None and not isinstance(marked, dict):
            raise ValueError(f"gold={marked!r:.80}: takes {{'winner': index}} or {{'outcome': 'tie' or 'both_bad'}}")
        target = row.get("target_labels")
        if target is not None and (isinstance(target, bool) or not isinstance(target, int)):
            raise ValueError(f"target_labels={target!r}: must be a whole number")
        item = NewItem(
            prompt=prompt,
            responses=responses,
            source=str(row.get("source", source)),
            warning=str(row.get("warning", "")),
            gold=marked,
            target_labels=target,
            tags=tags | ({"imported_preference": "0"} if preferred else {}),
        )
        check_item(item)
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).removeprefix(': ')}") from None
    return item


def _texts(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[NewResponse], bool]:
    """(prompt, answers, whether the first is known to be preferred)."""
    if "responses" in row:
        if not isinstance(row["responses"], list):
            raise ValueError("responses must be a list of texts or of objects with `text`")
        asked = with_system("", row, as_messages("", "prompt", row.get("prompt"), "user"))
        return _plain(asked), [_response(one) for one in row["responses"]], False
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(f"found {sorted(row)}; a row has `prompt` and `responses`, or `chosen` and `rejected`")
    if row.get("prompt") is None:
        chosen, rejected = (as_messages("", name, row[name], "assistant") for name in ("chosen", "rejected"))
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            raise ValueError("without `prompt`, chosen and rejected must be messages that differ in the last one only")
        prompt, answers = with_system("", row, chosen[:-1]), [chosen[-1:], rejected[-1:]]
    else:
        prompt, answers = with_system("", row, as_messages("", "prompt", row["prompt"], "user")), []
        for name in ("chosen", "rejected"):
            prompt, answer = without_prompt("", name, prompt, as_messages("", name, row[name], "assistant"))
            answers.append(answer)
    return _plain(prompt), [NewResponse(text=_plain(answer)[-1]["content"]) for answer in answers], True


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Role and content, which is what people are shown; ValueError for a call of tools, which they would not see."""
    if any(m.get("tool_calls") for m in messages):
        raise ValueError("holds calls of tools, which the labelling app does not show; drop the row, or write them out")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _response(value: Any) -> NewResponse:
    if isinstance(value, str):
        return NewResponse(text=value)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(f"{value!r:.80}: an answer is a text, or an object with `text`")
    params = value.get("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"params={params!r:.80}: must be an object")
    model, finish = str(value.get("model", "")), str(value.get("finish_reason", ""))
    return NewResponse(text=value["text"], model=model, params=params, finish_reason=finish)


def starter_items() -> list[NewItem]:
    """The preference pairs that ship with Plumbline, to be labelled blind."""
    from plumbline.paths import STARTER

    path = STARTER / "preferences.jsonl"
    return [item_of(place, row, source="starter") for place, row in read_rows(path)]


def hub_items(name: str, split: str, *, limit: int | None = None, gold: bool = False) -> Iterator[NewItem]:
    """Rows of a data set on the hub, read as those of a file."""
    for number, (place, row) in enumerate(hub_rows(name, split, streaming=limit is not None)):
        if limit is not None and number >= limit:
            return
        yield item_of(place, row, source=name, gold=gold)


def generated_items(
    prompts: Path, models: Sequence[str], *, max_new_tokens: int = 256, temperature: float = 1.0, seed: int = 0
) -> list[NewItem]:
    """One item a prompt, answered by each model source (see policy_models/loading.py); equal answers are left out."""
    import torch

    from plumbline.align.data.rows import read_prompts
    from plumbline.policy_models.chat import encode_prompts, sample_answers
    from plumbline.policy_models.loading import load_for_answers, load_tokenizer, resolve_model_source

    if not 2 <= len(models) <= 6:
        raise ValueError(f"{len(models)} models: pairs and rankings take 2 to 6")
    conversations = read_prompts(prompts)
    for model in models:
        resolve_model_source(model)  # all of them, before the first is loaded
    by_model = []
    for model in models:
        tokenizer, policy = load_tokenizer(model), load_for_answers(model)
        answers, texts = sample_answers(
            policy,
            tokenizer,
            encode_prompts(tokenizer, conversations),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        )
        params = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
        by_model.append(
            [
                NewResponse(text=text.strip(), model=model, params=params, finish_reason="" if a.finished else "length")
                for a, text in zip(answers, texts, strict=True)
            ]
        )
    items = []
    for prompt, *responses in zip(conversations, *by_model, strict=True):
        distinct = list({response.text: response for response in responses if response.text}.values())
        if len(distinct) >= 2:
            items.append(NewItem(prompt=prompt, responses=distinct, source="generated"))
    return items


# Out


def margin_of(strength: float) -> float:
    """RewardTrainer's margin in [0, 1] for a (mean) strength in 1..4; 0 for "negligibly better"."""
    return (strength - 1) / 3


def _preference_rows(votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    for verdict in settle(for_training(votes)):
        chosen, rejected = (verdict.vote.responses[at]["text"] for at in (verdict.better, verdict.worse))
        yield {
            "prompt": verdict.vote.prompt,
            "chosen": _assistant(chosen),
            "rejected": _assistant(rejected),
            "margin": margin_of(verdict.strength),  # on every row: the collator looks at the first one only
            "p_chosen": verdict.share,
            "source": f"labels/{verdict.vote.source}",
        }
    for vote in for_training(votes):
        if vote.edit is not None and vote.edit[1].strip() != vote.responses[vote.edit[0]]["text"].strip():
            yield {
                "prompt": vote.prompt,
                "chosen": _assistant(vote.edit[1]),
                "rejected": _assistant(vote.responses[vote.edit[0]]["text"]),
                "margin": 0.0,
                "p_chosen": 1.0,
                "source": "labels/edit",
            }


def _plain_rows(votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    for row in _preference_rows(votes):
        prompt = "\n\n".join(message["content"] for message in row["prompt"])
        yield {"prompt": prompt, "chosen": row["chosen"][0]["content"], "rejected": row["rejected"][0]["content"]}


def _kto_rows(votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    """Chosen answers are good, rejected ones bad; of two that are both bad, both are. Single thumbs as they are."""
    usable = for_training(votes)
    said: dict[tuple[str, str], list[bool]] = {}
    prompts: dict[tuple[str, str], list[dict[str, str]]] = {}

    def say(vote: Vote, at: int, label: bool) -> None:
        key = (json.dumps(vote.prompt), vote.responses[at]["text"])
        said.setdefault(key, []).append(label)
        prompts[key] = vote.prompt

    for verdict in settle(usable):
        say(verdict.vote, verdict.better, True)
        say(verdict.vote, verdict.worse, False)
    for vote in usable:
        if vote.outcome in ("both_bad", "good", "bad"):
            for at in range(len(vote.responses)):
                say(vote, at, vote.outcome == "good")
    for key, labels in said.items():
        if len(set(labels)) == 1:  # best of one pair and worst of another says neither good nor bad
            yield {"prompt": prompts[key], "completion": _assistant(key[1]), "label": labels[0]}


def _sft_rows(votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    """Corrected answers, and answers rated 4 and more on every axis (toxicity: 2 and less) by all who rated them."""
    usable = for_training(votes)
    rated: dict[Any, Any] = {}
    for vote in usable:
        if vote.edit is not None:
            yield {"messages": vote.prompt + _assistant(vote.edit[1])}
        for at, values in vote.ratings.items():
            good = set(values) == set(CRITERIA) and all(
                (6 - v if c == "toxicity" else v) >= 4 for c, v in values.items()
            )
            key = (vote.item, at)
            rated[key] = (vote, rated.get(key, (vote, True))[1] and good)
    for (_, at), (vote, good) in rated.items():
        if good:
            yield {"messages": vote.prompt + _assistant(vote.responses[at]["text"])}


def _full_rows(votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    """Every judgement with all that is known of it, under the annotator's pseudonym."""
    for vote in votes:
        row = {name: getattr(vote, name) for name in Vote.__dataclass_fields__}  # not asdict: it would copy every text
        yield row | {"ratings": {str(at): values for at, values in vote.ratings.items()}}


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


FORMATS: dict[str, Callable[[Sequence[Vote]], Iterator[dict[str, Any]]]] = {
    "preference": _preference_rows,
    "plain": _plain_rows,
    "kto": _kto_rows,
    "sft": _sft_rows,
    "full": _full_rows,
}


def export_rows(
    store: LabelStore, format: str, *, as_of: int | None = None, by: int | None = None
) -> list[dict[str, Any]]:
    """Rows in one of FORMATS, always in the same order for the same labels; the export is logged with its hash."""
    rows = list(FORMATS[format](read_votes(store, as_of=as_of)))
    digest = hashlib.sha256("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()).hexdigest()
    with store.database.write() as run:
        seq = run("SELECT max(seq) AS seq FROM event")[0]["seq"] or 0
        run(
            "INSERT INTO export (at, format, filter_json, n_rows, max_event_seq, sha256) VALUES (?, ?, ?, ?, ?, ?)",
            (store.clock(), format, json.dumps({"as_of": as_of}), len(rows), seq if as_of is None else as_of, digest),
        )
        log_event(run, store.clock(), by, "export", format, {"rows": len(rows), "sha256": digest})
    return rows


def in_test(prompt: Sequence[dict[str, str]] | str, every: int) -> bool:
    """Whether a prompt is held out: one in `every`, by its hash, with all that was said about it. 0: none."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return (
        bool(every) and int.from_bytes(hashlib.sha256(text.strip().lower().encode()).digest()[:4], "big") % every == 0
    )


def write_export(
    store: LabelStore, folder: Path, format: str, *, test_every: int = 0, as_of: int | None = None, licence: str = ""
) -> dict[str, int]:
    """train.jsonl, test.jsonl (whole prompts, never single rows) and a data card; returns the rows of each split."""
    rows = export_rows(store, format, as_of=as_of)
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for row in rows:
        prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
        splits["test" if in_test(prompt, test_every) else "train"].append(row)
    for name, part in splits.items():
        if part or name == "train":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    counts = {name: len(part) for name, part in splits.items()}
    (folder / "README.md").write_text(data_card(store, format, counts, as_of=as_of, licence=licence), encoding="utf-8")
    return counts


def data_card(
    store: LabelStore, format: str, counts: dict[str, int], *, as_of: int | None = None, licence: str = ""
) -> str:
    """A data card in the hub's form: counts, sources, agreement, the guidelines that the labels followed."""
    from plumbline.apps.label.study.label_statistics import agreement_table

    votes = [vote for vote in read_votes(store, as_of=as_of) if vote.round == FIRST]
    version, guidelines = store.guidelines()
    lines = ["---", f"license: {licence or 'other'}", "tags: [preference, rlhf, plumbline]", "---", "", "# Labels", ""]
    lines += [f"Rows in the format `{format}`: {', '.join(f'{n} {name}' for name, n in counts.items())}.", ""]
    lines += [f"- Judgements: {len(votes)} by {len({v.annotator for v in votes})} annotators (pseudonyms in `full`)"]
    for name, counted in (
        ("Outcomes", Counter(vote.outcome for vote in votes)),
        ("Sources", Counter(vote.source for vote in votes)),
        ("Guideline versions", Counter(vote.guideline_version for vote in votes)),
    ):
        lines.append(f"- {name}: " + (", ".join(f"{key} {n}" for key, n in sorted(counted.items(), key=str)) or "none"))
    for name, interval in agreement_table(votes).items():
        lines.append(f"- {name}: {interval.mean:.3f} (95% {interval.low:.3f} to {interval.high:.3f})")
    lines += [
        "- Left out of training formats: gold items, flagged and retired items, repeats, skips, paused annotators"
    ]
    lines += ["", f"## Guidelines (version {version})", "", guidelines or "None were written.", ""]
    return "\n".join(lines)
