"""Two policies answer one prompt side by side, blind: which they are, and which is faster, does not show.

Both answers are let out at the pace of the slower one. What comes out is an ordinary item, leased to the annotator who
watched it, so that gold, overlap, agreement and exports treat it as any other.
"""

import json
import queue
import random
import secrets
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from plumbline.apps.label.store.answers import RefusedError
from plumbline.apps.label.store.items import NewItem, NewResponse
from plumbline.apps.label.store.store import LabelStore

TICK = 0.04  # seconds between two pieces
PIECE = 24  # characters a piece, at most
MAX_NEW_TOKENS = 400


@dataclass(frozen=True, kw_only=True)
class ArenaPolicy:
    """Something that answers: `stream(prompt, seed)` yields pieces of text, the last of which may be anything."""

    name: str
    stream: Callable[[str, int], Iterator[str]]
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Run:
    account: int
    stopped: threading.Event = field(default_factory=threading.Event)


class Arena:
    """The policies that may meet, and the runs under way. `max_runs` at a time: each keeps two models busy."""

    def __init__(self, policies: Sequence[ArenaPolicy], *, max_runs: int = 4, seed: int | None = None) -> None:
        names = [policy.name for policy in policies]
        if len(policies) == 1 or len(set(names)) < len(names):
            raise ValueError(f"arena policies {names}: give at least two, with different names")
        self.policies, self.rng = list(policies), random.Random(seed)
        self._slots = threading.BoundedSemaphore(max_runs)
        self._runs: dict[str, _Run] = {}

    def answer(self, store: LabelStore, account_id: int, prompt: str) -> Iterator[dict[str, Any]]:
        """Starts a run; RefusedError at once where it cannot. Then events as in label_api.arena_start."""
        if not self.policies:
            raise RefusedError(409, "no policies: start `plumbline label` with --arena NAME=SOURCE for each")
        if not prompt.strip() or "\x00" in prompt:
            raise RefusedError(422, "the prompt is empty or holds a zero byte")
        if not self._slots.acquire(blocking=False):
            raise RefusedError(429, "the policies are busy; try again in a moment")
        run_id = secrets.token_hex(8)
        self._runs[run_id] = _Run(account=account_id)
        return self._events(store, run_id, prompt)

    def stop(self, account_id: int, run_id: str) -> None:
        """Ends a run of one's own."""
        run = self._runs.get(run_id)
        if run is None:
            raise RefusedError(404, "no such run; it may have ended")
        if run.account != account_id:
            raise RefusedError(403, "this run belongs to another annotator")
        run.stopped.set()

    def _events(self, store: LabelStore, run_id: str, prompt: str) -> Iterator[dict[str, Any]]:
        run, seed = self._runs[run_id], self.rng.randrange(2**31)
        pair = self.rng.sample(self.policies, 2)  # slot 0 is on the left: the sides are random with the draw
        try:
            yield {"run": run_id}
            sides = [_Side(policy, prompt, seed, run.stopped) for policy in pair]
            while not run.stopped.is_set() and not all(side.ended for side in sides):
                for side in sides:
                    side.take()
                waiting = [len(side.waiting) for side in sides if not side.finished]
                size = min([PIECE, *waiting])  # nobody runs ahead of the other
                for slot, side in enumerate(sides):
                    if piece := side.let_out(size):
                        yield {"slot": slot, "text": piece}
                run.stopped.wait(TICK)
            failed = next((side for side in sides if side.error), None)
            if failed:
                yield {"error": "one of the policies failed; nothing was stored, try again"}
                return
            if not all(side.shown.strip() for side in sides) or sides[0].shown.strip() == sides[1].shown.strip():
                yield {"error": "an answer is empty, or both are the same; try another prompt"}
                return
            responses = [
                NewResponse(
                    text=side.shown.strip(),
                    model=policy.name,
                    params=policy.params | {"seed": seed},
                    finish_reason="" if side.ended else "stopped",
                )
                for side, policy in zip(sides, pair, strict=True)
            ]
            item = NewItem(prompt=[{"role": "user", "content": prompt}], responses=responses, source="arena")
            yield {"task": store.add_arena_item(run.account, item, [0, 1])}
        except RefusedError as error:
            yield {"error": str(error)}
        finally:
            run.stopped.set()
            self._runs.pop(run_id, None)
            self._slots.release()


class _Side:
    """One policy writing in a thread of its own; `waiting` is what it wrote and nobody has seen."""

    def __init__(self, policy: ArenaPolicy, prompt: str, seed: int, stopped: threading.Event) -> None:
        self.waiting, self.shown, self.finished, self.error = "", "", False, ""
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(policy, prompt, seed, stopped), daemon=True).start()

    def _write(self, policy: ArenaPolicy, prompt: str, seed: int, stopped: threading.Event) -> None:
        try:
            for piece in policy.stream(prompt, seed):
                if stopped.is_set():
                    break
                self._pieces.put(piece)
        except Exception as error:  # whatever a model or an endpoint raises ends this run, not the app
            self.error = f"{type(error).__name__}: {error}"
        self._pieces.put(None)

    def take(self) -> None:
        """Moves what was written to `waiting`."""
        while not self._pieces.empty():
            piece = self._pieces.get()
            if piece is None:
                self.finished = True
            else:
                self.waiting += piece

    def let_out(self, size: int) -> str:
        """The next piece to show."""
        piece, self.waiting = self.waiting[:size], self.waiting[size:]
        self.shown += piece
        return piece

    @property
    def ended(self) -> bool:
        """Written to the end, and all of it shown."""
        return self.finished and not self.waiting


def policy_of(name: str, source: str) -> ArenaPolicy:
    """An arena policy of a model source, or of an OpenAI-compatible endpoint: `http://host:port/v1#model`."""
    if source.startswith(("http://", "https://")):
        url, _, model = source.partition("#")
        if not model:
            raise ValueError(f"{source}: an endpoint needs its model's name after '#', as in {source}#my-model")
        return ArenaPolicy(name=name, stream=lambda prompt, seed: _from_endpoint(url, model, prompt, seed))
    from plumbline.policy_models.loading import resolve_model_source

    resolve_model_source(source)
    return ArenaPolicy(name=name, stream=_LocalPolicy(source), params={"source": source, "temperature": 0.8})


class _LocalPolicy:
    """A model of ours, loaded when first asked. One answer of it is written at a time."""

    def __init__(self, source: str) -> None:
        self.source, self._lock = source, threading.Lock()
        self._loaded: Any = None

    def __call__(self, prompt: str, seed: int) -> Iterator[str]:
        import torch
        from transformers import TextIteratorStreamer

        from plumbline.policy_models.chat import encode_prompts
        from plumbline.policy_models.loading import load_for_answers, load_tokenizer

        with self._lock:
            if self._loaded is None:
                self._loaded = load_tokenizer(self.source), load_for_answers(self.source)
            tokenizer, model = self._loaded
            ids = torch.tensor(encode_prompts(tokenizer, [[{"role": "user", "content": prompt}]]), device=model.device)
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
            gone = threading.Event()

            def write() -> None:
                torch.manual_seed(seed)
                try:
                    model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        streamer=streamer,
                        max_new_tokens=MAX_NEW_TOKENS,
                        do_sample=True,
                        temperature=0.8,
                        stopping_criteria=[lambda ids, scores: torch.full((len(ids),), gone.is_set())],
                    )
                finally:
                    streamer.end()

            thread = threading.Thread(target=write, daemon=True)
            thread.start()
            try:
                yield from streamer
            finally:
                gone.set()
                thread.join()


def _from_endpoint(url: str, model: str, prompt: str, seed: int) -> Iterator[str]:
    body = {"model": model, "stream": True, "seed": seed, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/chat/completions",
        data=json.dumps(body | {"max_tokens": MAX_NEW_TOKENS}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as lines:  # noqa: S310 - the scheme is checked in policy_of
        for line in lines:
            data = line.decode().removeprefix("data:").strip()
            if not line.startswith(b"data:") or data == "[DONE]":
                continue
            for choice in json.loads(data).get("choices", []):
                yield choice.get("delta", {}).get("content") or ""
