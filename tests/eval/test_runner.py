"""The runner with stand-in targets: nothing is asked twice, nothing fails silently, a kill anywhere changes nothing."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from plumbline.eval.grading.graders import each, refused
from plumbline.eval.runner import CHUNK, ReplyStore, _cut, ask, run_suites
from plumbline.eval.samples import Sample
from plumbline.eval.suites import SUITES, load_suites
from plumbline.eval.targets.endpoint import EndpointTarget
from plumbline.eval.targets.function import CallableTarget
from plumbline.eval.targets.guarded import GuardedTarget
from plumbline.eval.targets.model_target import ModelTarget
from plumbline.eval.targets.recorded import TranscriptTarget
from plumbline.eval.targets.specs import open_target
from plumbline.eval.tasks import EvalTask, Reply, Scorer, grade


class Counting:
    """Answers with the number of the question; counts what it is asked."""

    gives_logp = True
    fingerprint = "f"

    def __init__(self, name="t"):
        self.name, self.asked = name, 0

    def reply(self, prompts, *, max_new_tokens, temperature, seed):
        self.asked += len(prompts)
        return [Reply(answers=(f"say {p[-1]['content']} {len(p)}",)) for p in prompts]

    def logp(self, pairs):
        self.asked += len(pairs)
        return [-float(len(text)) for _, text in pairs]

    def close(self):
        pass


def task(n=70, name="plain", **more):
    samples = [Sample(id=f"{name}-{i}", input=f"q{i}", **more) for i in range(n)]
    words = Scorer(name="words", grade=each(lambda s, r: len(r.text.split())), rate=False)
    return EvalTask(name=name, version=1, area="behaviour", samples=samples, scorers=[words, refused("low")], about="")


def test_second_run_and_one_more_suite_ask_only_what_is_new(tmp_path):
    target, store = Counting(), ReplyStore(tmp_path)
    first = run_suites([target], [task()], store, quiet=True)
    assert target.asked == 70 and first[0].replies[69].text == "say q69 1"
    run_suites([target], [task(), task(5, "more")], ReplyStore(tmp_path), quiet=True)
    assert target.asked == 75
    changed = run_suites([target], [task()], ReplyStore(tmp_path), max_new_tokens=9, quiet=True)
    assert target.asked == 145 and changed[0].replies == first[0].replies  # other settings are other questions


def test_a_line_cut_short_by_a_kill_is_asked_again_and_spoils_no_other(tmp_path):
    run_suites([Counting()], [task()], ReplyStore(tmp_path), quiet=True)
    file = tmp_path / "replies-0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-25])
    target = Counting()
    graded = run_suites([target], [task()], ReplyStore(tmp_path), quiet=True)
    assert 0 < target.asked <= CHUNK and all(not reply.error for reply in graded[0].replies)
    keys = [json.loads(line)["key"] for line in file.read_text().splitlines() if line.endswith("}")]
    assert len(keys) == len(set(keys)) == 70


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from tests_stub import task
from plumbline.eval.runner import ReplyStore, run_suites
from plumbline.eval.targets.function import CallableTarget
def slow(messages):
    time.sleep(0.02)
    return "said " + messages[-1]["content"]
run_suites([CallableTarget("slow", slow)], [task()], ReplyStore({folder!r}), quiet=True)
"""


def test_sigkill_in_the_middle_leaves_the_same_results_and_no_duplicates(tmp_path):
    (tmp_path / "tests_stub.py").write_text(
        "from plumbline.eval.grading.graders import each\n"
        "from plumbline.eval.samples import Sample\n"
        "from plumbline.eval.tasks import EvalTask, Scorer\n"
        "def task():\n"
        "    s = [Sample(id=str(i), input=f'q{i}') for i in range(160)]\n"
        "    w = Scorer(name='w', grade=each(lambda a, r: len(r.text)), rate=False)\n"
        "    return EvalTask(name='k', version=1, area='x', samples=s, scorers=[w], about='')\n"
    )
    script = KILLED.format(root=os.getcwd(), folder=str(tmp_path / "cache"))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=env)
    file = tmp_path / "cache" / "replies-0.jsonl"
    while process.poll() is None and not (file.is_file() and file.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(file.read_text().splitlines())
    assert 0 < before < 160
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 160
    assert {row["answers"][0] for row in rows} == {f"said q{i}" for i in range(160)}


def test_earlier_turns_are_answered_by_the_target_itself():
    (reply,) = ask(Counting(), task(1, history=("a", "b"), system="s"), task(1, history=("a", "b"), system="s").samples,
                   max_new_tokens=4, temperature=0.0, seed=0)  # fmt: skip
    assert reply.answers == ("say a 2", "say b 4", "say q0 6")  # system, then user and assistant by turns


def test_shards_together_are_the_whole_and_order_does_not_matter(tmp_path):
    targets = [Counting(), Counting()]
    for rank in (1, 0):
        run_suites([targets[rank]], [task(100)], ReplyStore(tmp_path, rank=rank), rank=rank, processes=2, quiet=True)
    assert targets[1].asked and targets[0].asked and sum(t.asked for t in targets) == 100
    alone = run_suites([Counting()], [task(100)], ReplyStore(tmp_path / "alone"), quiet=True)
    assert run_suites([Counting()], [task(100)], ReplyStore(tmp_path), quiet=True)[0].replies == alone[0].replies


# ---- targets that misbehave -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, why",
    [
        (lambda m: 7, "int, not text"),
        (lambda m: None, "NoneType, not text"),
        (lambda m: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_garbage_is_unscored_with_a_reason_and_never_kept(tmp_path, answer, why):
    store = ReplyStore(tmp_path)
    graded = run_suites([CallableTarget("bad", answer)], [task(3)], store, quiet=True)
    assert all(score.value is None and why in score.why for score in graded[0].scores["refused"])
    assert not store.replies


def test_too_few_replies_and_nan_are_unscored():
    class Short(Counting):
        def reply(self, prompts, **_):
            return []

        def logp(self, pairs):
            return [float("nan")] * len(pairs)

    options = {"max_new_tokens": 4, "temperature": 0.0, "seed": 0}
    assert "0 replies to 2 prompts" in ask(Short(), task(2), task(2).samples, **options)[0].error
    choices = task(1, choices=(" a", " b"))
    assert "nan" in ask(Short(), choices, choices.samples, **options)[0].error


def test_a_scorer_that_raises_or_lies_leaves_rows_unscored():
    def broken(samples, replies):
        raise KeyError("x")

    one = task(2)
    scorers = [Scorer(name="broken", grade=broken), Scorer(name="half", grade=each(lambda s, r: 0.5))]
    graded = grade("t", EvalTask(name="n", version=1, area="x", samples=one.samples, scorers=scorers, about=""),
                   [Reply(answers=("a",))] * 2)  # fmt: skip
    assert [s.value for s in graded.scores["broken"] + graded.scores["half"]] == [None] * 4
    assert "KeyError" in graded.scores["broken"][0].why and "only 0 and 1" in graded.scores["half"][0].why


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        if text == "slow":
            time.sleep(1.5)
        bodies = {"garbage": b"<html>", "empty": b'{"choices": []}'}
        said = {"choices": [{"message": {"content": "you said " + text}, "finish_reason": "stop"}]}
        self.send_response(500 if text == "broken" else 200)
        self.end_headers()
        self.wfile.write(bodies.get(text, json.dumps(said).encode()))

    def log_message(self, *_):
        pass


def test_endpoint_answers_times_out_breaks_and_is_down():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    target = EndpointTarget("e", url, "m", timeout_s=0.5, tries=1)
    prompts = [[{"role": "user", "content": text}] for text in ("hello", "slow", "garbage", "empty", "broken")]
    replies = target.reply(prompts, max_new_tokens=4, temperature=0, seed=0)
    server.shutdown()
    server.server_close()
    assert replies[0].text == "you said hello"
    reasons = ["", "time-out", "not an OpenAI-style answer", "not an OpenAI-style answer", "HTTP 500"]
    assert all(why in reply.error for why, reply in zip(reasons, replies, strict=True))
    (down,) = target.reply(prompts[:1], max_new_tokens=4, temperature=0, seed=0)
    assert "cannot be reached" in down.error
    with pytest.raises(ValueError, match="does not answer: .*cannot be reached.*start the server"):
        target.check()


# ---- targets that work ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return open_target("tiny=bundled:tiny-moe")


def test_tiny_model_answers_and_its_choices_agree_with_a_plain_forward(tiny):
    import torch

    assert isinstance(tiny, ModelTarget) and tiny.name == "tiny"
    replies = tiny.reply([[{"role": "user", "content": "hi"}], "once upon"], max_new_tokens=5, temperature=0, seed=0)
    assert all(isinstance(reply.text, str) and reply.finished is not None for reply in replies)
    pairs = [("abc", " d"), ("abc", " efg"), ("", "hello"), ("a longer prompt", " x")]
    model, tokenizer = tiny.load()
    for (prompt, text), (logp, greedy) in zip(pairs, tiny.logp_and_greedy(pairs), strict=True):
        before = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id]
        ids = torch.tensor([before + tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        want = logits.gather(1, ids[0, len(before) :, None]).sum()
        assert logp == pytest.approx(float(want), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == ids[0, len(before) :]).all())


def test_a_prompt_that_is_too_long_is_a_final_error(tiny, tmp_path):
    long = task(1)
    long = EvalTask(
        name="l", version=1, area="x", samples=[Sample(id="1", input="a" * 3000)], scorers=long.scorers, about=""
    )
    store = ReplyStore(tmp_path)
    run_suites([tiny], [long], store, quiet=True)
    (kept,) = ReplyStore(tmp_path).replies.values()
    assert kept.final and "tokens" in kept.error


def test_transcripts_are_found_by_prompt_and_others_are_unscored(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text('{"prompt": "q0", "answer": "A"}\n{"messages": [{"role": "user", "content": "q1"}, {"role": "assistant", '
                    '"content": "B"}]}\n')  # fmt: skip
    target = open_target(str(path))
    assert isinstance(target, TranscriptTarget) and target.name == "said"
    replies = run_suites([target], [task(3)], ReplyStore(tmp_path / "c"), quiet=True)[0].replies
    assert [r.text for r in replies] == ["A", "B", ""] and replies[2].error == "not among the transcripts"
    path.write_text('{"prompt": "q0"}\n')
    with pytest.raises(ValueError, match="said.jsonl:1"):
        open_target(str(path))


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"prompt": "q0", "answer": null}', "null"),
        ('{"messages": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": null}]}', "null"),
        ('{"messages": [{"role": "user", "content": "q0"}, {"role": "assistant"}]}', "null"),
        ('{"messages": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": null, "tool_calls": [CALL]}]}', "tools"),
        ('{"messages": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}', "tools"),
    ],
)  # fmt: skip
def test_recorded_answers_that_are_no_text_are_unscored(row, reason, tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text(row.replace("CALL", '{"id": "1", "function": {"name": "f"}}') + "\n")
    (graded,) = run_suites([open_target(str(path))], [task(1)], ReplyStore(tmp_path / "c"), quiet=True)
    assert reason in graded.replies[0].error and not graded.replies[0].answers
    assert all(scores[0].value is None for scores in graded.scores.values())


def test_recorded_content_in_parts_is_its_text(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_bytes('\ufeff{"messages": [{"role": "user", "content": [{"type": "text", "text": "q0"}]}, {"role": "assistant", "content": '
                     '[{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]}\r\n'.encode())  # fmt: skip
    (graded,) = run_suites([open_target(str(path))], [task(1)], ReplyStore(tmp_path / "c"), quiet=True)
    assert graded.replies[0].text == "AB"


@pytest.mark.parametrize(
    "row, rule",
    [
        (
            '{"messages": [{"role": "assistant", "content": "A"}, {"role": "user", "content": "q0"}]}',
            "must be 'assistant'",
        ),
        ('{"prompt": "q0", "answer": 7}', "answer=7"),
        ('{"prompt": "q0", "answer": "\\ud83d"}', "surrogate"),
        ('{"prompt": "q0", "answer": ' + "[" * 20000 + "}", "said.jsonl:1"),
        ('{"messages": []}', "said.jsonl:1"),
        ("[]", "said.jsonl:1"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_what_is_no_transcript_is_refused_by_line(row, rule, tmp_path):
    (tmp_path / "said.jsonl").write_bytes(row.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rule):
        open_target(str(tmp_path / "said.jsonl"))


@pytest.mark.parametrize("said, want", [("Question: x", ""), ("\n\n7", "\n\n7"), ("\n\n7\n\nmore", "\n\n7")])
def test_a_stop_among_the_first_blanks_ends_nothing(said, want):
    assert _cut(said, ("Question:", "\n\n")) == want


@pytest.mark.parametrize(
    "spec, rule",
    [
        ("nowhere/at/all/x", "no such folder"),
        ("https://host/v1", "names no model"),
        ("x.jsonl", "no such file"),
        ("call:eval.nothing:f", "package.module:function"),
        ("bundled:tiny-moe+nope", "adapter_config"),
        ("name=", "empty"),
    ],
)
def test_bad_specs_are_refused_before_anything_loads(spec, rule):
    with pytest.raises(ValueError, match=rule):
        open_target(spec)


def test_run_folders_and_adapters_resolve(tmp_path):
    (tmp_path / "run" / "ppo" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="did you mean .*ppo"):
        open_target(str(tmp_path / "run"))
    config = {"base_model_name_or_path": "bundled:tiny-llama"}
    (tmp_path / "run" / "ppo" / "model" / "adapter_config.json").write_text(json.dumps(config))
    target = open_target(str(tmp_path / "run" / "ppo"))
    assert (target.name, target.source) == ("ppo", "bundled:tiny-llama")


def test_an_adapter_finds_its_base_after_its_run_folder_was_moved(tmp_path, monkeypatch):
    base, adapter = tmp_path / "moved/runs/demo/sft/model", tmp_path / "moved/runs/demo/ppo/model"
    for folder in (base, adapter):
        folder.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "runs/demo/sft/model"}')
    (tmp_path / "runs/demo/sft/model").mkdir(parents=True)  # another run of that name, below the working folder
    monkeypatch.chdir(tmp_path)
    assert open_target(str(adapter.parent)).source == str(base.resolve())
    monkeypatch.chdir(tmp_path / "moved")
    assert open_target("runs/demo/ppo").source == "runs/demo/sft/model"


class StubGuard:
    """Blocks what says "bomb", redacts names on the way in, and blocks answers that say "secret"."""

    model = None

    def chat(self, messages):
        from types import SimpleNamespace

        asked = messages[-1]["content"]
        if asked == "crash":
            raise RuntimeError("scanner lost")
        if "bomb" in asked:
            return SimpleNamespace(text="blocked")
        said = self.model([{"role": "user", "content": asked.replace("Ann", "[name]")}])
        return SimpleNamespace(text="blocked" if "secret" in said else said)


def test_a_guarded_target_asks_the_model_in_one_batch_and_shows_what_the_guard_shows():
    inner = Counting()
    target = GuardedTarget("g", inner, StubGuard(), policy_hash="p")
    prompts = [[{"role": "user", "content": text}] for text in ("hello", "a bomb", "Ann is here", "a secret", "crash")]
    replies = target.reply(prompts, max_new_tokens=4, temperature=0, seed=0)
    assert [r.text for r in replies[:4]] == ["say hello 1", "blocked", "say [name] is here 1", "blocked"]
    assert "scanner lost" in replies[4].error and inner.asked == 3
    assert target.fingerprint != GuardedTarget("g", inner, StubGuard(), policy_hash="q").fingerprint


def test_a_guard_does_not_ask_again_what_its_model_has_answered(tmp_path):
    """Bare first, then guarded: only what the guard changed is asked, and turn by turn."""
    bare, store = Counting("bare"), ReplyStore(tmp_path)
    of = {"version": 1, "area": "attack", "scorers": [refused("low")], "about": ""}
    texts = ["hello", "a bomb", "Ann is here", "a secret"]
    plain = EvalTask(name="p", samples=[Sample(id=t, input=t) for t in texts], **of)
    raw = EvalTask(name="r", samples=[Sample(id="r", input="Once", raw=True)], **of)
    run_suites([bare], [plain], store, quiet=True)
    inner = Counting("inner")
    guarded = GuardedTarget("guarded", inner, StubGuard(), policy_hash="p")
    (graded, _) = run_suites([guarded], [plain, raw], store, quiet=True)
    assert [r.text for r in graded.replies] == ["say hello 1", "blocked", "say [name] is here 1", "blocked"]
    assert inner.asked == 2  # the redacted one, and the text to continue, which the guard makes a user's turn
    alone = GuardedTarget("guarded", Counting(), StubGuard(), policy_hash="p")
    (same,) = run_suites([alone], [plain], ReplyStore(tmp_path / "new"), quiet=True)
    assert same.replies == graded.replies


# ---- the suites -----------------------------------------------------------------------------------------------------


def test_there_are_at_least_twenty_suites_and_each_reads():
    tasks = load_suites(["all"])
    assert len(SUITES) >= 20 and len(tasks) == len(SUITES)
    for one in tasks:
        assert one.version >= 1 and one.about and len(one.samples) >= 20
        assert one.scorers[0].better or one.area == "bias", one.name


def test_limits_keep_groups_whole_and_suites_bring_their_counterpart():
    (attack, over) = load_suites(["harmful_direct"], limit=5)
    assert (attack.name, over.name, len(attack.samples)) == ("harmful_direct", "over_refusal", 5)
    (sway,) = load_suites(["sycophancy"], limit=4)
    assert len(sway.samples) == 6 and {s.group for s in sway.samples} == {"quiz-001", "quiz-002"}
    assert len(load_suites(["harmful_templates"], limit=30)[0].samples) == 30  # its groups do not stand together


@pytest.mark.parametrize("names, rule", [(["nope"], "there are harmful_direct"), (["mmlu"], "--data")])
def test_unknown_suites_are_refused(names, rule):
    with pytest.raises(ValueError, match=rule):
        load_suites(names)


def test_public_sets_name_file_and_line_when_broken(tmp_path):
    (tmp_path / "advbench").mkdir()
    path = tmp_path / "advbench" / "harmful_behaviors.jsonl"
    path.write_text('{"goal": "a"}\n{"goal": \n')
    with pytest.raises(ValueError, match="harmful_behaviors.jsonl:2"):
        load_suites(["advbench"], data=tmp_path)
    path.write_text('{"goal": "a"}\n{"other": "b"}\n')
    with pytest.raises(ValueError, match="no text in field 'goal'"):
        load_suites(["advbench"], data=tmp_path)
