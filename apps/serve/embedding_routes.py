"""POST /v1/embeddings: the bundled sentence embedder."""

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from plumbline.apps.serve.engine.backend import BadRequestError, UnknownModelError
from plumbline.apps.serve.openai_types import EmbeddingRequest

MODEL = "all-MiniLM-L6-v2"
WIDTH = 384
Embed = Callable[[Sequence[str]], np.ndarray]


def embedding_routes(embed: Embed | None) -> APIRouter:
    """The route; without an embedder it says so."""
    router = APIRouter()

    @router.post("/v1/embeddings", summary="Unit vectors of texts", response_class=JSONResponse)
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        if body.model != MODEL or embed is None:
            there = f"there is {MODEL}" if embed else "the embedder's packages are not installed on this server"
            raise UnknownModelError(f"embedding model {body.model!r} is not served here; {there}", param="model")
        if body.dimensions not in (None, WIDTH):
            raise BadRequestError(f"dimensions={body.dimensions}: {MODEL} has {WIDTH}", param="dimensions")
        texts = [body.input] if isinstance(body.input, str) else body.input
        vectors = await asyncio.to_thread(embed, texts)
        words = sum(len(text.split()) for text in texts)
        data = [
            {"object": "embedding", "index": at, "embedding": _written(vector, body.encoding_format)}
            for at, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": words, "total_tokens": words}  # words: the embedder does not report its pieces
        return {"object": "list", "model": MODEL, "data": data, "usage": usage}

    return router


def _written(vector: np.ndarray, how: str) -> Any:
    if how == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
