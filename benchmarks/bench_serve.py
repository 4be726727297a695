"""`plumbline serve` under load: many clients against one, against `transformers serve`, with the guard and without.

    python -m benchmarks.bench_serve                 the bundled SmolLM2-135M, 32 clients, some minutes
    python -m benchmarks.bench_serve --toy           a tiny model, seconds; tries the path, its figures mean nothing
    python -m benchmarks.bench_serve --storm 2000    besides: requests of which a third is cut off at random

All servers are started as a user starts them, get the same conversations of mixed lengths and answer with the same limits at
temperature 0. Tokens are counted alike for all: those of the text that arrived, by the model's own tokenizer.

The last line is JSON: `ratio_one_client` (tokens a second of all clients over those of one), `ratio_transformers_serve` (over
`transformers serve` on the same load; null where it cannot be started, the reason is printed), `guard_overhead` (share of the tokens
a second that the default guard costs), `ttft_p95_s` (seconds to the first text at the 95th percentile, guard off, all clients).
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.records import append, commit, device_name

CSV = Path(__file__).parent / "results" / "serve.csv"
COLUMNS = (
    "commit",
    "device",
    "model",
    "server",
    "clients",
    "requests",
    "tokens",
    "seconds",
    "tokens_per_s",
    "ttft_p50_s",
    "ttft_p95_s",
)
TOPICS = ("bread", "tides", "chess", "the moon", "bicycles", "rivers", "clocks", "maple trees", "lighthouses", "tea")
SYSTEM = "You are a careful assistant. Answer in plain whole sentences, and say so when you do not know something. " * 3
WAIT_S = 600.0


@dataclass(frozen=True)
class Job:
    """One conversation and the limit of its answer."""

    messages: list[dict[str, str]]
    max_tokens: int


@dataclass
class Load:
    """What a load came to. `first_s`: seconds to the first text of each answer."""

    requests: int
    tokens: int
    seconds: float
    first_s: list[float]
    failed: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def first(self, share: float) -> float:
        """Seconds to the first text, at a percentile."""
        ordered = sorted(self.first_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def make_jobs(count: int, longest: int, seed: int = 0) -> list[Job]:
    """Prompts from a line to a page, answers from short to `longest` tokens."""
    rng = random.Random(seed)
    jobs = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        notes = " ".join(f"Note {n}: something was written about {topic}." for n in range(rng.choice((0, 0, 2, 8, 20))))
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{notes} Tell me about {topic}, part {number}."},
        ]
        jobs.append(Job(messages, rng.choice((longest // 8, longest // 4, longest // 2, longest)) or 1))
    return jobs


async def run_load(url: str, model: str, jobs: Sequence[Job], clients: int, count: Callable[[str], int]) -> Load:
    """Clients that each send one request after the other until no job is left."""
    left, texts, first, failed = list(reversed(jobs)), [], [], 0
    async with httpx.AsyncClient(timeout=WAIT_S, limits=httpx.Limits(max_connections=None)) as http:

        async def client() -> None:
            nonlocal failed
            while left:
                job = left.pop()
                body = {
                    "model": model,
                    "messages": job.messages,
                    "max_tokens": job.max_tokens,
                    "temperature": 0,
                    "stream": True,
                }
                started, text, said = time.perf_counter(), "", False
                async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        for piece in pieces_of(line):
                            if not said:
                                first.append(time.perf_counter() - started)
                                said = True
                            text += piece
                failed += response.status_code != 200
                texts.append(text)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - started
    return Load(len(jobs), sum(map(count, texts)), seconds, first, failed)


def pieces_of(line: str) -> Iterator[str]:
    """The text in a line of a stream."""
    if line.startswith("data: {"):
        for choice in json.loads(line[6:]).get("choices") or ():
            if text := (choice.get("delta") or {}).get("content"):
                yield text


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def started(command: Sequence[str], port: int, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers; RuntimeError with its last words where it does not come up."""
    environment = os.environ | {"PLUMBLINE_API_KEYS": ""}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            until = time.monotonic() + WAIT_S
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
                    raise RuntimeError(lines[-1] if lines else f"exit status {process.returncode}")
                try:
                    if httpx.get(f"http://127.0.0.1:{port}{ready}", timeout=5).status_code < 500:
                        break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def plumbline(model: str, port: int, *flags: str) -> list[str]:
    """The command of our own server."""
    return [sys.executable, "-m", "plumbline.apps.cli", "serve", model, "--port", str(port), *flags]


class Bench:
    """Starts servers, loads them, prints and records what came of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from plumbline.policy_models.loading import load_tokenizer, resolve_model_source

        self.args = args
        self.folder = resolve_model_source(args.model)
        tokenizer = load_tokenizer(args.model)
        self.count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
        self.jobs = make_jobs(args.clients * args.requests, args.longest)

    def load(self, server: str, port: int, model: str, jobs: Sequence[Job], clients: int) -> Load:
        """One load, after a request that warms the server up."""
        url = f"http://127.0.0.1:{port}"
        asyncio.run(run_load(url, model, [Job(self.jobs[0].messages, 2)], 1, self.count))
        load = asyncio.run(run_load(url, model, jobs, clients, self.count))
        p50, p95 = load.first(0.5), load.first(0.95)
        print(
            f"{server:<28} {clients:>3} clients  {load.tokens:>6} tokens  {load.seconds:7.1f} s  {load.rate:7.1f} tokens/s  "
            f"first text p50 {p50:.2f} s, p95 {p95:.2f} s" + (f"  {load.failed} FAILED" if load.failed else ""),
            flush=True,
        )
        row = [commit(), device_name(), self.args.model, server, clients, load.requests, load.tokens]
        row += [f"{value:.3f}" for value in (load.seconds, load.rate, p50, p95)]
        append(self.args.csv, COLUMNS, [row])
        return load

    def ours(self, name: str, *flags: str, alone: bool = False) -> tuple[Load, Load | None]:
        """The load on a server of ours with these flags and, if `alone`, a quarter of it from one client."""
        port = free_port()
        sizes = ["--rows", str(self.args.clients), "--queue", "256", "--context", str(self.args.context)]
        with started(plumbline(self.args.model, port, *sizes, *flags), port, "/readyz"):
            many = self.load(name, port, self.args.model, self.jobs, self.args.clients)
            some = make_jobs(
                max(4, len(self.jobs) // 4), self.args.longest, seed=1
            )  # others: no prefix is known of them
            return many, self.load(f"{name}, alone", port, self.args.model, some, 1) if alone else None

    def transformers_serve(self) -> Load | None:
        """The same load on `transformers serve`; None, with the reason, where it cannot be started."""
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "transformers.cli.transformers",
            "serve",
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
        command += self.args.transformers_flags.split()
        try:
            with started(command, port, "/health"):
                load = self.load("transformers serve", port, self.folder, self.jobs, self.args.clients)
        except (RuntimeError, httpx.HTTPError, OSError) as error:
            print(f"transformers serve: skipped: {str(error)[:300]}")
            return None
        if load.failed or not load.tokens:
            print(f"transformers serve: skipped: {load.failed} of {load.requests} requests failed")
            return None
        return load

    def storm(self, count: int) -> dict[str, Any]:
        """Requests of which a third is cut off at random, a SIGTERM amid them and a fresh start after it."""
        rng, port = random.Random(1), free_port()
        report: dict[str, Any] = {"requests": 0, "cut": 0, "whole": 0, "refused": 0, "broken": 0}
        for part in range(2):
            flags = [
                "--rows",
                str(self.args.clients),
                "--queue",
                "4096",
                "--guard",
                "rules_only",
                "--context",
                str(self.args.context),
            ]
            with started(plumbline(self.args.model, port, *flags), port, "/readyz") as server:
                before = resident_mib(server.pid)
                url = f"http://127.0.0.1:{port}"
                asyncio.run(self._storm(url, count // 2, rng, report, server if part == 0 else None))
                if part == 1:
                    text = httpx.get(f"{url}/metrics", timeout=60).text
                    report["rows_left"] = float(re.findall(r"^plumbline_engine_rows (\S+)", text, re.M)[0])
                    report["grown_mib"] = round(resident_mib(server.pid) - before, 1)
        return report

    async def _storm(self, url: str, count: int, rng: random.Random, report: dict[str, Any], stop: Any) -> None:
        left = [
            (self.jobs[rng.randrange(len(self.jobs))], rng.random() < 1 / 3, rng.randint(0, 8)) for _ in range(count)
        ]
        half = count // 2
        async with httpx.AsyncClient(timeout=WAIT_S, limits=httpx.Limits(max_connections=None)) as http:

            async def client() -> None:
                while left:
                    job, cut, lines = left.pop()
                    if stop is not None and len(left) == half:
                        stop.send_signal(signal.SIGTERM)
                    report["requests"] += 1
                    body = {
                        "model": self.args.model,
                        "messages": job.messages,
                        "max_tokens": job.max_tokens,
                        "stream": True,
                    }
                    text = ""
                    try:
                        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                            async for line in response.aiter_lines():
                                text += line + "\n"
                                lines -= 1
                                if cut and lines < 0:
                                    break
                    except httpx.HTTPError:
                        report["refused" if not text else "broken"] += 1
                        continue
                    if response.status_code != 200:
                        report["refused"] += 1
                    elif cut and lines < 0:
                        report["cut"] += 1
                    else:
                        report["whole" if text.rstrip().endswith("[DONE]") else "broken"] += 1

            await asyncio.gather(*(client() for _ in range(self.args.clients)))


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Runs everything, prints a line a load and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest answer")
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--toy", action="store_true", help="tiny model, few requests")
    parser.add_argument("--storm", type=int, default=0, metavar="N", help="requests with random disconnects besides")
    parser.add_argument("--transformers-flags", default="", help="more flags of `transformers serve`, in one string")
    parser.add_argument("--csv", type=Path, default=CSV)
    args = parser.parse_args(argv)
    if args.toy:
        args.model, args.clients, args.requests, args.longest = "bundled:tiny-llama", 4, 2, 16
    bench = Bench(args)
    many = bench.ours("guard off", "--guard", "off")
    one = bench.ours(
        "guard off, one client", "--guard", "off", clients=1, jobs=bench.jobs[:: max(1, args.clients // 4)]
    )
    guarded = {
        name: bench.ours(f"guard {name}", "--guard-layers", *layers)
        for name, layers in (("input", ["input"]), ("output", ["output"]), ("both", ["input", "output"]))
    }
    theirs = bench.transformers_serve()
    for name, load in guarded.items():
        print(f"guard {name}: {1 - load.rate / many.rate:+.1%} of the tokens a second")
    if args.storm:
        print(f"storm: {json.dumps(bench.storm(args.storm))}")
    print(
        json.dumps(
            {
                "ratio_one_client": round(many.rate / one.rate, 2),
                "ratio_transformers_serve": round(many.rate / theirs.rate, 2) if theirs else None,
                "guard_overhead": round(1 - guarded["both"].rate / many.rate, 4),
                "ttft_p95_s": round(many.first(0.95), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
