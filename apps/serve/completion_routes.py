"""POST /v1/completions: text that goes on, without a chat template."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from plumbline.apps.serve.answering import Answer, Answering, Usage
from plumbline.apps.serve.chat_routes import SSE_HEADERS, drawing_of, sse, while_connected
from plumbline.apps.serve.engine import backend
from plumbline.apps.serve.engine.backend import BadRequestError, TokenLogprob
from plumbline.apps.serve.errors import event_of
from plumbline.apps.serve.openai_types import MOST_ANSWERS, CompletionRequest


def completion_routes(answering: Answering, deadline_s: float) -> APIRouter:
    """The route; `deadline_s` bounds every request."""
    router = APIRouter()

    @router.post("/v1/completions", summary="Text that follows a prompt", response_class=JSONResponse)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        backend.find_served(answering.backend, body.model)
        prompts = body.prompts()
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise BadRequestError("the prompt is empty", param="prompt")
        if len(prompts) * body.n > MOST_ANSWERS or (body.stream and len(prompts) > 1):
            raise BadRequestError(
                f"{len(prompts)} prompts with n={body.n}: at most {MOST_ANSWERS} answers a request, and a stream has one prompt",
                param="prompt",
            )
        if body.echo and not isinstance(prompts[0], str):
            raise BadRequestError("echo needs prompts in text", param="echo")
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        asked = [
            backend.Request(
                model=body.model,
                prompt=prompt,
                n=body.n,
                drawing=drawing_of(body, body.max_tokens, body.logprobs),
                deadline_s=min(deadline_s, body.x_deadline_s or deadline_s),
            )
            for prompt in prompts
        ]
        if body.stream:
            answer = await answering.begin(asked[0], whole=False)
            return StreamingResponse(_events(body, head, answer), media_type="text/event-stream", headers=SSE_HEADERS)

        async def whole() -> JSONResponse:
            answers = []
            try:
                for one in asked:  # all of them are queued before the first is read
                    answers.append(await answering.begin(one, whole=True))
                return JSONResponse(await _body(body, head, prompts, answers))
            finally:
                for answer in answers:
                    answer.cancel()

        return await while_connected(request, whole())

    return router


async def _body(
    body: CompletionRequest, head: dict[str, Any], prompts: list[str | list[int]], answers: list[Answer]
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    usage = Usage()
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        mine = [
            _choice(at * body.n + i, prompt if body.echo and isinstance(prompt, str) else "") for i in range(body.n)
        ]
        async for part in answer:
            choice = mine[part.index]
            choice["text"] += part.text
            if body.logprobs is not None:
                choice["logprobs"] = _logprobs(choice["logprobs"], part.logprobs)
            if part.finish is not None:
                choice["finish_reason"] = part.finish
                if part.guard is not None:
                    choice["x_guard"] = part.guard
        choices += mine
        usage.prompt += answer.usage.prompt
        usage.completion += answer.usage.completion
        usage.cached += answer.usage.cached
    return {**head, "choices": choices, "usage": usage.to_json()}


async def _events(body: CompletionRequest, head: dict[str, Any], answer: Answer) -> AsyncIterator[str]:
    try:
        async for part in answer:
            if not part.text and not part.logprobs and part.finish is None:
                continue
            choice = _choice(part.index, part.text) | {"finish_reason": part.finish}
            if body.logprobs is not None:
                choice["logprobs"] = _logprobs(None, part.logprobs)
            if part.guard is not None:
                choice["x_guard"] = part.guard
            yield sse({**head, "choices": [choice]})
        if body.include_usage():
            yield sse({**head, "choices": [], "usage": answer.usage.to_json()})
        yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001  the status line has gone out; the client learns of it all the same
        yield event_of(error)
    finally:
        answer.cancel()


def _choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _logprobs(before: dict[str, Any] | None, more: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """The parallel lists of the older API."""
    out = before or {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in more:
        out["tokens"].append(one.text)
        out["token_logprobs"].append(one.logprob)
        out["top_logprobs"].append({text: value for text, _, value in one.top})
        out["text_offset"].append(one.start)
    return out
