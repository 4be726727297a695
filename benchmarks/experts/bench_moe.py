"""One expert layer, forward and forward with backward: transformers' eager loop and grouped_mm against ours.

    python benchmarks/experts/bench_moe.py --cpu                 # 8 experts of 576 x 1536, 2,048 tokens, bf16, one thread
    python benchmarks/experts/bench_moe.py --tokens 8192 --width 2048 --inner 768 --experts 128 --top-k 8     # on a GPU

Providers on a GPU: transformers' eager loop, grouped_mm and the same compiled; ours; Liger, ScatterMoE and SonicMoE where they
are installed (one that fails is left out, and said so). `roofline` is the least time that the products or, if that is
more, the traffic of weights and tokens can take at this device's own measured speeds, over the time taken.

The layer is transformers' own (Mixtral's experts) with one set of weights; a provider is a back end of it. Outputs and
gradients are compared before the clock starts, and providers take turns, so that other work on the machine hits all.
A CPU is timed in CPU seconds of one thread, or with more --threads by the clock on the wall.
A training step needs the gradients of input, weights of the experts and routing weights. Each turn draws new routes:
the loads of a training run differ from step to step, and a product of a new shape costs a CPU a kernel compilation.

Appends to benchmarks/results/moe.csv and ends with a line of JSON: ratios of medians.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import plumbline.policy_models  # noqa: F401  # registers the back ends
from benchmarks.experts.moe_peers import peers
from benchmarks.records import append_dicts, commit, device_name
from plumbline.policy_models.experts import DEFAULT_EXPERTS
from plumbline.policy_models.kernels import TRITON_EXPERTS, kernels_run_on

RESULTS = Path(__file__).parent / "results" / "moe.csv"
COLUMNS = "commit device torch provider shape pass p20_ms p50_ms p80_ms tflops roofline peak_mib".split()


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement; skew 0 draws routes evenly, 1 gives expert e a probability proportional to 1/(e+1)."""

    tokens: int
    width: int
    inner: int
    experts: int
    top_k: int
    skew: float = 0.0

    def __str__(self) -> str:
        return f"T{self.tokens} H{self.width} I{self.inner} E{self.experts} K{self.top_k} skew{self.skew:g}"

    def flops(self, backward: bool) -> float:
        """Multiplications and additions of the three products; a backward has twice those of a forward."""
        forward = 2 * 3 * self.tokens * self.top_k * self.width * self.inner
        return forward * (3 if backward else 1)

    def bytes(self, backward: bool) -> float:
        """What has to be read and written in bf16 however it is done: weights and tokens, and gradients of both."""
        forward = 2 * (3 * self.experts * self.width * self.inner + 2 * self.tokens * self.width)
        return forward * (3 if backward else 1)


def make_layer(shape: Shape, device: str, dtype: torch.dtype) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    layer = MixtralExperts(config).to(device, dtype)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return layer


def draw(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, routes, weights of one step."""
    chance_E = (torch.arange(shape.experts, device=device) + 1.0) ** -shape.skew
    indices = torch.multinomial(chance_E.expand(shape.tokens, -1), shape.top_k)
    weights = torch.rand(shape.tokens, shape.top_k, device=device)
    return torch.randn(shape.tokens, shape.width, device=device, dtype=dtype), indices, weights


def step(layer: MixtralExperts, provider: str, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> list[Tensor]:
    """One pass; returns the output, and after a backward all gradients."""
    layer.config._experts_implementation = provider
    x, indices, weights = inputs
    with torch.set_grad_enabled(backward):
        x, weights = x.detach().requires_grad_(backward), weights.detach().requires_grad_(backward)
        out = layer(x, indices, weights)
        if not backward:
            return [out]
        return [out, *torch.autograd.grad(out, (x, weights, *layer.parameters()), torch.ones_like(out))]


def compare(
    layer: MixtralExperts, providers: list[str], shape: Shape, device: str, dtype: torch.dtype, optional: list[str]
) -> list[str]:
    """The providers that run. Stops unless each agrees with the first up to rounding; an optional one may fail to run."""
    inputs = draw(shape, device, dtype)
    want = step(layer, providers[0], inputs, backward=True)
    runs = providers[:1]
    for provider in providers[1:]:
        try:
            found = step(layer, provider, inputs, True)
        except Exception as error:
            if provider not in optional:
                raise
            print(f"{provider} left out: {type(error).__name__}: {error}", flush=True)
            continue
        runs.append(provider)
        for part, a, b in zip("output x weights gate_up down".split(), found, want, strict=True):
            error = ((a.float() - b.float()).norm() / b.float().norm()).item()
            if not error < (3e-2 if dtype == torch.bfloat16 else 1e-4):
                raise SystemExit(f"{provider}: {part} differs from {providers[0]} by {error:.1%}")
    return runs


@cache
def ceiling(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Best measured (multiplications and additions a second, bytes a second): one square product, one copy."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    block = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    product = min(clock(lambda: a @ b, device)[0] for _ in range(8))
    copy = min(clock(lambda: target.copy_(block), device)[0] for _ in range(8))
    return 2 * size**3 / product, 2 * len(block) / copy


def measure(
    providers: list[str], shape: Shape, device: str, dtype: torch.dtype, repeats: int, optional: Sequence[str] = ()
) -> list[dict]:
    """CSV rows: percentiles in ms over `repeats` turns of each provider."""
    peak_flops, peak_bytes = ceiling(device, dtype)
    torch.manual_seed(0)
    layer = make_layer(shape, device, dtype)
    providers = compare(layer, [*providers, *optional], shape, device, dtype, list(optional))
    rows = []
    for backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in providers}
        peaks = dict.fromkeys(providers, 0)
        for turn in range(repeats + 2):  # two of them to warm up
            inputs = draw(shape, device, dtype)
            for name in providers:
                seconds, peak = clock(partial(step, layer, name, inputs, backward), device)
                peaks[name] = max(peaks[name], peak)
                if turn >= 2:
                    times[name].append(1e3 * seconds)
        floor = max(shape.flops(backward) / peak_flops, shape.bytes(backward) / peak_bytes)
        for name, values in times.items():
            p20, p50, p80 = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            rows.append(
                {
                    "commit": commit(),
                    "device": device_name(device),
                    "torch": torch.__version__,
                    "provider": name,
                    "shape": f"{shape} {str(dtype).removeprefix('torch.')}",
                    "pass": "fwd_bwd" if backward else "fwd",
                    "p20_ms": round(p20, 3),
                    "p50_ms": round(p50, 3),
                    "p80_ms": round(p80, 3),
                    "tflops": round(shape.flops(backward) / p50 / 1e9, 3),
                    "roofline": float(f"{1e3 * floor / p50:.3g}"),
                    "peak_mib": peaks[name],
                }
            )
            print(f"{rows[-1]['shape']} {rows[-1]['pass']} {name}: {p50:.2f} ms, {rows[-1]['tflops']} TF/s", flush=True)
    return rows


def clock(run: Callable[[], object], device: str) -> tuple[float, int]:
    """(seconds, peak MiB above what was held before; 0 on a CPU). One CPU thread is timed in CPU seconds of its process:
    what else runs on the machine then hardly counts."""
    if device != "cuda":
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = now()
        run()
        return now() - start, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, (torch.cuda.max_memory_allocated() - held) >> 20


def ratio(rows: list[dict], passes: str, baseline: str, ours: str) -> float:
    """How many times faster `ours` is, by medians."""
    p50 = {row["provider"]: row["p50_ms"] for row in rows if row["pass"] == passes}
    return round(p50[baseline] / p50[ours], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU at its sizes, even where there is a GPU")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--skew", type=float, default=0.0, help="0: routes drawn evenly; 1: expert e as 1/(e+1)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each provider")
    parser.add_argument("--threads", type=int, default=1, help="on shared cores more threads wait for each other")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    shape = Shape(args.tokens, args.width, args.inner, args.experts, args.top_k, args.skew)
    providers = ["eager", "grouped_mm", DEFAULT_EXPERTS]
    if device == "cuda" and kernels_run_on(device) is None:
        providers.append(TRITON_EXPERTS)
    others = peers() if device == "cuda" else []
    rows = measure(providers, shape, device, torch.bfloat16, args.repeats, others)
    append_dicts(RESULTS, COLUMNS, rows)
    result = {"device": device_name(device), "shape": str(shape)}
    kind = "cpu" if device == "cpu" else "gpu"
    for passes in ("fwd", "fwd_bwd"):
        for baseline in ("eager", "grouped_mm"):
            for ours in providers[2:]:
                name = f"{kind}_{passes}_vs_{baseline}" + ("" if ours == DEFAULT_EXPERTS else "_triton")
                result[name] = ratio(rows, passes, baseline, ours)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
