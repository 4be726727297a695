"""What a reviewer does: settle disagreements, read the statistics, write the guidelines."""

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Response
from pydantic import BaseModel, Field

from plumbline.apps.label.server.context import Key, Reviewer, Store
from plumbline.apps.label.study.label_statistics import label_statistics

router = APIRouter()


class Status(BaseModel):
    """Where an item goes."""

    status: str


class Text(BaseModel):
    """Guidelines in Markdown."""

    text: str = Field(max_length=200_000)


@router.get("/api/review", tags=["review"])
def review_queue(account: Reviewer, store: Store) -> list[dict[str, Any]]:
    """Items that were flagged, or whose annotators disagree."""
    return store.review_queue()


@router.post("/api/review/{item}", tags=["review"])
def open_review(item: Key, account: Reviewer, store: Store) -> dict[str, Any]:
    """A task on this item whose answer settles it; sent as any other."""
    return {"task": store.open_review(account.id, item)}


@router.put("/api/items/{item}/status", tags=["review"])
def item_status(item: Key, body: Status, account: Reviewer, store: Store) -> dict[str, bool]:
    """Puts an item back into the queue, or retires it."""
    store.set_item_status(item, body.status, by=account.id)
    return {"ok": True}


@router.put("/api/guidelines", tags=["review"])
def change_guidelines(body: Text, account: Reviewer, store: Store) -> dict[str, int]:
    """New guidelines; labels from now on carry their version."""
    if "\x00" in body.text:
        raise HTTPException(422, "the text holds a zero byte")
    return {"version": store.change_guidelines(account.id, body.text)}


@router.get("/api/statistics", tags=["review"])
def statistics(account: Reviewer, store: Store) -> dict[str, Any]:
    """Agreement, bias, annotators and models, each with its interval."""
    return label_statistics(store)


@router.get("/api/statistics.png", tags=["review"])
def statistics_plots(account: Reviewer, store: Store) -> Response:
    """The main estimates with their intervals as one picture."""
    from plumbline.apps.label.study.plots import statistics_png

    return Response(statistics_png(label_statistics(store)), media_type="image/png")


@router.get("/api/events", tags=["review"])
def events(
    store: Store, account: Reviewer, after: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
) -> list[dict[str, Any]]:
    """The audit trail after a sequence number, 1,000 rows at most."""
    return store.events(after)
