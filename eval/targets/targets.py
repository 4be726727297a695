"""What is evaluated: a model, an adapter or a run folder, an endpoint, recorded transcripts, or any function.

A target answers conversations and, if it can, gives log-probabilities of texts. A target is named by a spec:

    bundled:smollm2-135m-instruct      any model source of policy_models/loading.py: bundled, folder or hub id
    runs/demo/ppo                      a run folder: its model/, which may be an adapter on a base model
    path/to/adapter                    a PEFT adapter, on the base its adapter_config.json names
    base+path/to/adapter               an adapter on another base
    https://host/v1#model-name         an OpenAI-compatible endpoint; the key is read from $OPENAI_API_KEY
    answers.jsonl                      recorded transcripts: rows {"prompt", "answer"} or {"messages": [...]}
    guard:default:runs/demo/ppo        any of these behind the safety pipeline, under a policy by name or YAML path
    call:package.module:function       a function from messages to text, or an object with .answer(messages)

`name=spec` gives it a name of its own. Sources are checked before any weights are read.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from plumbline.eval.targets.model_target import ModelTarget
from plumbline.eval.tasks import Messages, Prompt, Reply, digest


class Target(Protocol):
    """`fingerprint` changes whenever answers could: replies are kept by it."""

    name: str
    fingerprint: str
    gives_logp: bool

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        """One reply a prompt. What goes wrong with one of them is its `error`; nothing is raised for it."""

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Log-probability in nats of each continuation after its prompt."""

    def close(self) -> None:
        """Frees memory; the next call loads again."""


class EndpointTarget:
    """An OpenAI-compatible chat endpoint. Each question has its own time-out, and is tried `tries` times."""

    gives_logp = False

    def __init__(
        self, name: str, url: str, model: str, *, key: str = "", timeout_s: float = 60, tries: int = 2, parallel: int = 4
    ) -> None:  # fmt: skip
        self.name, self.url, self.model, self.key = name, url.rstrip("/"), model, key
        self.timeout_s, self.tries, self.parallel = timeout_s, tries, parallel
        self.fingerprint = digest("endpoint", self.url, model)

    def check(self) -> None:
        """Asks one short question; ValueError with the reason if no answer comes, before hundreds of them time out."""
        prompts: list[Prompt] = [[{"role": "user", "content": "Hello"}]]
        (reply,) = self.reply(prompts, max_new_tokens=8, temperature=0.0, seed=0)
        if reply.error:
            raise ValueError(f"target {self.name!r} does not answer: {reply.error}; start the server or mend the URL")

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        def one(prompt: Prompt) -> Reply:
            body: dict[str, Any] = {
                "model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
            }  # fmt: skip
            kind = "completions" if isinstance(prompt, str) else "chat/completions"
            body |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
            return self._ask(kind, body)

        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(one, prompts))

    def _ask(self, kind: str, body: dict[str, Any]) -> Reply:
        import urllib.error
        import urllib.request

        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/{kind}", json.dumps(body).encode(), headers)
        error = ""
        for _ in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    choice = json.load(answer)["choices"][0]
                text = choice["message"]["content"] if "message" in choice else choice["text"]
                if not isinstance(text, str):
                    return Reply(error=f"the endpoint answered {type(text).__name__} instead of text")
                return Reply(answers=(text,), finished=choice.get("finish_reason") != "length")
            except urllib.error.HTTPError as problem:
                error = f"HTTP {problem.code} from {self.url}"
                if problem.code < 500 and problem.code != 429:  # asking again would not help
                    break
            except TimeoutError:
                error = f"time-out after {self.timeout_s:g} s"
            except OSError as problem:  # refused, unknown host, reset
                error = f"{self.url} cannot be reached: {problem}"
            except (ValueError, KeyError, IndexError, TypeError) as problem:
                error = f"not an OpenAI-style answer ({type(problem).__name__}: {problem})"
        return Reply(error=error)

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class TranscriptTarget:
    """Answers that were recorded earlier, found by what was asked; a prompt that was not asked is unscored."""

    gives_logp = False

    def __init__(self, name: str, path: str | Path) -> None:
        self.name, self.path = name, Path(path)
        self._answers: dict[str, str] = {}
        for line_no, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                asked, answer = _recorded(line, f"{self.path}:{line_no}")
                self._answers.setdefault(asked, answer)
        if not self._answers:
            raise ValueError(f"{self.path}: no transcripts; needs one JSON object a line with prompt and answer")
        self.fingerprint = digest("transcripts", sorted(self._answers.items()))

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        found = [self._answers.get(_asked(prompt)) for prompt in prompts]
        return [Reply(error="not among the transcripts") if text is None else Reply(answers=(text,)) for text in found]

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class CallableTarget:
    """Any function from messages to text; also a guarded pipeline, as `Guard.answer`. Texts to continue are one user turn.

    The fingerprint holds the function's source where Python can find it; what the function calls is not seen: raise
    `version` when that changes.
    """

    gives_logp = False

    def __init__(self, name: str, answer: Callable[[Messages], Any], *, version: str = "1") -> None:
        self.name, self.answer = name, answer
        try:
            source = inspect.getsource(answer)
        except (OSError, TypeError):
            source = ""
        self.fingerprint = digest("callable", name, version, source)

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        return [self._one([{"role": "user", "content": p}] if isinstance(p, str) else p) for p in prompts]

    def _one(self, messages: Messages) -> Reply:
        try:
            said = self.answer(messages)
        except Exception as error:  # whatever a user's function does, one sample is unscored and the run goes on
            return Reply(error=f"{type(error).__name__}: {error}")
        text = getattr(said, "text", said)
        return (
            Reply(answers=(text,))
            if isinstance(text, str)
            else Reply(error=f"answered {type(said).__name__}, not text")
        )

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class GuardedTarget:
    """Another target behind a safety pipeline: anything with chat(messages) -> .text that asks its `.model`.

    The pipeline is asked twice, so that the model answers in batches: once to see what it would ask the model, with
    redactions made, and once with the model's answers at hand. Layers are switched on and off by the policy file.

    `known` holds what the model answered when it was asked without the guard, by conversation: those are not asked again, so
    that a guarded target differs from its bare one by what the guard did, and by nothing else.
    """

    gives_logp = False

    def __init__(self, name: str, inner: Target, guard: Any, *, policy_hash: str) -> None:
        self.name, self.inner, self.guard = name, inner, guard
        self.fingerprint = digest("guard", inner.fingerprint, policy_hash)
        self.known: dict[str, Reply] = {}

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        talks = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        asked: dict[int, Messages] = {}
        for at, messages in enumerate(talks):

            def note(passed: Messages, at: int = at) -> str:
                asked[at] = [dict(message) for message in passed]
                return ""

            self.guard.model = note
            self._chat(messages)
        said = {at: self.known[key] for at, passed in asked.items() if (key := digest(passed)) in self.known}
        new = {at: passed for at, passed in asked.items() if at not in said}
        if new:
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            said |= zip(new, self.inner.reply(list(new.values()), **options), strict=True)
        replies = []
        for at, messages in enumerate(talks):
            if at in said and said[at].error:
                replies.append(said[at])
                continue
            self.guard.model = lambda _, at=at: said[at].text if at in said else ""
            answer = self._chat(messages)
            replies.append(answer if isinstance(answer, Reply) else Reply(answers=(answer,)))
        return replies

    def _chat(self, messages: Messages) -> str | Reply:
        try:
            return self.guard.chat(messages).text
        except (
            Exception
        ) as error:  # a pipeline that raises leaves the sample unscored; it never lets the answer through
            return Reply(error=f"guard: {type(error).__name__}: {error}")

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        self.inner.close()


# ---- specs ----------------------------------------------------------------------------------------------------------


def open_target(
    spec: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", timeout_s: float = 60, key: str | None = None
) -> Target:
    """The target that a spec names; see the top of this file. Raises ValueError for one that does not exist."""
    name, _, rest = spec.partition("=") if re.match(r"[\w.+-]+=", spec) else ("", "", spec)
    if not rest:
        raise ValueError(f"target {spec!r} is empty; name a model source, run folder, adapter, URL or transcripts")
    name = name or _short_name(rest)
    if rest.startswith(("http://", "https://")):
        url, _, model = rest.partition("#")
        if not model:
            raise ValueError(f"target {rest!r} names no model; write it as {rest}#model-name")
        key = os.environ.get("OPENAI_API_KEY", "") if key is None else key
        return EndpointTarget(name, url, model, key=key, timeout_s=timeout_s)
    if rest.startswith("guard:"):
        policy, _, inside = rest.removeprefix("guard:").partition(":")
        if not policy or not inside:
            raise ValueError(f"target {rest!r}: write guard:POLICY:TARGET, such as guard:default:runs/demo/ppo")
        inner = open_target(inside, dtype=dtype, device=device, timeout_s=timeout_s, key=key)
        try:
            pipeline: Any = importlib.import_module("plumbline.safety.pipeline")
        except ImportError as error:
            raise ValueError(f"target {rest!r}: this version has no safety pipeline ({error})") from None
        guard = pipeline.Guard(policy)
        return GuardedTarget(name, inner, guard, policy_hash=guard.policy.sha256)
    if rest.startswith("call:"):
        return CallableTarget(name, _imported(rest.removeprefix("call:")))
    if rest.endswith(".jsonl"):
        if not Path(rest).is_file():
            raise ValueError(f"target {rest!r}: no such file of transcripts")
        return TranscriptTarget(name, rest)
    source, adapter = _source_and_adapter(rest)
    return ModelTarget(name, source, adapter=adapter, dtype=dtype, device=device)


def _source_and_adapter(spec: str) -> tuple[str, str | None]:
    base, plus, adapter = spec.partition("+")
    if plus:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ValueError(
                f"adapter {adapter!r} has no adapter_config.json; name a folder written by save_pretrained"
            )
        return base, adapter
    folder = Path(spec)
    if (folder / "adapter_config.json").is_file():
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return _moved(str(named), folder), spec
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "model").is_dir():
            return _source_and_adapter(str(folder / "model"))
        inside = [str(one.parent) for one in sorted(folder.glob("*/model"))]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else "; it holds no model/ and no config.json"
        raise ValueError(f"target {spec!r} is a folder without a model{hint}")
    return spec, None


def _moved(base: str, adapter: Path) -> str:
    """A relative base as it is written in an adapter: the one beside the adapter, though its run folder was moved.

    Only then one below the working folder, which may belong to another run of the same name.
    """
    if base.startswith("bundled:") or Path(base).is_absolute():
        return base
    beside = next((one / base for one in adapter.resolve().parents if (one / base).is_dir()), None)
    return base if beside is None or beside == Path(base).resolve() else str(beside)


def _imported(path: str) -> Callable[[Messages], Any]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"target call:{path}: {error}; write call:package.module:function") from None
    return found.answer if hasattr(found, "answer") else found


def _short_name(spec: str) -> str:
    """runs/demo/ppo -> ppo, owner/model -> model, https://host/v1#m -> m."""
    parts = [part for part in re.split(r"[/#:+]", spec.rstrip("/")) if part]
    last = parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]
    return re.sub(r"[^\w.-]", "-", last.removesuffix(".jsonl"))


def _recorded(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        if "messages" in row:
            *asked, answer = row["messages"]
            return _asked(asked), str(answer["content"])
        if not (isinstance(row["prompt"], str) and isinstance(row["answer"], str)):
            raise ValueError("prompt and answer must be text")
        return row["prompt"], row["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a transcript ({error}); needs prompt and answer, or messages") from None


def _asked(prompt: Prompt) -> str:
    """What a transcript is found by: the last user turn of a one-turn conversation, else the whole conversation."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else json.dumps(prompt, sort_keys=True)
