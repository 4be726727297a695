"""Requests of OpenAI's API, checked field by field: what this server does not do is refused, never ignored.

Fields that change no answer (`user`, `metadata`, `service_tier`, `safety_identifier`, `prompt_cache_key`) are taken and not used.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=False)]
MOST_ANSWERS = 64
MOST_STOPS = 16
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Prompt = str | list[str] | list[Annotated[int, Field(ge=0)]] | list[list[Annotated[int, Field(ge=0)]]]


class Strict(BaseModel):
    """Unknown fields and values of another type are errors; null is as good as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class Body(Strict):
    """A whole request: all of its text can be written in UTF-8."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, values: Any) -> Any:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("the request holds half of a surrogate pair, which is no character") from None
        except RecursionError:
            raise ValueError("the request is nested too deeply") from None
        return values


def _only_text(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") not in ("text", None):
        raise ValueError(f"content of type {str(part['type'])[:40]!r} is not read here, only text")
    return part


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"] = "text"
    text: str


class CalledFunction(Strict):
    """A function and its arguments, as JSON."""

    name: str = Field(min_length=1, max_length=128)
    arguments: str


class PastToolCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: str = Field(max_length=200)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One message. What an answer of this server holds besides (`refusal`, `annotations`) may be sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart, BeforeValidator(_only_text)]] = ""
    name: str | None = Field(None, max_length=200)
    tool_calls: list[PastToolCall] | None = Field(None, min_length=1)
    tool_call_id: str | None = Field(None, max_length=200)
    refusal: str | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of the role 'tool' needs the tool_call_id that it answers")
        return self

    def plain(self) -> dict[str, Any]:
        """As the guard and chat templates take it, with a text for content."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role  # the newer name of the same
        out: dict[str, Any] = {"role": role, "content": content}
        if self.tool_calls:
            out["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return out | {k: v for k in ("name", "tool_call_id") if (v := getattr(self, k)) is not None}


class Function(Strict):
    """What a tool does; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    """A schema for the answer; it is held whether `strict` says so or not."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and that type needs it")
        return self


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the tokens of the whole request."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Drawn(Body):
    """What both kinds of completion share."""

    model: str = Field(max_length=500)
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31, description="-1 and 0 leave all tokens in")
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=1024)
    )
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    x_deadline_s: Number | None = Field(
        None, gt=0, description="seconds that the answer may take; not above the server's"
    )

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Drawn":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Drawn):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        forced = self.tool_choice not in (None, "none", "auto")
        if forced and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format and a tool_choice that forces a call exclude each other")
        return self


class CompletionRequest(Drawn):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int = Field(16, ge=1, le=2**31)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS)

    @model_validator(mode="after")
    def _only_what_is_drawn(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError(
                "best_of must equal n; a server started with --reward-model draws several and gives the best"
            )
        if self.echo and (self.logprobs is not None or self.stream):
            raise ValueError("echo goes with neither logprobs nor stream")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One prompt or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(token, int) for token in self.prompt):
            return [list(self.prompt)]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str = Field(max_length=500)
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=2**31)
    user: str | None = None


class ModerationRequest(Body):
    """POST /v1/moderations."""

    input: (
        str
        | Annotated[list[str | Annotated[TextPart, BeforeValidator(_only_text)]], Field(min_length=1, max_length=256)]
    )
    model: str | None = Field(None, max_length=500)

    def texts(self) -> list[str]:
        """The texts to look at."""
        if isinstance(self.input, str):
            return [self.input]
        return [one if isinstance(one, str) else one.text for one in self.input]
