"""Simulated annotators against the real server: nothing lost, nothing twice, and how long claim and submit take.

    python benchmarks/bench_label.py                                        # SQLite in a temporary folder
    python benchmarks/bench_label.py --db postgresql://user@host/database   # an empty database

50 annotators label 5,000 assignments over HTTP. One submit in ten is sent twice at once, one claim in twenty is walked away
from (its lease is then aged past its end), and the server is killed with SIGKILL twice and started again. Annotators think
between labels; latencies are of calls that met a living server. `cpu_stolen` is the share of the cores' time that the host of a virtual
machine took away meanwhile. The last line is JSON, also appended to results/label.csv.
"""

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.records import append_dicts  # noqa: E402
from plumbline.apps.label.store.database import open_database  # noqa: E402
from plumbline.apps.label.store.items import NewItem, NewResponse  # noqa: E402
from plumbline.apps.label.store.store import LabelStore  # noqa: E402

PASSWORD = "a simulated password"
RESULTS = Path(__file__).parent / "results" / "label.csv"


@dataclass(kw_only=True)
class Outcome:
    """What the clients saw. `accepted`: request id -> assignment, of submits that got a receipt."""

    accepted: dict[str, int] = field(default_factory=dict)
    claim_s: list[float] = field(default_factory=list)
    submit_s: list[float] = field(default_factory=list)
    both_s: list[float] = field(default_factory=list)
    doubles: int = 0
    walked_away: int = 0
    kills: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


class Client:
    """One kept connection and its cookie. A fuller client takes a core for itself, which the server then lacks."""

    def __init__(self, port: int, cookie: str = "") -> None:
        self.connection, self.cookie = HTTPConnection("127.0.0.1", port, timeout=30), cookie

    def post(self, path: str, body: Any = None) -> Any:
        """See `send`."""
        return self.send("POST", path, body)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON. ConnectionError where no server answers, RuntimeError for a status other than 200."""
        headers = {"Content-Type": "application/json", "Cookie": self.cookie}
        try:
            self.connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = self.connection.getresponse()
            data = answer.read()
        except (OSError, HTTPException) as error:
            self.connection.close()
            raise ConnectionError(str(error)) from None
        if cookie := answer.getheader("Set-Cookie"):
            self.cookie = cookie.partition(";")[0]
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {data[:200]!r}")
        return json.loads(data)


class Server:
    """`plumbline label --no-pages` as a process that can be killed and started again on its port."""

    def __init__(self, db: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.db = db
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "plumbline.apps.cli",
            "label",
            "--db",
            self.db,
            "--port",
            str(self.port),
            "--no-pages",
        ]
        self.process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.DEVNULL)
        while True:
            try:
                Client(self.port).send("GET", "/healthz")
                return
            except ConnectionError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with status {self.process.returncode}") from None
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


def prepare(db: str, *, annotators: int, items: int, overlap: int) -> LabelStore:
    """Accounts and items in an empty database."""
    from argon2 import PasswordHasher

    fast = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)  # sign-in is not what is measured
    store = LabelStore(open_database(db), hasher=fast, seed=0)
    store.change_settings(None, {"target_labels": overlap, "repeat_share": 0.0})
    for number in range(annotators):
        store.add_account(f"annotator {number}", PASSWORD, "annotator")
    store.add_items(
        NewItem(
            prompt=[{"role": "user", "content": f"question {number}"}],
            responses=[
                NewResponse(text=f"{side} answer to {number} " + "word " * 60, model=side) for side in ("red", "blue")
            ],
        )
        for number in range(items)
    )
    return store


def call(client: Client, path: str, body: Any = None) -> tuple[Any, float | None]:
    """Repeats a call until a living server answers: (JSON, seconds), or None for seconds when it had to repeat."""
    clean = True
    while True:
        begun = time.perf_counter()
        try:
            answer = client.post(path, body)
            return answer, time.perf_counter() - begun if clean else None
        except ConnectionError:
            clean = False
            time.sleep(0.1)


def simulate(
    db: str, *, annotators: int, items: int, overlap: int = 2, think: tuple[float, float] = (0.0, 0.0), kills: int = 2,
    double: float = 0.1, walk_away: float = 0.05, seed: int = 0,
) -> tuple[LabelStore, Outcome]:  # fmt: skip
    """Runs until every item has its labels; returns the store and what the clients saw."""
    store = prepare(db, annotators=annotators, items=items, overlap=overlap)
    server, outcome, lock = Server(db), Outcome(), threading.Lock()
    wanted = items * overlap
    kill_at = [wanted * (number + 1) // (kills + 1) for number in range(kills)]
    ended = threading.Event()

    def label(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        client = Client(server.port)
        with ThreadPoolExecutor(1) as twice:
            call(client, "/api/sign-in", {"name": f"annotator {number}", "password": PASSWORD})
            second_client = Client(server.port, client.cookie)
            while not ended.is_set():
                answer, claim_s = call(client, "/api/claim")
                task = answer["task"]
                if task is None:
                    with lock:
                        if len(outcome.accepted) >= wanted:
                            return
                    time.sleep(0.2)  # what others hold may come free
                    continue
                assignment = task["assignment"]
                if rng.random() < walk_away:
                    with store.database.write() as run:  # twenty minutes go by
                        run("UPDATE assignment SET lease_until = 0 WHERE id = ? AND state = 'leased'", (assignment,))
                    with lock:
                        outcome.walked_away += 1
                    continue
                time.sleep(rng.uniform(*think))
                request_id = f"request-{number}-{assignment}-{rng.randrange(10**9)}"
                vote = {"outcome": "prefer", "winner": rng.randrange(2), "strength": rng.randint(1, 4)}
                send = {"request_id": request_id, "answer": vote}
                path = f"/api/assignments/{assignment}/submit"
                second = twice.submit(call, second_client, path, send) if rng.random() < double else None
                answer, submit_s = call(client, path, send)
                if second is not None:
                    repeated = second.result()[0]
                    assert repeated["judgement"] == answer["judgement"], repeated
                with lock:
                    outcome.accepted[request_id] = assignment
                    outcome.doubles += second is not None
                    if claim_s is not None and submit_s is not None and second is None:
                        outcome.claim_s.append(claim_s)
                        outcome.submit_s.append(submit_s)
                        outcome.both_s.append(claim_s + submit_s)
                    if outcome.kills < len(kill_at) and len(outcome.accepted) >= kill_at[outcome.kills]:
                        outcome.kills += 1
                        server.kill()  # with the lock held: in the middle of everybody else's requests
                        server.start()

    def guarded(number: int) -> None:
        try:
            label(number)
        except Exception as error:
            outcome.errors.append(f"annotator {number}: {error!r}")
            ended.set()
        finally:
            store.database.close()

    begun = time.perf_counter()
    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(annotators)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.seconds = time.perf_counter() - begun
    server.stop()
    return store, outcome


def check(store: LabelStore, outcome: Outcome, *, items: int, overlap: int) -> dict[str, int]:
    """Compares the database with what the clients were told; each number should be 0."""
    with store.database.read() as run:
        stored = run("SELECT request_id, assignment_id, is_current FROM judgement")
        twice = run("SELECT item_id FROM assignment WHERE round = 0 GROUP BY item_id, account_id HAVING count(*) > 1")
        counts = run(
            "SELECT i.id, i.n_done, (SELECT count(*) FROM assignment a JOIN judgement j ON j.assignment_id = a.id"
            " WHERE a.item_id = i.id AND j.is_current = 1) AS labels FROM item i"
        )
    by_request = {row["request_id"]: row["assignment_id"] for row in stored}
    return {
        "accepted_but_not_stored": sum(by_request.get(r) != a for r, a in outcome.accepted.items()),
        "stored_but_not_accepted": len(by_request.keys() - outcome.accepted.keys()),
        "stored_twice": len(stored) - len({row["assignment_id"] for row in stored}),
        "item_and_annotator_twice": len(twice),
        "items_off_target": sum(not row["n_done"] == row["labels"] == overlap for row in counts) + items - len(counts),
        "audit_trail_broken": int(store.broken_event() is not None),
        "client_errors": len(outcome.errors),
    }


def cpu_ticks() -> tuple[int, int]:
    """(taken away by the host, all) of every core since the machine started; zeros where Linux does not say."""
    try:
        ticks = [int(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[7], sum(ticks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", help="an empty PostgreSQL database; default: SQLite in a temporary folder")
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--items", type=int, default=2500)
    parser.add_argument("--think", type=float, nargs=2, default=(0.3, 1.1), help="seconds, uniform between the two")
    args = parser.parse_args()
    if args.db:
        if not args.db.startswith("postgresql://"):
            parser.error(f"--db {args.db}: must be a postgresql:// URL; SQLite is measured without --db")
        try:
            database = open_database(args.db)
        except ValueError as error:
            parser.error(f"--db {error}")
        with database.read() as run:
            used = run("SELECT count(*) AS n FROM account")[0]["n"]
        database.close()
        if used:
            parser.error(f"--db {args.db} has {used} accounts: it must be empty; drop it and create it again")
    stolen_before, ticks_before = cpu_ticks()
    with tempfile.TemporaryDirectory() as folder:
        db = args.db or str(Path(folder) / "labels.db")
        store, outcome = simulate(db, annotators=args.annotators, items=args.items, think=tuple(args.think))
        wrong = check(store, outcome, items=args.items, overlap=2)
        store.database.close()
    stolen, ticks = cpu_ticks()
    p50, p95, p99 = np.quantile(outcome.both_s, [0.5, 0.95, 0.99]) * 1000
    row = {
        "store": "postgres" if args.db else "sqlite",
        "annotators": args.annotators,
        "labels": len(outcome.accepted),
        "doubles": outcome.doubles,
        "walked_away": outcome.walked_away,
        "kills": outcome.kills,
        "labels_per_s": round(len(outcome.accepted) / outcome.seconds, 1),
        "claim_submit_p50_ms": round(p50, 1),
        "claim_submit_p95_ms": round(p95, 1),
        "claim_submit_p99_ms": round(p99, 1),
        "cpu_stolen": round((stolen - stolen_before) / max(ticks - ticks_before, 1), 4),
        "violations": sum(wrong.values()),
    }
    stamped = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **row}
    append_dicts(RESULTS, list(stamped), [stamped])
    print("\n".join([f"{name}: {count}" for name, count in wrong.items()] + outcome.errors[:5]))
    print(json.dumps(row | wrong))
    return 1 if sum(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
