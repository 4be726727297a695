"""Tiny models with a chat template that knows tools, backends around them, and a backend that says what a test wants."""

import asyncio
import functools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("prometheus_client", reason="the server needs the [serve] extra")

from plumbline.apps.serve.engine.backend import Drawing, Piece, Request, Served, TokenLogprob  # noqa: E402
from plumbline.apps.serve.engine.local_backend import EngineSettings, LocalBackend  # noqa: E402
from plumbline.policy_models.loading import load_policy, load_tokenizer  # noqa: E402

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall as <tool_call>{...}</tool_call>: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tiny(source: str = "tiny-llama"):
    """Model and tokenizer; "+adapter" adds the adapter `red`, which changes the answers."""
    name, _, adapter = source.partition("+")
    model, tokenizer = load_policy(f"bundled:{name}"), load_tokenizer(f"bundled:{name}")
    tokenizer.chat_template = TOOL_TEMPLATE
    if adapter:
        torch.manual_seed(3)
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"]), adapter_name="red"
        )
        with torch.no_grad():
            for label, parameter in model.named_parameters():
                if "lora_B" in label:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval(), tokenizer


def local_backend(source: str = "tiny-llama", **changes) -> LocalBackend:
    model, tokenizer = tiny(source)
    settings = {"rows": 4, "context": 320, "step_tokens": 48, "queue": 8, "prefix_tokens": 1024} | changes
    adapters = ["red"] if "+" in source else []
    return LocalBackend(model, tokenizer, name="tiny", adapters=adapters, settings=EngineSettings(**settings))


@pytest.fixture
def backend():
    """A local backend; closed afterwards."""
    made = local_backend("tiny-llama+adapter")
    yield made
    made.scheduler.stop()


def greedy(prompt, model: str = "tiny", **changes) -> Request:
    drawing = Drawing(
        **(
            {"temperature": 0.0, "max_tokens": 12}
            | {k: v for k, v in changes.items() if k in Drawing.__dataclass_fields__}
        )
    )
    rest = {k: v for k, v in changes.items() if k not in Drawing.__dataclass_fields__}
    what = {"prompt": prompt} if isinstance(prompt, str) or isinstance(prompt[0], int) else {"messages": prompt}
    return Request(model=model, drawing=drawing, **what, **rest)


async def collect(generation) -> list[dict]:
    """Text, tokens and finish of each answer."""
    answers: dict[int, dict] = {}
    async for piece in generation:
        answer = answers.setdefault(piece.index, {"text": "", "tokens": 0, "finish": None, "logprobs": []})
        answer["text"] += piece.text
        answer["tokens"] += piece.tokens
        answer["finish"] = piece.finish
        answer["logprobs"] += piece.logprobs
    return [answers[at] for at in sorted(answers)]


class Scripted:
    """A backend that says given pieces, one token each."""

    def __init__(self, *answers: list[str], finish: str = "stop", endless: bool = False) -> None:
        self.answers, self.finish, self.endless = list(answers), finish, endless
        self.requests: list[Request] = []
        self.cancelled = self.open = 0

    def served(self):
        return [Served(name="scripted")]

    def tool_format(self, model):
        return "hermes"

    def stats(self):
        return {"rows": self.open, "waiting": 0}

    async def ready(self):
        return None

    def drain(self):
        pass

    async def close(self, patience_s=0.0):
        pass

    async def submit(self, request):
        self.requests.append(request)
        self.open += 1
        return _Said(self, request.n)


class _Said:
    prompt_tokens, cached_tokens = 7, 0

    def __init__(self, backend, n) -> None:
        self.backend, self.n, self.live = backend, n, True

    def cancel(self):
        self.backend.cancelled += 1
        self.backend.open -= self.live
        self.live = False

    async def __aiter__(self):
        answers = [self.backend.answers[at % len(self.backend.answers)] for at in range(self.n)]
        for index, pieces in enumerate(answers):
            at = 0
            for text in pieces:
                await asyncio.sleep(0)
                yield Piece(index, text, 1, (TokenLogprob(text, text.encode(), -0.5, at, at + len(text)),))
                at += len(text)
            while self.backend.endless:
                await asyncio.sleep(0.001)
                yield Piece(index, "word ", 1)
            yield Piece(index, "", 1, (), self.backend.finish)


def lines_of(text: str) -> list[dict]:
    """The events of a stream, [DONE] left out."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
