"""Answers from a vLLM server in place of the rollout engine, for adapters on a frozen base.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 16 \
        --logprobs-mode processed_logprobs
    accelerate launch align/ppo.py --config ... --rollout_server http://localhost:8000

The server runs in an environment, and on devices, of its own. Before each rollout it is handed the policy's adapter as a
folder, which it has to be able to read: on the same machine or a shared file system.

Endpoints: /v1/models, /v1/completions, /v1/load_lora_adapter, /v1/unload_lora_adapter (vLLM 0.32; docs.vllm.ai, "LoRA
Adapters" and "OpenAI-Compatible Server").
"""

import json
import os
import secrets
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from plumbline.policy_models.rollout.generation import Answer

# Mean difference of log-probabilities, in nats a token, above which the server is taken to serve something else.
MAX_MISMATCH = 0.3
_AT_ONCE = 256  # requests under way: the server batches what it has


class RolloutServer:
    """A vLLM server and the adapter it was handed last.

    Args:
        url: as in http://host:8000. `OPENAI_API_KEY`, if set, goes along.
        adapters: folder for the adapters that are handed over; only the newest stays there.
        timeout_s: of one request.

    Raises:
        ValueError: when nothing that speaks the protocol answers at `url`.
    """

    def __init__(self, url: str, accelerator: Accelerator, *, adapters: Path, timeout_s: float = 600) -> None:
        self.url, self.accelerator, self.adapters, self.timeout_s = url.rstrip("/"), accelerator, adapters, timeout_s
        # A name for the adapters of this process alone: the server may still know those of a run that was killed.
        (self._token,) = broadcast_object_list([secrets.token_hex(4)])
        self._handed = 0
        try:
            served = self._ask("/v1/models")["data"]
            self.base = str(next(model["id"] for model in served if not model.get("parent")))
        except (ValueError, KeyError, TypeError, StopIteration, RuntimeError) as error:
            raise ValueError(
                f"rollout_server={url!r}: no vLLM server answers there ({error.__cause__ or error}); start one as "
                "align/rl/rollout_server.py says, or leave the setting out"
            ) from None

    def hand_over(self, save: Callable[..., None]) -> str:
        """Makes the policy known to the server under a new name, and returns that; all ranks call it together.

        `save(folder, write=...)` writes the adapter. A name is never used twice, since the server keeps what it has
        computed of prompts by the adapter's name.
        """
        main, before = self.accelerator.is_main_process, self._handed
        self._handed += 1
        folder, name = self.adapters / str(self._handed), self._name(self._handed)
        save(folder, write=main)
        if main:
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
            if before:
                self._ask("/v1/unload_lora_adapter", {"lora_name": self._name(before)})
                shutil.rmtree(self.adapters / str(before))
        self.accelerator.wait_for_everyone()
        return name

    def _name(self, number: int) -> str:
        return f"plumbline-{self._token}-{number}"

    def generate(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float,
        generator: torch.Generator,
    ) -> list[Answer]:
        """One answer a prompt, in their order, as `rollout.generation.generate` gives them, from what is served as `model`.

        Each request has a seed of its own, drawn from `generator`; what a server makes of it may depend on what else it
        has in its batch. RuntimeError when the server refuses, goes away, or answers something that is no answer.
        """
        seeds = torch.randint(2**31 - 1, (len(prompts),), generator=generator, device=generator.device).tolist()
        # All that a model's generation_config.json might change is said here.
        asked: dict[str, Any] = {
            "model": model, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0, "top_k": -1,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1,
            "stop_token_ids": list(stop_ids), "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip

        def one(prompt: Sequence[int], seed: int) -> Answer:
            (choice,) = self._ask("/v1/completions", asked | {"prompt": list(prompt), "seed": seed})["choices"]
            ids, logp = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if len(ids) != len(logp) or not 0 < len(ids) <= max_new_tokens:
                raise RuntimeError(
                    f"rollout_server={self.url!r} answered {len(ids)} tokens with {len(logp)} log-probabilities"
                )
            return Answer(ids=ids, logp=logp, finished=choice["finish_reason"] == "stop")

        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(prompts)))) as threads:
            return list(threads.map(one, prompts, seeds))

    def check(self, mismatch: float) -> None:
        """RuntimeError where the server's log-probabilities are not those of the policy that is trained."""
        if not mismatch <= MAX_MISMATCH:
            raise RuntimeError(
                f"rollout_server={self.url!r}: its log-probabilities are {mismatch:.2f} nats a token off the policy's "
                f"(at most {MAX_MISMATCH}); it must serve the run's `model` and be started with "
                "--logprobs-mode processed_logprobs"
            )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=self.timeout_s
            ) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as problem:
            said = problem.read().decode(errors="replace")[:300]
            raise RuntimeError(f"rollout_server={self.url!r}: {path} gave HTTP {problem.code}: {said}") from problem
        except OSError as problem:  # refused, reset, timed out
            raise RuntimeError(
                f"rollout_server={self.url!r}: {path} got no answer ({problem}); see to the server, then go on from the last "
                "checkpoint with --resume true"
            ) from problem
        return json.loads(text) if text.startswith(("{", "[")) else text
