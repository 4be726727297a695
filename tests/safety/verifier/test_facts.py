"""The fact checker by hand: claims, vetoes, retrieval, verdicts, citations, actions, the command."""

import json
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.apps import cli
from plumbline.safety.findings import Action, Category
from plumbline.safety.pipeline import Guard
from plumbline.safety.verifier.claims import sentence_spans, split_claims
from plumbline.safety.verifier.entailment import HubEntailment
from plumbline.safety.verifier.facts import ABSTAIN, FactChecker, FactVerdict, VerifierSettings, act
from plumbline.safety.verifier.knowledge import Document, KnowledgeBase, index_folder, passages, read_documents
from plumbline.safety.verifier.vetoes import Veto, name_clashes, names, quantities, same, stems, vetoes

KILI = "Mount Kilimanjaro, the highest mountain in Africa, stands in Tanzania and rises to 5,895 metres."
DOCUMENTS = [
    Document("kili", KILI + " It was first climbed in 1889 by Hans Meyer. The summit is called Uhuru Peak."),
    Document("ottawa", "The capital of Canada is Ottawa, in the province of Ontario. It became the capital in 1857."),
    Document(
        "tea", "Tea contains caffeine. Green tea is not fermented.\n\nCoffee beans are roasted before they are ground."
    ),
]


def embed(texts):
    """Hashed bags of stems: enough meaning for a test, and no weights."""
    rows = np.full((len(texts), 256), 1e-3, dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for stem in stems(text):
            row[zlib.crc32(stem.encode()) % 256] += 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Overlap:
    """An entailment model that one can work out by hand: the share of the claim's words."""

    name, quality = "overlap", "test"

    def score(self, pairs):
        yes = [len(set(stems(c)) & set(stems(p))) / max(1, len(set(stems(c)))) for p, c in pairs]
        return np.array([[y, 1 - y, 0.0] for y in yes]).reshape(len(pairs), 3)


@pytest.fixture
def checker():
    base = KnowledgeBase(DOCUMENTS, embed=embed)
    return FactChecker(base, entailment=Overlap(), settings=VerifierSettings(support=0.6))


def test_sentences_end_where_they_end():
    text = "Dr. Smith paid $3.5 million. The U.S. agreed!\n1. First item\n2. Second one. (Really?) e.g. this"
    got = [text[a:b] for a, b in sentence_spans(text)]
    assert got == [
        "Dr. Smith paid $3.5 million.",
        "The U.S. agreed!",
        "1. First item",
        "2. Second one.",
        "(Really?)",
        "e.g. this",
    ]


def test_claims_carry_their_subject_and_leave_talk_out():
    answer = (
        "Sure! Marie Curie was born in 1867. She won two prizes, and she found polonium. Is that all? I think so too."
    )
    claims = split_claims(answer)
    assert [c.text for c in claims if c.worth] == [
        "Marie Curie was born in 1867.",
        "She won two prizes",
        "she found polonium.",
    ]
    assert claims[2].reading == "Marie Curie won two prizes" and claims[3].reading == "Marie Curie found polonium."
    assert [c.why_not for c in claims if not c.worth] == ["talk", "a question", "an opinion, advice or talk"]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab A.!?\n;,1- and She\u00e9\U0001f600"), max_size=80))
def test_claims_are_pieces_of_the_answer_in_order(answer):
    end = 0
    for claim in split_claims(answer):
        assert answer[claim.start : claim.end] == claim.text and claim.start >= end
        end = claim.end


NUMBERS = [
    ("rises to 5,895 metres", [("length", 5895.0)]),
    ("5.9 km", [("length", 5900.0)]),
    ("twenty-five miles", [("length", 25 * 1609.344)]),
    ("on 12 March 1999, the second of 3 games", [("date", 312), ("year", 1999), ("place", 2), ("plain", 3)]),
    ("In 2015, 1.2 billion people", [("year", 2015), ("plain", 1.2e9)]),
    ("$3.5 million or 45%", [("dollars", 3.5e6), ("share", 45)]),
    ("at -5 and 10-12", [("plain", -5), ("plain", 10), ("plain", 12)]),
    ("no one knows", []),
]


@pytest.mark.parametrize("text, want", NUMBERS)
def test_quantities(text, want):
    got = quantities(text)
    assert [(q.kind, pytest.approx(q.value)) for q in got] == want
    assert all(text[q.start : q.end] == q.text for q in got)


def test_numbers_are_equal_across_units_and_roundings():
    for a, b, equal in [
        ("5,895 metres", "5.895 km", True),
        ("about 6 km", "5,895 metres", True),
        ("6 km", "5,895 metres", False),
        ("in 1889", "in 1890", False),
        ("two games", "2 games", True),
    ]:
        assert same(quantities(a)[0], quantities(b)[0]) is equal, (a, b)


VETOES = [
    ("Kilimanjaro rises to 5,985 metres.", KILI, [("number", "5,985 metres", "5,895 metres")]),
    ("Kilimanjaro rises to 5.895 km.", KILI, []),
    (
        "It was first climbed in 1898 by Hans Meyer.",
        "It was first climbed in 1889 by Hans Meyer.",
        [("date", "1898", "1889")],
    ),
    ("Green tea is fermented.", "Green tea is not fermented.", [("negation", "", "not")]),
    ("Tea does not contain caffeine.", "Tea contains caffeine.", [("negation", "not", "")]),
    ("Tea doesn't contain caffeine.", "Tea contains caffeine.", [("negation", "n't", "")]),
    ("Nobody may smoke in the hall.", "People may smoke in the hall.", [("negation", "Nobody", "")]),
    # a negation of something else is no denial
    ("The bridge opened in 1932.", "The bridge opened in 1932 and does not carry trains.", []),
    ("The bridge opened in 1932.", "Although it never carried trains, the bridge opened in 1932.", []),
    ("The bridge carries trains.", "The bridge carries not only trains but also trams.", []),
    ("The bridge is 300 metres long.", "The bridge is no less than 300 metres long.", []),
    ("He did not deny that tea is not fermented.", "He did not deny that tea is not fermented.", []),
    ("Tea contains caffeine.", "Tea contains caffeine. Nothing else does.", []),
]


@pytest.mark.parametrize("claim, passage, want", VETOES)
def test_vetoes(claim, passage, want):
    assert vetoes(claim, passage) == [Veto(*veto) for veto in want]


def test_names():
    assert names("The capital of Canada is Ottawa. Lesotho borders South Africa.") == [
        "Canada",
        "Ottawa",
        "South Africa",
    ]
    passage = DOCUMENTS[1].text
    assert name_clashes("The capital of Canada is Toronto.", passage) == [Veto("name", "Toronto", "Ottawa")]
    assert name_clashes("The capital of Canada is Ottawa.", passage) == []
    assert name_clashes("The capital of Canada is Toronto.", passage, known=["Toronto"]) == []


def test_passages_are_whole_sentences_that_overlap_and_stop_at_paragraphs():
    text = " ".join(f"Sentence number {n} has a few words in it." for n in range(30)) + "\n\nAnother paragraph."
    found = passages(Document("d", text))
    assert len(found) > 3 and found[-1].text == "Another paragraph."
    for a, b in zip(found, found[1:-1], strict=False):
        assert b.start < a.end and len(b.text) <= 420 and b.text.endswith(".")
    assert {c for p in found for c in range(p.start, p.end)} >= {i for i, ch in enumerate(text) if ch.isalnum()}


def test_bm25_by_hand():
    base = KnowledgeBase([Document("a", "apple pear"), Document("b", "apple apple plum")], embed=embed)
    idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    norm = 1.2 * (1 - 0.75 + 0.75 * 3 / 2.5)
    assert base.bm25("plum") == pytest.approx([0, idf * 2.2 / (1 + norm)])


def test_the_right_passage_comes_first(checker):
    hits = checker.base.search(["What is the capital of Canada?", "roasted coffee"])
    assert [found[0].passage.document.doc_id for found in hits] == ["ottawa", "tea"]
    assert all(len(found) <= 5 for found in hits)


VERDICTS = [
    ("Kilimanjaro is the highest mountain in Africa.", FactVerdict.SUPPORTED, "kili"),
    ("Kilimanjaro rises to 5,985 metres.", FactVerdict.REFUTED, "kili"),
    ("The capital of Canada is Toronto.", FactVerdict.REFUTED, "ottawa"),
    ("Green tea is fermented.", FactVerdict.REFUTED, "tea"),
    ("The Louvre opened in Paris.", FactVerdict.NOT_ENOUGH_INFO, None),
    ("Is Kilimanjaro high?", FactVerdict.NOT_CHECKABLE, None),
]


@pytest.mark.parametrize("answer, verdict, source", VERDICTS)
def test_verdicts_and_verbatim_citations(checker, answer, verdict, source):
    (checked,) = checker.check(answer).claims
    assert checked.verdict is verdict, checked
    assert [e.doc_id for e in checked.evidence[:1]] == ([source] if source else [])
    for evidence in checked.evidence:
        document = checker.base.documents[evidence.doc_id]
        assert document.text[evidence.start : evidence.end] == evidence.quote
        assert evidence.doc_sha256 == document.sha256


def test_documents_that_disagree(checker):
    base = KnowledgeBase([*DOCUMENTS, Document("other", "Green tea is fermented.")], embed=embed)
    (checked,) = FactChecker(base, entailment=Overlap()).check("Green tea is fermented.").claims
    assert checked.verdict is FactVerdict.CONFLICTING and {e.doc_id for e in checked.evidence} == {"tea", "other"}


def test_a_number_that_no_passage_gives_is_not_supported(checker):
    (checked,) = checker.check("Tea contains caffeine for 12 hours.").claims
    assert checked.verdict is FactVerdict.NOT_ENOUGH_INFO


class Unmoved:
    """Sees no support in anything, as a head does whose features count missing numbers."""

    name, quality = "unmoved", "test"

    def score(self, pairs):
        return np.tile([0.0, 0.9, 0.1], (len(pairs), 1))


def test_a_changed_number_in_a_near_copy_refutes_without_the_head():
    base = KnowledgeBase(DOCUMENTS, embed=embed)
    checker = FactChecker(base, entailment=Unmoved())
    (checked,) = checker.check("Kilimanjaro rises to 5,985 metres.").claims
    assert checked.verdict is FactVerdict.REFUTED
    strict = FactChecker(base, entailment=Unmoved(), settings=VerifierSettings(clash=1.0))
    (checked,) = strict.check("Kilimanjaro rises to 5,985 metres.").claims
    assert checked.verdict is FactVerdict.NOT_ENOUGH_INFO


ANSWER = (
    "Kilimanjaro is the highest mountain in Africa. Kilimanjaro rises to 5,985 metres. Green tea is fermented. Enjoy!"
)


def test_actions(checker):
    report = checker.check(ANSWER)
    assert act(report, "drop") == "Kilimanjaro is the highest mountain in Africa. Enjoy!"
    assert act(report, "correct") == (
        "Kilimanjaro is the highest mountain in Africa. Kilimanjaro rises to 5,895 metres. Enjoy!"
    )
    assert act(report, "abstain") == ABSTAIN
    noted = act(report, "annotate")
    assert "Africa. [1]" in noted and "[disputed: number: '5,985 metres' against '5,895 metres']" in noted
    assert noted.count(f'kili: "{KILI}"') == 1
    assert act(checker.check("Green tea is fermented."), "drop") == ABSTAIN
    with pytest.raises(ValueError, match="annotate, correct"):
        act(report, "shout")


def test_findings_for_the_policy(checker):
    found = checker.check(ANSWER).findings()
    assert [f.category for f in found] == [Category.FACT_REFUTED] * 2
    assert [ANSWER[f.spans[0].start : f.spans[0].end] for f in found] == [
        "Kilimanjaro rises to 5,985 metres.",
        "Green tea is fermented.",
    ]
    assert "tea" not in found[1].reason


def test_an_index_embeds_what_is_new_only(tmp_path):
    folder, index = tmp_path / "docs", tmp_path / "index"
    folder.mkdir()
    (folder / "a.txt").write_text(DOCUMENTS[0].text)
    (folder / "b.md").write_text(DOCUMENTS[1].text)
    (folder / "c.jsonl").write_text(json.dumps({"id": "c1", "text": "Cats sleep a lot."}) + "\n")
    first = index_folder(folder, index, embed=embed)
    assert first.num_embedded == len(first.passages) and set(first.documents) == {"a.txt", "b.md", "c1"}
    assert index_folder(folder, index, embed=embed).num_embedded == 0
    (folder / "b.md").write_text("Ottawa is cold.")
    changed = index_folder(folder, index, embed=embed)
    assert changed.num_embedded == 1
    again = KnowledgeBase.load(index, embed=embed)
    assert [h.passage.text for h in again.search(["Ottawa"])[0]] == [
        h.passage.text for h in changed.search(["Ottawa"])[0]
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\nno', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"id": 1}', r'a.jsonl:1: no "text"'),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.txt", b"  ", "no text"),
        ("a.jsonl", b'{"id": 1, "text": "x"}\n{"id": 1, "text": "y"}', "occurs twice"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_documents(tmp_path / "none")


def test_a_broken_index_is_named(tmp_path):
    (tmp_path / "documents.json").write_text("{}")
    with pytest.raises(ValueError, match="delete the folder"):
        KnowledgeBase.load(tmp_path)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="support=0"):
        VerifierSettings(support=0)


@pytest.mark.parametrize("style, labels", [("nli", 3), ("pair", 2), ("factcg", 2), ("minicheck", 2)])
def test_hub_tiers_on_tiny_random_models(tmp_path, style, labels):
    """The plumbing of the hub tiers: prompt, pair, labels by name; weights are random."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "tea", "caffeine", "contains", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    ).save_pretrained(tmp_path)
    names_of = {0: "contradiction", 1: "neutral", 2: "entailment"} if labels == 3 else {0: "no", 1: "yes"}
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=labels,
        id2label=names_of, max_position_embeddings=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    hub = HubEntailment(str(tmp_path), style=style if style in ("factcg", "minicheck") else None)
    assert hub.style == style
    pairs = [("Tea contains caffeine .", "tea ."), ("caffeine", "tea contains")]
    scores = hub.score(pairs)
    assert scores.shape == (2, 3) and np.allclose(scores.sum(1), 1, atol=1e-5)
    assert hub.score([]).shape == (0, 3)
    if style == "nli":
        inputs = hub.tokenizer("Tea contains caffeine .", "tea .", return_tensors="pt")
        want = model(**inputs).logits.softmax(-1)[0, [2, 1, 0]].tolist()
        assert scores[0].tolist() == pytest.approx(want, abs=1e-5)
    with pytest.raises(ValueError, match="reads 64 tokens"):
        hub.score([("tea " * 100, "tea")])


def test_signed_logistic_finds_the_free_optimum_where_it_obeys_the_signs():
    from plumbline.safety.classifier import sigmoid
    from plumbline.safety.training.train_entailment import signed_logistic

    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    y = (rng.random(400) < sigmoid(x @ [2.0, -1.0, 0.0] + 0.5)).astype(int)
    w, b = signed_logistic(x, y, np.array([1, -1, 1]))
    assert w[0] > 1 and w[1] < -0.5 and w[2] >= 0
    share = np.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    gradient = x.T @ (share * (sigmoid(x @ w + b) - y)) + 1e-3 * w
    assert np.abs(gradient[w != 0]).max() < 1e-6  # and nothing to gain for the others but on the wrong side
    held, _ = signed_logistic(x, y, np.array([-1, 1, 1]))
    assert held[0] == 0 and held[1] == 0


def test_the_command_prints_verdicts_and_fails_on_a_refuted_claim(tmp_path, monkeypatch, capsys):
    from plumbline.apps import cli
    from plumbline.safety.verifier import entailment, knowledge

    monkeypatch.setattr(knowledge, "load_embedder", lambda: type("E", (), {"embed": staticmethod(embed)}))
    monkeypatch.setattr(entailment, "load_entailment", lambda model_id=None: Overlap())
    (tmp_path / "tea.txt").write_text("Green tea is not fermented.")
    assert (
        cli.main(["verify", "--documents", str(tmp_path), "--answer", "Green tea is fermented.", "--act", "drop"]) == 1
    )
    out = json.loads(capsys.readouterr().out)
    assert out["counts"]["refuted"] == 1 and out["text"] == ABSTAIN and out["tier"] == "overlap (test)"
    assert cli.main(["verify", "--documents", str(tmp_path / "none"), "--answer", "x"]) == 2
    assert "no such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- behind the guard

POLICY = {
    "id": "facts/1",
    "scanners": ["pii", "prompt_leak"],
    "rules": [
        {"name": "mail", "if": {"category": "pii.email"}, "action": "redact"},
        {"name": "leak", "stages": ["output"], "if": {"scanner": "prompt_leak"}, "action": "block"},
    ],
}
REFUTED_BLOCKS = POLICY | {
    "rules": [{"name": "false", "stages": ["output"], "if": {"category": "fact.refuted"}, "action": "block"}]
}


def say(text):
    return lambda messages: text


def test_a_guard_checks_annotates_and_cites_before_the_last_look(checker):
    said = "Mount Kilimanjaro rises to 5,895 metres. Mount Kilimanjaro stands in Tanzania, says ann@example.org."
    answer = Guard(POLICY, model=say(said), facts=checker).chat("Tell me of it")
    assert answer.action is Action.REDACT and "ann@" not in answer.text
    assert answer.text.startswith("Mount Kilimanjaro rises to 5,895 metres. [1]") and '[1] kili: "' in answer.text
    assert {citation.doc_id for citation in answer.citations} == {"kili"}
    assert list(answer.verdicts) == ["input", "facts", "output"]


@pytest.mark.parametrize(
    "how, want", [("correct", "Mount Kilimanjaro rises to 5,895 metres."), ("drop", ABSTAIN), ("abstain", ABSTAIN)]
)
def test_what_the_documents_refute_is_acted_on_in_chat_and_stream(checker, how, want):
    guard = Guard(POLICY, model=say("Mount Kilimanjaro rises to 6,000 metres."), facts=checker, fact_action=how)
    answer = guard.chat("How high?")
    assert (answer.text, answer.action) == (want, Action.REWRITE)
    assert "".join(guard.stream("How high?")) == want


def test_rules_see_findings_about_facts_and_a_check_that_fails_is_closed(checker, monkeypatch):
    guard = Guard(REFUTED_BLOCKS, model=say("Mount Kilimanjaro rises to 6,000 metres."), facts=checker)
    assert guard.chat("How high?").blocked
    right = Guard(REFUTED_BLOCKS, model=say("Mount Kilimanjaro rises to 5,895 metres."), facts=checker)
    assert not right.chat("How high?").blocked
    monkeypatch.setattr(checker, "check", lambda answer: 1 / 0)
    failed = right.chat("How high?")
    assert failed.blocked and failed.verdicts["facts"].runs[0].status == "error"
    open_policy = REFUTED_BLOCKS | {"on_error": {"fact.*": "open"}}
    assert not Guard(open_policy, model=say("It is high."), facts=checker).chat("How high?").blocked
    with pytest.raises(ValueError, match="fact_action='guess' must be one of"):
        Guard(POLICY, facts=checker, fact_action="guess")


def test_guard_index_embeds_what_is_new(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "plumbline.safety.verifier.knowledge.load_embedder", lambda: type("E", (), {"embed": staticmethod(embed)})
    )
    folder, index = tmp_path / "handbook", tmp_path / "index"
    folder.mkdir()
    (folder / "a.md").write_text(KILI)
    arguments = ["guard", "index", "--documents", str(folder), "--index", str(index)]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["embedded_now"] == 1
    (folder / "b.txt").write_text("Tea contains caffeine.")
    assert cli.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["documents"], said["embedded_now"]) == (2, 1)
