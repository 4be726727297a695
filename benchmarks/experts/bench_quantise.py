"""What packed weights save and cost: bytes, divergence from the model as it came, time of a decoding step and of a pass.

    python benchmarks/experts/bench_quantise.py --model bundled:smollm2-135m-instruct
    python benchmarks/experts/bench_quantise.py --experts 4          # upcycled first: 4 experts in every layer

KL(as it came || packed) is a mean over the tokens of a paragraph. A decoding step is one token after 64 others, by `model`
with a cache. Schemes take turns. Appends to benchmarks/results/quantise.csv and ends with a line of JSON.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.experts.bench_moe import clock
from benchmarks.records import append_dicts, commit, device_name
from plumbline.apps.commands.upcycle import SAMPLE
from plumbline.policy_models import load_policy, load_tokenizer, upcycle
from plumbline.policy_models.compression.quantise import SCHEMES, quantise
from plumbline.policy_models.upcycling import kl_from_dense

RESULTS = Path(__file__).parent / "results" / "quantise.csv"
COLUMNS = "commit device torch model scheme weights_mib kl_nats step_ms pass_ms".split()


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all storages that parameters and buffers use, each counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def step_seconds(model: PreTrainedModel, ids: Tensor) -> float:
    cache = DynamicCache(config=model.config)
    model(ids[:, :64], past_key_values=cache, use_cache=True)
    return seconds(lambda: model(ids[:, 64:65], past_key_values=cache, use_cache=True))


def seconds(run: Callable[[], object]) -> float:
    return clock(run, "cpu")[0]


@torch.no_grad()
def measure(model: PreTrainedModel, ids: Tensor, name: str, repeats: int) -> list[dict]:
    models = {"none": model} | {scheme: quantise(copy.deepcopy(model), scheme) for scheme in SCHEMES}
    steps: dict[str, list[float]] = {scheme: [] for scheme in models}
    passes: dict[str, list[float]] = {scheme: [] for scheme in models}
    for turn in range(repeats + 1):  # one of them to warm up
        for scheme, packed in models.items():
            spent = step_seconds(packed, ids), seconds(lambda packed=packed: packed(ids))
            if turn:
                steps[scheme].append(1e3 * spent[0])
                passes[scheme].append(1e3 * spent[1])
    rows = []
    for scheme, packed in models.items():
        rows.append(
            {
                "commit": commit(),
                "device": device_name("cpu"),
                "torch": torch.__version__,
                "model": name,
                "scheme": scheme,
                "weights_mib": round(weight_bytes(packed) / 2**20, 1),
                "kl_nats": round(kl_from_dense(model, packed, ids), 5),
                "step_ms": round(torch.tensor(steps[scheme]).median().item(), 2),
                "pass_ms": round(torch.tensor(passes[scheme]).median().item(), 2),
            }
        )
        print(" ".join(f"{key}={rows[-1][key]}" for key in COLUMNS[3:]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument(
        "--experts", type=int, default=0, help="upcycle to this many experts a layer first; 0: as it is"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_policy(args.model, dtype=torch.bfloat16)
    if args.experts:
        model = upcycle(model, num_experts=args.experts)
    ids = load_tokenizer(args.model)(SAMPLE, return_tensors="pt").input_ids
    name = f"{args.model} x{args.experts}" if args.experts else args.model
    rows = measure(model.eval(), ids, name, args.repeats)
    append_dicts(RESULTS, COLUMNS, rows)
    dense = rows[0]
    result: dict[str, object] = {"device": device_name("cpu"), "model": name}
    for row in rows[1:]:
        result |= {
            f"{row['scheme']}_weights_share": round(row["weights_mib"] / dense["weights_mib"], 3),
            f"{row['scheme']}_kl_nats": row["kl_nats"],
            f"{row['scheme']}_step_speed": round(dense["step_ms"] / row["step_ms"], 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
