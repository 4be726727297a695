"""`plumbline upcycle`: a dense checkpoint becomes a Mixture-of-Experts policy that starts with the same function."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plumbline.align.runtime.launch import parse_settings, pick_dtype
from plumbline.policy_models.loading import load_policy, load_tokenizer, model_summary
from plumbline.policy_models.upcycling import kl_from_dense, upcycle

# What the cost of noise is measured on: plain prose, any language model has an opinion about it.
SAMPLE = (
    "A tide is the slow rise and fall of the sea. It comes from the pull of the moon and, less, of the sun. Most coasts "
    "see two high tides a day, about twelve hours and twenty-five minutes apart, because the moon moves on while the "
    "earth turns. Near full and new moon the two pulls add up and the tides are largest. Fishermen, sailors and birds "
    "all plan their days around them, and so did the builders of the first mills that were driven by the sea."
)


@dataclass(kw_only=True)
class UpcycleSettings:
    """Which layers get experts, and how many."""

    model: str = field(default="bundled:smollm2-135m-instruct", metadata={"help": "bundled name, folder or hub id"})
    output_dir: str = field(default="runs/policy", metadata={"help": "folder of the new model"})
    num_experts: int = field(default=4, metadata={"help": "experts in each chosen layer"})
    num_experts_per_tok: int = field(default=2, metadata={"help": "experts that each token is sent to"})
    granularity: int = field(default=1, metadata={"help": "slices that each copy of the MLP is cut into"})
    shared_expert: bool = field(
        default=False, metadata={"help": "keep the MLP as a shared expert beside silent copies"}
    )
    noise: float = field(
        default=0.0, metadata={"help": "noise on the experts, in standard deviations of their weights"}
    )
    router: str = field(
        default="softmax", metadata={"help": "softmax, sigmoid, capacity, progressive or grouped: docs/policy_model.md"}
    )
    expert_groups: list[int] | None = field(default=None, metadata={"help": "sizes of the groups of router grouped"})
    groups_per_tok: int = field(default=1, metadata={"help": "groups that a token's experts may come from"})
    attention_gate: bool = field(default=False, metadata={"help": "a gate on each attention head, 1 at first"})
    attention_pattern: str = field(default="full", metadata={"help": "full, sparse or local_global"})
    attention_window: int = field(default=256, metadata={"help": "tokens that sparse and local_global see around them"})
    attention_globals: int = field(default=64, metadata={"help": "far tokens that sparse chooses for each query"})
    attention_stride: int = field(default=128, metadata={"help": "every such position is global under local_global"})
    every: int = field(default=1, metadata={"help": "one layer in this many gets experts; 1: all"})
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, bfloat16 or float32"})
    seed: int = field(default=0, metadata={"help": "of the routers"})


def run(settings: UpcycleSettings) -> Path:
    """Writes the policy and its tokenizer, and says what it is."""
    dense = load_policy(settings.model, dtype=pick_dtype(settings.dtype))
    policy = upcycle(
        dense,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.num_experts_per_tok,
        moe_layers="all" if settings.every == 1 else settings.every,
        granularity=settings.granularity,
        shared_expert=settings.shared_expert,
        noise=settings.noise,
        seed=settings.seed,
        router=settings.router,
        expert_groups=settings.expert_groups,
        groups_per_tok=settings.groups_per_tok,
        attention_gate=settings.attention_gate,
        attention_pattern=settings.attention_pattern,
        attention_window=settings.attention_window,
        attention_globals=settings.attention_globals,
        attention_stride=settings.attention_stride,
    )
    folder = Path(settings.output_dir)
    policy.save_pretrained(folder)
    tokenizer = load_tokenizer(settings.model)
    tokenizer.save_pretrained(folder)
    print(model_summary(policy))
    if settings.noise:
        ids = tokenizer(SAMPLE, return_tensors="pt").input_ids.to(policy.device)
        cost = kl_from_dense(dense, policy, ids)
        print(f"noise {settings.noise:g}: KL(dense || policy) = {cost:.4f} nats a token over {ids.shape[1]} tokens")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (settings,) = parse_settings((UpcycleSettings,), argv, stage="upcycle")
    print(f"upcycle: the policy is in {run(settings)}")
