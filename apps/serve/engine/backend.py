"""The join between the server and what makes its answers: requests in, pieces of text out.

A backend knows nothing of the guard: what it yields is unchecked, and `apps/serve/answering.py` is the only reader.
"""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How an answer is drawn. temperature 0 takes the likeliest token; seed None draws one.

    logprobs   None for none, else how many alternatives are wanted a token beside the one drawn
    stop       texts that end the answer and are not part of it
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: either `messages` or a `prompt` (text or tokens), `n` answers.

    `deadline_s` is how long the request may take in all, queue included.
    """

    model: str
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    n: int = 1
    drawing: Drawing = field(default_factory=Drawing)
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A drawn token: its text, its bytes, characters [start, end) of the answer, and the likeliest tokens instead of it."""

    text: str
    data: bytes
    logprob: float
    start: int
    end: int
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of answer `index`. `finish` is set on its last piece, which may have no text.

    `tokens` is how many tokens were drawn for it; `logprobs` describes them where that was asked for.
    """

    index: int
    text: str = ""
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


class Generation(Protocol):
    """A request that was taken. Iterate it for its pieces; `cancel` (harmless at any time) frees what it holds."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model by the name that requests use; `parent` is the base of an adapter."""

    name: str
    parent: str | None = None
    context: int | None = None


class Backend(Protocol):
    """Something that answers. `submit` raises one of the errors below before anything is drawn."""

    def served(self) -> Sequence[Served]:
        """The models that requests may name; the first is the default."""
        ...

    async def submit(self, request: Request) -> Generation: ...

    def tool_format(self, model: str) -> str | None:
        """How tool calls are written in a model's answers (`apps/serve/tools.py`); None where it has no tools."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Gauges for /metrics: rows, waiting, reading, cached prefix tokens."""
        ...

    async def ready(self) -> str | None:
        """None when requests can be answered, else why not."""
        ...

    def drain(self) -> None:
        """Takes no more requests; those taken go on."""
        ...

    async def close(self, patience_s: float) -> None:
        """Drains, waits that long for the requests that were taken, and ends."""
        ...


# What `submit` and iteration may raise; `status` and `code` are those of the HTTP answer.


class ServeError(Exception):
    """A request that is not answered, with a sentence for its sender."""

    status, kind, code = 500, "server_error", "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param, self.retry_after_s = param, retry_after_s


class BadRequestError(ServeError):
    """The request cannot be answered as it is."""

    status, kind, code = 400, "invalid_request_error", "invalid_value"


class TooLongError(BadRequestError):
    """Prompt and answer do not fit the context."""

    code = "context_length_exceeded"


class UnknownModelError(ServeError):
    """No model of that name."""

    status, kind, code = 404, "invalid_request_error", "model_not_found"


class BusyError(ServeError):
    """The queue is full."""

    status, kind, code = 429, "rate_limit_error", "queue_full"


class DrainingError(ServeError):
    """The server is about to stop."""

    status, kind, code = 503, "server_error", "shutting_down"


class DeadlineError(ServeError):
    """The request took longer than it may."""

    status, kind, code = 504, "timeout_error", "deadline_exceeded"


class UpstreamError(ServeError):
    """The server behind this one failed."""

    status, kind, code = 502, "server_error", "upstream_error"


def find_served(backend: Backend, name: str) -> Served:
    """The model of a name; UnknownModelError lists those there are."""
    known = backend.served()
    for one in known:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in known)
    raise UnknownModelError(f"model {name!r} is not served here; there are {names}", param="model")
