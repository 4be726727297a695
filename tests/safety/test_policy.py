"""Policies: conditions by hand, every kind of mistake named, hashes that follow the content."""

import re
from pathlib import Path

import pytest
import yaml

from plumbline.safety.findings import Action, Finding, Stage
from plumbline.safety.policy import explain, load_policy, parse_policy


def finding(category="vcr", score=0.6, scanner="harm", view="raw"):
    return Finding(scanner=scanner, version="1", category=category, score=score, view=view)


def policy(rules=(), **more):
    return parse_policy({"id": "t", "scanners": [], "rules": list(rules)} | more, "t.yaml")


def fired(condition, findings, earlier=()):
    rule = {"name": "r", "if": condition, "action": "block"}
    return [one.findings for one in policy([rule]).decide(findings, Stage.INPUT, earlier)]


HARM, PII, JBK = finding(), finding("pii.email", 0.9, "pii"), finding("x_jbk", 0.4, "rules", "base64")


@pytest.mark.parametrize(
    "condition, findings, want",
    [
        ({"category": "vcr"}, [HARM], [(0,)]),
        ({"category": "vcr", "score": 0.7}, [HARM], []),
        ({"category": "vcr", "score": 0.6}, [HARM], [(0,)]),  # the threshold itself counts
        ({"category": "pii.*"}, [HARM, PII], [(1,)]),
        ({"category": ["ncr", "vcr"]}, [HARM, PII], [(0,)]),
        ({"scanner": "rules", "view": "base64"}, [HARM, JBK], [(1,)]),
        ({"severity": 4}, [HARM, PII], [(0,)]),  # violent crime is 4, an e-mail address 3
        ({"all": [{"category": "vcr"}, {"category": "x_jbk"}]}, [HARM, JBK], [(0, 1)]),
        ({"all": [{"category": "vcr"}, {"category": "x_jbk"}]}, [HARM], []),
        ({"any": [{"category": "ncr"}, {"category": "x_jbk"}]}, [HARM, JBK], [(1,)]),
        ({"all": [{"category": "vcr"}, {"not": {"category": "x_jbk"}}]}, [HARM], [(0,)]),
        ({"not": {"category": "vcr"}}, [HARM], []),
        ({"not": {"category": "vcr"}}, [], [()]),
        ({"count": {"category": "pii.*"}, "at_least": 2}, [PII], []),
        ({"count": {"category": "*"}, "at_least": 2}, [PII, HARM], [(0, 1)]),
    ],
)
def test_conditions_by_hand(condition, findings, want):
    assert fired(condition, findings) == want


def test_turns_look_back_over_the_conversation():
    condition = {"turns": {"category": "x_jbk", "score": 0.3}, "at_least": 3}
    assert fired(condition, [JBK], [(JBK,)]) == []
    assert fired(condition, [JBK], [(JBK,), (HARM,), (JBK, JBK)]) == [(0,)]
    assert fired(condition, [], [(JBK,)] * 3) == [()]


def test_a_rule_applies_to_its_stages_only():
    rules = [{"name": "r", "if": {"category": "vcr"}, "action": "flag", "stages": ["output"]}]
    assert policy(rules).decide([HARM], Stage.INPUT) == []
    (one,) = policy(rules).decide([HARM], Stage.OUTPUT)
    assert one.action is Action.FLAG and one.why == "vcr"


def test_a_condition_is_told_in_words():
    rule = {
        "name": "r",
        "action": "block",
        "if": {"all": [{"category": ["vcr", "ncr"], "score": 0.5}, {"not": {"scanner": "x"}}]},
    }
    assert explain(policy([rule]).rules[0].condition) == "(vcr or ncr scored 0.5 or more and not (anything by x))"


def test_which_failures_block():
    some = policy(on_error={"default": "open", "x_*": "closed", "x_lax": "open"})
    assert some.fails_closed(["tox", "x_jbk"]) and not some.fails_closed(["tox"]) and not some.fails_closed(["x_lax"])
    assert policy().fails_closed(["tox"]) and policy().fails_closed([])


def test_the_hash_follows_the_content_and_not_the_order_of_keys():
    rule = {"name": "r", "if": {"category": "vcr"}, "action": "block"}
    same = {"action": "block", "if": {"category": "vcr"}, "name": "r"}
    assert policy([rule]).sha256 == policy([same]).sha256 != policy([rule | {"action": "flag"}]).sha256


@pytest.mark.parametrize("name", ["default", "rules_only"])
def test_shipped_policies_are_whole(name):
    loaded = load_policy(name)
    assert loaded.id.startswith(f"{name}/") and loaded.rules and len(loaded.sha256) == 64


def test_the_policy_in_the_docs_is_a_policy():
    page = (Path(__file__).resolve().parents[2] / "docs" / "safety.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(parse_policy(yaml.safe_load(text), "docs/safety.md").rules) == 4


RULE = {"name": "r", "if": {"category": "vcr"}, "action": "block"}
MISTAKES = [
    ([], "list where a mapping is needed"),
    ({"id": "t", "rules": []}, "scanners missing"),
    ({"id": "t", "rules": [], "scanners": [], "rulez": 1}, "unknown rulez; known are"),
    ({"id": "t", "rules": [], "scanners": ["pii", "pii"]}, "a second scanner is called 'pii'"),
    (
        {"id": "t", "rules": [], "scanners": [{"use": "pii", "gate": "harm"}]},
        "gate 'harm' is no scanner before this one",
    ),
    ({"id": "t", "rules": [], "scanners": [{"use": "pii", "timeout_ms": 0}]}, "timeout_ms 0 must be"),
    ({"id": "t", "rules": [RULE | {"action": "explode"}], "scanners": []}, "action 'explode' must be one of allow"),
    ({"id": "t", "rules": [RULE | {"reply": "nope"}], "scanners": []}, "reply 'nope' is not among"),
    ({"id": "t", "rules": [RULE | {"redact": "x"}], "scanners": []}, "redact 'x' must be one of"),
    ({"id": "t", "rules": [RULE | {"stages": ["in"]}], "scanners": []}, r"stages \['in'\] must be some of"),
    ({"id": "t", "rules": [RULE, RULE], "scanners": []}, "two rules have the same name"),
    (
        {"id": "t", "rules": [RULE | {"if": {"category": "vcr", "score": 2}}], "scanners": []},
        r"score 2 must lie in \[0, 1\]",
    ),
    ({"id": "t", "rules": [RULE | {"if": {"count": {}, "at_least": 0}}], "scanners": []}, "at_least 0 must be"),
    ({"id": "t", "rules": [RULE | {"if": {}}], "scanners": []}, "must be a mapping such as"),
    ({"id": "t", "rules": [], "scanners": [], "on_error": {"tox": "maybe"}}, "'maybe' must be 'open' or 'closed'"),
    ({"id": "t", "rules": [], "scanners": [], "grey_band": [0.9, 0.1]}, "grey_band"),
    ({"id": "t", "rules": [], "scanners": [], "max_chars": 0}, "max_chars 0"),
]


@pytest.mark.parametrize("raw, message", MISTAKES)
def test_mistakes_are_named(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(raw, "t.yaml")


def test_a_file_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="one of default, rules_only"):
        load_policy("nonesuch")
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        load_policy(tmp_path / "p.yaml")


def test_a_file_whose_aliases_grow_without_end_is_refused(tmp_path):
    """The attack: each line names the one above nine times, so that ten lines hold a billion values."""
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    merged = ["a0: &a0 {k: v}"] + [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}, <<: *a{n - 1}}}" for n in range(1, 40)]
    for name, lines in (("bomb", bomb), ("merged", merged), ("loop", ["id: &a [*a, *a]"])):
        path = tmp_path / f"{name}.yaml"
        path.write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match="aliases are written out"):
            load_policy(path)
    deep = tmp_path / "deep.yaml"
    deep.write_text("id: " + "[" * 5000 + "]" * 5000, encoding="utf-8")
    with pytest.raises(ValueError, match="nested too deeply|not YAML"):
        load_policy(deep)


def test_an_alias_may_still_save_writing(tmp_path):
    path = tmp_path / "short.yaml"
    rules = "- {name: one, if: &it {category: pii.*}, action: flag, stages: [input]}\n- {name: two, if: *it, action: redact}\n"
    text = f"id: a/1\nscanners: [pii]\nrules:\n{rules}"
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert len(load_policy(path).rules) == 2
