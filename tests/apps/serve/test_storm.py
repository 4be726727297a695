"""Clients that leave at random, a schema-driven fuzz, and a signal in the midst of answers."""

import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from plumbline.apps.serve.answering import Answering
from plumbline.apps.serve.app import make_serve_app
from plumbline.apps.serve.settings import ServeSettings
from plumbline.safety.pipeline import Guard
from tests.apps.conftest import free_port
from tests.apps.serve.conftest import lines_of, local_backend


def test_clients_that_leave_at_random_cost_no_row_and_change_no_answer(serve):
    """200 requests, a third cut off; every answer that ends is the one that a quiet server gives."""
    backend = local_backend(queue=300)
    address = serve(make_serve_app(Answering(backend, None), ServeSettings()))
    rng = random.Random(4)
    jobs = [(rng.choice(["ab", "The fox", "x" * 50]), rng.randint(1, 12), rng.random() < 1 / 3) for _ in range(200)]
    said: dict[tuple, set[str]] = {}
    lock = threading.Lock()

    def work(mine):
        with httpx.Client(timeout=300) as client:
            for prompt, count, cut in mine:
                body = {
                    "model": "tiny",
                    "prompt": prompt,
                    "max_tokens": 60 if cut else count,
                    "temperature": 0,
                    "stream": True,
                }
                with client.stream("POST", f"{address}/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    if cut:
                        for _ in response.iter_lines():
                            break
                        continue
                    text = "".join(response.iter_text())
                assert text.rstrip().endswith("[DONE]")
                with lock:
                    shown = "".join(c["text"] for event in lines_of(text) for c in event["choices"])
                    said.setdefault((prompt, count), set()).add(shown)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [jobs[at::8] for at in range(8)]))
    assert all(len(texts) == 1 for texts in said.values()) and len(said) > 20
    for (prompt, count), (text,) in said.items():  # a shorter answer is the beginning of a longer one
        longer = next((t for (p, c), (t,) in said.items() if p == prompt and c > count), text)
        assert longer.startswith(text.rstrip("\ufffd"))
    whole = httpx.post(
        f"{address}/v1/completions", json={"model": "tiny", "prompt": "ab", "n": 4, "max_tokens": 3}, timeout=300
    )
    assert whole.status_code == 200 and sorted(backend.scheduler.batch._slots) == [0, 1, 2, 3]
    backend.scheduler.stop()


def test_the_schema_promises_nothing_that_breaks_the_server():
    """schemathesis draws requests, valid and not, from the OpenAPI schema: no 5xx, no error in another shape."""
    schemathesis = pytest.importorskip("schemathesis", reason="the fuzz needs the [dev] extra")
    from hypothesis import HealthCheck, given, settings

    backend = local_backend(context=64, rows=2)
    app = make_serve_app(Answering(backend, Guard("rules_only")), ServeSettings())
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen = 0
    try:
        for found in schema.get_all_operations():

            @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=found.ok().as_strategy())
            def fuzz(case):
                response = case.call()
                assert response.status_code < 500, response.text
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            fuzz()
            seen += 1
    finally:
        backend.scheduler.stop()
    assert seen == 9


def test_a_signal_lets_running_answers_end_and_refuses_new_ones():
    port = free_port()
    environment = os.environ | {"PLUMBLINE_API_KEYS": ""}
    command = [
        sys.executable,
        "-m",
        "plumbline.apps.cli",
        "serve",
        "bundled:tiny-llama",
        "--guard",
        "off",
        "--port",
        str(port),
        "--rows",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert "Serving bundled:tiny-llama" in process.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(timeout=240) as client:
            body = {
                "model": "bundled:tiny-llama",
                "prompt": "x",
                "max_tokens": 200,
                "temperature": 0,
                "stream": True,
                "logit_bias": {"2": -100},
            }
            with client.stream("POST", f"{address}/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                while True:  # until the signal has arrived: the answer goes on meanwhile
                    refused = httpx.post(
                        f"{address}/v1/completions", json=body | {"stream": False, "max_tokens": 1}, timeout=240
                    )
                    if refused.status_code != 200:
                        break
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
                assert (
                    httpx.get(f"{address}/readyz").status_code == 503
                    and httpx.get(f"{address}/healthz").status_code == 200
                )
                text = "\n".join(lines)
        assert text.rstrip().endswith("[DONE]") and '"finish_reason": "length"' in text
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
