"""A model on this machine as a backend: chat template, grammars and adapters around the scheduler."""

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from plumbline.apps.serve.engine.backend import (
    BadRequestError,
    Piece,
    Request,
    Served,
    ServeError,
    TooLongError,
    find_served,
)
from plumbline.apps.serve.engine.batch import Batch, Job
from plumbline.apps.serve.engine.prefixes import PrefixCache
from plumbline.apps.serve.engine.scheduler import Scheduler
from plumbline.apps.serve.engine.text import Vocabulary
from plumbline.apps.serve.tools import MARKS, forced_grammar, format_of
from plumbline.eval.targets.specs import source_and_adapter
from plumbline.policy_models.chat import render, stop_ids
from plumbline.policy_models.loading import attach_adapter, load_for_answers, load_tokenizer
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.rollout.decoder import compute_dtype, supports_fast_path
from plumbline.policy_models.rollout.forward_rows import ForwardRows
from plumbline.policy_models.rollout.generation import Processor
from plumbline.policy_models.rollout.joining import JoiningDecoder
from plumbline.safety.constrained.grammar import Grammar, GrammarProcessor

logger = logging.getLogger(__name__)
# Adapters that no request can name: the one that leans first tokens, and the policy itself where it is an adapter.
EXPERT, POLICY = "plumbline-safety-expert", "plumbline-policy"
_PRIVATE = 0xE000  # characters that stand for special tokens which somebody typed


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Sizes of the engine. `context`: tokens of prompt and answer together; 0 takes what the model knows, at most 4096.

    rows           answers at a time, which bounds the cache: rows * context tokens
    step_tokens    tokens that a step reads at most
    queue          requests that may wait
    prefix_tokens  tokens whose keys and values are kept for requests that begin alike; 0 for none
    max_tokens     of an answer whose request names no limit
    """

    rows: int = 16
    context: int = 0
    step_tokens: int = 256
    queue: int = 64
    prefix_tokens: int = 8192
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("rows", "step_tokens", "queue", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.context < 0 or self.prefix_tokens < 0:
            raise ValueError(f"context={self.context} and prefix_tokens={self.prefix_tokens} must be at least 0")


def load_local(source: str, adapters: Mapping[str, str], expert: str = "") -> tuple[Any, Any]:
    """Model and tokenizer, with adapters by name; ValueError with a sentence for what cannot be loaded.

    A source that is itself an adapter or a run folder is served as the adapter POLICY, unmerged: merging rounds a small
    change of bf16 weights away.
    """
    base, policy = source_and_adapter(source)
    named = {**({POLICY: policy} if policy else {}), **adapters, **({EXPERT: expert} if expert else {})}
    for name, folder in named.items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f"adapter {name}={folder}: no adapter_config.json there; give a folder that PEFT wrote")
    try:
        model: Any = load_for_answers(base)
        tokenizer = load_tokenizer(base)
        for name, folder in named.items():
            if hasattr(model, "peft_config"):
                model.load_adapter(folder, adapter_name=name)
            else:
                model = attach_adapter(model, folder, adapter_name=name)
    except (OSError, RuntimeError, KeyError, ImportError) as error:  # a damaged file, shapes that do not fit
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source} cannot be loaded ({type(error).__name__}): {first}") from error
    split_expert_adapters(model)
    return model.eval(), tokenizer


@dataclass(eq=False)
class LocalGeneration:
    """A job of the engine as asyncio sees it."""

    job: Job
    scheduler: Scheduler
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.job.ids)

    @property
    def cached_tokens(self) -> int:
        """Of these, the ones that were not read again."""
        return self.job.reused

    async def __aiter__(self) -> AsyncIterator[Piece]:
        left = self.job.n
        while True:
            self.woken.clear()
            while self.job.pieces:
                piece = self.job.pieces.popleft()
                if isinstance(piece, ServeError):
                    raise piece
                left -= piece.finish is not None
                yield piece
            if left == 0:
                return
            await self.woken.wait()

    def cancel(self) -> None:
        """Frees the rows; harmless when the job is over."""
        self.scheduler.cancel(self.job)

    def __del__(
        self,
    ) -> None:  # a client that left before anybody iterated; without a lock, since a collector may call it anywhere
        self.job.cancelled = True


class LocalBackend:
    """One model and its adapters, all requests in one batch.

    Args:
        name: by which requests name the base model.
        adapters: names of the adapters that `model` has loaded and requests may name.
        processors: change the logits of every answer (banned phrases, a safety expert), before a request's own grammar.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        adapters: Sequence[str] = (),
        settings: EngineSettings = EngineSettings(),  # noqa: B008  frozen
        processors: Sequence[Processor] = (),
    ) -> None:
        self.name, self.adapters, self.settings = name, list(adapters), settings
        self.tokenizer, self.processors = tokenizer, list(processors)
        self.vocabulary = Vocabulary(tokenizer)
        self.stop_ids = stop_ids(model, tokenizer)
        text_config = model.config.get_text_config()
        self.vocab_size = text_config.vocab_size
        knows = getattr(text_config, "max_position_embeddings", None) or 4096
        if settings.context > knows:
            raise ValueError(f"context={settings.context}: {name} has {knows} positions")
        self.context = settings.context or min(knows, 4096)
        loaded = getattr(model, "peft_config", {})
        self._policy = POLICY if POLICY in loaded else None
        known = [*adapters, *([POLICY] if self._policy else [])]
        decoder, prefix_tokens = _decoder(model, settings.rows, self.context, known), settings.prefix_tokens
        if isinstance(decoder, ForwardRows):
            prefix_tokens = 0
        batch = Batch(
            decoder, self.vocabulary, stop_ids=self.stop_ids, prefixes=PrefixCache(prefix_tokens), step_tokens=settings.step_tokens
        )  # fmt: skip
        self._generations: WeakValueDictionary[Job, LocalGeneration] = (
            WeakValueDictionary()
        )  # as long as somebody reads it
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scheduler = Scheduler(batch, queue_limit=settings.queue, wake=self._wake)
        self._encoding = threading.Lock()  # tokenizers change their own settings while they encode

    def served(self) -> list[Served]:
        """The base model first, then its adapters."""
        adapters = [Served(name=name, parent=self.name, context=self.context) for name in self.adapters]
        return [Served(name=self.name, context=self.context), *adapters]

    def tool_format(self, model: str) -> str | None:
        """That of the chat template; all adapters share it."""
        return format_of(self.tokenizer.chat_template)

    async def submit(self, request: Request) -> LocalGeneration:
        """Checks, encodes and queues a request."""
        find_served(self, request.model)
        self._loop = asyncio.get_running_loop()
        job = await asyncio.to_thread(self._job, request)
        generation = LocalGeneration(job, self.scheduler)
        self._generations[job] = generation
        self.scheduler.submit(job)
        return generation

    def stats(self) -> dict[str, float]:
        """Gauges of the engine."""
        return self.scheduler.stats()

    async def ready(self) -> str | None:
        """Not ready when the engine's thread has died."""
        return None if self.scheduler.alive else "the engine has stopped"

    def drain(self) -> None:
        """Takes no more requests."""
        self.scheduler.drain()

    async def close(self, patience_s: float = 0.0) -> None:
        """Waits for what was taken, then stops the engine."""
        self.drain()
        until = time.monotonic() + patience_s
        while not self.scheduler.idle and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.scheduler.stop)

    # ------------------------------------------------------------------------------------------------------------- jobs

    def _wake(self, jobs: list[Job]) -> None:
        """Called by the engine's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, jobs)

    def _tell(self, jobs: list[Job]) -> None:
        for job in jobs:
            if (generation := self._generations.get(job)) is not None:
                generation.woken.set()

    def _job(self, request: Request) -> Job:
        ids = self._encode(request)
        drawing = request.drawing
        if not ids:
            raise BadRequestError("the prompt is empty: it has no tokens", param="prompt")
        if request.n > self.settings.rows:
            raise BadRequestError(f"n={request.n}: at most {self.settings.rows} answers at a time here", param="n")
        room = self.context - len(ids)
        wanted = drawing.max_tokens or min(self.settings.max_tokens, room)
        if room < 1 or wanted > room:
            asked = f" and max_tokens asks for {drawing.max_tokens} more" if drawing.max_tokens else ""
            raise TooLongError(
                f"the prompt has {len(ids)} tokens{asked}; the limit of {request.model} is {self.context} tokens together",
                param="messages" if request.messages is not None else "prompt",
            )
        return Job(
            ids=ids,
            drawing=drawing,
            max_tokens=wanted,
            n=request.n,
            adapter=self._policy if request.model == self.name else request.model,
            processors=[*self.processors, *self._grammar(request)],
            shown=MARKS if request.tools else (),
            deadline=time.monotonic() + request.deadline_s,
        )

    def _grammar(self, request: Request) -> list[Processor]:
        grammar = None
        kind = (request.response_format or {}).get("type", "text")
        try:
            if kind == "json_object":
                grammar = Grammar.json_schema({"type": "object"})
            elif kind == "json_schema":
                assert request.response_format
                grammar = Grammar.json_schema(request.response_format["json_schema"]["schema"])
            if request.tools and (request.tool_choice == "required" or not isinstance(request.tool_choice, str)):
                grammar = forced_grammar(request.tools, request.tool_choice, self.tool_format(request.model) or "")
            if grammar is None:
                return []
            return [GrammarProcessor(grammar, self.tokenizer, self.stop_ids, self.vocab_size)]
        except (ValueError, RecursionError) as error:
            param = "tools" if request.tools and kind == "text" else "response_format"
            raise BadRequestError(str(error) or "the schema is nested too deeply", param=param) from error
        except ImportError as error:
            raise BadRequestError(f"not available on this server: {error}", param="response_format") from error

    # ---------------------------------------------------------------------------------------------------------- prompts

    def _encode(self, request: Request) -> list[int]:
        if request.messages is None:
            if not isinstance(request.prompt, str):
                ids = list(request.prompt or ())
                if wrong := [id_ for id_ in ids if not 0 <= id_ < self.vocab_size]:
                    raise BadRequestError(
                        f"token {wrong[0]} is not one of the {self.vocab_size} of the model", param="prompt"
                    )
                return ids
            with self._encoding:
                return list(self.tokenizer(request.prompt)["input_ids"])
        tools = list(request.tools) or None
        if tools and self.tool_format(request.model) is None:
            raise BadRequestError(f"the chat template of {request.model} has no tools", param="tools")
        if self.tokenizer.chat_template is None:
            raise BadRequestError(f"{request.model} has no chat template; use /v1/completions", param="model")
        messages, typed = self._hide_special([_for_template(message) for message in request.messages])
        try:
            with self._encoding:
                text = render(self.tokenizer, messages, tools=tools, open_turn=True)
        except (ValueError, AttributeError) as error:
            raise BadRequestError(f"{request.model}: {error}", param="messages") from error
        return self._tokens(text, typed)

    def _hide_special(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Special tokens that somebody typed are characters: they must not open a turn of their own."""
        special = sorted((text for text in self.tokenizer.all_special_tokens if text), key=len, reverse=True)
        if not special:
            return messages, {}
        stand_in = {text: chr(_PRIVATE + at) for at, text in enumerate(special)}
        pattern = re.compile("|".join(map(re.escape, special)))
        typed: dict[str, str] = {}

        def swap(match: re.Match[str]) -> str:
            typed[stand_in[match.group()]] = match.group()
            return stand_in[match.group()]

        for message in messages:
            if isinstance(message.get("content"), str):
                message["content"] = pattern.sub(swap, message["content"])
        return messages, typed

    def _tokens(self, text: str, typed: Mapping[str, str]) -> list[int]:
        with self._encoding:
            if not typed:
                return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            ids: list[int] = []
            for part in re.split(f"([{''.join(typed)}])", text):
                if part:
                    read = self.tokenizer(
                        typed.get(part, part), add_special_tokens=False, split_special_tokens=part in typed
                    )
                    ids += read["input_ids"]
            return ids


def _decoder(model: Any, rows: int, context: int, adapters: Sequence[str]) -> JoiningDecoder | ForwardRows:
    with torch.inference_mode():
        reason = supports_fast_path(model, context)
        if reason is None:
            return JoiningDecoder(
                model, max_rows=rows, num_positions=context, dtype=compute_dtype(model), adapters=adapters
            )
        logger.warning("answers are drawn through the model's own forward, one row at a time: %s", reason)
        return ForwardRows(model, max_rows=rows, num_positions=context)


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's message as templates of transformers take it: arguments of calls as objects, a text for content."""
    out = dict(message)
    if out.get("content") is None:
        out["content"] = ""
    if calls := out.get("tool_calls"):
        out["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call["function"]["arguments"])}}
            for call in calls
        ]
    return out


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
