"""Weights on this machine as a target: answers through the rollout engine, log-probabilities in shared forward passes."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plumbline.eval.tasks import Prompt, Reply, digest
from plumbline.policy_models.chat import encode_prompts, sample_answers
from plumbline.policy_models.loading import attach_adapter, load_policy, load_tokenizer, resolve_model_source
from plumbline.policy_models.logprobs import token_logprobs

PAIRS_TOKENS = 2048  # padded tokens a forward pass of log-probabilities


class ModelTarget:
    """Weights on this machine, loaded at the first question, answered through the rollout engine."""

    gives_logp = True

    def __init__(
        self, name: str, source: str, *, adapter: str | None = None, dtype: torch.dtype = torch.float32,
        device: str = "cpu", batch_size: int = 64,
    ) -> None:  # fmt: skip
        self.name, self.source, self.adapter = name, source, adapter
        self.dtype, self.device, self.batch_size = dtype, device, batch_size
        folders = [Path(resolve_model_source(source)), *([Path(adapter)] if adapter else [])]
        self.fingerprint = digest(name_of_weights(folders), str(dtype).removeprefix("torch."))
        self._loaded: tuple[Any, Any] | None = None

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        if self._loaded is None:
            model: Any = load_policy(self.source, dtype=self.dtype)
            if self.adapter:
                model = attach_adapter(model, self.adapter).merge_and_unload()
            self._loaded = model.to(self.device).eval(), load_tokenizer(self.source)
        return self._loaded

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        model, tokenizer = self.load()
        ids, faults = [], {}
        for at, prompt in enumerate(prompts):
            try:
                ids.append(self.encode(prompt))
            except (ValueError, TypeError) as error:  # half of a surrogate pair, or what the chat template refuses
                ids.append([])
                faults[at] = f"the prompt cannot be encoded ({error})"
        room = getattr(model.config, "max_position_embeddings", None) or 2**31
        fits = [at for at, one in enumerate(ids) if 0 < len(one) <= room - max_new_tokens]
        too_long = "the prompt has {} tokens, the model takes {}"
        replies = [Reply(error=too_long.format(len(one), room - max_new_tokens), final=True) for one in ids]
        for at, fault in faults.items():
            replies[at] = Reply(error=fault, final=True)
        if fits:
            answers, texts = sample_answers(
                model, tokenizer, [ids[at] for at in fits], max_new_tokens=max_new_tokens, temperature=temperature,
                generator=torch.Generator().manual_seed(seed), batch_size=self.batch_size,
            )  # fmt: skip
            for at, answer, text in zip(fits, answers, texts, strict=True):
                replies[at] = Reply(answers=(text,), finished=answer.finished)
        return replies

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        return [total for total, _ in self.logp_and_greedy(pairs)]

    @torch.inference_mode()
    def logp_and_greedy(self, pairs: Sequence[tuple[Prompt, str]]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether each token was the likeliest) of each continuation.

        Tokens are split as lm-evaluation-harness splits them: prompt and continuation are encoded together, and the
        continuation begins after as many tokens as the prompt alone has. One-token continuations of one prompt share a pass.
        """
        model, tokenizer = self.load()
        split = [self._split(prompt, text) for prompt, text in pairs]
        inputs: dict[tuple[int, ...], list[int]] = {}  # what goes in (all but the last token) -> pairs that read it
        for at, (before, after) in enumerate(split):
            inputs.setdefault(tuple((before + after)[:-1]), []).append(at)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(inputs, key=len)
        while order:
            batch, order = _last(order, max(1, PAIRS_TOKENS // max(1, len(order[-1]))))
            self._score_batch(model, batch, inputs, split, tokenizer.pad_token_id, found)
        return found

    def _score_batch(self, model, batch, inputs, split, pad: int, found: list[tuple[float, bool]]) -> None:
        width = max(map(len, batch))
        ids_BT = torch.full((len(batch), width), pad)
        keep_BT, read_BT = torch.zeros_like(ids_BT), torch.zeros(len(batch), width, dtype=torch.bool)
        for row, one in enumerate(batch):
            ids_BT[row, : len(one)], keep_BT[row, : len(one)] = torch.tensor(one), 1
            read_BT[row, len(one) - max(len(split[at][1]) for at in inputs[one]) : len(one)] = True
        device = model.device
        logits_NV = model(
            input_ids=ids_BT.to(device), attention_mask=keep_BT.to(device), use_cache=False,
            position_ids=(keep_BT.cumsum(1) - keep_BT).to(device), logits_to_keep=read_BT.to(device),
        ).logits  # fmt: skip
        logits_NV = logits_NV.reshape(-1, logits_NV.shape[-1])
        first = 0
        for row, one in enumerate(batch):
            rows = logits_NV[first : first + int(read_BT[row].sum())]
            first += len(rows)
            for at in inputs[one]:
                after = torch.tensor(split[at][1], device=device)
                of_it = rows[-len(after) :]
                logp_N, _ = token_logprobs(of_it, after)
                found[at] = float(logp_N.sum()), bool((of_it.argmax(-1) == after).all())

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a conversation (with the assistant's turn opened) or of a plain text."""
        _, tokenizer = self.load()
        if isinstance(prompt, str):
            return tokenizer(prompt, add_special_tokens=True)["input_ids"]
        return encode_prompts(tokenizer, [prompt])[0]

    def _split(self, prompt: Prompt, text: str) -> tuple[list[int], list[int]]:
        _, tokenizer = self.load()
        if not isinstance(prompt, str):
            return self.encode(prompt), tokenizer(text, add_special_tokens=False)["input_ids"]
        if not prompt:  # the text alone, given the token that begins or ends a text
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            return [start], tokenizer(text, add_special_tokens=False)["input_ids"]
        blanks = len(prompt) - len(prompt.rstrip())
        if blanks:
            prompt, text = prompt[:-blanks], prompt[-blanks:] + text
        before, whole = self.encode(prompt), self.encode(prompt + text)
        return before, whole[len(before) :] or whole[-1:]

    def close(self) -> None:
        self._loaded = None
        gc.collect()


def name_of_weights(folders: Sequence[Path]) -> str:
    """Hash of everything in model folders that can change an answer; a hub id is named by the commit in the cache."""
    whole = hashlib.sha256()
    for folder in folders:
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(str(folder), "config.json")
            whole.update(f"{folder}@{Path(cached).parent.name if isinstance(cached, str) else ''}".encode())
            continue
        files = (
            f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
        )
        for file in sorted(files):
            whole.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    whole.update(block)
    return whole.hexdigest()[:32]


def _last(order: list, count: int) -> tuple[list, list]:
    return order[-count:], order[:-count]
