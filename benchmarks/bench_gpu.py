"""Everything about the kernels that needs a GPU, in one command of under 10 minutes: first right, then fast.

    make bench-gpu                                   # on a GPU
    python benchmarks/bench_gpu.py --cpu             # no GPU: the same path at toy sizes, kernels interpreted

1. Correctness: output and every gradient of the kernels in bf16 against the specification in fp64, over even and
   skewed loads, one token, empty experts and token counts that fill no tile. The error may be at most 1.5 times that of
   torch's grouped_mm in bf16 against the same, plus 0.2%.
2. The expert layer: forward and forward with backward, against transformers' grouped_mm (and its eager loop where there
   are few experts), over the shapes that the kernels are for.
3. Log-probabilities: time and peak memory against logits, log_softmax and gather.

Appends to benchmarks/results/moe.csv and logprob.csv (not with --cpu) and ends with a line of JSON.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experts import bench_logprob, bench_moe, moe_peers
from benchmarks.experts.bench_moe import Shape
from benchmarks.records import append_dicts, device_name
from plumbline.policy_models.experts import DEFAULT_EXPERTS
from plumbline.policy_models.kernels import TRITON_EXPERTS, kernels_run_on

CHECKED = [
    Shape(1, 576, 1536, 8, 2),
    Shape(77, 576, 1536, 8, 2),
    Shape(1000, 576, 384, 32, 8, skew=1.0),
    Shape(300, 520, 264, 16, 2, skew=3.0),  # most experts get nothing
    Shape(4096, 2048, 768, 128, 8),
]
TIMED = [
    Shape(8192, 2048, 768, 128, 8),
    Shape(32768, 2048, 768, 128, 8),
    Shape(32768, 2048, 768, 128, 8, skew=1.0),
    Shape(32768, 576, 1536, 8, 2),
    Shape(2048, 576, 1536, 8, 2),
    Shape(32768, 576, 384, 32, 8),
    Shape(8192, 4096, 14336, 8, 2),
]
LOGPROB = (8192, 576, 49152)  # tokens, width, vocabulary
SMALL = [Shape(5, 24, 32, 3, 2)], [Shape(9, 24, 32, 3, 2)], (6, 24, 50)


def errors(shape: Shape, device: str) -> dict[str, tuple[float, float]]:
    """Relative error of output and gradients against fp64: (ours, grouped_mm's)."""
    torch.manual_seed(0)
    layer = bench_moe.make_layer(shape, device, torch.bfloat16)
    x, indices, weights = bench_moe.draw(shape, device, torch.bfloat16)
    leaves = [part.detach().double().requires_grad_() for part in (x, weights, *layer.parameters())]
    out = fp64_layer(leaves[0], leaves[2], leaves[3], indices, leaves[1])
    want = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    found = [bench_moe.step(layer, name, (x, indices, weights), True) for name in (TRITON_EXPERTS, DEFAULT_EXPERTS)]
    return {
        part: (relative(ours, exact), relative(theirs, exact))
        for part, ours, theirs, exact in zip("output x weights gate_up down".split(), *found, want, strict=True)
    }


def fp64_layer(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The specification, in fp64 throughout and as fast as a loop over experts is."""
    out = torch.zeros_like(x)
    for expert, (up_e, down_e) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = torch.where(indices == expert)
        gate, up = F.linear(x[token], up_e).chunk(2, dim=-1)
        out = out.index_add(0, token, F.linear(F.silu(gate) * up, down_e) * weights[token, slot, None])
    return out


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check_experts(shapes: list[Shape], device: str) -> float:
    """The worst ratio of our error to grouped_mm's; stops where one is too large."""
    worst = 0.0
    for shape in shapes:
        for part, (ours, theirs) in errors(shape, device).items():
            worst = max(worst, ours / max(theirs, 1e-4))
            print(f"{shape} {part}: error {ours:.2e}, grouped_mm {theirs:.2e}", flush=True)
            if not ours <= 1.5 * theirs + 2e-3:
                raise SystemExit(f"{shape}: {part} is off by {ours:.2%}; do not use {TRITON_EXPERTS} here")
    return round(worst, 3)


def time_experts(shapes: list[Shape], device: str, repeats: int) -> dict[str, float]:
    result: dict[str, float] = {}
    for shape in shapes:
        providers = ["grouped_mm", DEFAULT_EXPERTS, TRITON_EXPERTS]
        if shape.experts <= 8 and shape.inner < 4096:
            providers.insert(0, "eager")
        others = moe_peers.peers() if device == "cuda" else []
        rows = bench_moe.measure(providers, shape, device, torch.bfloat16, repeats, others)
        if device == "cuda":
            append_dicts(bench_moe.RESULTS, bench_moe.COLUMNS, rows)
        for passes in ("fwd", "fwd_bwd"):
            ran = {row["provider"] for row in rows}
            for other in ran & {"grouped_mm", "compiled_grouped_mm", "liger", "scattermoe", "sonicmoe"}:
                result[f"{passes}_vs_{other} {shape}"] = bench_moe.ratio(rows, passes, other, TRITON_EXPERTS)
            ours = next(row for row in rows if row["provider"] == TRITON_EXPERTS and row["pass"] == passes)
            result[f"{passes}_tflops {shape}"] = ours["tflops"]
    return result


def check_logprob(sizes: tuple[int, int, int], device: str) -> float:
    """Largest error of log-probability and entropy against fp64, in nats; stops where it is too large."""
    from plumbline.policy_models.kernels.logprob import linear_logprob

    torch.manual_seed(0)
    hidden, weight, ids = bench_logprob.draw((min(sizes[0], 256), *sizes[1:]), device)
    exact = bench_logprob.naive(hidden.double(), weight.double(), ids)
    worst = max(
        (got - want).abs().max().item() for got, want in zip(linear_logprob(hidden, weight, ids), exact, strict=True)
    )
    if not worst < 1e-3:
        raise SystemExit(f"log-probability or entropy is off by {worst:.4f}")
    return worst


def time_logprob(sizes: tuple[int, int, int], device: str, repeats: int) -> dict[str, float]:
    rows = bench_logprob.measure(sizes, device, repeats)  # compares gradients before it times
    if device == "cuda":
        append_dicts(bench_logprob.RESULTS, bench_logprob.COLUMNS, rows)
    return bench_logprob.ratios(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="toy sizes in triton's interpreter: checks the path only")
    parser.add_argument("--repeats", type=int, default=10, help="turns of each provider")
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --cpu runs the same path at toy sizes")
    problem = kernels_run_on(device)
    if problem is not None:
        raise SystemExit(problem)
    checked, timed, logprob = SMALL if args.cpu else (CHECKED, TIMED, LOGPROB)
    repeats = 1 if args.cpu else args.repeats
    start = time.perf_counter()
    result: dict[str, object] = {"device": device_name(device)}
    result["worst_error_vs_grouped_mm"] = check_experts(checked, device)
    result["logprob_worst_error_nats"] = check_logprob(logprob, device)
    result |= time_logprob(logprob, device, repeats)
    result |= time_experts(timed, device, repeats)
    result["wall_s"] = round(time.perf_counter() - start)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
