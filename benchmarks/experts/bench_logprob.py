"""Log-probabilities and entropies of given tokens from hidden states, forward and backward: time and peak memory.

    python benchmarks/experts/bench_logprob.py --cpu             # 256 tokens of width 576, 49,152 words, bf16, one thread
    python benchmarks/experts/bench_logprob.py                   # on a GPU: 8,192 tokens

Providers: `naive` (logits, log_softmax in fp32, gather), `compiled` (the same under torch.compile, on a GPU), `chunked`
(logits once, the softmax in chunks and again in the backward: policy_models/logprobs.py) and `fused` (no logits at all:
policy_models/kernels/logprob.py, on a GPU). `liger` where liger-kernel is installed, which has no entropy.

Results are compared before the clock starts, and providers take turns. Peak memory is above what was held before: of the
allocator on a GPU, of all tensors on a CPU (torch's profiler), where the figure says nothing about malloc.
Appends to benchmarks/results/logprob.csv and ends with a line of JSON.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.experts.bench_moe import clock
from benchmarks.records import append_dicts, commit, device_name
from plumbline.policy_models.kernels import kernels_run_on
from plumbline.policy_models.logprobs import token_logprobs

RESULTS = Path(__file__).parent / "results" / "logprob.csv"
COLUMNS = "commit device torch provider shape pass p20_ms p50_ms p80_ms peak_mib".split()

Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def naive(hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    logits_TV = F.linear(hidden_TD, weight_VD)
    logp_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)
    return logp_TV.gather(-1, ids_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def chunked(hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(F.linear(hidden_TD, weight_VD), ids_T)


def liger(hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor) -> tuple[Tensor, None]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight_VD, hidden_TD, ids_T), None


def providers(device: str) -> dict[str, Scorer]:
    """Those that can run here; the first is what the others are compared with."""
    found: dict[str, Scorer] = {"naive": naive, "chunked": chunked}
    if device == "cuda":
        found["compiled"] = torch.compile(naive, dynamic=False)
        if importlib.util.find_spec("liger_kernel") is not None:
            found["liger"] = liger
    if kernels_run_on(device) is None:
        from plumbline.policy_models.kernels.logprob import linear_logprob

        found["fused"] = linear_logprob
    return found


def step(scorer: Scorer, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> list[Tensor]:
    """Log-probabilities and, after a backward of their sum, gradients of hidden states and weight."""
    hidden, weight, ids = inputs
    with torch.set_grad_enabled(backward):
        leaves = hidden.detach().requires_grad_(backward), weight.detach().requires_grad_(backward)
        logp, entropy = scorer(*leaves, ids)
        found = [logp] if entropy is None else [logp, entropy]
        return [*found, *torch.autograd.grad(logp.sum(), leaves)] if backward else found


def draw(sizes: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width, vocab = sizes
    hidden = torch.randn(tokens, width, device=device).bfloat16()
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).bfloat16()
    return hidden, weight, torch.randint(0, vocab, (tokens,), device=device)


def compare(found: dict[str, Scorer], inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Stops unless each provider has the naive one's log-probabilities and gradients, up to the rounding of bf16."""
    want = step(naive, inputs, backward=True)
    for name, scorer in found.items():
        got = step(scorer, inputs, backward=True)
        for part, index in (("log-probability", 0), ("gradient of hidden", -2), ("gradient of weight", -1)):
            error = ((got[index].float() - want[index].float()).norm() / want[index].float().norm()).item()
            if not error < 3e-2:
                raise SystemExit(f"{name}: {part} differs from naive by {error:.1%}")


def peak_on_cpu(run: Callable[[], object]) -> int:
    """Largest MiB of tensors that were alive at once during `run`, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak >> 20


def measure(sizes: tuple[int, int, int], device: str, repeats: int) -> list[dict]:
    """CSV rows: percentiles in ms over `repeats` turns of each provider, and peak memory."""
    torch.manual_seed(0)
    inputs = draw(sizes, device)
    found = providers(device)
    compare(found, inputs)
    rows = []
    for backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in found}
        peaks = dict.fromkeys(found, 0)
        for turn in range(repeats + 1):  # one of them to warm up
            for name, scorer in found.items():
                run = partial(step, scorer, inputs, backward)
                seconds, peak = clock(run, device)
                if turn:
                    times[name].append(1e3 * seconds)
                    peaks[name] = max(peaks[name], peak)
        for name, scorer in found.items():
            if device == "cpu":
                peaks[name] = peak_on_cpu(partial(step, scorer, inputs, backward))
            p20, p50, p80 = torch.tensor(times[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            rows.append(
                {
                    "commit": commit(),
                    "device": device_name(device),
                    "torch": torch.__version__,
                    "provider": name,
                    "shape": "T{} H{} V{} bfloat16".format(*sizes),
                    "pass": "fwd_bwd" if backward else "fwd",
                    "p20_ms": round(p20, 3),
                    "p50_ms": round(p50, 3),
                    "p80_ms": round(p80, 3),
                    "peak_mib": peaks[name],
                }
            )
            print(f"{rows[-1]['shape']} {rows[-1]['pass']} {name}: {p50:.2f} ms, {peaks[name]} MiB", flush=True)
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Speed over the naive way, and the share of its peak memory, for every other provider."""
    result = {}
    for passes in ("fwd", "fwd_bwd"):
        of = {row["provider"]: row for row in rows if row["pass"] == passes}
        for name, row in of.items():
            if name != "naive":
                result[f"logprob_{passes}_{name}_vs_naive"] = round(of["naive"]["p50_ms"] / row["p50_ms"], 3)
                result[f"logprob_{passes}_{name}_peak_share"] = round(
                    row["peak_mib"] / max(of["naive"]["peak_mib"], 1), 4
                )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU at its sizes, even where there is a GPU")
    parser.add_argument("--tokens", type=int, default=None, help="8192 on a GPU, 256 on a CPU")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each provider")
    parser.add_argument("--threads", type=int, default=1, help="on shared cores more threads wait for each other")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    tokens = args.tokens or (8192 if device == "cuda" else 256)
    rows = measure((tokens, args.width, args.vocab), device, args.repeats)
    append_dicts(RESULTS, COLUMNS, rows)
    print(json.dumps({"device": device_name(device), "shape": rows[0]["shape"]} | ratios(rows)))


if __name__ == "__main__":
    main()
