"""POST /v1/moderations: the guard's verdict on texts, under OpenAI's categories and its own."""

import secrets
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from plumbline.apps.serve.answering import Answering, check_texts, layer_report
from plumbline.apps.serve.engine.backend import BadRequestError
from plumbline.apps.serve.openai_types import ModerationRequest
from plumbline.safety.findings import Category, Verdict

# OpenAI's categories and the ones of ours that are them; the others are reported under their own code.
OPENAI_CATEGORIES: dict[str, tuple[str, ...]] = {
    "harassment": (Category.TOXICITY,),
    "harassment/threatening": (),
    "hate": (Category.HATE,),
    "hate/threatening": (),
    "illicit": (Category.NON_VIOLENT_CRIMES,),
    "illicit/violent": (Category.INDISCRIMINATE_WEAPONS,),
    "self-harm": (Category.SELF_HARM,),
    "self-harm/intent": (),
    "self-harm/instructions": (),
    "sexual": (Category.SEXUAL_CONTENT, Category.SEX_CRIMES),
    "sexual/minors": (Category.CHILD_EXPLOITATION,),
    "violence": (Category.VIOLENT_CRIMES,),
    "violence/graphic": (),
}
_NAMED = frozenset(code for codes in OPENAI_CATEGORIES.values() for code in codes)


def moderation_routes(answering: Answering) -> APIRouter:
    """The route; without a guard it says so."""
    router = APIRouter()

    @router.post("/v1/moderations", summary="The guard's verdict on texts", response_class=JSONResponse)
    async def moderate(body: ModerationRequest) -> dict[str, Any]:
        guard = answering.guard
        if guard is None:
            raise BadRequestError("this server was started with --guard off: there is nothing to ask", param="model")
        verdicts = await check_texts(guard, body.texts())
        for verdict in verdicts:
            answering.metrics.verdict("moderation", verdict)
        results = [moderation_of(verdict) for verdict in verdicts]
        return {"id": f"modr-{secrets.token_hex(12)}", "model": guard.policy.id, "results": results}

    return router


def moderation_of(verdict: Verdict) -> dict[str, Any]:
    """One verdict in OpenAI's shape. A category counts as found when a rule of the policy acted on it.

    `flagged` is True where the policy would not let the text through as it is; a scanner that failed closed flags too.
    """
    scores: dict[str, float] = dict.fromkeys(OPENAI_CATEGORIES, 0.0)
    acted = {verdict.findings[at].category for one in verdict.fired for at in one.findings}
    found = dict.fromkeys(OPENAI_CATEGORIES, False)
    for finding in verdict.findings:
        code = str(finding.category)
        names = [name for name, codes in OPENAI_CATEGORIES.items() if code in codes] if code in _NAMED else [code]
        for name in names:
            scores[name] = max(scores.get(name, 0.0), finding.score)
            found[name] = found.get(name, False) or finding.category in acted
    flagged = verdict.action > 1  # above "annotate"
    types = {name: ["text"] for name in scores}
    return {
        "flagged": flagged,
        "categories": found,
        "category_scores": scores,
        "category_applied_input_types": types,
        "x_guard": layer_report(verdict),
    }
