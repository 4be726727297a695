"""GET /v1/models: the base model, its adapters, the embedder."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from plumbline.apps.serve.embedding_routes import MODEL
from plumbline.apps.serve.engine.backend import Backend, UnknownModelError


def model_routes(backend: Backend, *, embeds: bool, started: int) -> APIRouter:
    """The routes; `started` is when the server was started, in seconds since 1970."""
    router = APIRouter()

    def models() -> list[dict[str, Any]]:
        out = [
            {
                "id": one.name, "object": "model", "created": started, "owned_by": "plumbline", "parent": one.parent,
                "max_model_len": one.context,
            }
            for one in backend.served()
        ]  # fmt: skip
        if embeds:
            out.append({"id": MODEL, "object": "model", "created": started, "owned_by": "plumbline", "parent": None})
        return out

    @router.get("/v1/models", summary="The models that requests may name", response_class=JSONResponse)
    def listed() -> dict[str, Any]:
        return {"object": "list", "data": models()}

    @router.get("/v1/models/{name:path}", summary="One model", response_class=JSONResponse)
    def one(name: str) -> dict[str, Any]:
        found = next((model for model in models() if model["id"] == name), None)
        if found is None:
            names = ", ".join(model["id"] for model in models())
            raise UnknownModelError(f"model {name!r} is not served here; there are {names}", param="model")
        return found

    return router
