"""Rollouts from a server: PPO against one that speaks vLLM's protocol and answers with the rollout engine."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from plumbline.align.ppo import train
from plumbline.policy_models.loading import load_policy
from plumbline.policy_models.rollout.generation import generate
from plumbline.reward import CompositeReward


class Server:
    """The four endpoints over one model folder. `raw` gives log-probabilities at temperature 1, as vLLM does unasked."""

    def __init__(self, folder: str, *, raw: bool = False) -> None:
        self.model, self.raw = load_policy(folder), raw
        self.peft: PeftModel | None = None
        self.adapters: list[str] = []
        self.loads, self.asked = [], []
        self._lock = threading.Lock()

    def answer(self, path: str, body: dict) -> tuple[int, dict | str]:
        with self._lock:
            self.asked.append((path, body))
            match path:
                case "/v1/models":
                    named = [{"id": name, "parent": "base"} for name in self.adapters]
                    return 200, {"data": [*named, {"id": "base", "parent": None}]}
                case "/v1/load_lora_adapter":
                    return self.load(body["lora_name"], body["lora_path"])
                case "/v1/unload_lora_adapter":
                    self.adapters.remove(body["lora_name"])
                    self.peft.set_adapter(self.adapters[-1])
                    self.peft.delete_adapter(body["lora_name"])
                    return 200, "Success"
                case "/v1/completions":
                    return self.complete(body)
        return 404, {"error": f"no {path}"}

    def load(self, name: str, path: str) -> tuple[int, dict | str]:
        if name in self.adapters or not (Path(path) / "adapter_model.safetensors").is_file():
            return 400, {"error": f"{name} cannot be loaded"}
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.model, path, adapter_name=name)
        else:
            self.peft.load_adapter(path, adapter_name=name)
        self.adapters.append(name)
        self.loads.append(name)
        return 200, "Success"

    def complete(self, body: dict) -> tuple[int, dict]:
        if body["model"] not in ["base", *self.adapters]:
            return 404, {"error": f"{body['model']} is not served"}
        draw = {
            "max_new_tokens": body["max_tokens"],
            "stop_ids": body["stop_token_ids"],
            "pad_id": 0,
            "temperature": body["temperature"],
            "generator": torch.Generator().manual_seed(body["seed"]),
        }
        if body["model"] == "base" and self.peft is not None:
            with self.peft.disable_adapter():
                (answer,) = generate(self.model, [body["prompt"]], **draw)
        else:
            if self.peft is not None:
                self.peft.set_adapter(body["model"])
            (answer,) = generate(self.model, [body["prompt"]], **draw)
        logp = [value * body["temperature"] for value in answer.logp] if self.raw else answer.logp
        choice = {"token_ids": answer.ids, "logprobs": {"token_logprobs": logp}}
        return 200, {"choices": [choice | {"finish_reason": "stop" if answer.finished else "length"}]}


@contextmanager
def serving(server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({})

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            status, said = server.answer(self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write((said if isinstance(said, str) else json.dumps(said)).encode())

        def log_message(self, *_):
            pass

    class Listening(ThreadingHTTPServer):
        request_queue_size = 256  # as many as may come at once; by default the sixth is reset

    http = Listening(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_ppo_trains_on_the_answers_of_a_server_that_always_has_the_newest_policy(
    settings, share, read_metrics, prompts_file
):
    made = settings("llama", steps=3, temperature=0.7, eval_every=1, eval_prompts=4, eval_prompts_file=prompts_file)
    server = Server(made.model)
    with serving(server) as url:
        made.rollout_server = url
        run = train(made, reward=CompositeReward([(share(), 1.0)]))
    rows = read_metrics(run)
    # Sampled by the policy as it is: with the weights of a step before, log-probabilities differ by 1e-2 and more.
    assert all(row["rollout/logp_mismatch"] < 1e-4 for row in rows[:3])
    assert rows[2]["eval/kl_per_answer"] > 1e-3, "the policy moved"
    assert len(server.loads) == len(set(server.loads)) == 3 * 2 + 1, "an adapter for each rollout and each evaluation"
    assert server.adapters == server.loads[-1:] and len(list((run / "rollout_adapters").iterdir())) == 1
    drawn = [body for path, body in server.asked if path == "/v1/completions"]
    assert [body["model"] for body in drawn[: made.scaling_prompts]] == ["base"] * made.scaling_prompts
    seeds = [{body["seed"] for body in drawn if body["model"] == name} for name in server.loads]
    assert seeds[0] == seeds[2] == seeds[4] == seeds[6], "evaluations draw alike"
    assert len(seeds[1] | seeds[3] | seeds[5]) == 3 * made.rollouts_per_step


def test_a_resumed_run_asks_for_the_same_answers(settings, share, read_metrics, tmp_path):
    def scores(name, **options):
        made = settings("llama", steps=4, output_dir=str(tmp_path / name), **options)
        with serving(Server(made.model)) as url:
            made.rollout_server = url
            rows = read_metrics(train(made, reward=CompositeReward([(share(), 1.0)])))
        return [row["objective/scores"] for row in rows[:4]]

    whole = scores("whole")
    assert scores("cut", save_every=2) == whole
    *_, newest = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    newest.rename(tmp_path / "set aside")  # as if the run had been killed after step 2
    assert scores("cut", resume=True) == whole


@pytest.mark.parametrize(
    ("wrong", "temperature"), [("another model", 1.0), ("log-probabilities at temperature 1", 0.25)]
)
def test_a_server_of_something_else_is_refused_at_the_first_rollout(
    settings, share, tiny, tmp_path, wrong, temperature
):
    folder, raw = tiny("llama"), wrong != "another model"
    if not raw:
        other = load_policy(folder)
        torch.nn.init.normal_(other.lm_head.weight, std=1.0)
        folder = str(tmp_path / "other")
        other.save_pretrained(folder)
    with serving(Server(folder, raw=raw)) as url:
        made = settings("llama", rollout_server=url, temperature=temperature)
        with pytest.raises(RuntimeError, match=r"nats a token off .*processed_logprobs"):
            train(made, reward=CompositeReward([(share(), 1.0)]))


def test_no_server_is_said_before_a_model_loads(settings, share, monkeypatch):
    monkeypatch.setattr("plumbline.align.ppo.load_start", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"rollout_server='http://127.0.0.1:9': no vLLM server answers there"):
        train(settings("llama", rollout_server="http://127.0.0.1:9"), reward=CompositeReward([(share(), 1.0)]))


def test_what_the_server_says_of_a_refusal_is_passed_on(settings, share, monkeypatch):
    made = settings("llama")
    server = Server(made.model)
    monkeypatch.setattr(server, "load", lambda *_: (400, {"error": "rank 4 is above --max-lora-rank 2"}))
    with (
        serving(server) as url,
        pytest.raises(RuntimeError, match=r"load_lora_adapter gave HTTP 400: .*max-lora-rank 2"),
    ):
        made.rollout_server = url
        train(made, reward=CompositeReward([(share(), 1.0)]))


def test_a_server_that_goes_away_is_named_with_the_way_on(settings, share, monkeypatch):
    made = settings("llama")
    server = Server(made.model)
    with serving(server) as url, pytest.raises(RuntimeError, match=r"/v1/completions got no answer .*--resume true"):
        monkeypatch.setattr(server, "complete", lambda _: (_ for _ in ()).throw(ConnectionError("gone")))
        made.rollout_server = url
        train(made, reward=CompositeReward([(share(), 1.0)]))


@pytest.mark.parametrize(
    ("options", "said"), [({"lora": False}, "set lora: true"), ({"old_logp": "rollout"}, "set old_logp: forward")]
)
def test_what_a_server_cannot_do_is_refused(settings, options, said):
    with pytest.raises(ValueError, match=said):
        settings("llama", rollout_server="http://localhost:8000", **options)
