"""POST /v1/chat/completions."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from plumbline.apps.serve.answering import Answer, Answering, Checked
from plumbline.apps.serve.engine import backend
from plumbline.apps.serve.engine.backend import BadRequestError, Drawing, TokenLogprob
from plumbline.apps.serve.errors import event_of
from plumbline.apps.serve.keys import until_disconnect
from plumbline.apps.serve.openai_types import ChatRequest, Drawn
from plumbline.apps.serve.tools import ToolCall, ToolReader, names_of

T = TypeVar("T")
SSE_HEADERS = {"X-Accel-Buffering": "no"}  # proxies must pass pieces on as they come


def chat_routes(answering: Answering, deadline_s: float) -> APIRouter:
    """The route; `deadline_s` bounds every request."""
    router = APIRouter()

    @router.post("/v1/chat/completions", summary="An answer to a conversation", response_class=JSONResponse)
    async def chat(body: ChatRequest, request: Request) -> Response:
        asked = _request_of(body, answering, deadline_s)
        writer = _Writer(body, answering.backend.tool_format(body.model) if asked.tools else None)
        if body.stream:
            answer = await answering.begin(asked, whole=False)
            return StreamingResponse(writer.events(answer), media_type="text/event-stream", headers=SSE_HEADERS)

        async def whole() -> JSONResponse:
            return JSONResponse(await writer.whole(await answering.begin(asked, whole=True)))

        return await while_connected(request, whole())

    return router


def drawing_of(body: Drawn, max_tokens: int | None, logprobs: int | None) -> Drawing:
    """How the answers of a request are drawn."""
    return Drawing(
        max_tokens=max_tokens,
        temperature=float(body.temperature),
        top_p=float(body.top_p),
        top_k=max(0, body.top_k),
        seed=body.seed,
        stop=body.stops(),
        logprobs=logprobs,
        frequency_penalty=float(body.frequency_penalty),
        presence_penalty=float(body.presence_penalty),
        logit_bias={int(token): float(bias) for token, bias in (body.logit_bias or {}).items()},
    )


def _request_of(body: ChatRequest, answering: Answering, deadline_s: float) -> backend.Request:
    backend.find_served(answering.backend, body.model)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice: Any = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
    if choice == "none":
        tools = []
    if tools and answering.backend.tool_format(body.model) is None:
        raise BadRequestError(
            f"the chat template of {body.model} has no tools; choose a model that was taught them", param="tools"
        )
    answer_format = body.response_format
    return backend.Request(
        model=body.model,
        messages=[message.plain() for message in body.messages],
        n=body.n,
        drawing=drawing_of(
            body, body.max_tokens or body.max_completion_tokens, (body.top_logprobs or 0) if body.logprobs else None
        ),
        tools=tools,
        tool_choice=choice or "auto",
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=answer_format.model_dump(by_alias=True, exclude_none=True) if answer_format else None,
        deadline_s=min(deadline_s, body.x_deadline_s or deadline_s),
    )


class _Writer:
    """Checked text in the shapes of a chat completion, tool calls taken out of it."""

    def __init__(self, body: ChatRequest, notation: str | None) -> None:
        self.body = body
        self.notation, self.names = notation, names_of([tool.model_dump() for tool in body.tools or ()])
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}

    def _reader(self) -> ToolReader:
        return ToolReader(self.notation or "", self.names)

    async def body_parts(self, answer: Answer) -> AsyncIterator[tuple[Checked, list[str | ToolCall]]]:
        """Every checked part with what it says and calls."""
        readers = [self._reader() for _ in range(self.body.n)]
        async for part in answer:
            reader = readers[part.index]
            parts = reader.feed(part.text) if part.text else []
            yield part, parts + (reader.end() if part.finish is not None else [])

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole completion."""
        choices: list[dict[str, Any]] = [
            {
                "index": at,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            }
            for at in range(self.body.n)
        ]
        async for part, said in self.body_parts(answer):
            choice = choices[part.index]
            message = choice["message"]
            for one in said:
                if isinstance(one, str):
                    message["content"] += one
                else:
                    message.setdefault("tool_calls", []).append(_call(one))
            if self.body.logprobs:
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"] += [_logprob(one) for one in part.logprobs]
            if part.finish is not None:
                choice["finish_reason"] = "tool_calls" if "tool_calls" in message else part.finish
                if part.guard is not None:
                    choice["x_guard"] = part.guard
        for choice in choices:
            if "tool_calls" in choice["message"] and not choice["message"]["content"].strip():
                choice["message"]["content"] = None
        usage = answer.usage.to_json()
        out = {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}
        return out | ({"x_guard": choices[0]["x_guard"]} if "x_guard" in choices[0] else {})

    async def events(self, answer: Answer) -> AsyncIterator[str]:
        """Server-sent events; an error is the last of them, without [DONE]."""
        calls = [0] * self.body.n
        opened: set[int] = set()
        try:
            async for part, said in self.body_parts(answer):
                if part.index not in opened:
                    opened.add(part.index)
                    yield self._event(part.index, {"role": "assistant", "content": ""})
                deltas: list[dict[str, Any]] = []
                for one in said:
                    if isinstance(one, str):
                        deltas.append({"content": one})
                    else:
                        deltas.append({"tool_calls": [{"index": calls[part.index], **_call(one)}]})
                        calls[part.index] += 1
                logprobs = [_logprob(one) for one in part.logprobs]
                if logprobs and not deltas:
                    deltas.append({"content": ""})
                for at, delta in enumerate(deltas):
                    yield self._event(part.index, delta, logprobs if at == 0 else [])
                if part.finish is not None:
                    finish = "tool_calls" if calls[part.index] else part.finish
                    yield self._event(part.index, {}, [], finish, part.guard)
            if self.body.include_usage():
                yield self._line({"choices": [], "usage": answer.usage.to_json()})
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001  the status line has gone out; the client learns of it all the same
            yield event_of(error)
        finally:
            answer.cancel()

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        finish: str | None = None,
        guard: dict[str, Any] | None = None,
    ) -> str:
        shown = {"content": logprobs, "refusal": None} if self.body.logprobs and logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish}
        if guard is not None:
            choice["x_guard"] = guard
        usage = {"usage": None} if self.body.include_usage() else {}
        return self._line({"choices": [choice], **usage, **({"x_guard": guard} if guard is not None else {})})

    def _line(self, more: dict[str, Any]) -> str:
        return sse({**self.head, "object": "chat.completion.chunk", **more})


def sse(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    top = [{"token": text, "logprob": value, "bytes": list(data)} for text, data, value in one.top]
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data), "top_logprobs": top}


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """What `work` returns; it is cancelled when the client goes away, and the answer is one that nobody reads."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=499)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
