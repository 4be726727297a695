"""What a PPO run is given: prompts and the reward that its settings describe."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from plumbline.align.data.rows import Messages, read_prompts
from plumbline.align.models.actors import Actors
from plumbline.align.rl.settings import PPOSettings
from plumbline.align.runtime.launch import pick_dtype
from plumbline.reward import CompositeReward, default_composite
from plumbline.rows import data_source


def read_prompt_files(settings: PPOSettings) -> tuple[list[Messages], list[Messages]]:
    """(prompts to train on, prompts to evaluate on); the latter are taken at even steps through their file."""
    prompts = read_prompts(data_source(settings.prompts_file))
    held_out = read_prompts(data_source(settings.eval_prompts_file)) if settings.eval_prompts_file else []
    count = min(settings.eval_prompts, len(held_out))
    return prompts, [held_out[at * len(held_out) // count] for at in range(count)]


def build_reward(
    settings: PPOSettings, actors: Actors | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> CompositeReward:
    """The composite reward that the settings describe, not yet scaled.

    A reward model that is an adapter folder becomes a third adapter on the weights of `actors`.
    """
    composite = default_composite(
        alpha=settings.fluency_weight,
        beta=settings.relevance_weight,
        gamma=settings.safety_weight,
        delta=settings.toxicity_weight,
        fluency_source=settings.fluency_model,
    )
    if not settings.preference_weight:
        return composite
    from plumbline.reward.learned import LearnedPreference

    assert settings.reward_model is not None
    parts = [(part, composite.weights[name]) for name, part in composite.components.items()]
    shared = None
    if settings.shares_reward_model:
        assert actors is not None, "an adapter needs the weights that it is for"
        shared = actors.reward_model(Path(settings.reward_model))
    learned = LearnedPreference(
        settings.reward_model,
        model=shared,  # type: ignore[arg-type]
        tokenizer=tokenizer if shared else None,
        dtype=pick_dtype(settings.dtype),
    )
    return CompositeReward([*parts, (learned, settings.preference_weight)])


def check_sharding(settings: PPOSettings) -> None:
    """ValueError for settings that a run over sharded layers (`plumbline.align.parallel.sharding`) does not take."""
    refused = {
        "lora=true (adapters switch too often): set lora: false": settings.lora,
        f"optimizer={settings.optimizer!r}: set adamw": settings.optimizer != "adamw",
        f"gradient_rank={settings.gradient_rank} (FSDP2 adds gradients up itself): drop it": settings.gradient_rank,
        f"adaptive_clip={settings.adaptive_clip} (a shard does not know the norm of a row): drop it": settings.adaptive_clip,
        "dtype='float16': set bfloat16 or float32": pick_dtype(settings.dtype) == torch.float16,
    }
    for what, given in refused.items():
        if given:
            raise ValueError(
                f"PPO over sharded layers does not take {what}, or launch with configs/accelerate/ddp.yaml"
            )
