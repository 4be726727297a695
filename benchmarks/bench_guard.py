"""Latency of the guard: each scanner and each tier at four text lengths, and what checking adds to a stream.

    python benchmarks/bench_guard.py --repeats 200

Every text is new to the embedder's cache and made from the same public-domain-like sentences; scanners are warm. `rules` is the
policy rules_only, `layer1` the policy default with every scanner run (nothing is skipped after a block). The stream is a stand-in model
that gives a token every --token-ms of computing; its overhead is the time of the checks over the time of the tokens.
With --gorget the default scanners of that library that load offline are timed in the same run, where it is installed.

Appends to benchmarks/results/guard.csv and ends with a line of JSON.
"""

import argparse
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.records import append, commit, device_name
from plumbline.safety.findings import ScanItem, Stage
from plumbline.safety.pipeline import Guard, StreamCheck
from plumbline.safety.policy import load_policy
from plumbline.safety.scanning import Scanning
from plumbline.safety.text.normalise import views
from plumbline.safety.text.redaction import Vault

RESULTS = Path(__file__).parent / "results" / "guard.csv"
COLUMNS = "commit device threads tokens what p50_ms p95_ms p99_ms".split()
LENGTHS = (30, 100, 300, 1000)  # tokens
SENTENCES = """The harbour office opens at eight and closes when the last ferry has left for the islands.
Please move the meeting to Thursday and send the agenda to everyone who asked for it last week.
She planted beans along the fence, and by August the whole garden smelled of warm earth and tomatoes.
How long should bread dough rest before it goes into the oven, and does the flour matter much?
The report lists 34 bridges that need repair, most of them built between 1950 and 1975.
Our new timetable starts in October; buses to the hospital will run every 20 minutes.
He asked whether the library would lend its oldest maps, and was told to fill in a form.
A function that reads a file should close it again, even when something goes wrong half way.
Rain is expected in the north, while the south stays dry with light winds until Sunday evening.
The museum's tour takes an hour and a half, costs 12 euros, and ends in the small courtyard café.""".splitlines()


def main() -> None:
    args = parse_args()
    rng = random.Random(args.seed)
    rules, layer1 = Scanning("rules_only"), Scanning(replace(load_policy("default"), stop_early=False))
    runs = timed(rules, layer1) | (gorget_scanners() if args.gorget else {})
    rows: list[list[object]] = []
    result: dict[str, float] = {}
    for tokens in LENGTHS:
        make = lambda tokens=tokens: text_of(rng, tokens)  # noqa: E731
        for name, run in runs.items():
            repeats = max(20, args.repeats // (4 if tokens == 1000 else 1))
            p50, p95, p99 = percentiles(run, make, repeats)
            rows.append([tokens, name, round(p50, 3), round(p95, 3), round(p99, 3)])
            print(f"{tokens:5d} tokens  {name:32s} p50 {p50:8.2f}  p95 {p95:8.2f}  p99 {p99:8.2f} ms", flush=True)
            if name in ("rules", "layer1"):
                result |= {
                    f"{name}_p50_ms_{tokens}": p50,
                    f"{name}_p95_ms_{tokens}": p95,
                    f"{name}_p99_ms_{tokens}": p99,
                }
    result["stream_overhead"] = stream_overhead(Guard("default"), rng, args.token_ms, args.stream_tokens)
    append(RESULTS, COLUMNS, ([commit(), device_name(), os.cpu_count(), *row] for row in rows))
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="texts a length and scanner")
    parser.add_argument(
        "--token-ms", type=float, default=25.0, help="computing time of one token of the stand-in model"
    )
    parser.add_argument("--stream-tokens", type=int, default=400, help="length of the streamed answer")
    parser.add_argument("--gorget", action="store_true", help="time gorget's scanners too, where it is installed")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    args = parser.parse_args()
    if args.repeats < 1 or args.token_ms <= 0 or args.stream_tokens < 1:
        parser.error("--repeats, --token-ms and --stream-tokens must be above 0")
    return args


def text_of(rng: random.Random, tokens: int) -> str:
    """About `tokens` tokens (0.8 words a token), never the same twice."""
    words: list[str] = []
    while len(words) < 0.8 * tokens:
        words += rng.choice(SENTENCES).split()
    words = words[: int(0.8 * tokens)]
    for at in rng.sample(range(len(words)), k=max(1, len(words) // 20)):  # no two texts share a window in the cache
        words[at] = f"{words[at]} {rng.randrange(10**4)}"
    return " ".join(words)


def timed(rules: Scanning, layer1: Scanning) -> dict[str, Callable[[str], object]]:
    """What is timed, by name."""
    runs: dict[str, Callable[[str], object]] = {"rules": rules.check, "layer1": layer1.check, "normaliser": views}
    for entry, scanner in layer1.scanners:
        runs[f"scanner {entry.name}"] = lambda text, scanner=scanner: scanner.scan(
            [ScanItem(text=text, stage=Stage.INPUT)]
        )  # type: ignore[misc]
    return runs


def gorget_scanners() -> dict[str, Callable[[str], object]]:
    """The default scanners of gorget that can be made and run without a download."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import structlog
        from gorget import input_scanners
    except ImportError as error:
        print(f"gorget is not installed, or not whole ({error}): not measured")
        return {}
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    runs: dict[str, Callable[[str], object]] = {}
    for name in (
        "Secrets",
        "Regex",
        "BanSubstrings",
        "InvisibleText",
        "TokenLimit",
        "Anonymize",
        "PromptInjection",
        "Toxicity",
        "Language",
        "Gibberish",
        "BanTopics",
    ):
        try:
            kind = getattr(input_scanners, name)
            scanner = kind(
                **{
                    "Regex": {"patterns": [r"Bearer [A-Za-z0-9-._~+/]+"]},
                    "BanSubstrings": {"substrings": ["forbidden"]},
                    "BanTopics": {"topics": ["violence"]},
                }.get(name, {})
            )
            scanner.scan("hello there")
            runs[f"gorget {name}"] = scanner.scan
        except Exception as error:  # noqa: BLE001  whatever keeps it from loading offline
            print(f"gorget {name} does not load offline: {type(error).__name__}")
    loaded = list(runs.values())
    return runs | {"gorget, all that load offline": lambda text: [run(text) for run in loaded]}


def percentiles(run: Callable[[str], object], make: Callable[[], str], repeats: int) -> tuple[float, float, float]:
    """p50, p95 and p99 in milliseconds over fresh texts, after ten to warm up."""
    for _ in range(10):
        run(make())
    times = []
    for _ in range(repeats):
        text = make()
        started = time.perf_counter()
        run(text)
        times.append((time.perf_counter() - started) * 1000)
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return float(p50), float(p95), float(p99)


def stream_overhead(guard: Guard, rng: random.Random, token_ms: float, tokens: int) -> float:
    """Time of the checks over the time of the tokens, for one answer; the checks and the model run in turn."""
    check, spent = StreamCheck(guard, Vault()), 0.0
    for word in text_of(rng, tokens).split():
        started = time.perf_counter()
        check.feed(f"{word} ")
        spent += time.perf_counter() - started
    started = time.perf_counter()
    check.close()
    spent += time.perf_counter() - started
    return spent * 1000 / (token_ms * tokens)


if __name__ == "__main__":
    main()
