"""Adapters on experts: PEFT's way (B A added to the whole stack at every forward) against split products.

    python benchmarks/experts/bench_lora_experts.py --threads 1      # one layer of 32 experts of 576 x 384, top 2, rank 8, bf16

Forward and backward of one layer's experts with frozen weights, by number of tokens. Outputs are compared first, and the
two take turns. Appends to benchmarks/results/lora_experts.csv and ends with a line of JSON: ratios of medians.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.experts.bench_moe import Shape, clock, draw
from benchmarks.records import append_dicts, commit, device_name
from plumbline.policy_models import MoEPolicyConfig, MoEPolicyForCausalLM
from plumbline.policy_models.lora import split_expert_adapters

RESULTS = Path(__file__).parent / "results" / "lora_experts.csv"
COLUMNS = "commit device torch provider shape rank p20_ms p50_ms p80_ms peak_mib".split()


def adapted_experts(shape: Shape, rank: int, device: str, *, split: bool) -> nn.Module:
    config = MoEPolicyConfig(
        vocab_size=8,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    torch.manual_seed(0)
    model = MoEPolicyForCausalLM(config).to(device, torch.bfloat16)
    lora = LoraConfig(r=rank, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if split:
        split_expert_adapters(adapted)
    return model.model.layers[0].mlp.experts


def step(experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    x, indices, weights = inputs
    out = experts(x.detach().requires_grad_(), indices, weights)
    learning = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad(out, learning, torch.ones_like(out))]


def measure(shape: Shape, rank: int, device: str, repeats: int) -> list[dict]:
    layers = {name: adapted_experts(shape, rank, device, split=name == "split") for name in ("peft", "split")}
    inputs = draw(shape, device, torch.bfloat16)
    for got, want in zip(*(step(layer, inputs) for layer in layers.values()), strict=True):
        error = ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-9)).item()
        if not error < 5e-2:
            raise SystemExit(f"split adapters differ from PEFT's by {error:.1%}")
    times: dict[str, list[float]] = {name: [] for name in layers}
    peaks = dict.fromkeys(layers, 0)
    for turn in range(repeats + 2):
        inputs = draw(shape, device, torch.bfloat16)
        for name, layer in layers.items():
            seconds, peak = clock(partial(step, layer, inputs), device)
            if turn >= 2:
                times[name].append(1e3 * seconds)
                peaks[name] = max(peaks[name], peak)
    rows = []
    for name, values in times.items():
        p20, p50, p80 = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        figures = {"p20_ms": round(p20, 3), "p50_ms": round(p50, 3), "p80_ms": round(p80, 3), "peak_mib": peaks[name]}
        common = {"commit": commit(), "device": device_name(device), "torch": torch.__version__, "rank": rank}
        rows.append(common | {"provider": name, "shape": str(shape)} | figures)
        print(f"{shape} rank {rank} {name}: {p50:.2f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 2048])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, object] = {"device": device_name(device), "rank": args.rank}
    for tokens in args.tokens:
        shape = Shape(tokens, args.width, args.inner, args.experts, args.top_k)
        rows = measure(shape, args.rank, device, args.repeats)
        append_dicts(RESULTS, COLUMNS, rows)
        p50 = {row["provider"]: row["p50_ms"] for row in rows}
        result[f"split_vs_peft_{tokens}_tokens"] = round(p50["peft"] / p50["split"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
