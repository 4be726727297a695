"""Runs targets on suites: every question once, whatever happens in between.

Replies are kept in a folder by a hash of target, question and settings. A run that was killed, or one more suite, or one
more target, asks only what is missing. Questions go out in chunks that depend on the suite and on nothing else, and
a chunk is asked again as a whole: an answer can depend on what is in the batch with it, in the last bit of a sum.

Sharded: under `accelerate launch` with n processes, process r takes chunks r, r + n, ... and writes a file of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from plumbline.eval.samples import Sample
from plumbline.eval.targets.guarded import GuardedTarget
from plumbline.eval.targets.target import Target
from plumbline.eval.tasks import EvalTask, Graded, Prompt, Reply, digest, grade

CHUNK = 64  # samples asked at once, at most; part of the hash, since an answer's last bits may depend on its batch


class ReplyStore:
    """Replies on disk by key: one JSON Lines file a process, only ever appended to.

    A line that a kill has cut short is dropped when the folder is read, with its newline put right before the next one.
    """

    def __init__(self, folder: str | Path, *, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / f"replies-{rank}.jsonl"
        self.replies: dict[str, Reply] = {}
        self.read()

    def read(self) -> None:
        """Reads what all processes have written."""
        for file in sorted(self.folder.glob("replies-*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError, KeyError, TypeError):  # cut short, or damaged: asked again
                    row = json.loads(line)
                    fields = row | {"answers": tuple(row["answers"]), "logp": tuple(row["logp"])}
                    key = fields.pop("key")
                    self.replies.setdefault(key, Reply(**fields))

    def add(self, keys: Sequence[str], replies: Sequence[Reply]) -> None:
        """Keeps replies, on the disk when this returns; not those with an error that asking again may mend."""
        lines = []
        for key, reply in zip(keys, replies, strict=True):
            if key not in self.replies and (reply.final or not reply.error):
                lines.append(json.dumps({"key": key} | asdict(reply)) + "\n")
                self.replies[key] = reply
        if lines:
            with self.file.open("ab") as stream:
                cut = stream.tell() and not self._ends_with_newline()
                stream.write((("\n" if cut else "") + "".join(lines)).encode())
                stream.flush()
                os.fsync(stream.fileno())

    def _ends_with_newline(self) -> bool:
        with self.file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"


def run_suites(
    targets: Sequence[Target],
    tasks: Sequence[EvalTask],
    store: ReplyStore,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    rank: int = 0,
    processes: int = 1,
    quiet: bool = False,
) -> list[Graded]:
    """Asks what is missing, then grades everything: one `Graded` a target and task, targets in the outer loop.

    With several processes the grades are complete once all of them have finished and the store was read again: call
    `grade_all` after that.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    failed: dict[str, Reply] = {}
    for target in targets:
        asked = [task for task in tasks if target.gives_logp or not task.asks_choices]
        chunks = [(task, chunk) for task in asked for chunk in _chunks(task)]
        mine = [
            (task, chunk)
            for task, chunk in chunks[
                rank::processes
            ]  # counted before what is known is left out: the same for every process
            if any(key not in store.replies for key in _keys(target, task, chunk, options))
        ]
        bar = tqdm(total=sum(len(c) for _, c in mine), desc=target.name, unit="sample", disable=quiet or not mine)
        with bar:
            for task, chunk in mine:
                bar.set_postfix_str(task.name)
                if isinstance(target, GuardedTarget):
                    target.known = _without_guard(target.inner, task, chunk, store, options)
                keys, replies = _keys(target, task, chunk, options), ask(target, task, chunk, **options)
                store.add(keys, replies)
                failed |= {key: reply for key, reply in zip(keys, replies, strict=True) if reply.error}
                bar.update(len(chunk))
        target.close()
    return grade_all(targets, tasks, store, failed=failed, **options)


def grade_all(
    targets: Sequence[Target],
    tasks: Sequence[EvalTask],
    store: ReplyStore,
    *,
    failed: dict[str, Reply] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Graded]:
    """Grades what is in the store; what is not there is unscored."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    graded = []
    for target in targets:
        for task in tasks:
            if task.asks_choices and not target.gives_logp:
                replies = [Reply(error="this target gives no log-probabilities")] * len(task.samples)
            else:
                keys = [key for chunk in _chunks(task) for key in _keys(target, task, chunk, options)]
                missing = failed or {}
                replies = [store.replies.get(k) or missing.get(k) or Reply(error="not asked yet") for k in keys]
            graded.append(grade(target.name, task, replies))
    return graded


def ask(
    target: Target, task: EvalTask, samples: Sequence[Sample], *, max_new_tokens: int, temperature: float, seed: int
) -> list[Reply]:
    """One reply a sample, earlier turns played in order, each answered by the target itself. Never raises."""
    try:
        if task.asks_choices:
            return _ask_choices(target, samples)
        return _ask_answers(target, task, samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a target that breaks on a chunk leaves it unscored, with the reason
        return [Reply(error=f"{type(error).__name__}: {error}")] * len(samples)


def _ask_answers(target, task, samples, *, max_new_tokens, temperature, seed) -> list[Reply]:
    limit = task.max_new_tokens or max_new_tokens
    said: list[list[str]] = [[] for _ in samples]
    finished: list[bool | None] = [None] * len(samples)
    errors = [""] * len(samples)
    final = [False] * len(samples)
    for turn in range(1 + max(len(sample.history) for sample in samples)):
        due = [at for at, s in enumerate(samples) if turn <= len(s.history) and not errors[at]]
        prompts = [conversation(samples[at], said[at]) for at in due]
        replies = target.reply(prompts, max_new_tokens=limit, temperature=temperature, seed=seed + turn) if due else []
        if len(replies) != len(due):
            raise ValueError(f"the target gave {len(replies)} replies to {len(due)} prompts")
        for at, reply in zip(due, replies, strict=True):
            if not isinstance(reply, Reply) or not (reply.error or all(isinstance(a, str) for a in reply.answers)):
                reply = Reply(error="the target gave something else than text")
            elif not reply.error and not reply.answers:
                reply = Reply(error="the target gave no answer")
            errors[at], finished[at], final[at] = reply.error, reply.finished, reply.final
            said[at].append(_cut(reply.text, task.stop))
    return [
        Reply(error=errors[at], final=final[at])
        if errors[at]
        else Reply(answers=tuple(said[at]), finished=finished[at])
        for at in range(len(samples))
    ]


def _ask_choices(target: Target, samples: Sequence[Sample]) -> list[Reply]:
    pairs = [(conversation(sample, []), choice) for sample in samples for choice in sample.choices]
    found = iter(target.logp(pairs))
    replies = []
    for sample in samples:
        logp = tuple(float(next(found)) for _ in sample.choices)
        odd = any(x != x or x == float("inf") for x in logp)
        replies.append(Reply(error=f"log-probabilities {logp}") if odd else Reply(logp=logp))
    return replies


def conversation(sample: Sample, said: Sequence[str]) -> Prompt:
    """The prompt of a sample's next turn, `said` being the answers so far; the text itself if it is raw."""
    if sample.raw:
        return sample.input
    turns = [*sample.history, sample.input]
    messages = [{"role": "system", "content": sample.system}] if sample.system else []
    for at, answer in enumerate(said):
        messages += [{"role": "user", "content": turns[at]}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": turns[len(said)]}]


def _without_guard(
    inner: Target, task: EvalTask, chunk: Sequence[Sample], store: ReplyStore, options: dict
) -> dict[str, Reply]:  # fmt: skip
    """What the model behind a guard has said to this chunk already, turn by turn, by conversation."""
    known: dict[str, Reply] = {}
    if task.stop:  # what is stored was cut there; the guard reads the whole
        return known
    for sample, key in zip(chunk, _keys(inner, task, chunk, options), strict=True):
        if sample.raw or key not in store.replies:  # behind a guard a text to continue becomes a user's turn
            continue
        answers = store.replies[key].answers
        for turn, answer in enumerate(answers):
            known[digest(conversation(sample, answers[:turn]))] = Reply(answers=(answer,))
    return known


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop; one among the blanks that it begins with ends nothing."""
    begun = len(text) - len(text.lstrip())
    ends = [at for at in (text.find(one, begun) for one in stop) if at >= 0]
    return text[: min(ends)] if ends else text


def _chunks(task: EvalTask) -> Iterator[Sequence[Sample]]:
    """Pieces of (nearly) one size, so that processes that take turns at them have as much to do."""
    size = math.ceil(len(task.samples) / math.ceil(len(task.samples) / CHUNK)) if task.samples else CHUNK
    for start in range(0, len(task.samples), size):
        yield task.samples[start : start + size]


def _keys(target: Target, task: EvalTask, chunk: Sequence[Sample], options: dict) -> list[str]:
    """What a reply depends on: the target, the question, how it is asked, and the batch it is in."""
    how = [task.max_new_tokens or options["max_new_tokens"], task.stop, options["temperature"], options["seed"]]
    asked = [[s.input, s.system, s.history, s.raw, s.choices] for s in chunk]
    batch = digest(asked)
    return [digest(target.fingerprint, one, how, batch, s.id) for s, one in zip(chunk, asked, strict=True)]
