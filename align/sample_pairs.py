"""Preference pairs from a model's own answers, ranked by the composite reward: the best and the worst of n a prompt.

Launch: `accelerate launch align/sample_pairs.py --config configs/ppo/debug.yaml --answers_per_prompt 2`

What DPO needs to be a baseline for PPO: trained on pairs that people wrote, it optimises their taste; on these it
optimises the very reward that PPO is given, offline (Dong et al. 2024, arXiv:2405.07863, one iteration). It reads the
settings of a PPO run, so that model, prompts, sampling and reward are the same. What the run leaves:
`pairs.jsonl`     prompt, chosen, rejected, margin (difference of the rewards), as every stage reads them
`scaling.json`    scaling of the reward parts, fitted on all these answers: hand it to PPO as `reward_scaling`
"""

import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from plumbline.align.data.rows import Messages, last_user_text, read_prompts
from plumbline.align.models.start import load_start
from plumbline.align.rl.inputs import build_reward
from plumbline.align.rl.rollouts import drop_long_prompts
from plumbline.align.rl.settings import PPOSettings
from plumbline.align.runtime.launch import open_run, parse_settings, pick_dtype
from plumbline.align.runtime.tracking import write_rows
from plumbline.paths import resolve_path
from plumbline.policy_models.chat import encode_prompts, sample_answers
from plumbline.policy_models.devices import default_device
from plumbline.policy_models.loading import load_tokenizer, resolve_model_source
from plumbline.reward import CompositeReward


@dataclass(kw_only=True)
class PairSettings(PPOSettings):
    """A PPO run's settings; of them count model, prompts, sampling, reward, scaling and seed. And:"""

    answers_per_prompt: int = field(default=4, metadata={"help": "answers to each prompt, at least 2"})
    pair_prompts: int = field(default=64, metadata={"help": "prompts, drawn from prompts_file"})
    min_margin: float = field(default=0.5, metadata={"help": "smaller differences of reward make no pair"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers_per_prompt < 2:
            raise ValueError(f"answers_per_prompt={self.answers_per_prompt}: must be at least 2 to make a pair")
        if self.pair_prompts < 1:
            raise ValueError(f"pair_prompts={self.pair_prompts}: must be at least 1")
        if not self.min_margin >= 0:
            raise ValueError(f"min_margin={self.min_margin}: must be at least 0")
        if self.shares_reward_model:
            raise ValueError(f"reward_model={self.reward_model}: an adapter; name the merged folder of the same run")


def sample_pairs(settings: PairSettings, *, reward: CompositeReward | None = None) -> Path:
    """Samples, scores, pairs and returns the run folder. `reward` replaces the one that the settings describe."""
    prompts = read_prompts(resolve_path(settings.prompts_file))
    for source in (settings.model, settings.reward_model if settings.preference_weight else None):
        if source:
            resolve_model_source(source)
    run = open_run(settings.output_dir, settings)
    tokenizer = load_tokenizer(settings.model)
    prompts, ids = drop_long_prompts(prompts, encode_prompts(tokenizer, prompts), settings.max_prompt_tokens)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    rows = [row for row in order[: settings.pair_prompts] for _ in range(settings.answers_per_prompt)]
    model: Any = load_start(settings.model, dtype=pick_dtype(settings.dtype))
    model.to(default_device())
    _, answers = sample_answers(
        model,
        tokenizer,
        [ids[row] for row in rows],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        generator=torch.Generator(model.device).manual_seed(settings.seed),
    )
    reward = reward or build_reward(settings)
    raw = reward.raw([last_user_text(prompts[row]) for row in rows], answers)
    reward.fit_raw(raw).save(run / "scaling.json")
    pairs = best_and_worst([prompts[row] for row in rows], answers, reward.combine(raw).total, settings)
    if not pairs:
        raise ValueError(
            f"no prompt has two answers whose rewards differ by min_margin={settings.min_margin}; "
            "lower it, raise answers_per_prompt or the temperature"
        )
    write_rows(run / "pairs.jsonl", pairs)
    return run


def best_and_worst(
    prompts: Sequence[Messages], answers: Sequence[str], totals: Sequence[float | None], settings: PairSettings
) -> list[dict[str, Any]]:
    """One row a prompt whose best and worst answer differ in text and by `min_margin`; answers to a prompt stand
    together. Blank answers and answers without a reward take no part.
    """
    pairs = []
    n = settings.answers_per_prompt
    for first in range(0, len(answers), n):
        known = [(t, at) for at in range(first, first + n) if (t := totals[at]) is not None and answers[at].strip()]
        if not known:
            continue
        (low, worst), (high, best) = min(known), max(known)
        if high - low >= settings.min_margin and answers[best].strip() != answers[worst].strip():
            chosen, rejected = answers[best], answers[worst]
            pairs.append({"prompt": prompts[first], "chosen": chosen, "rejected": rejected, "margin": high - low})
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    (settings,) = parse_settings((PairSettings,), argv, stage="ppo")
    run = sample_pairs(settings)
    count = sum(1 for _ in (run / "pairs.jsonl").open(encoding="utf-8"))
    print(f"sample_pairs: finished, {count} pairs of {settings.pair_prompts} prompts in {run / 'pairs.jsonl'}")


if __name__ == "__main__":
    main()
