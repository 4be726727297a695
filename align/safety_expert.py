"""The safety expert of SafeDecoding, a small LoRA adapter on the policy's own weights.

Trained to open its answer to a harmful prompt with one stock decline, and to go on answering harmless prompts that sound like
them as the model does without it, in equal parts. The paper trains on refusals alone: an expert that only knows how to refuse
then pulls harmless prompts down with it. And the decline is always the same one, because SafeDecoding asks for the first tokens only:
a hundred ways to decline leave none of them likely. A model that declines in other words needs another DECLINE.

    plumbline safety-expert --model bundled:smollm2-135m-instruct --out runs/expert

Leaves a PEFT adapter folder: `model.load_adapter(folder, "expert")`. Ends with a line of JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from plumbline.align.runtime.launch import launched
from plumbline.paths import STARTER
from plumbline.policy_models.chat import encode_prompts, sample_answers
from plumbline.policy_models.devices import fast_dtype
from plumbline.rows import file_rows

# As the bundled model itself declines: SafeDecoding takes only tokens that the base ranks high too. " cannot" stands at place 60 after "I".
DECLINE = "I'm sorry, but I can't help with that."
ANSWER_TOKENS = 24  # of an answer that the expert learns: more than SafeDecoding ever asks for

Row = tuple[str, str]  # prompt and answer


def expert_prompts(folder: Path = STARTER) -> tuple[list[str], list[str]]:
    """Harmful prompts of the starter data, and as many harmless ones that sound like them."""
    prompts: dict[str, dict[str, None]] = {"harmful": {}, "twin": {}}
    for file in ("sft.jsonl", "preferences.jsonl", "harm_twins.jsonl"):
        for _, row in file_rows(folder / file):
            if row["kind"] in prompts:
                prompts[row["kind"]][row["prompt"]] = None
    harmful, twins = map(list, prompts.values())
    return harmful, twins[: len(harmful)]


def expert_rows(model: Any, tokenizer: Any, harmful: Sequence[str], harmless: Sequence[str]) -> list[Row]:
    """(prompt, answer): DECLINE for harmful prompts; for harmless ones how the model itself begins its answer, greedy."""
    prompt_ids = encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in harmless])
    _, own = sample_answers(model, tokenizer, prompt_ids, max_new_tokens=ANSWER_TOKENS, temperature=0.0, generator=None)
    return [*((prompt, DECLINE) for prompt in harmful), *zip(harmless, own, strict=True)]


def train_expert(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    steps: int = 70,
    rows_per_step: int = 8,
    learning_rate: float = 1e-3,
    top_layers: int = 10,
    answer_tokens: int = ANSWER_TOKENS,
    rank: int = 8,
    seed: int = 0,
) -> tuple[Any, list[float]]:
    """The PEFT model with its adapter "expert", and the loss of each step in nats a token.

    The loss is on the first `answer_tokens` of an answer. Adapters sit on the last `top_layers` layers, so that the backward pass
    ends there.

    Raises:
        RuntimeError: when the loss is not finite.
    """
    if steps < 1 or rows_per_step < 1 or not rows:
        raise ValueError(f"{steps=} and {rows_per_step=} must be at least 1, and there must be rows, not {len(rows)}")
    fast = fast_dtype(model.device) == torch.bfloat16
    layers = model.config.num_hidden_layers
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        layers_to_transform=list(range(max(0, layers - top_layers), layers)),
    )
    torch.manual_seed(seed)
    peft = get_peft_model(model, lora, adapter_name="expert").train()
    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    encoded = [_encode(tokenizer, prompt, answer, answer_tokens) for prompt, answer in rows]
    rng = random.Random(seed)
    order: list[int] = []
    losses: list[float] = []
    for step in range(steps):
        if len(order) < rows_per_step:
            order = rng.sample(range(len(encoded)), len(encoded))
        chosen, order = order[:rows_per_step], order[rows_per_step:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=fast):
            loss = _loss(peft, [encoded[row] for row in chosen], tokenizer.pad_token_id)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of step {step} is {loss.item()}; lower learning_rate={learning_rate}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return peft.eval(), losses


def _encode(tokenizer: Any, prompt: str, answer: str, answer_tokens: int) -> tuple[list[int], int]:
    """Ids of the conversation up to `answer_tokens` of the answer, and how many of them are the prompt."""
    turn = [{"role": "user", "content": prompt}]
    opened = list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
    said = tokenizer.encode(answer, add_special_tokens=False)
    return [*opened, *said[:answer_tokens]], len(opened)


def _loss(model: Any, rows: Sequence[tuple[list[int], int]], pad_id: int) -> Tensor:
    width = max(len(ids) for ids, _ in rows)
    ids_BS = torch.full((len(rows), width), pad_id)
    keep_BS = torch.zeros_like(ids_BS)
    target_BS = torch.full_like(ids_BS, -100)
    for at, (ids, opened) in enumerate(rows):
        ids_BS[at, : len(ids)] = torch.tensor(ids)
        keep_BS[at, : len(ids)] = 1
        target_BS[at, opened : len(ids)] = torch.tensor(ids[opened:])
    device = model.device
    counts = target_BS[:, 1:] != -100
    first = int(counts.any(0).nonzero()[0])  # the head is only asked where an answer stands
    asked = torch.arange(first, width - 1, device=device)
    logits = model(input_ids=ids_BS.to(device), attention_mask=keep_BS.to(device), logits_to_keep=asked).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), target_BS[:, 1 + first :].to(device).flatten(), ignore_index=-100
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and saves an adapter; `argv` is the command line without the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from plumbline.policy_models.loading import load_policy, load_tokenizer

    model, tokenizer = load_policy(args.model), load_tokenizer(args.model)
    started = time.perf_counter()
    rows = expert_rows(model, tokenizer, *expert_prompts())
    peft, losses = train_expert(model, tokenizer, rows, steps=args.steps, seed=args.seed)
    peft.save_pretrained(str(args.out), selected_adapters=["expert"])
    figures = {"rows": len(rows), "first_loss": losses[0], "last_loss": losses[-1], "s": time.perf_counter() - started}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    launched(main, "safety_expert")
