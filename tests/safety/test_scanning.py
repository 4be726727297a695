"""Running scanners: statuses, fail-closed, cascade, readings mapped back, batches. Stand-in scanners throughout."""

import threading

import pytest

from plumbline.safety.findings import ALL_STAGES, Action, Finding, ScanItem, Scanner, Span, Stage, Status
from plumbline.safety.scanning import Conversation, Scanning


class Stub:
    """A scanner that answers with what `see(text)` gives: a list of (category, score, spans)."""

    version, stages = "1", ALL_STAGES

    def __init__(self, see, *, name="stub", categories=("vcr",), cost="regex", folds=True):
        self.see, self.name, self.categories, self.cost, self.folds = see, name, categories, cost, folds
        self.calls = []

    def scan(self, items):
        self.calls.append([item.text for item in items])
        return [
            [Finding(scanner="?", version="1", category=c, score=s, spans=spans) for c, s, spans in self.see(item.text)]
            for item in items
        ]


def build(*stubs, rules=None, **more):
    """Scanning over stand-ins; `gate`, `timeout_ms` ... of an entry come from the stub's attribute `entry`."""
    entries = [{"use": "pii", "name": stub.name} | getattr(stub, "entry", {}) for stub in stubs]
    rules = rules or [{"name": "bad", "if": {"score": 0.5}, "action": "block"}]
    policy = {"id": "t/1", "scanners": entries, "rules": rules} | more
    return Scanning(policy, {stub.name: stub for stub in stubs})


def fail(text):
    raise RuntimeError(f"cannot read {text}")


def word(what, score=0.9, category="vcr"):
    def see(text):
        at = text.find(what)
        return [(category, score, (Span(start=at, end=at + len(what)),))] if at >= 0 else []

    return see


def test_stubs_are_scanners():
    assert isinstance(Stub(fail), Scanner)


def test_a_verdict_says_what_was_seen_decided_and_by_which_policy():
    scanning = build(Stub(word("bad"), name="w"))
    verdict = scanning.check("so bad", Stage.INPUT)
    assert verdict.action is Action.BLOCK and verdict.blocked and verdict.text == "I can't help with that."
    (found,) = verdict.findings
    assert found.scanner == "w" and found.spans == (Span(start=3, end=6),)
    (fired,) = verdict.fired
    assert fired.rule == "bad" and fired.findings == (0,)
    assert verdict.policy_sha256 == scanning.policy.sha256 and verdict.policy_id == "t/1"
    fine = scanning.check("so good", Stage.INPUT)
    assert fine.action is Action.ALLOW and fine.text == "so good" and fine.request_id != verdict.request_id


@pytest.mark.parametrize("on_error, action", [("closed", Action.BLOCK), ("open", Action.ALLOW)])
def test_a_scanner_that_raises_ends_as_the_policy_says(on_error, action):
    verdict = build(Stub(fail), on_error={"vcr": on_error}).check("secret words")
    assert verdict.action is action
    (run,) = verdict.runs
    assert run.status is Status.ERROR and run.detail == "RuntimeError"  # the message may hold the text: left out
    assert "secret" not in repr(verdict.fired)


@pytest.mark.parametrize("answer", [None, [], [[]] * 5, ["x"], [[1]], 7])
def test_nonsense_from_a_scanner_is_an_error(answer):
    stub = Stub(word("x"))
    stub.scan = lambda items: answer
    verdict = build(stub).check("text")
    assert verdict.blocked and verdict.runs[0].status is Status.ERROR


def test_a_scanner_that_hangs_times_out_and_does_not_pile_up_threads():
    never, stub = threading.Event(), Stub(lambda text: never.wait(60) and [])
    stub.entry = {"timeout_ms": 1}
    scanning = build(stub)
    before = threading.active_count()
    verdicts = [scanning.check("text") for _ in range(6)]
    assert all(verdict.blocked and verdict.runs[0].status is Status.TIMEOUT for verdict in verdicts)
    assert threading.active_count() <= before + 2
    assert verdicts[-1].runs[0].detail == "still busy with earlier texts"
    never.set()


def test_one_bad_text_does_not_spoil_the_batch():
    stub = Stub(lambda text: fail(text) if text == "poison" else word("bad")(text))
    verdicts = build(stub).check_batch([ScanItem(text=text) for text in ("fine", "poison", "bad")])
    assert [verdict.runs[0].status for verdict in verdicts] == [Status.OK, Status.ERROR, Status.OK]
    assert [verdict.blocked for verdict in verdicts] == [False, True, True]


def test_text_that_is_too_long_is_blocked_unread():
    stub = Stub(word("bad"))
    verdict = build(stub, max_chars=10).check("x" * 11)
    assert verdict.blocked and verdict.fired[0].rule == "max_chars" and not stub.calls
    assert [run.status for run in verdict.runs] == [Status.SKIPPED]


def test_cheap_scanners_run_first_and_a_block_spares_the_dear_ones():
    dear, cheap = Stub(word("worse"), name="dear", cost="llm"), Stub(word("bad"), name="cheap")
    scanning = build(dear, cheap)
    blocked = scanning.check("bad and worse")
    assert [run.scanner for run in blocked.runs] == ["cheap", "dear"]
    assert blocked.runs[1].status is Status.SKIPPED and not dear.calls
    assert scanning.check("only worse").blocked and dear.calls
    assert len(build(dear, cheap, stop_early=False).check("bad and worse").findings) == 2


@pytest.mark.parametrize("score, asked", [(0.05, False), (0.3, True), (0.95, False)])
def test_a_gated_scanner_runs_in_the_grey_band_only(score, asked):
    judge = Stub(word("bad"), name="judge", cost="llm")
    judge.entry = {"gate": "first"}
    rules = [{"name": "judged", "if": {"scanner": "judge"}, "action": "block"}]
    verdict = build(Stub(word("bad", score), name="first"), judge, rules=rules).check("bad")
    assert bool(judge.calls) is asked and verdict.blocked is asked
    assert (verdict.runs[1].status is Status.SKIPPED) is not asked


def test_a_gate_that_failed_does_not_switch_off_what_it_guards():
    judge = Stub(word("bad"), name="judge", cost="llm")
    judge.entry = {"gate": "first"}
    assert build(Stub(fail, name="first"), judge, on_error={"default": "open"}).check("bad").blocked and judge.calls


def test_other_readings_add_findings_at_their_place_in_the_original():
    scanning = build(Stub(word("bad")))
    text = "how b\u200ba\u200bd"
    (found,) = scanning.check(text).findings
    assert found.view == "folded" and text[found.spans[0].start : found.spans[0].end] == "b\u200ba\u200bd"
    raw_only = Stub(word("bad"), folds=False)
    assert not build(raw_only).check(text).findings


def test_redaction_is_merged_once_and_every_scanner_sees_the_original():
    rules = [{"name": "r", "if": {"score": 0.5}, "action": "redact"}]
    first, second = Stub(word("bc", category="pii.email"), name="a"), Stub(word("cde", category="pii.phone"), name="b")
    verdict = build(first, second, rules=rules).check("abcdef")
    assert verdict.text == "a[TELEPHONE_NUMBER]f" and verdict.action is Action.REDACT
    assert first.calls == second.calls == [["abcdef"]]


def test_two_instances_of_one_class_keep_their_names():
    verdict = build(Stub(word("a"), name="one"), Stub(word("zzz"), name="two")).check("a")
    assert [found.scanner for found in verdict.findings] == ["one"] and [run.scanner for run in verdict.runs] == [
        "one",
        "two",
    ]


def test_rules_about_turns_see_the_conversation():
    rules = [{"name": "again", "if": {"turns": {"score": 0.4}, "at_least": 2}, "action": "block"}]
    scanning, conversation = build(Stub(word("odd", 0.4)), rules=rules), Conversation()
    first = scanning.check("odd", conversation=conversation)
    conversation.turns.append(first.findings)
    assert not first.blocked and scanning.check("odd", conversation=conversation).blocked


def test_a_normaliser_that_fails_blocks(monkeypatch):
    monkeypatch.setattr("plumbline.safety.scanning.views", fail)
    verdict = build(Stub(word("bad")), on_error={"default": "open"}).check("secret words")
    assert verdict.blocked and verdict.fired[0].rule == "on_error" and "secret" not in repr(verdict.fired)


def test_stages_of_the_policy_limit_a_scanner():
    stub = Stub(word("bad"))
    stub.entry = {"stages": ["output"]}
    scanning = build(stub)
    assert not scanning.check("bad", Stage.INPUT).runs and scanning.check("bad", Stage.OUTPUT).blocked


def test_lone_surrogates_reach_no_scanner():
    stub = Stub(word("\ufffd"))
    (found,) = build(stub).check("a\ud800b").findings
    assert found.spans == (Span(start=1, end=2),)


def test_bad_set_ups_are_named():
    with pytest.raises(ValueError, match="no scanner called extra"):
        Scanning({"id": "t", "scanners": [], "rules": []}, {"extra": Stub(fail)})
    with pytest.raises(ValueError, match="no kind 'nonesuch'"):
        Scanning({"id": "t", "scanners": ["nonesuch"], "rules": []})
    with pytest.raises(ValueError, match="settings .* do not fit Length"):
        Scanning({"id": "t", "scanners": [{"use": "length", "settings": {"most": 3}}], "rules": []})
    cheap, dear = Stub(fail, name="cheap"), Stub(fail, name="dear", cost="llm")
    cheap.entry = {"gate": "dear"}
    with pytest.raises(ValueError, match="cheaper than its gate"):
        build(dear, cheap)
    with pytest.raises(TypeError, match="is int; pass a string"):
        build(Stub(fail)).check(3)


class Generator(Stub):
    """A scanner whose `scan` is a generator: it does its work while it is read."""

    def scan(self, items):
        for item in items:
            yield self.see(item.text)


def endless():
    while True:
        yield Finding(scanner="?", version="1", category="vcr", score=0.1)


@pytest.mark.parametrize("lazy", [False, True], ids=["hangs while it is read", "hangs inside a list of findings"])
def test_a_generator_that_hangs_times_out_like_any_scanner(lazy):
    free = threading.Event()

    def hang(text):
        if lazy:
            return (free.wait(60) for _ in range(1))
        free.wait(60)
        return []

    stub = Generator(hang)
    stub.entry = {"timeout_ms": 30}
    verdict = build(stub).check("a")
    assert verdict.blocked and verdict.runs[0].status is Status.TIMEOUT
    free.set()


@pytest.mark.parametrize(
    "see", [fail, lambda text: endless(), lambda text: 3, lambda text: [3], lambda text: iter("ab")]
)
def test_a_generator_that_raises_or_never_ends_is_an_error(see):
    stub = Generator(see)
    stub.entry = {"timeout_ms": 60_000}  # on a busy machine an error must not look like a time-out
    verdict = build(stub).check("a")
    assert verdict.blocked and verdict.runs[0].status is Status.ERROR


def test_a_generator_that_behaves_is_a_scanner():
    found = Finding(scanner="?", version="1", category="vcr", score=0.9)
    assert build(Generator(lambda text: (found for _ in range(2)))).check("a").findings[0].scanner == "stub"


def test_spans_beyond_the_text_are_cut_to_it():
    stub = Stub(lambda text: [("vcr", 0.9, (Span(start=3, end=900),)), ("vcr", 0.8, (Span(start=800, end=900),))])
    rules = [{"name": "out", "if": {"score": 0.5}, "action": "redact"}]
    for text in ("plain text", "s p a c e d  letters", "ａｂｃｄ ｅｆ"):
        assert not build(stub, rules=rules).check(text).blocked
