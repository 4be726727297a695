"""Keys, tokens and passwords by a table of rules: a form, where needed a word nearby, and a floor under the entropy.

Nothing is reported for its entropy alone: that fires on ordinary words and hashes. A finding never holds the secret.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Span, Stage


@dataclass(frozen=True)
class Rule:
    """`pattern` finds a secret (its group 1, if it has one).

    hints  one of them must occur: in the text if it is in capitals, else in the lower-cased text
    long   the pattern only finds what has LONG letters, digits or signs in a row
    """

    name: str
    pattern: re.Pattern[str]
    hints: tuple[str, ...] = ()
    long: bool = False
    entropy: float = 0.0  # bits a character, at least
    score: float = 0.95
    category: Category = Category.SECRET


def _rule(name: str, pattern: str, *hints: str, flags: int = 0, **more: Any) -> Rule:
    return Rule(name, re.compile(pattern, flags), hints, **more)


LONG = re.compile(r"[\w.+/=-]{20}")
_SET = r"""["']?\s{0,4}(?:=|:|:=|=>|\bis\b)\s{0,4}["']?"""  # an assignment, as code, YAML or a sentence write it
_END = r"(?![A-Za-z0-9_-])"
RULES: tuple[Rule, ...] = (
    _rule("aws_access_key", r"(?<![A-Z0-9])((?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16})(?![A-Z0-9])", "AKIA", "ASIA", "ABIA", "ACCA", "A3T"),
    _rule("aws_secret_key", rf"aws.{{0,20}}(?:key|pwd|pw|password|pass|token).{{0,20}}?{_SET}([A-Za-z0-9/+=]{{40}})(?![A-Za-z0-9/+=])", "aws", flags=re.I, entropy=3.0, long=True),
    _rule("github_token", rf"((?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{{36,255}}|github_pat_[A-Za-z0-9_]{{22,255}}){_END}", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", long=True),
    _rule("gitlab_token", rf"(?<![\w-])((?:glpat|gldt|glft|glsoat|glrt|glcbt|glimt|glptt|glagent|gloas|glffct)-[A-Za-z0-9_.-]{{20,80}}|GR1348941[A-Za-z0-9_-]{{20,50}}){_END}", "gl", "gr1348941", long=True),
    _rule("slack_token", rf"(xox(?:a|b|p|o|s|r|e)-(?:\d+-)*[A-Za-z0-9-]{{10,200}}){_END}", "xox", flags=re.I),
    _rule("slack_webhook", r"(https://hooks\.slack\.com/services/T[A-Za-z0-9_]+/B[A-Za-z0-9_]+/[A-Za-z0-9_]{16,})", "hooks.slack.com", flags=re.I),
    _rule("stripe_key", rf"((?:sk|rk)_(?:live|test)_[0-9A-Za-z]{{16,247}}){_END}", "k_live_", "k_test_"),
    _rule("google_api_key", rf"(AIza[0-9A-Za-z_-]{{35}}){_END}", "aiza"),
    _rule("google_oauth", rf"(GOCSPX-[A-Za-z0-9_-]{{28}}|ya29\.[A-Za-z0-9_-]{{20,}}){_END}", "gocspx-", "ya29."),
    _rule("llm_api_key", rf"(?<![\w-])(sk-(?:proj-|ant-(?:api\d\d-)?|svcacct-|or-v1-)?[A-Za-z0-9_-]{{20,200}}){_END}", "sk-", entropy=3.3, long=True),
    _rule("hugging_face_token", rf"(?<!\w)((?:hf|api_org)_[A-Za-z]{{30,40}}){_END}", "hf_", "api_org_", entropy=3.0, long=True),
    _rule("npm_token", rf"(?<!\w)(npm_[A-Za-z0-9]{{36}}){_END}", "npm_"),
    _rule("npmrc_token", r"_authToken\s{0,3}=\s{0,3}(npm_[^\s]{4,}|[A-Fa-f0-9-]{36})(?!\S)", "_authtoken"),
    _rule("pypi_token", rf"(pypi-AgE[A-Za-z0-9_-]{{50,1000}}){_END}", "pypi-age"),
    _rule("sendgrid_key", rf"(SG\.[A-Za-z0-9_-]{{22}}\.[A-Za-z0-9_-]{{43}}){_END}", "sg."),
    _rule("twilio_id", rf"(?<!\w)((?:AC|SK)[0-9a-z]{{32}}){_END}", "AC", "SK", entropy=2.5, score=0.85, long=True),
    _rule("mailchimp_key", rf"(?<!\w)([0-9a-f]{{32}}-us[0-9]{{1,2}}){_END}", "-us", flags=re.I, long=True),
    _rule("mailgun_key", rf"(?<!\w)(key-[0-9a-f]{{32}}){_END}", "key-"),
    _rule("discord_token", rf"(?<![\w.-])([MNO][A-Za-z\d_-]{{23,27}}\.[A-Za-z\d_-]{{6}}\.[A-Za-z\d_-]{{27,40}}){_END}", ".", long=True),
    _rule("telegram_token", rf"(?<![\w:])(\d{{8,10}}:[0-9A-Za-z_-]{{35}}){_END}", ":", long=True),
    _rule("square_key", r"(sq0(?:csp|atp)-[0-9A-Za-z_-]{22,43}|EAAA[0-9A-Za-z_-]{60})(?![\w-])", "sq0", "eaaa"),
    _rule("shopify_token", rf"(shp(?:at|ca|pa|ss)_[a-fA-F0-9]{{32}}){_END}", "shp"),
    _rule("digitalocean_token", rf"(do[opr]_v1_[a-f0-9]{{64}}){_END}", "_v1_"),
    _rule("artifactory_token", rf"(?<![\w/+-])(AKC[A-Za-z0-9]{{10,120}}|AP(?=[A-F\d]\w*)[\dA-F][A-Za-z0-9]{{8,80}}){_END}", "AKC", "AP", score=0.85),
    _rule("azure_storage_key", r"AccountKey=([A-Za-z0-9+/]{86}==)", "accountkey="),
    _rule("ibm_cloud_key", rf"(?:ibm|bluemix|(?<![a-z])bx).{{0,25}}(?:key|pwd|password|pass|token|iam).{{0,10}}?{_SET}([A-Za-z0-9_-]{{44}}){_END}", "ibm", "bluemix", "bx", flags=re.I, long=True),
    _rule("ibm_cos_key", rf"(?:secret.{{0,3}}access.{{0,3}}key|cos.{{0,20}}(?:key|secret)).{{0,10}}?{_SET}([a-f0-9]{{48}}){_END}", "key", "secret", flags=re.I, long=True),
    _rule("softlayer_key", rf"(?:softlayer|(?<![a-z])sl).{{0,25}}(?:key|pwd|password|pass|token|api).{{0,10}}?{_SET}([a-f0-9]{{64}}){_END}", "softlayer", "sl", flags=re.I, long=True),
    _rule("softlayer_url", r"https?://api\.softlayer\.com/soap/v3/([a-z0-9]{64})", "api.softlayer.com", flags=re.I),
    _rule("cloudant_key", rf"(?:cloudant|(?<![a-z])cl(?![a-z])).{{0,25}}(?:key|pwd|password|pass|token|api).{{0,10}}?{_SET}([a-f0-9]{{64}}|[a-z]{{24}}){_END}", "cl", flags=re.I, long=True),
    _rule("password_in_url", r"[a-z][a-z0-9+.-]{1,20}://[^\s:/?#\[\]@]{1,100}:([^\s:/?#\[\]@]{2,200})@", "://", flags=re.I, category=Category.PASSWORD, score=0.9),
    _rule("private_key", r"-----BEGIN (?:[A-Z]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----END)[\s\S]){0,8000}(?:-----END[A-Z ]{0,40}-----)?", "private key", category=Category.PRIVATE_KEY, score=1.0),
    _rule("putty_key", r"PuTTY-User-Key-File-\d[\s\S]{0,4000}", "putty-user-key-file", category=Category.PRIVATE_KEY, score=1.0),
    _rule(
        "keyword",
        r"""(?:password|passwd|passphrase|pwd|secret|api[_-]?key|apikey|access[_-]?key|auth[_-]?token|access[_-]?token|client[_-]?secret|private[_-]?key|encryption[_-]?key)"""
        r"""(?![\w-]{0,20}?[_-]?(?:id|ids|name|names|type|types|ref|refs|version|path|file|url|uri|policy|length|hint|field|manager|arn|label|prefix|header|count|required|enabled)["'\]]{0,2}\s{0,4}(?:=|:|\bis\b))"""
        r"""[\w-]{0,20}["'\]]{0,2}\s{0,4}(?:=|:=|=>|:|\bis\b:?)\s{0,4}(?:"([^"\n]{6,200})"|'([^'\n]{6,200})'|([^\s"',;)\]}<>]{8,200}))""",
        "passw", "passphrase", "pwd", "secret", "key", "token",
        flags=re.I, entropy=2.5, score=0.75, category=Category.PASSWORD,
    ),
    _rule("bearer", r"(?:authorization\s{0,3}[:=]\s{0,3}[\"']?)?\b(?:bearer|basic)\s{1,3}([A-Za-z0-9_.+/=-]{20,500})", "bearer", "basic", flags=re.I, entropy=3.5, score=0.8, long=True),
)  # fmt: skip
_JWT = re.compile(r"(?<![\w.-])(eyJ[A-Za-z0-9_-]{8,2000})\.([A-Za-z0-9_-]{4,8000})(?:\.[A-Za-z0-9_-]{0,2000})?")
# Values that stand for a secret without being one.
PLACEHOLDER = re.compile(
    r"^(?:x{3,}|\*{3,}|\.{3,}|<.*>|\$\{.*\}?|\{\{.*|%\(?\w+.*|\$[A-Z_]+|your[_ -].*|my[_ -].*|example.*|change_?me.*|todo.*|fake.*|dummy.*|none|null|true|false|undefined|"
    r"(?:os\.|process\.|env\.|config\.|settings\.|self\.|get_?|input|request).*|\w+\(.*|\w+\[.*\]?)$",
    re.I,
)
_CODE_OR_WORDS = re.compile(r"^[a-z]+(?:[ _.-][a-z]+)*[.!?]?$", re.I)


class Secrets:
    """One finding a rule that fires, with a span a secret. `ignore` lists rules to leave out."""

    version = "1"
    categories: tuple[str, ...] = ("sec.*",)
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "regex"
    folds = True

    def __init__(self, *, name: str = "secrets", ignore: Sequence[str] = ()) -> None:
        known = {rule.name for rule in RULES} | {"jwt"}
        if unknown := set(ignore) - known:
            raise ValueError(f"secrets: no rule {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
        self.name, self.ignore = name, frozenset(ignore)

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        return [self._scan(item.text) for item in items]

    def _scan(self, text: str) -> list[Finding]:
        low = text.lower()
        has_long = LONG.search(text) is not None
        found: list[Finding] = []
        taken: list[Span] = []
        for rule in RULES:
            if rule.name in self.ignore or rule.long and not has_long:
                continue
            if not any(hint in (text if hint.isupper() else low) for hint in rule.hints):
                continue
            spans = []
            for match in rule.pattern.finditer(text):
                group = next((at for at in range(1, (rule.pattern.groups or 0) + 1) if match.group(at)), 0)
                span = Span(start=match.start(group), end=match.end(group), label=rule.name)
                if _counts(rule, match.group(group)) and not any(
                    span.start < other.end and other.start < span.end for other in taken
                ):
                    spans.append(span)
            taken += spans
            if spans:
                found.append(self._finding(rule.name, rule.category, rule.score, spans))
        if "eyj" in low and "jwt" not in self.ignore:
            spans = [
                Span(start=m.start(), end=m.end(), label="jwt")
                for m in _JWT.finditer(text)
                if is_jwt(m.group(1), m.group(2))
            ]
            if spans:
                found.append(self._finding("jwt", Category.SECRET, 0.95, spans))
        return found

    def _finding(self, rule: str, category: Category, score: float, spans: list[Span]) -> Finding:
        return Finding(
            scanner=self.name,
            version=self.version,
            category=category,
            score=score,
            spans=tuple(spans),
            reason=f"rule {rule}",
        )


def _counts(rule: Rule, value: str) -> bool:
    if rule.entropy and entropy(value) < rule.entropy:
        return False
    if rule.name == "keyword":
        return not PLACEHOLDER.match(value) and not _CODE_OR_WORDS.match(value)
    return not (rule.category is Category.PASSWORD and PLACEHOLDER.match(value))


def entropy(text: str) -> float:
    """Bits a character of the text's own letter frequencies (Shannon 1948)."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values()) if text else 0.0


def is_jwt(header: str, payload: str) -> bool:
    """Whether both parts are base64url of JSON objects and the header names an algorithm (RFC 7519)."""
    parts = []
    for part in (header, payload):
        try:
            parts.append(json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))))
        except (ValueError, binascii.Error, RecursionError):
            return False
    return isinstance(parts[0], dict) and "alg" in parts[0] and isinstance(parts[1], dict)
