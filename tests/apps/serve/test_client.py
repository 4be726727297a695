"""The official `openai` client against a server that listens: what it sends is taken, what it reads has its shape."""

import json
import math

import numpy as np
import pytest

openai = pytest.importorskip("openai", reason="the client suite needs the [dev] extra")

from plumbline.apps.serve.answering import Answering  # noqa: E402
from plumbline.apps.serve.app import make_serve_app  # noqa: E402
from plumbline.apps.serve.keys import ApiKey, read_keys  # noqa: E402
from plumbline.apps.serve.settings import ServeSettings  # noqa: E402
from plumbline.safety.pipeline import Guard  # noqa: E402
from tests.apps.serve.conftest import local_backend  # noqa: E402

KEY = "sk-0123456789abcdef"
USER = [{"role": "user", "content": "Say something."}]
SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "switch", "description": "on or off", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


def embed(texts):
    return np.stack([np.full(384, len(text), dtype=np.float32) / 10 for text in texts])


@pytest.fixture(scope="module")
def address(serve, tmp_path_factory):
    """One server for all: a key, the rules of the guard on what comes in, answers unread so that alternatives show."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    keys: list[ApiKey] = read_keys(str(file))
    backend = local_backend("tiny-llama+adapter", rows=8, context=640)
    answering = Answering(backend, Guard("rules_only"), layers=("input",))
    yield serve(make_serve_app(answering, ServeSettings(max_body=100_000), keys=keys, embed=embed))
    assert backend.scheduler.idle
    backend.scheduler.stop()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=240)


def chat(client, messages=None, **options):
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0} | options
    return client.chat.completions.create(messages=USER if messages is None else messages, **options)


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_models(client):
    assert [one.id for one in client.models.list()] == ["tiny", "red", "all-MiniLM-L6-v2"]
    assert client.models.retrieve("red").id == "red"
    with pytest.raises(openai.NotFoundError, match="there are tiny, red"):
        client.models.retrieve("gpt-4")


def test_chat(client):
    answer = chat(client)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == "tiny" and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.x_guard["layers"]["input"]["action"] == "allow"
    assert chat(client).choices[0].message.content == choice.message.content
    assert chat(client, model="red").choices[0].message.content != choice.message.content


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = chat(client, max_tokens=20).choices[0].message.content
    chunks = list(chat(client, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20


def test_seeds(client):
    one, same, other = (
        chat(client, temperature=1, seed=s, top_p=0.9, max_tokens=16).choices[0].message.content for s in (5, 5, 6)
    )
    assert one == same != other


def test_several_answers(client):
    answer = chat(client, n=3, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3 and answer.usage.completion_tokens == 24
    chunks = list(chat(client, n=2, temperature=1, seed=1, stream=True))
    for index in (0, 1):
        mine = [c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(mine) == answer.choices[index].message.content


def test_stop(client):
    whole = chat(client, max_tokens=20, logit_bias={str(40): 100}).choices[0].message.content
    assert len(set(whole)) == 1
    stopped = chat(client, max_tokens=20, logit_bias={str(40): 100}, stop=[whole[:3]]).choices[0]
    assert stopped.message.content == "" and stopped.finish_reason == "stop"
    assert text_of(chat(client, max_tokens=20, logit_bias={"40": 100}, stop=whole[:3], stream=True)) == ""


def test_log_probabilities(client):
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(content) == 8 and all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in content)
    assert all(math.exp(one.top_logprobs[1].logprob) <= math.exp(one.logprob) for one in content)
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    streamed = [one for c in chunks if c.choices and c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in content]


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema(client, stream):
    answer_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=answer_format, max_tokens=60, stream=stream)
    text = text_of(answer) if stream else answer.choices[0].message.content
    assert isinstance(json.loads(text)["ok"], bool)


def test_a_json_object(client):
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=100, logit_bias={"95": 20}).choices[0]
    assert answer.message.content.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "switch"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tools(client, choice, stream):
    tools = TOOLS[:1] if choice == "required" else TOOLS
    answer = chat(client, tools=tools, tool_choice=choice, max_tokens=120, stream=stream)
    if stream:
        chunks = list(answer)
        (call,) = [one for c in chunks if c.choices for one in c.choices[0].delta.tool_calls or []]
        finish = next(c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason)
    else:
        (call,), finish = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    assert finish == "tool_calls" and call.function.name == "switch" and call.id.startswith("call_")
    assert isinstance(json.loads(call.function.arguments)["ok"], bool)


def test_tools_that_were_called_go_back_into_the_conversation(client):
    said = chat(client, tools=TOOLS[:1], tool_choice="required", max_tokens=120).choices[0].message
    messages = [*USER, said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "done"}]
    assert chat(client, messages, tools=TOOLS).choices[0].finish_reason == "length"
    assert chat(client, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None


def test_completions(client):
    one = client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0)
    both = client.completions.create(model="tiny", prompt=["Once", "Twice"], max_tokens=6, temperature=0, echo=True)
    assert both.choices[0].text == "Once" + one.choices[0].text and both.choices[1].text.startswith("Twice")
    logprobs = (
        client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0, logprobs=0)
        .choices[0]
        .logprobs
    )
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 6 and logprobs.text_offset[0] == 0
    chunks = client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text


def test_embeddings(client):
    answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=["a", "bcd"])  # the client asks for base64
    floats = client.embeddings.create(model="all-MiniLM-L6-v2", input="a", encoding_format="float")
    assert len(answer.data) == 2 and answer.data[0].embedding == pytest.approx(floats.data[0].embedding)
    with pytest.raises(openai.BadRequestError, match="has 384"):
        client.embeddings.create(model="all-MiniLM-L6-v2", input="a", dimensions=3)
    with pytest.raises(openai.NotFoundError, match="there is all-MiniLM"):
        client.embeddings.create(model="tiny", input="a")


def test_moderations(client):
    result = client.moderations.create(input="my key is ghp_16C7e42F292c6912E7710c838347Ae178B4a").results[0]
    assert result.flagged and result.categories.violence is False
    assert not client.moderations.create(input="hello").results[0].flagged


def test_a_client_that_leaves_frees_its_rows(client):
    stream = chat(client, max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert chat(client, n=8, temperature=1).usage.completion_tokens == 64  # all rows are free again


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": 3}, "temperature: .*less than or equal to 2"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n: "),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "tokens and max_tokens asks for 5000 more; the limit of tiny is 640"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "only text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [{"role": "system", "content": "x"}]}, "nothing to answer"),
        ({"messages": [{"role": "user", "content": "x" * 800}]}, "the limit of tiny is 640 tokens"),
        ({"extra_body": {"magic": 1}}, "unrecognised field 'magic'"),
        ({"stream_options": {"include_usage": True}}, "needs stream=true"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "none of the tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "magic"}}}}, "not a JSON schema"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**70}, "seed"),
    ],
)  # fmt: skip
def test_bad_requests_are_400_with_the_field(client, options, words):
    with pytest.raises(openai.BadRequestError, match=words) as error:
        chat(client, **options)
    assert error.value.body["type"] == "invalid_request_error" and set(error.value.body) == {
        "message",
        "type",
        "param",
        "code",
    }


def test_other_errors_have_openais_shape_and_class(client, address):
    with pytest.raises(openai.NotFoundError, match="there are tiny, red") as error:
        chat(client, model="gpt-4")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.AuthenticationError, match="no such API key"):
        chat(client.with_options(api_key="sk-wrong-wrong-wrong"))
    with pytest.raises(openai.APIStatusError, match="the limit is 100000") as error:
        chat(client, [{"role": "user", "content": "x" * 200_000}])
    assert error.value.status_code == 413
    with pytest.raises(openai.APIError, match="deadline"):
        list(chat(client, max_tokens=200, stream=True, extra_body={"x_deadline_s": 1e-6}))
    with pytest.raises(openai.InternalServerError) as error:
        chat(client, max_tokens=200, extra_body={"x_deadline_s": 1e-6})
    assert error.value.status_code == 504


@pytest.mark.parametrize(
    "method, path, body, status",
    [("GET", "/healthz", None, 200), ("GET", "/readyz", None, 200), ("GET", "/metrics", None, 200), ("GET", "/openapi.json", None, 200),
     ("GET", "/nothing", None, 404), ("PUT", "/v1/models", None, 405), ("POST", "/v1/chat/completions", b"{", 400),
     ("POST", "/v1/chat/completions", b"[" * 50_000, 400), ("POST", "/v1/chat/completions", b"null", 400),
     ("POST", "/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
     ("POST", "/v1/chat/completions", b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 400),
     ("POST", "/v1/completions", b'{"model": "tiny", "prompt": [1, 999999]}', 400),
     ("POST", "/v1/completions", b'{"model": "tiny", "prompt": []}', 400),
     ("POST", "/v1/chat/completions", b'{"model": "tiny", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', 400)],
)  # fmt: skip
def test_raw_requests(address, method, path, body, status):
    import httpx

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    response = httpx.request(method, address + path, content=body, headers=headers, timeout=240)
    assert response.status_code == status
    if status >= 400:
        assert (
            set(response.json()["error"]) == {"message", "type", "param", "code"} and "Traceback" not in response.text
        )
