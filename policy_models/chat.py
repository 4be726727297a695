"""Conversations in, answers out: chat template, stop tokens, decoding to text around the rollout engine.

Every stage renders conversations here, so that what a reward model reads in PPO is what it read in training. A template
that takes no system role gets the system's text at the head of the first user turn, as Gemma's users do it; what else a
template leaves out, `lost_in_template` says.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from plumbline.messages import Message, Messages
from plumbline.policy_models.loading import resolve_model_source
from plumbline.policy_models.rollout.generation import Answer, generate


class TemplateRefusalError(ValueError):
    """A chat template does not take a conversation, such as two turns of the user in a row."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, tools: list[Any] | None = None, open_turn: bool = False
) -> str:
    """The conversation as the model reads it; `open_turn` ends it with the head of the assistant's next turn.

    Raises:
        ValueError: for a tokenizer without a chat template.
        TemplateRefusalError: where the template refuses the conversation, with its reason.
    """
    check_template(tokenizer)
    try:
        text = _rendered(tokenizer, messages, tools, open_turn)
        if messages[0]["role"] != "system" or messages[0]["content"].strip() in text:
            return text
    except TemplateRefusalError:
        if messages[0]["role"] != "system":
            raise
    return _rendered(tokenizer, system_folded(messages), tools, open_turn)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer without a chat template, with the ways out."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so nothing says how a conversation "
            "reads: start from a chat model, put a chat_template.jinja beside its tokenizer, or let SFT set one with "
            "chat_template_path, for the later stages to start from"
        )


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has a place for a system prompt; else `render` folds it into the first user turn."""
    probe = [{"role": "system", "content": "plumbline-probe"}, {"role": "user", "content": "?"}]
    try:
        return "plumbline-probe" in _rendered(tokenizer, probe, None, True)
    except TemplateRefusalError:
        return False


def system_folded(messages: Messages) -> Messages:
    """The system's text at the head of the first user turn; a turn of its own where the user does not speak next."""
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": system["content"]}, *rest]


def lost_in_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None = None
) -> set[str]:
    """Which fields of the messages, or `tools`, do not show in the rendered text.

    TemplateRefusalError as for `render`.
    """
    fields = {name for m in messages for name in m} - {"role", "content"}
    if not fields and tools is None:
        return set()
    text, lost = render(tokenizer, messages, tools=tools), set()
    if tools is not None and render(tokenizer, messages) == text:
        lost.add("tools")
    for name in fields:
        values = [m[name] for m in messages if name in m]
        if all(isinstance(value, str) for value in values):
            if not all(value.strip() in text for value in values):
                lost.add(name)
        elif render(tokenizer, [_without(m, name) for m in messages], tools=tools) == text:
            lost.add(name)
    return lost


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None, open_turn: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=open_turn, tokenize=False)  # type: ignore[arg-type]
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise TemplateRefusalError(f"the chat template does not take the roles {roles:.120}: {error}") from None


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, tools: list[Any] | None = None, open_turn: bool = False
) -> list[int]:
    """`render` as token ids. The template writes a start token where one belongs; the tokenizer adds no second one."""
    text = render(tokenizer, messages, tools=tools, open_turn=open_turn)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> list[list[int]]:
    """Chat template with the turn of the assistant opened, one list of ids a prompt."""
    return [encode(tokenizer, prompt, open_turn=True) for prompt in prompts]


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    batch_size: int = 64,
) -> tuple[list[Answer], list[str]]:
    """Answers as tokens and as text (special tokens left out)."""
    answers = generate(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        temperature=temperature,
        generator=generator,
        batch_size=batch_size,
    )
    return answers, tokenizer.batch_decode([a.ids for a in answers], skip_special_tokens=True)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the generation settings' and the tokenizer's."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ids = {ends} if isinstance(ends, int) else set(ends or [])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ValueError("neither generation_config nor the tokenizer has an eos token: answers could never end")
    return sorted(ids)


def end_ids(source: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends an answer of a model that is not loaded yet: the tokenizer's, and its generation settings'."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    try:
        ends = GenerationConfig.from_pretrained(resolve_model_source(source)).eos_token_id
    except (OSError, ValueError):  # no such file, as in an adapter's folder
        return ids
    return ids | ({ends} if isinstance(ends, int) else set(ends or []))
