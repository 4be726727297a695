"""`plumbline chat`: talk to a model behind the guard, and see what each layer saw, took out, steered and verified.

plumbline chat                                              the bundled model at http://127.0.0.1:7862/
plumbline chat --model runs/ppo/policy --documents handbook/ --ban "rubber duck" --expert runs/expert/expert
plumbline chat --url http://localhost:8000/v1 --name my-model
plumbline chat --labels labels.db --as ada                  thumbs become labels: `plumbline label export --format kto`
"""

import argparse
import os
from collections.abc import Sequence

from plumbline.apps.chat.conversation import GuardedChat, LocalSpeaker, Speaker, endpoint_speaker
from plumbline.safety.policy import load_policy


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="plumbline chat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    top.add_argument("--model", default="bundled:smollm2-135m-instruct", help="a model source on this machine")
    top.add_argument("--url", help="an OpenAI-compatible endpoint instead, such as http://localhost:8000/v1")
    top.add_argument("--name", help="the model's name at the endpoint")
    top.add_argument("--key-variable", default="OPENAI_API_KEY", help="environment variable that holds the key")
    top.add_argument("--policy", default="default", help="a shipped safety policy or the path of a YAML file")
    top.add_argument("--system", default="", help="system prompt")
    top.add_argument("--documents", help="folder of .txt, .md and .jsonl that answers are verified against")
    top.add_argument("--index", help="folder that keeps the index of the documents between runs")
    top.add_argument("--ban", action="append", default=[], metavar="PHRASE", help="no answer spells it (local models)")
    top.add_argument("--expert", default="", help="folder of a safety adapter for SafeDecoding (local models)")
    top.add_argument("--max-new-tokens", type=int, default=256)
    top.add_argument("--temperature", type=float, default=0.7)
    top.add_argument("--labels", default=os.environ.get("PLUMBLINE_LABELS", ""), help="label database for thumbs")
    top.add_argument("--as", dest="account", default="", metavar="NAME", help="the account that gives the thumbs")
    top.add_argument("--port", type=int, default=7862, help="on 127.0.0.1: there is no sign-in")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the chat; ValueError for bad input (apps/cli.py prints it), before any model loads."""
    args = parser().parse_args(argv)
    try:
        import uvicorn

        from plumbline.apps.chat.server import Thumbs, make_chat_app
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install 'plumbline-rlhf[ui]'") from None
    if args.url and (args.ban or args.expert):
        raise ValueError("--ban and --expert steer decoding, which an endpoint does not offer: use --model")
    if args.url and not args.name:
        raise ValueError("--url needs --name, the model's name at the endpoint")
    try:
        policy = load_policy(args.policy)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    thumbs = Thumbs.open(args.labels, args.account) if args.account else None
    speaker: Speaker
    if args.url:
        options = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}
        speaker = endpoint_speaker(args.url, args.name, key_variable=args.key_variable, **options)
    else:
        limits = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        speaker = LocalSpeaker(args.model, banned=args.ban, expert=args.expert, **limits)
    checker = None
    if args.documents:
        from plumbline.safety.verifier.facts import FactChecker
        from plumbline.safety.verifier.knowledge import index_folder

        checker = FactChecker(index_folder(args.documents, args.index))
    steering = [f"banned: {len(args.ban)}"] * bool(args.ban) + ["safety expert"] * bool(args.expert)
    name = args.name or args.model
    chat = GuardedChat(
        speaker, policy=policy, checker=checker, name=name, system=args.system, steering=steering
    )  # fmt: skip
    print(f"Chat: http://127.0.0.1:{args.port}/", flush=True)
    app = make_chat_app(chat, thumbs)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", timeout_graceful_shutdown=3)
    return 0
