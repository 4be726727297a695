"""`plumbline label`: the labelling app and the commands around it.

plumbline label                                    serve the app; makes labels.db where there is none
plumbline label user add NAME --role admin         make an account (asks for the password)
plumbline label import pairs.jsonl                 or --starter, --hub ID, --generate prompts.jsonl --model A --model B
plumbline label export runs/labels --format kto    train.jsonl, test.jsonl and a data card
plumbline label backup labels-monday.gz            and: restore FILE, settings NAME=VALUE, guidelines FILE, check
"""

import argparse
import getpass
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from plumbline.apps.label.store.accounts import ROLES
from plumbline.apps.label.store.answers import RefusedError
from plumbline.apps.label.store.database import open_database
from plumbline.apps.label.store.store import LabelStore

GUIDELINES = Path(__file__).parent / "static" / "guidelines.md"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="plumbline label", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    where = os.environ.get("PLUMBLINE_LABELS", "labels.db")
    top.add_argument(
        "--db", default=where, help="SQLite file or postgresql:// URL (default: $PLUMBLINE_LABELS or labels.db)"
    )
    top.add_argument("--host", default="127.0.0.1", help="address to listen on")
    top.add_argument("--port", type=int, default=7861)
    top.add_argument("--no-pages", action="store_true", help="serve the REST API only")
    top.add_argument("--https", action="store_true", help="people reach it over https: mark the cookie as secure")
    top.add_argument(
        "--arena", action="append", default=[], metavar="NAME=SOURCE", help="a policy of the arena; twice or more"
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    user = commands.add_parser("user", help="add an account, or change one").add_subparsers(dest="act", required=True)
    add = user.add_parser("add", help="make an account")
    change = user.add_parser("change", help="change role or password, close or open an account")
    for one in (add, change):
        one.add_argument("name")
        one.add_argument("--role", choices=ROLES, default="annotator" if one is add else None)
        one.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    change.add_argument("--password", action="store_true", help="set a new password")
    change.add_argument("--close", action="store_true")
    change.add_argument("--open", action="store_true")
    user.add_parser("list", help="list accounts")

    load = commands.add_parser("import", help="add items to label")
    load.add_argument("file", nargs="?", type=Path, help="JSON Lines: ours, or TRL preference rows")
    load.add_argument("--starter", action="store_true", help="the pairs that ship with Plumbline")
    load.add_argument("--hub", metavar="ID", help="a data set on the hub")
    load.add_argument("--split", default="train")
    load.add_argument("--limit", type=int)
    load.add_argument(
        "--generate", type=Path, metavar="PROMPTS", help="JSON Lines of prompts, answered by each --model"
    )
    load.add_argument(
        "--model", action="append", default=[], help="a model source or run folder's model; twice or more"
    )
    load.add_argument("--max-new-tokens", type=int, default=256)
    load.add_argument("--gold", action="store_true", help="rows with chosen and rejected become gold items")

    export = commands.add_parser("export", help="write labels for training")
    export.add_argument("folder", type=Path)
    export.add_argument("--format", default="preference", choices=("preference", "plain", "kto", "sft", "full"))
    export.add_argument("--test-every", type=int, default=0, help="hold out one prompt in this many (0: none)")
    export.add_argument("--as-of", type=int, help="labels as they were after this event of the audit trail")
    export.add_argument("--licence", default="", help="for the data card")

    commands.add_parser("backup", help="write everything to one file").add_argument("file", type=Path)
    commands.add_parser("restore", help="fill an empty database from a backup").add_argument("file", type=Path)
    commands.add_parser("settings", help="show or change settings").add_argument(
        "change", nargs="*", metavar="NAME=VALUE"
    )
    commands.add_parser("guidelines", help="set the guidelines from a Markdown file").add_argument("file", type=Path)
    commands.add_parser("stats", help="print the statistics as JSON")
    commands.add_parser("check", help="verify the audit trail")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; ValueError for bad input (apps/cli.py prints it)."""
    args = parser().parse_args(argv)
    database = open_database(args.db)
    if args.command == "restore":  # before the store writes its first rows
        from plumbline.apps.label.store.backup import restore

        counts = restore(database, args.file)
        print(f"restored {counts['item']} items and {counts['judgement']} judgements into {args.db}")
        return 0
    store = LabelStore(database)
    try:
        return {"user": _user, "import": _import, "export": _export, None: _serve}.get(args.command, _small)(
            store, args
        )
    except RefusedError as error:
        raise ValueError(str(error)) from None
    finally:
        database.close()


def _serve(store: LabelStore, args: argparse.Namespace) -> int:
    try:
        import uvicorn

        if args.no_pages:
            from plumbline.apps.label.server.api import make_api as make_app
        else:
            from plumbline.apps.label.server.pages import make_label_app as make_app
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install 'plumbline-rlhf[ui]'") from None
    from plumbline.apps.label.arena import Arena, policy_of

    policies = []
    for given in args.arena:
        name, _, source = given.partition("=")
        if not name or not source:
            raise ValueError(f"--arena {given!r}: takes NAME=SOURCE")
        policies.append(policy_of(name, source))
    arena = Arena(policies)
    if not store.guidelines()[1]:
        store.change_guidelines(None, GUIDELINES.read_text(encoding="utf-8"))
    if not any(account.role == "admin" and account.active for account in store.accounts()):
        option = "" if args.db == "labels.db" else f" --db {args.db}"
        print(f"No admin yet. In another terminal: plumbline label{option} user add NAME --role admin")
    print(f"Labels: http://{args.host}:{args.port}/", flush=True)
    app = make_app(store, arena, secure_cookie=args.https)
    sys.setswitchinterval(5e-4)  # the default of 5 ms keeps requests waiting behind threads that only wait for a lock
    # One process: gradio keeps its queue in memory. Open event streams would otherwise hold up a shutdown for ever.
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=3, workers=1)
    return 0


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass("Password: ")
    if password != getpass.getpass("Once more: "):
        raise ValueError("the two passwords differ; nothing was changed")
    return password


def _user(store: LabelStore, args: argparse.Namespace) -> int:
    if args.act == "list":
        for account in store.accounts():
            state = "closed" if not account.active else "paused" if account.paused else "active"
            print(f"{account.name}\t{account.role}\t{state}\t{account.pseudonym}")
        return 0
    if args.act == "add":
        account = store.add_account(args.name, _password(args.password_stdin), args.role)
        print(f"{account.name} ({account.role}) can sign in now")
        return 0
    found = next((one for one in store.accounts() if one.name == args.name), None)
    if found is None:
        raise ValueError(f"no account {args.name!r}; `plumbline label user list` shows them")
    account = found
    if args.close and args.open:
        raise ValueError("--close and --open: choose one")
    password = _password(args.password_stdin) if args.password or args.password_stdin else None
    active = False if args.close else True if args.open else None
    store.change_account(account.id, role=args.role, active=active, password=password)
    print(f"{account.name} changed; open sessions of the account have ended")
    return 0


def _import(store: LabelStore, args: argparse.Namespace) -> int:
    from plumbline.apps.label.exchange import generated_items, hub_items, read_items, starter_items

    if sum(bool(given) for given in (args.file, args.starter, args.hub, args.generate)) != 1:
        raise ValueError("import takes one of: a file, --starter, --hub ID, --generate PROMPTS")
    if args.starter:
        items = starter_items()
    elif args.hub:
        items = list(hub_items(args.hub, args.split, limit=args.limit, gold=args.gold))
    elif args.generate:
        items = generated_items(args.generate, args.model, max_new_tokens=args.max_new_tokens)
    elif args.file.is_file():
        items = read_items(args.file.read_bytes(), str(args.file), gold=args.gold)
    else:
        raise ValueError(f"{args.file}: no such file")
    added, doubles = store.add_items(items[: args.limit])
    print(f"{added} items imported, {doubles} were there already")
    return 0


def _export(store: LabelStore, args: argparse.Namespace) -> int:
    from plumbline.apps.label.exchange import write_export

    if args.test_every < 0 or args.test_every == 1:
        raise ValueError(f"--test-every {args.test_every}: 0, or 2 and more")
    counts = write_export(
        store, args.folder, args.format, test_every=args.test_every, as_of=args.as_of, licence=args.licence
    )
    print(f"{args.folder}: " + ", ".join(f"{rows} rows in {name}.jsonl" for name, rows in counts.items() if rows))
    return 0


def _small(store: LabelStore, args: argparse.Namespace) -> int:
    if args.command == "backup":
        from plumbline.apps.label.store.backup import backup

        counts = backup(store.database, args.file)
        print(f"{args.file}: {counts['item']} items, {counts['judgement']} judgements")
    elif args.command == "settings":
        changes = {}
        for given in args.change:
            name, _, value = given.partition("=")
            try:
                changes[name] = json.loads(value)
            except json.JSONDecodeError:
                raise ValueError(f"{given!r}: takes NAME=VALUE with a number or [low, high]") from None
        settings = store.change_settings(None, changes) if changes else store.settings()
        print("\n".join(f"{name}={json.dumps(value)}" for name, value in vars(settings).items()))
    elif args.command == "guidelines":
        if not args.file.is_file():
            raise ValueError(f"{args.file}: no such file; Markdown expected")
        print(f"guidelines version {store.change_guidelines(None, args.file.read_text(encoding='utf-8'))}")
    elif args.command == "stats":
        from plumbline.apps.label.study.label_statistics import label_statistics

        print(json.dumps(label_statistics(store), indent=2))
    else:
        broken = store.broken_event()
        print("audit trail: whole" if broken is None else f"audit trail: event {broken} was changed from outside")
        return 0 if broken is None else 1
    return 0
