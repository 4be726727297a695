"""The pages: gradio's tabs, mounted in the FastAPI app, with one custom element of static/ in each.

gradio draws the shell, the theme and the guidelines; what changes anything goes from the page to the REST API, so that
there is one door with one lock. The two handlers here only read.
"""

import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402 - it reads the variable above when imported
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import RedirectResponse  # noqa: E402

from plumbline.apps.label.arena import Arena  # noqa: E402
from plumbline.apps.label.server.api import make_api  # noqa: E402
from plumbline.apps.label.store.accounts import ROLES  # noqa: E402
from plumbline.apps.label.store.store import LabelStore  # noqa: E402

TABS = {  # title -> (element, the role that sees it)
    "Label": ("label", "annotator"),
    "Arena": ("arena", "annotator"),
    "Review": ("review", "reviewer"),
    "Statistics": ("statistics", "reviewer"),
    "Guidelines": ("guidelines", "annotator"),
    "Admin": ("admin", "admin"),
}
HEAD = (
    '<link rel="stylesheet" href="/static/plumbline.css"><link rel="icon" href="/static/icon.svg" type="image/svg+xml">'
    '<script type="module" src="/static/pages.js"></script>'
)
CSS = """
.gradio-container { max-width: 1180px !important; width: 100%; margin: 0 auto; }
footer { display: none !important; }
.gradio-container .column, .gradio-container .tabitem, .gradio-container .block { min-width: 0 !important; }
.gradio-container .main.fillable { width: 100%; max-width: 100% !important; padding: 12px 14px 40px !important; }
.gradio-container .main .column { gap: 4px; }
.gradio-container .html-container { padding: 0 2px !important; }
.gradio-container .tabitem { padding: 12px 0 !important; }
.dark button[role=tab].selected { color: #8ab0ff !important; }
"""


def make_pages(store: LabelStore) -> gr.Blocks:
    """The tabs. Which of them shows is a matter of comfort: the API checks roles."""

    def visible(request: gr.Request) -> list[Any]:
        account = next((one for one in store.accounts() if one.name == request.username), None)
        rank = ROLES.index(account.role) if account else -1
        return [gr.update(visible=ROLES.index(role) <= rank) for _, role in TABS.values()]

    def read_guidelines() -> str:
        return store.guidelines()[1] or "No guidelines were written yet."

    with gr.Blocks(title="Plumbline labels", analytics_enabled=False) as pages:
        gr.HTML("<plumbline-account></plumbline-account>", padding=False, apply_default_css=False)
        tabs = []
        with gr.Tabs():
            for title, (element, role) in TABS.items():
                with gr.Tab(title, visible=role == "annotator", render_children=True) as tab:
                    if title == "Guidelines":
                        text = gr.Markdown(read_guidelines())
                        tab.select(read_guidelines, None, text, api_visibility="private", show_progress="hidden")
                    gr.HTML(f"<plumbline-{element}></plumbline-{element}>", padding=False, apply_default_css=False)
                tabs.append(tab)
        pages.load(visible, None, tabs, api_visibility="private", show_progress="hidden", concurrency_limit=None)
    return pages


def make_label_app(store: LabelStore, arena: Arena | None = None, *, secure_cookie: bool = False) -> FastAPI:
    """The whole app: API, sign-in page, and the pages under /app. Run it with one worker."""
    app = make_api(store, arena, secure_cookie=secure_cookie)
    context = app.state.label

    @app.middleware("http")
    async def to_sign_in(request: Request, call_next: Any) -> Any:
        """A page that needs a session leads to the sign-in page; everything else gets 401."""
        wants_page = request.method == "GET" and request.url.path in ("/app", "/app/")
        if wants_page and context.account_of(request) is None:
            return RedirectResponse("/sign-in", 303)
        return await call_next(request)

    def user_of(request: Request) -> str | None:
        account = context.account_of(request)
        return account.name if account else None

    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=font, font_mono=["ui-monospace", "monospace"]).set(
        body_background_fill="#f6f7f9", body_background_fill_dark="#101318", block_background_fill="transparent",
        block_background_fill_dark="transparent", block_border_width="0px", body_text_color="#16181d",
        body_text_color_dark="#e9ebef", body_text_color_subdued="#525866", body_text_color_subdued_dark="#a9b0bd",
        border_color_primary="#d3d7de", border_color_primary_dark="#373d48", color_accent="#1d4ed8",
    )  # fmt: skip
    return gr.mount_gradio_app(
        app,
        make_pages(store),
        path="/app",
        auth_dependency=user_of,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        ssr_mode=False,
        theme=theme,
        css=CSS,
        head=HEAD,
    )
