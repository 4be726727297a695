"""Tokens a second of the rollout engine against transformers' `generate`, on the bundled model.

Both compute in bf16 (fp32 on a CPU that would emulate it) and sample from the whole softmax at temperature 1, from the
same prompts, without end tokens, so that every answer has the full length. They take turns, so that whatever else the
machine does hits both alike. `transformers_top_k50` is what `generate` does by default. Before the clock starts, the
log-probabilities that came with the drawn tokens are compared with those of one forward pass over prompt and answer.

    python benchmarks/bench_rollouts.py --repeats 5

Appends to benchmarks/results/rollouts.csv and ends with a line of JSON: the ratio of the medians at each batch size.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from benchmarks.records import append_dicts, commit, device_name
from plumbline.align.runtime.launch import pick_dtype
from plumbline.policy_models.loading import load_policy
from plumbline.policy_models.rollout.generation import Answer, generate
from plumbline.policy_models.upcycling import upcycle

RESULTS = Path(__file__).parent / "results" / "rollouts.csv"
COLUMNS = "commit device threads provider shape p20 p50 p80 p50_per_cpu_second peak_mib".split()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = pick_dtype(args.dtype)
    dense = without_end(load_policy(args.model, dtype=dtype))
    name = f"smollm2-135m {str(dtype).removeprefix('torch.')}"
    result: dict[str, float] = {}
    rows = []
    for batch in args.batch_sizes:
        prompts = random_prompts(dense, batch, args.prompt_tokens)
        ours = partial(plumbline, dense, prompts, args.new_tokens)
        result[f"mismatch_b{batch}"] = check(dense, prompts, ours())
        providers: dict[str, Callable] = {
            "plumbline": ours,
            "transformers": partial(transformers_generate, dense, prompts, args.new_tokens, 0),
        }
        if args.top_k:
            providers["transformers_top_k50"] = partial(transformers_generate, dense, prompts, args.new_tokens, 50)
        rows += measure(providers, args, f"{name} b{batch} p{args.prompt_tokens} n{args.new_tokens}", batch)
        result[f"ratio_b{batch}"] = ratio(rows[-len(providers) :])
    if args.moe:
        batch = max(args.batch_sizes)
        moe = without_end(upcycle(dense, num_experts=4, num_experts_per_tok=2, moe_layers=3))
        prompts = random_prompts(moe, batch, args.prompt_tokens)
        ours = partial(plumbline, moe, prompts, args.new_tokens)
        result[f"moe_mismatch_b{batch}"] = check(moe, prompts, ours())
        providers = {
            "plumbline": ours,
            "transformers": partial(transformers_generate, moe, prompts, args.new_tokens, 0),
        }
        shape = f"{name} moe-e4k2-every3 b{batch} p{args.prompt_tokens} n{args.new_tokens}"
        rows += measure(providers, args, shape, batch)
        result[f"moe_ratio_b{batch}"] = ratio(rows[-len(providers) :])
    append_dicts(RESULTS, COLUMNS, rows)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each provider at each batch size")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, bfloat16 or float32")
    parser.add_argument("--threads", type=int, default=1, help="on shared cores more threads wait for each other")
    parser.add_argument("--moe", action=argparse.BooleanOptionalAction, default=True, help="the MoE policy too")
    parser.add_argument("--top-k", action=argparse.BooleanOptionalAction, default=False, help="generate's default too")
    return parser.parse_args()


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with no token that would end an answer early."""
    model.generation_config.eos_token_id = None
    return model.eval()


def random_prompts(model: PreTrainedModel, batch: int, length: int) -> list[list[int]]:
    return torch.randint(3, model.config.vocab_size, (batch, length)).tolist()


def plumbline(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[Answer]:
    never = model.config.vocab_size
    return generate(
        model, prompts, max_new_tokens=new_tokens, stop_ids=[never], pad_id=0, temperature=1.0, batch_size=len(prompts)
    )


def transformers_generate(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, top_k: int
) -> torch.Tensor:
    ids = torch.tensor(prompts)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=top_k, top_p=1.0, max_new_tokens=new_tokens, pad_token_id=0
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert out.shape[1] == ids.shape[1] + new_tokens, out.shape
    return out


@torch.inference_mode()
def check(model: PreTrainedModel, prompts: list[list[int]], answers: list[Answer]) -> float:
    """Mean |log-probability at drawing less that of one forward pass| over the answers of 8 rows, in nats.

    bf16 alone causes some: decoding the same tokens step by step through `model.forward` sets the scale.
    """
    prompt_ids = torch.tensor(prompts[:8])
    answer_ids = torch.tensor([answer.ids for answer in answers[:8]])
    drawn = torch.tensor([answer.logp for answer in answers[:8]])

    logits = [model(torch.cat([prompt_ids, answer_ids], dim=1)).logits[:, prompt_ids.shape[1] - 1 : -1]]
    cache = DynamicCache(config=model.config)
    steps = [prompt_ids, *answer_ids[:, :-1].split(1, dim=1)]
    logits.append(torch.stack([model(ids, past_key_values=cache, use_cache=True).logits[:, -1] for ids in steps], 1))
    forward, stepwise = (x.float().log_softmax(-1).gather(-1, answer_ids[..., None])[..., 0] for x in logits)

    mismatch, scale = (drawn - forward).abs().mean().item(), (stepwise - forward).abs().mean().item()
    print(f"mean |log-probability less forward's|: plumbline {mismatch:.4f}, transformers {scale:.4f}", flush=True)
    if mismatch > 2 * scale + 1e-3:
        raise SystemExit(f"log-probabilities are off by {mismatch:.4f} nats: the rollout samples from another model")
    return mismatch


def measure(providers: dict[str, Callable], args: argparse.Namespace, shape: str, batch: int) -> list[dict]:
    """One CSV row a provider; percentiles over its turns, in tokens a second (p20 is the slow end)."""
    tokens = batch * args.new_tokens
    wall: dict[str, list[float]] = {name: [] for name in providers}
    cpu: dict[str, list[float]] = {name: [] for name in providers}
    for run in providers.values():
        run()  # warm-up
    for _ in range(args.repeats):
        for name, run in providers.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            run()
            wall[name].append(tokens / (time.perf_counter() - wall_start))
            cpu[name].append(tokens / (time.process_time() - cpu_start))
            print(f"{shape} {name}: {wall[name][-1]:.0f} tokens/s, {cpu[name][-1]:.0f} a CPU second", flush=True)
    return [
        {
            "commit": commit(),
            "device": device_name(),
            "threads": args.threads,
            "provider": name,
            "shape": shape,
            "p20": round(percentile(wall[name], 0.2), 1),
            "p50": round(percentile(wall[name], 0.5), 1),
            "p80": round(percentile(wall[name], 0.8), 1),
            "p50_per_cpu_second": round(percentile(cpu[name], 0.5), 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        for name in providers
    ]


def ratio(rows: list[dict]) -> float:
    p50 = {row["provider"]: row["p50"] for row in rows}
    return p50["plumbline"] / p50["transformers"]


def percentile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


if __name__ == "__main__":
    main()
