"""`plumbline upcycle`: a dense checkpoint becomes a Mixture-of-Experts policy that starts with the same function."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.launch import parse_settings, pick_dtype
from policy_models.loading import load_policy, load_tokenizer, model_summary
from policy_models.upcycling import upcycle


@dataclass(kw_only=True)
class UpcycleSettings:
    """Which layers get experts, and how many."""

    model: str = field(default="bundled:smollm2-135m-instruct", metadata={"help": "bundled name, folder or hub id"})
    output_dir: str = field(default="runs/policy", metadata={"help": "folder of the new model"})
    num_experts: int = field(default=4, metadata={"help": "experts in each chosen layer"})
    num_experts_per_tok: int = field(default=2, metadata={"help": "experts that each token is sent to"})
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
        seed=settings.seed,
    )
    folder = Path(settings.output_dir)
    policy.save_pretrained(folder)
    load_tokenizer(settings.model).save_pretrained(folder)
    print(model_summary(policy))
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (settings,) = parse_settings((UpcycleSettings,), argv)
    print(f"upcycle: the policy is in {run(settings)}")
