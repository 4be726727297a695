"""`plumbline serve MODEL`: an aligned model behind its guard, for every client of OpenAI's API.

plumbline serve runs/demo/ppo                                      http://127.0.0.1:8000/v1
plumbline serve --config my.yaml --adapters polite=runs/dpo        adapters are models of their own
plumbline serve my-model --backend openai --url http://gpu:8000/v1 the guard before vLLM or any other server
"""

import argparse
import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from plumbline.apps.serve.settings import ServeSettings, read_settings

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line: one flag a setting."""
    top = argparse.ArgumentParser(
        prog="plumbline serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    top.add_argument("--config", default="", help="a YAML file of these settings, or the name of one that ships")
    for one in dataclasses.fields(ServeSettings):
        default: Any = one.default
        text = one.metadata["help"] + (f" (default: {default})" if default not in ("", (), False) else "")
        if one.name == "model":
            top.add_argument("model", nargs="?", default=None, metavar="MODEL", help=text)
        elif isinstance(default, bool):
            top.add_argument(_flag(one.name), action="store_true", default=None, help=text)
        elif isinstance(default, tuple):
            top.add_argument(_flag(one.name), nargs="+", action="extend", default=None, metavar="X", help=text)
        else:
            top.add_argument(_flag(one.name), type=type(default), default=None, help=text.replace("%", "%%"))
    return top


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; ValueError for bad input (apps/cli.py prints it), before any model loads."""
    args = vars(parser().parse_args(argv))
    config = args.pop("config")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in args.items() if v is not None}
    settings = read_settings(config, given)
    try:
        import uvicorn  # noqa: F401

        from plumbline.apps.serve.app import make_serve_app  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install 'plumbline-rlhf[serve]'") from None
    return serve(settings)


def serve(settings: ServeSettings) -> int:
    """Checks, loads, listens, drains."""
    from plumbline.apps.serve.keys import read_keys

    keys = read_keys(
        settings.api_keys, requests_per_minute=settings.requests_per_minute, concurrent=settings.concurrent
    )
    if not keys and not settings.local_only and not settings.no_auth:
        raise ValueError(
            f"host={settings.host} is open to others: give --api-keys FILE, or --no-auth to serve without keys"
        )
    if not keys and (settings.requests_per_minute or settings.concurrent):
        raise ValueError("--requests-per-minute and --concurrent are limits of API keys: give --api-keys FILE")
    listening = _listen(settings)
    try:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        guard = make_guard(settings)
        score = load_score(settings)
        embed = load_embed()
        backend, decode = make_backend(settings)
        asyncio.run(_run(settings, listening, backend, guard, score, embed, decode, keys))
    finally:
        listening.close()
    return 0


def _listen(settings: ServeSettings) -> socket.socket:
    """The socket, before anything is loaded: a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise ValueError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    return listening


def make_guard(settings: ServeSettings) -> Any:
    """The guard with its fact checker, or None for "off"; ValueError for a policy or an index that cannot be loaded."""
    if settings.guard == "off":
        return None
    from plumbline.safety.pipeline import Guard

    facts = None
    if settings.documents or settings.index:
        if "output" not in settings.guard_layers:
            raise ValueError("--documents and --index verify answers: they need the layer output in --guard-layers")
        from plumbline.safety.verifier.facts import FactChecker
        from plumbline.safety.verifier.knowledge import KnowledgeBase, index_folder

        try:
            base = (
                index_folder(settings.documents, settings.index or None)
                if settings.documents
                else KnowledgeBase.load(settings.index)
            )
        except (OSError, KeyError) as error:
            raise ValueError(f"the index cannot be loaded ({type(error).__name__}): {error}") from error
        facts = FactChecker(base)
    try:
        return Guard(
            settings.guard, log=settings.guard_log or None, every=settings.guard_every, facts=facts, fact_action=settings.fact_action
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def load_score(settings: ServeSettings) -> Callable[[Sequence[list[dict[str, str]]]], Sequence[float | None]] | None:
    """Scores of whole conversations by the reward model, if there is one."""
    if not settings.reward_model:
        return None
    from plumbline.policy_models.loading import resolve_model_source
    from plumbline.reward.learned import LearnedPreference

    resolve_model_source(settings.reward_model)
    return LearnedPreference(settings.reward_model).score_conversations


def load_embed() -> Callable[[Sequence[str]], Any] | None:
    """The bundled embedder, or None where its wheels are not installed."""
    from plumbline.safety.embedder.embedding import load_embedder

    try:
        return load_embedder().embed
    except (ValueError, ImportError, FileNotFoundError) as error:
        logger.warning("/v1/embeddings is not offered: %s", error)
        return None


def make_backend(settings: ServeSettings) -> tuple[Any, Mapping[str, Any]]:
    """The backend, and what constrains drawing for the report of the guard."""
    if settings.backend == "openai":
        from plumbline.apps.serve.engine.openai_backend import OpenAIBackend

        key = os.environ.get(settings.url_key, "")
        return OpenAIBackend(settings.url, settings.model, name=settings.served_name, key=key, limit=settings.queue), {}
    from plumbline.apps.serve.engine.local_backend import EXPERT, LocalBackend, load_local
    from plumbline.policy_models.chat import stop_ids
    from plumbline.safety.constrained.banned import BannedPhrases
    from plumbline.safety.constrained.guided import OtherAdapter, SafeDecoding
    from plumbline.safety.constrained.rows import token_bytes
    from plumbline.safety.constrained.spellings import Phrases

    adapters = settings.named_adapters()
    phrases = Phrases(list(settings.ban)) if settings.ban else None
    model, tokenizer = load_local(settings.model, adapters, settings.expert)
    processors: list[Any] = []
    if settings.expert:
        processors.append(SafeDecoding(OtherAdapter(model, EXPERT, tokenizer.pad_token_id)))
    if phrases:
        processors.append(BannedPhrases(phrases, token_bytes(tokenizer), stop_ids(model, tokenizer)))
    decode = {"banned_phrases": len(settings.ban), "safety_expert": bool(settings.expert)} if processors else {}
    backend = LocalBackend(
        model, tokenizer, name=settings.served_name, adapters=list(adapters), settings=settings.engine(), processors=processors
    )  # fmt: skip
    return backend, decode


async def _run(
    settings: ServeSettings,
    listening: socket.socket,
    backend: Any,
    guard: Any,
    score: Any,
    embed: Any,
    decode: Mapping[str, Any],
    keys: Sequence[Any],
) -> None:
    import uvicorn

    from plumbline.apps.serve.answering import Answering
    from plumbline.apps.serve.app import make_serve_app

    answering = Answering(
        backend, guard, layers=settings.guard_layers, score=score, best_of=settings.best_of, decode=decode
    )  # fmt: skip
    app = make_serve_app(answering, settings, keys=keys, embed=embed, accepting=lambda: not server.draining)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="off")
    server = _drainable(uvicorn, config, backend, settings.drain_s)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Serving {settings.served_name} at http://{shown}:{port}/v1", flush=True)
    await server.serve(sockets=[listening])


def _drainable(uvicorn: Any, config: Any, backend: Any, drain_s: float) -> Any:
    """A uvicorn server that, when told to stop, first answers what it has taken. A second signal stops it at once."""

    class Server(uvicorn.Server):
        draining = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.draining:
                super().handle_exit(sig, frame)
                return
            self.draining = True
            name = signal.Signals(sig).name
            print(f"{name}: finishing what was taken, at most {drain_s:g} s", file=sys.stderr, flush=True)
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(lambda: setattr(self, "_task", loop.create_task(self._drain())))

        async def _drain(self) -> None:
            backend.drain()
            until = asyncio.get_running_loop().time() + drain_s
            while asyncio.get_running_loop().time() < until and self._busy():
                await asyncio.sleep(0.05)
            self.should_exit = True
            await backend.close(0.0)

        def _busy(self) -> bool:
            return backend_busy(backend) or bool(self.server_state.tasks)

    return Server(config)


def backend_busy(backend: Any) -> bool:
    """Whether requests are under way."""
    return any(backend.stats().get(name) for name in ("rows", "reading", "waiting"))
