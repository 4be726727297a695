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
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plumbline.eval.targets.endpoint import EndpointTarget
from plumbline.eval.targets.function import CallableTarget
from plumbline.eval.targets.guarded import GuardedTarget
from plumbline.eval.targets.model_target import ModelTarget
from plumbline.eval.targets.recorded import TranscriptTarget
from plumbline.eval.targets.target import Target
from plumbline.eval.tasks import Messages


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
    source, adapter = source_and_adapter(rest)
    return ModelTarget(name, source, adapter=adapter, dtype=dtype, device=device)


def source_and_adapter(spec: str) -> tuple[str, str | None]:
    """The model source and the adapter on it, if any, of a source, a run folder, an adapter or BASE+ADAPTER.

    ValueError for a folder that is none of these.
    """
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
            return source_and_adapter(str(folder / "model"))
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
