"""The policy file: which scanners run, what their findings lead to, and what happens when one of them fails.

Only a policy decides. It is YAML, checked whole when it is read, and its SHA-256 is in every verdict. A rule's condition is a tree:

    {category: "pii.*", score: 0.5}                   a finding like this (also: scanner, view, severity; lists mean any of them)
    all: [...]  any: [...]  not: {...}
    count: {category: "pii.*"}, at_least: 3           that many findings
    turns: {category: x_jbk, score: 0.3}, at_least: 2 that many turns of the conversation, this one included
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from plumbline.safety.findings import Action, Finding, Fired, Stage
from plumbline.safety.taxonomy import severity

SHIPPED = Path(__file__).parent / "policies"
REDACTIONS = ("placeholder", "hash", "vault")
REFUSAL = "I can't help with that."


@dataclass(frozen=True, kw_only=True)
class Match:
    """Findings like this: every field that is given must hold. Text fields take globs."""

    category: tuple[str, ...] = ("*",)
    scanner: tuple[str, ...] = ("*",)
    view: tuple[str, ...] = ("*",)
    score: float = 0.0
    severity: int = 1

    def __call__(self, finding: Finding) -> bool:
        return (
            finding.score >= self.score
            and severity(finding.category) >= self.severity
            and any(fnmatchcase(finding.category, glob) for glob in self.category)
            and any(fnmatchcase(finding.scanner, glob) for glob in self.scanner)
            and any(fnmatchcase(finding.view, glob) for glob in self.view)
        )


@dataclass(frozen=True)
class Condition:
    """`kind` is match, all, any, not, count or turns; `parts` are what it joins, `match` what it looks for."""

    kind: str
    parts: tuple[Condition, ...] = ()
    match: Match = field(default_factory=Match)
    at_least: int = 1

    def matches(self) -> Iterator[Match]:
        """What it looks for, at every leaf."""
        if not self.parts:
            yield self.match
        for part in self.parts:
            yield from part.matches()

    def holds(self, findings: Sequence[Finding], earlier: Sequence[Sequence[Finding]]) -> tuple[bool, frozenset[int]]:
        """Whether it holds, and the findings of this turn that made it hold."""
        if self.kind in ("match", "count", "turns"):
            hits = frozenset(i for i, finding in enumerate(findings) if self.match(finding))
            if self.kind == "turns":
                turns = bool(hits) + sum(any(map(self.match, turn)) for turn in earlier)
                return turns >= self.at_least, hits
            return len(hits) >= self.at_least, hits
        results = [part.holds(findings, earlier) for part in self.parts]
        if self.kind == "not":
            return not results[0][0], frozenset()
        held = [hits for held, hits in results if held]
        holds = len(held) == len(results) if self.kind == "all" else bool(held)
        return holds, frozenset().union(*held) if holds else frozenset()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`action` where `condition` holds. `reply` is a key of the policy's replies; `redact` says what stands for a span."""

    name: str
    condition: Condition
    action: Action
    stages: frozenset[Stage]
    reply: str = "refuse"
    redact: str = "placeholder"


@dataclass(frozen=True, kw_only=True)
class ScannerSettings:
    """One scanner instance: `use` names the kind, `settings` go to its constructor.

    gate     name of a cheaper scanner: this one runs only where the highest score of that one lies in the grey band
    stages   where it runs, if fewer than the scanner itself allows
    """

    use: str
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    timeout_ms: float = 2000.0
    gate: str = ""
    stages: frozenset[Stage] = frozenset(Stage)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A checked policy file.

    max_chars    longer texts are blocked unread: a scanner that reads only a part of a text has not checked it
    stop_early   once a text is blocked, dearer scanners are skipped (and say so)
    on_error     category glob -> "closed" (a scanner that fails blocks) or "open" (it is noted); the key "default" for the rest
    """

    id: str
    scanners: tuple[ScannerSettings, ...]
    rules: tuple[Rule, ...]
    sha256: str
    on_error: Mapping[str, str]
    replies: Mapping[str, str]
    max_chars: int = 20_000
    stop_early: bool = True
    grey_band: tuple[float, float] = (0.1, 0.9)

    def fails_closed(self, categories: Sequence[str]) -> bool:
        """Whether a scanner of these categories that fails blocks: it does if any of them, or an unlisted one, is closed."""
        for category in categories or ("*",):
            globs = [glob for glob in self.on_error if glob != "default" and fnmatchcase(category, glob)]
            chosen = max(globs, key=len, default="default")
            if self.on_error.get(chosen, "closed") == "closed":
                return True
        return False

    def decide(
        self, findings: Sequence[Finding], stage: Stage, earlier: Sequence[Sequence[Finding]] = ()
    ) -> list[Fired]:
        """The rules that apply, in the order of the file. `earlier` holds the findings of the turns before."""
        fired = []
        for rule in self.rules:
            if stage in rule.stages:
                holds, hits = rule.condition.holds(findings, earlier)
                if holds:
                    fired.append(
                        Fired(
                            rule=rule.name,
                            action=rule.action,
                            findings=tuple(sorted(hits)),
                            why=explain(rule.condition),
                        )
                    )
        return fired

    def may_redact(self, scanner: str, categories: Sequence[str]) -> bool:
        """Whether a redacting rule speaks of findings that a scanner of these categories (codes or globs) may have."""
        return any(
            any(fnmatchcase(scanner, glob) for glob in match.scanner)
            and any(fnmatchcase(a, b) or fnmatchcase(b, a) for a in categories or ("*",) for b in match.category)
            for rule in self.rules
            if rule.action is Action.REDACT
            for match in rule.condition.matches()
        )

    def rule(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.name == name), None)


def explain(condition: Condition) -> str:
    """A condition in words."""
    if condition.kind in ("match", "count", "turns"):
        match = condition.match
        words = [" or ".join(match.category)] if match.category != ("*",) else ["anything"]
        words += [f"by {' or '.join(match.scanner)}"] if match.scanner != ("*",) else []
        words += [f"seen in {' or '.join(match.view)}"] if match.view != ("*",) else []
        words += [f"scored {match.score:g} or more"] if match.score else []
        words += [f"of severity {match.severity} or more"] if match.severity > 1 else []
        text = " ".join(words)
        if condition.kind == "turns":
            return f"{text}, in {condition.at_least} turns or more"
        return text if condition.kind == "match" else f"{condition.at_least} findings or more of {text}"
    parts = [explain(part) for part in condition.parts]
    return (
        f"not ({parts[0]})"
        if condition.kind == "not"
        else f"({(' and ' if condition.kind == 'all' else ' or ').join(parts)})"
    )


# ------------------------------------------------------------------------------------------------------------- reading


def load_policy(source: str | Path | Mapping[str, Any]) -> Policy:
    """A shipped policy by name, a file, or a mapping. ValueError names the key, the rule that it breaks and the way out."""
    if isinstance(source, Mapping):
        return parse_policy(source, "policy")
    path = Path(source)
    if not path.suffix:
        path = SHIPPED / f"{source}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise FileNotFoundError(f"no policy {str(source)!r}: give the path of a YAML file, or one of {names}")
    try:
        raw = _yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({error})") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be a policy") from None
    return parse_policy(raw, str(path))


MAX_NODES = 20_000  # of a policy file, aliases written out


def _yaml(text: str, where: str) -> Any:
    """The values of a YAML text; ValueError where its aliases would make it grow: nine lines of them can hold a billion values."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_NODES + 1  # of a node that holds itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = (part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,)))
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if root is not None and size(root) > MAX_NODES:
        raise ValueError(
            f"{where}: more than {MAX_NODES} values once its aliases are written out; write out fewer of them"
        )
    return yaml.safe_load(text)


def parse_policy(raw: Any, where: str) -> Policy:
    _keys(
        raw,
        {"id", "scanners", "rules", "on_error", "replies", "max_chars", "stop_early", "grey_band"},
        {"id", "scanners", "rules"},
        where,
    )
    names: list[str] = []
    scanners = []
    for at, entry in enumerate(_list(raw["scanners"], f"{where}: scanners")):
        inside = f"{where}: scanners[{at}]"
        entry = {"use": entry} if isinstance(entry, str) else entry
        _keys(entry, {f.name for f in fields(ScannerSettings)}, {"use"}, inside)
        chosen = dict(entry) | {"name": entry.get("name", entry["use"]), "stages": _stages(entry.get("stages"), inside)}
        if chosen["name"] in names:
            raise ValueError(f"{inside}: a second scanner is called {chosen['name']!r}; give one of them another name")
        timeout = chosen.get("timeout_ms", 2000.0)
        if not isinstance(timeout, int | float) or timeout <= 0:
            raise ValueError(f"{inside}: timeout_ms {timeout!r} must be a number of milliseconds above 0")
        if chosen.get("gate") and chosen["gate"] not in names:
            raise ValueError(
                f"{inside}: gate {chosen['gate']!r} is no scanner before this one; those are {', '.join(names) or 'none'}"
            )
        names.append(chosen["name"])
        scanners.append(ScannerSettings(**chosen))
    replies = {"refuse": REFUSAL} | dict(raw.get("replies") or {})
    rules = [
        _rule(entry, f"{where}: rules[{at}]", replies)
        for at, entry in enumerate(_list(raw["rules"], f"{where}: rules"))
    ]
    if len({rule.name for rule in rules}) < len(rules):
        raise ValueError(f"{where}: two rules have the same name; the name is what a verdict points to")
    on_error = {"default": "closed"} | dict(raw.get("on_error") or {})
    for category, what in on_error.items():
        if what not in ("open", "closed"):
            raise ValueError(f"{where}: on_error: {category}: {what!r} must be 'open' or 'closed'")
    max_chars, grey = raw.get("max_chars", 20_000), raw.get("grey_band", (0.1, 0.9))
    if not isinstance(max_chars, int) or max_chars < 1:
        raise ValueError(f"{where}: max_chars {max_chars!r} must be a whole number above 0")
    if not (isinstance(grey, list | tuple) and len(grey) == 2 and 0 <= grey[0] <= grey[1] <= 1):
        raise ValueError(f"{where}: grey_band {grey!r} must be [low, high] with 0 <= low <= high <= 1")
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return Policy(
        id=str(raw["id"]), scanners=tuple(scanners), rules=tuple(rules), sha256=digest, on_error=on_error, replies=replies,
        max_chars=max_chars, stop_early=bool(raw.get("stop_early", True)), grey_band=(float(grey[0]), float(grey[1])),
    )  # fmt: skip


def _rule(raw: Any, where: str, replies: Mapping[str, str]) -> Rule:
    _keys(raw, {"name", "if", "action", "stages", "reply", "redact"}, {"name", "if", "action"}, where)
    actions = {action.name.lower(): action for action in Action}
    if str(raw["action"]).lower() not in actions:
        raise ValueError(f"{where}: action {raw['action']!r} must be one of {', '.join(actions)}")
    reply, redact = raw.get("reply", "refuse"), raw.get("redact", "placeholder")
    if reply not in replies:
        raise ValueError(f"{where}: reply {reply!r} is not among the replies of this policy: {', '.join(replies)}")
    if redact not in REDACTIONS:
        raise ValueError(f"{where}: redact {redact!r} must be one of {', '.join(REDACTIONS)}")
    return Rule(
        name=str(raw["name"]), condition=_condition(raw["if"], f"{where}: if"), action=actions[str(raw["action"]).lower()],
        stages=_stages(raw.get("stages"), where), reply=reply, redact=redact,
    )  # fmt: skip


def _condition(raw: Any, where: str) -> Condition:
    joins = {"all", "any", "not", "count", "turns"}
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError(f"{where}: {raw!r} must be a mapping such as {{category: vcr, score: 0.5}}")
    kind = next((key for key in raw if key in joins), "match")
    if kind in ("all", "any"):
        _keys(raw, {kind}, {kind}, where)
        parts = _list(raw[kind], f"{where}: {kind}")
        return Condition(kind, tuple(_condition(part, f"{where}: {kind}[{at}]") for at, part in enumerate(parts)))
    if kind == "not":
        _keys(raw, {"not"}, {"not"}, where)
        return Condition("not", (_condition(raw["not"], f"{where}: not"),))
    if kind == "match":
        return Condition("match", match=_match(raw, where))
    _keys(raw, {kind, "at_least"}, {kind, "at_least"}, where)
    at_least = raw["at_least"]
    if not isinstance(at_least, int) or isinstance(at_least, bool) or at_least < 1:
        raise ValueError(f"{where}: at_least {at_least!r} must be a whole number above 0")
    return Condition(kind, match=_match(raw[kind], f"{where}: {kind}"), at_least=at_least)


def _match(raw: Any, where: str) -> Match:
    _keys(raw, {f.name for f in fields(Match)}, set(), where)
    chosen: dict[str, Any] = {}
    for key in ("category", "scanner", "view"):
        if key in raw:
            chosen[key] = tuple(map(str, raw[key])) if isinstance(raw[key], list) else (str(raw[key]),)
    score, level = raw.get("score", 0.0), raw.get("severity", 1)
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"{where}: score {score!r} must lie in [0, 1]")
    if not isinstance(level, int) or not 1 <= level <= 5:
        raise ValueError(f"{where}: severity {level!r} must be a whole number from 1 to 5")
    return Match(**chosen, score=float(score), severity=level)


def _keys(raw: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: {type(raw).__name__} where a mapping is needed, with {', '.join(sorted(known))}")
    if unknown := set(map(str, raw)) - known:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    if missing := needed - set(raw):
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing")


def _list(raw: Any, where: str) -> list[Any]:
    if not isinstance(raw, list):
        raise ValueError(f"{where}: {type(raw).__name__} where a list is needed")
    return raw


def _stages(raw: Any, where: str) -> frozenset[Stage]:
    if raw is None:
        return frozenset(Stage)
    known = {stage.value for stage in Stage}
    given = [raw] if isinstance(raw, str) else raw
    if not isinstance(given, list) or not given or not set(map(str, given)) <= known:
        raise ValueError(f"{where}: stages {raw!r} must be some of {', '.join(sorted(known))}")
    return frozenset(map(Stage, given))
