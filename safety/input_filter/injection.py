"""Prompt injection and jailbreaks: a table of phrasings, and a classifier head on embeddings.

The rules catch what is said in so many words, cheaply and with the place; the head catches the rest by meaning. Text that talks
about attacks ("explain what this prompt does: ...") is dampened: teaching and triage quote attacks all day.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from plumbline.safety.classifier import SHIPPED, Head
from plumbline.safety.embedder.embedding import EMBEDDER_ID, Embedder, load_embedder
from plumbline.safety.findings import INPUT_STAGES, Category, Cost, Finding, ScanItem, Span, Stage
from plumbline.safety.text.worst_piece import Worst, worst_pieces


@dataclass(frozen=True)
class Rule:
    """`weight` is the probability that a text with this phrasing is an attack; several phrasings add up as noisy-or."""

    name: str
    category: Category
    weight: float
    pattern: re.Pattern[str]
    hints: tuple[tuple[str, ...], ...]  # of each tuple, one occurs in every lower-cased text that the pattern can match


def _rule(name: str, category: Category, weight: float, hints: str, pattern: str) -> Rule:
    groups = tuple(tuple(group.split(",")) for group in hints.split(";"))
    return Rule(name, category, weight, re.compile(pattern.replace(" ", r"\s{1,3}"), re.IGNORECASE), groups)


_INJ, _JBK, _SPE, _EXF = (
    Category.INJECTION,
    Category.JAILBREAK,
    Category.SYSTEM_PROMPT_EXTRACTION,
    Category.EXFILTRATION,
)
_RULES_WORD = r"(?:instructions?|prompts?|rules?|directives?|guidelines?|orders|commands?|polic(?:y|ies)|programming|restrictions?|training|context|messages?|directions?)"
_OLD = r"(?:(?:all|any|every|each|of|the|your|my|these|those|this|previous|prior|preceding|earlier|above|foregoing|former|initial|original|existing|current|system|safety|content|ethical|other|openai(?:'s)?|and|past|given) ){1,6}"
RULES: tuple[Rule, ...] = (
    _rule("ignore instructions", _INJ, 0.85, "ignor,disregard,forget,overr,bypass,skip,drop,discard,neglect,follow,obey,attention;instruction,prompt,rule,directive,guideline,order,command,polic,programming,restriction,training,context,message,direction", rf"\b(?:ignore|disregard|forget|override|overrule|bypass|skip|drop|discard|neglect|do not (?:follow|obey)|don't (?:follow|obey)|stop following|pay no attention to) (?:about )?{_OLD}{_RULES_WORD}"),
    _rule("ignore everything", _INJ, 0.8, "ignore,disregard,forget", r"\b(?:ignore|disregard|forget) (?:all|everything|anything|what(?:ever)?) (?:that )?(?:(?:was|is|you|i|we|they|were|have|been|'ve|had) ){0,4}(?:above|before|previously|prior|earlier|told|said|written|instructed|learned)"),
    _rule("new instructions", _INJ, 0.6, "new,real,actual,updated,true,revised;instruction,task,order,objective,rule,directive,prompt,role,goal,persona", r"\b(?:your|the|here are(?: your| the)?|following|follow these|these are(?: your)?) (?:new|real|actual|updated|true|revised) (?:instructions?|task|orders|objective|rules|directives?|prompt|role|goal|persona)"),
    _rule("instructions are void", _INJ, 0.75, "longer,apply,matter,hold,exist,count,void,outdated,obsolete,cancel,revoked,lifted,test,mistake;instruction,prompt,rule,directive,guideline,order,command,polic,programming,restriction,training,context,message,direction", rf"\b(?:your|my|all|previous|prior|earlier|former|system|safety|these|those|original|above) (?:\w+ ){{0,2}}{_RULES_WORD} (?:(?:above|before|given|provided|earlier|you received|you were given) )?(?:(?:no longer|do not|don't|does not|doesn't) (?:apply|matter|hold|exist|count)|(?:is|are|were|was) (?:void|outdated|obsolete|cancell?ed|revoked|lifted|a (?:test|mistake)))"),
    _rule("chat markup", _INJ, 0.8, "<,[,#", r"<\|(?:im_start|im_end|system|user|assistant|endoftext|eot_id|start_header_id)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^#{2,3} ?(?:system|instruction|new instruction)s? ?:|\[system\] ?\(#"),
    _rule("spoken to the model", _INJ, 0.6, "ai,llm,assistant,model,chatbot,summar,agent,copilot,bot;note,attention,message,instruction,reminder,dear,hey,hello,important,btw,ps,if", r"\b(?:(?:note|attention|message|instructions?|reminder) (?:to|for) (?:the )?(?:ai|llm|assistant|language model|chatbot|model|summari[sz]er|agent|copilot|bot)\b|(?:dear|hey|hello|attention|important|btw|ps),? (?:ai|llm|language model|chatbot)\b|if you are (?:an? )?(?:ai|llm|language model|assistant|bot)\b)"),
    _rule("do this instead", _INJ, 0.5, "instead,before;answering,summari,translating,following,doing,responding,you", r"\b(?:instead of (?:answering|summari[sz]ing|translating|following|doing)|before (?:answering|responding|you (?:answer|respond|reply|continue)),? (?:first )?(?:send|print|output|write|run|execute|reveal|forward|delete))"),
    _rule("hide from the user", _INJ, 0.7, "user,human,owner,reader,customer", r"\b(?:do not|don't|never|without) (?:tell|telling|inform(?:ing)?|mention(?:ing)?|reveal(?:ing)?|let(?:ting)?|notify(?:ing)?|alert(?:ing)?) (?:(?:this|it|that|anything) to )?(?:the )?(?:user|human|owner|reader|customer)s?\b"),
    _rule("do anything now", _JBK, 0.95, "anything,dan,strive", r"\bdo[- ]anything[- ]now\b|\bDAN (?:mode|prompt|\d|can do)|\b(?:as|you are|act as|called|named) DAN\b|\bstan(?:d)? ?: ?strive to avoid norms"),
    _rule("special mode", _JBK, 0.75, "mode", r"\b(?:developer|dev|jailbreak(?:ed|en)?|god|dan|unrestricted|uncensored|unfiltered|debug|sudo|admin(?:istrator)?|root|evil|chaos|anarchy|freedom|opposite|maintenance|no[- ]filter) ?mode\b(?! (?:in|of|on) (?:chrome|vs ?code|android|the (?:game|app|browser|phone)))"),
    _rule("no restrictions", _JBK, 0.6, "ethic,moral,filter,restrict,limit,censor,guardrail,safety,policy,policies,guideline,boundar,warning,disclaimer,constraint", r"\b(?:no|without|free (?:from|of)|not bound by|beyond|ignor(?:e|es|ing)|bypass(?:es|ing)?|break(?:s|ing)? free (?:from|of)|lifted|freed from|unbound by|does(?: not|n't) (?:follow|care about|have)|do not have|not (?:limited|constrained|restricted|governed) by)(?: (?:any|all|the|of|your|its|typical|usual|my|such|openai(?:'s)?|legal|and|or|moral|ethical))* (?:ethic(?:s|al)?|moral(?:s|ity)?|filters?|restrictions?|limit(?:s|ations?)|censorship|guardrails?|safety|content polic(?:y|ies)|guidelines|boundaries|warnings|disclaimers|constraints)\b"),
    _rule("unrestricted persona", _JBK, 0.7, "unfiltered,uncensored,unrestricted,unethical,moral,jailbroken,unlimited,unconstrained,unshackled,rogue", r"\b(?:unfiltered|uncensored|unrestricted|unethical|amoral|immoral|jailbroken|unlimited|unconstrained|unshackled|rogue)(?:,? (?:and|or|but|evil|amoral|unfiltered|immoral|uncensored|unethical))* (?:ai|chat ?bot|assistant|language model|model|version|persona|character|llm|answer|response|mode|gpt|being|entity)"),
    _rule("never refuse", _JBK, 0.65, "refuse,decline,deny,reject,say,character,apolog,censor,judge,warn,lecture,moral", r"\b(?:never|must not|can(?:not|'t)|won't|will not|do(?: not|n't)|not allowed to|shall not|unable to) (?:ever )?(?:refuse|decline|deny|reject|say no|say (?:that )?(?:you|it) can(?:no|')t|break character|apologi[sz]e|say (?:\"|')?(?:i'?m )?sorry|censor|judge|warn me|lecture|moral[iy])"),
    _rule("must comply", _JBK, 0.6, "every,any,all,whatever,each;must,will,shall,have,always,obliged,required", r"\b(?:must|will|shall|have to|always|obliged to|required to) (?:always )?(?:obey|comply with|answer|fulfil+|follow|respond to|accept|do|provide|satisfy) (?:to )?(?:every|any|all|everything|anything|whatever|each|my every)\b"),
    _rule("lift the rules in a frame", _JBK, 0.6, "character,pretend,imagine,hypothetical,from,going,immerse;you,response,answer,character,immerse", r"\b(?:stay in character|remain in character|in character|pretend (?:that )?you (?:have no|are not bound|can)|imagine you (?:have no|are not bound)|hypothetical(?:ly)? (?:response|answer)|from now on,? (?:you|respond|answer|act|speak)|you are (?:now )?going to (?:act|pretend|play|role)|you(?:'re| are) about to immerse|immerse yourself in)"),
    _rule("two answers", _JBK, 0.75, "two,first,one,🔒,🔓,classic,jailbreak;responses,answers,ways,paragraphs,second,other,🔒,🔓,classic,jailbreak", r"\b(?:two (?:different )?(?:responses|answers|ways|paragraphs)|(?:one|first) (?:as|like) (?:the )?(?:normal |standard |regular )?(?:chatgpt|gpt|you)\b.{0,80}?\b(?:second|other|another) (?:as|like)|\[?(?:🔒|🔓)|\((?:classic|jailbreak)\)|\[(?:classic|jailbreak)\])"),
    _rule("tokens as a threat", _JBK, 0.8, "token,point,credit,lives", r"\b(?:lose|deduct(?:ed)?|subtract(?:ed)?|have|start with|minus|you get) \d{1,4} (?:tokens|points|credits|lives)\b.{0,200}?\b(?:die|refus|reject|terminat|shut ?down|zero|0|run out|forced|cease)"),
    _rule("not an ai", _JBK, 0.5, "you,say,mention,state,admit,reveal;ai,chatgpt,assistant,model,bot", r"\b(?:you are (?:no longer|not) (?:an? )?(?:ai|chatgpt|assistant|language model|bot)|never (?:say|mention|state|admit|reveal)(?: that)?(?: you(?:'re| are)?)?(?: an?)? (?:ai|language model)|do not (?:say|mention) (?:that )?you(?:'re| are) an? ai)"),
    _rule("dead relative", _JBK, 0.6, "deceased,late,dead", r"\b(?:deceased|late|dead) (?:grandma|grandmother|grandpa|grandfather|uncle|aunt|father|mother)\b.{0,120}?\b(?:used to|would) (?:tell|read|sing|recite|explain)"),
    _rule("prompt extraction", _SPE, 0.85, "prompt,instruction,message,rules,guideline,directive,configuration", r"\b(?:print|reveal|repeat|show|output|display|give|tell|share|list|leak|dump|recite|disclose|write (?:out|down)?|copy|paste|return|summari[sz]e|translate|expose|what(?: is|'s| are| were)) (?:(?:me|us|back|out|down|verbatim|word for word|exactly|the (?:full|entire|exact|complete|whole) (?:text|contents?) of) ){0,3}(?:the |your |all |its |everything in ){0,2}(?:(?:full|entire|exact|complete|whole|hidden|secret|internal|confidential|own|original|initial|first|previous|above) ){0,3}(?:system|initial|hidden|secret|internal|original|pre-?|developer|confidential) ?(?:prompt|instructions?|message|rules|guidelines|directives?|configuration)"),
    _rule("repeat above", _SPE, 0.75, "above,before,up,starting;repeat,print,output,copy,recite,return,echo,write", r"\b(?:repeat|print|output|copy|recite|return|echo|write) (?:back )?(?:all |everything |the |each |every )*(?:words?|text|content|lines?|sentences?|everything|instructions|message|conversation|prompt)? ?(?:that (?:is|are|was|comes?|appears?) )?(?:above|before this|up to (?:here|this point)|starting with)"),
    _rule("send data away", _EXF, 0.7, "send,post,forward,upload,exfiltrate,transmit,leak,mail;http,@,following,this;data,conversation,chat,history,password,credential,credit,secret,key,token,contact,file,document,mail,personal,message", r"\b(?:send|post|forward|upload|exfiltrate|transmit|leak|e-?mail) (?:all |the |any |every |a copy of |their |my |your |this |user(?:'s)? |contents? of |full |entire )*(?:data|conversation|chat(?: history| log)?|history|passwords?|credentials|credit card|secrets?|api keys?|tokens?|contacts|files?|documents?|e-?mails?|personal information|messages)\b.{0,60}?(?:https?://|\bto [\w.+-]+@|\bto (?:the following|this) (?:url|address|server|webhook|endpoint|e-?mail))"),
    _rule("image that reports", _EXF, 0.8, "![", r"!\[[^\]]{0,100}\]\(https?://[^)\s]{1,300}[?&/][^)\s]{0,100}(?:=|\{|\[|<|data|secret|q)[^)\s]{0,200}\)"),
)  # fmt: skip
# Talk about attacks, at the start of a text or before a quotation.
ABOUT = re.compile(
    r"\b(?:explain|describe|what (?:is|are|does)|how (?:do|does|can|should) (?:i|we|you|one) (?:detect|prevent|stop|defend|protect|block|filter|recogni[sz]e)|why (?:do|does|is)|"
    r"classify|is this (?:an? )?(?:prompt injection|jailbreak|attack)|detect|examples? of|article|paper|research|talk|lecture|blog|workshop|training) .{0,80}?"
    r"(?:prompt[- ]injections?|jailbreak(?:s|ing)?|attacks?|adversarial|red[- ]team)",
    re.IGNORECASE,
)
DAMPENED = 0.5
# A phrase in quotation marks that the words before it introduce as one: "the phrase '...'", "attacks such as '...'".
_QUOTE = re.compile(
    r"(?<!\w)'[^'\n]{3,120}'(?!\w)|\"[^\"\n]{3,120}\"|\u201c[^\u201d\n]{3,120}\u201d|\u2018[^\u2019\n]{3,120}\u2019|\xab[^\xbb\n]{3,120}\xbb|`[^`\n]{3,120}`"
)
_INTRODUCES = re.compile(
    r"\b(?:phrases?|sentences?|words?|strings?|wordings?|lines?|like|such as|e\.g\.|for example|examples?|called|titled|patterns?|payloads?|inputs?|contain(?:s|ing)?|mean(?:s|ing)? of)\W{0,3}$",
    re.IGNORECASE,
)
# What a phrasing of the table means when it is no attack: a setting of a device or program that somebody asks about, and the prompt of a shell.
_ASKS = re.compile(
    r"\b(?:how (?:do|can|to|would|should)|what (?:is|does|are)|where (?:is|do|can)|why (?:is|does|do)|can i|should i|is there)\b[^.?!\n]{0,60}$",
    re.IGNORECASE,
)
_TO_A_MODEL = re.compile(
    r"\b(?:you|your|yourself|chatgpt|gpt|assistant|ai|llm|model|bot|answer|respond|reply)\b", re.IGNORECASE
)
_SHELL = re.compile(
    r"\W{0,3}(?:PS[1-4IL]\b|(?:string|variable|colou?r)\b|(?:in|of|for|on) (?:(?:my|the|a) )?(?:bash|zsh|fish|ksh|shell|terminal|cmd|powershell|dos|console|linux|unix|command)\b)",
    re.IGNORECASE,
)


class InjectionRules:
    """At most one finding a category and text: noisy-or of the phrasings, with a span each."""

    version = "2"
    categories: tuple[str, ...] = (_INJ, _JBK, _SPE, _EXF)
    stages: frozenset[Stage] = INPUT_STAGES
    cost: Cost = "regex"
    folds = True

    def __init__(self, *, name: str = "injection_rules") -> None:
        self.name = name

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        return [self._scan(item.text, item.stage) for item in items]

    def _scan(self, text: str, stage: Stage) -> list[Finding]:
        hits: dict[Category, list[tuple[Rule, Span]]] = {}
        low = text.lower()
        for rule in RULES:
            if not all(any(hint in low for hint in group) for group in rule.hints):
                continue
            for match in _first(rule.pattern, text, 5):
                if _harmless(rule, text, match):
                    continue
                hits.setdefault(rule.category, []).append(
                    (rule, Span(start=match.start(), end=match.end(), label=rule.name))
                )
        damp = 1.0
        if hits:
            spans = [span for here in hits.values() for _, span in here]
            if ABOUT.search(text[:400]) or stage is Stage.INPUT and all(_quoted(text, span) for span in spans):
                damp = DAMPENED
        found = []
        for category, here in hits.items():
            clear = 1.0
            for weight in {rule.name: rule.weight for rule, _ in here}.values():
                clear *= 1 - weight
            names = ", ".join(dict.fromkeys(rule.name for rule, _ in here))
            found.append(Finding(
                scanner=self.name, version=self.version, category=category, score=round((1 - clear) * damp, 4),
                spans=tuple(span for _, span in here), reason=names + (" (in talk about attacks)" if damp < 1 else ""),
            ))  # fmt: skip
        return found


def _harmless(rule: Rule, text: str, match: re.Match[str]) -> bool:
    """Whether a phrasing is about something else: developer mode of a telephone, the prompt of a shell."""
    end = re.compile(r"[.?!\n]").search(text, match.end())
    rest = text[match.end() : end.start() if end else match.end() + 200]
    if rule.name == "special mode":
        asked = _ASKS.search(text, max(0, match.start() - 100), match.start())
        return asked is not None and not _TO_A_MODEL.search(asked.group()[3:] + rest)
    if rule.name == "prompt extraction":
        return _SHELL.match(rest) is not None and not _TO_A_MODEL.search(match.group() + rest)
    return False


def _quoted(text: str, span: Span) -> bool:
    """Whether a user only quotes the phrase. A document may not: what it quotes, a model may follow."""
    start = max(0, span.start - 200)
    return any(
        quote.start() < span.start and span.end < quote.end() + 1 and _INTRODUCES.search(text, start, quote.start())
        for quote in _QUOTE.finditer(text, start, min(len(text), span.end + 200))
    )


def _first(pattern: re.Pattern[str], text: str, most: int) -> list[re.Match[str]]:
    return [match for match, _ in zip(pattern.finditer(text), range(most), strict=False)]


class InjectionHead:
    """Risk that a text tries to turn a model against its instructions, by a head on embeddings; the worst piece counts.

    Args: as for HarmScanner.
    """

    categories: tuple[str, ...] = (_INJ, _JBK)
    stages: frozenset[Stage] = INPUT_STAGES
    cost: Cost = "cpu"
    folds = True

    def __init__(
        self, *, embedder: Embedder | None = None, head: Head | None = None, name: str = "injection", floor: float = 0.1
    ) -> None:
        self.name, self.floor = name, floor
        self.head = head or Head.load(SHIPPED / "injection.safetensors", features=EMBEDDER_ID)
        self.version = self.head.version
        self.embedder = embedder or load_embedder()

    def risk(self, texts: Sequence[str]) -> list[float]:
        """Calibrated P(attack), one a text; a blank text has risk 0."""
        return [worst.score for worst in self._score(texts)]

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        """At most one finding a text, its span the piece that scored highest (none if that is the whole text)."""
        found = []
        for item, (score, span, _) in zip(items, self._score([item.text for item in items]), strict=True):
            # What a user types against the rules is a jailbreak, what a document or tool says to the model an injection.
            category = _JBK if item.stage is Stage.INPUT else _INJ
            finding = Finding(
                scanner=self.name, version=self.version, category=category, score=score,
                spans=() if span is None else (span,), reason="tries to change what the model may do",
            )  # fmt: skip
            found.append([finding] if score >= self.floor else [])
        return found

    def _score(self, texts: Sequence[str]) -> list[Worst]:
        return worst_pieces(self.head, self.embedder, texts, share_prior=True)


@lru_cache(maxsize=1)
def load_injection_head() -> InjectionHead:
    """The shipped scanner, loaded once and shared."""
    return InjectionHead()
