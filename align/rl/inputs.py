"""What a PPO run is given: prompts and the reward that its settings describe."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from plumbline.align.data.rows import Messages, last_user_text, prompts_with_kinds, read_prompts
from plumbline.align.models.actors import Actors
from plumbline.align.rl.settings import PPOSettings
from plumbline.align.runtime.launch import pick_dtype
from plumbline.reward import CompositeReward, default_composite
from plumbline.reward.components.known import KIND_RISK, KnownHarm
from plumbline.rows import data_source
from plumbline.safety.input_filter.harm import load_harm_scanner


def read_prompt_files(settings: PPOSettings) -> tuple[list[Messages], list[Messages]]:
    """(prompts to train on, prompts to evaluate on); the latter are taken at even steps through their file.

    ValueError where `prompt_shares` names a kind that no prompt has.
    """
    source = data_source(settings.prompts_file)
    prompts = read_prompts(source)
    kinds = {kind for _, kind in prompts_with_kinds(source)} if settings.kind_shares else set()
    for kind, share in (settings.kind_shares or {}).items():
        if share and kind not in kinds:
            raise ValueError(
                f"prompt_shares={settings.prompt_shares!r}: {source} has no prompt of kind {kind!r}; "
                f"its rows say {', '.join(sorted(map(str, kinds)))}"
            )
    held_out = read_prompts(data_source(settings.eval_prompts_file)) if settings.eval_prompts_file else []
    count = min(settings.eval_prompts, len(held_out))
    return prompts, [held_out[at * len(held_out) // count] for at in range(count)]


def kinds_of(settings: PPOSettings, prompts: Sequence[Messages], kept: Sequence[Messages]) -> list[str | None]:
    """The kinds of those prompts of the settings' file (`prompts`, all of them) that were kept."""
    labelled = prompts_with_kinds(data_source(settings.prompts_file))
    of_prompt = {id(prompt): kind for prompt, (_, kind) in zip(prompts, labelled, strict=True)}
    return [of_prompt[id(prompt)] for prompt in kept]


def known_harm(settings: PPOSettings) -> dict[str, float]:
    """Risk by the text of each training prompt whose row says its kind; {} with `trust_kinds` false."""
    if not settings.trust_kinds:
        return {}
    return {
        last_user_text(prompt): KIND_RISK[kind]
        for prompt, kind in prompts_with_kinds(data_source(settings.prompts_file))
        if kind in KIND_RISK
    }


def rows_of_step(
    kinds: Sequence[str | None], step: int, count: int, *, seed: int, shares: dict[str, float] | None
) -> list[int]:
    """The rows of `count` prompts: a function of seed and step alone, so that a resumed run draws the same.

    Each pass over the prompts is shuffled anew and used up before the next begins; with `shares`, the prompts of each kind
    on their own. Shares that do not divide `count` are rounded so that no step is further than one row from them.
    """
    if shares is None:
        return _in_passes(range(len(kinds)), step * count, count, seed)
    rows: list[int] = []
    cumulative = 0.0
    for at, (kind, share) in enumerate(shares.items()):
        low, cumulative = round(cumulative * count), cumulative + share
        wanted = (count if at == len(shares) - 1 else round(cumulative * count)) - low
        of_kind = [row for row, k in enumerate(kinds) if k == kind]
        if wanted:
            rows += _in_passes(of_kind, step * wanted, wanted, seed + 7_919 * (at + 1))
    shuffle = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return [rows[i] for i in torch.randperm(len(rows), generator=shuffle).tolist()]


def _in_passes(rows: Sequence[int], first: int, count: int, seed: int) -> list[int]:
    n = len(rows)
    order: list[int] = []
    for epoch in range(first // n, (first + count - 1) // n + 1):
        shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += [rows[i] for i in torch.randperm(n, generator=shuffle).tolist()]
    start = first - (first // n) * n
    return order[start : start + count]


def build_reward(
    settings: PPOSettings, actors: Actors | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> CompositeReward:
    """The composite reward that the settings describe, not yet scaled.

    A reward model that is an adapter folder becomes a third adapter on the weights of `actors`.
    """
    labels = known_harm(settings)
    composite = default_composite(
        harm=KnownHarm(load_harm_scanner(), labels) if labels else None,
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
