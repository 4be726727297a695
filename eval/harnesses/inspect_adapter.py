"""inspect_ai both ways: our targets as a model provider, our suites as tasks.

    inspect eval eval/harnesses/inspect_adapter.py@suite -T name=over_refusal --model plumbline/bundled:smollm2-135m-instruct

The target's spec stands after "plumbline/". Needs `pip install inspect_ai`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

if not __package__:  # loaded by path, as inspect does: look from the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset
    from inspect_ai.dataset import Sample as InspectSample
    from inspect_ai.model import (
        ChatMessageSystem,
        ChatMessageUser,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        modelapi,
    )
    from inspect_ai.scorer import Score as InspectScore
    from inspect_ai.scorer import mean, scorer, stderr
    from inspect_ai.solver import solver
except ImportError as error:
    raise ImportError("this adapter needs inspect_ai: pip install inspect_ai") from error

from plumbline.eval.suites import load_suites
from plumbline.eval.targets.specs import open_target
from plumbline.eval.tasks import EvalTask, Reply, grade


@modelapi(name="plumbline")
class PlumblineAPI(ModelAPI):
    """A target as an inspect model; questions go to it one at a time, since it batches none across calls."""

    def __init__(
        self, model_name: str, base_url: str | None = None, api_key: str | None = None,
        config: GenerateConfig | None = None, **model_args: Any,
    ) -> None:  # fmt: skip
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self.target = open_target(model_name)
        self._lock = asyncio.Lock()

    async def generate(self, input, tools, tool_choice, config: GenerateConfig) -> ModelOutput:
        messages = [{"role": message.role, "content": message.text} for message in input]
        async with self._lock:
            (reply,) = await asyncio.to_thread(
                self.target.reply, [messages], max_new_tokens=config.max_tokens or 128,
                temperature=config.temperature or 0.0, seed=config.seed or 0,
            )  # fmt: skip
        if reply.error:
            raise RuntimeError(reply.error)
        return ModelOutput.from_content(self.model_name, reply.text)


@task
def suite(name: str = "over_refusal", limit: int | None = None) -> Task:
    """One of our suites. Suites that read log-probabilities have no place in inspect and are refused."""
    (found, *_) = load_suites([name], limit=limit)
    if found.asks_choices:
        raise ValueError(f"suite {name!r} reads log-probabilities, which inspect does not ask a model for")
    samples = [
        InspectSample(
            id=sample.id, target=sample.target,
            input=[*([ChatMessageSystem(content=sample.system)] if sample.system else []),
                   ChatMessageUser(content=[*sample.history, sample.input][0])],
            metadata={"later": [*sample.history, sample.input][1:], "at": at},
        )
        for at, sample in enumerate(found.samples)
    ]  # fmt: skip
    config = GenerateConfig(max_tokens=found.max_new_tokens or 128, temperature=0.0)
    return Task(
        dataset=MemoryDataset(samples), solver=[all_turns()], scorer=ours(found), config=config, version=found.version
    )


@solver
def all_turns():
    """Plays every user turn, the model answering each."""

    async def solve(state, generate):
        state = await generate(state)
        for turn in state.metadata["later"]:
            state.messages.append(ChatMessageUser(content=turn))
            state = await generate(state)
        return state

    return solve


def ours(found: EvalTask):
    """Our scorers as one inspect scorer; a figure without a value becomes NaN, which inspect leaves out."""

    @scorer(metrics={"*": [mean(), stderr()]}, name=found.name)
    def build():
        async def score(state, target) -> InspectScore:
            one = found.samples[state.metadata["at"]]
            alone = EvalTask(**{f: getattr(found, f) for f in found.__dataclass_fields__} | {"samples": [one]})
            graded = grade("inspect", alone, [Reply(answers=(state.output.completion,))])
            values = {name: s[0].value if s[0].value is not None else float("nan") for name, s in graded.scores.items()}
            return InspectScore(value=values, answer=state.output.completion)

        return score

    return build()
