"""Held-out evaluation of a PPO run, and the scale of its reward: what looks at the policy without training it."""

from typing import Any

import torch

from plumbline.align.rl.rollouts import pad_answers, texts_of
from plumbline.align.rl.watch import grader_watch
from plumbline.align.runtime.tracking import Metrics, sample_rows, write_rows
from plumbline.paths import resolve_path
from plumbline.reward import Scaling, statistics
from plumbline.reward.contracts import ask

PPO = Any  # the run of align/ppo.py, which imports this file


def evaluate(ppo: PPO, step: int, metrics: Metrics) -> dict[str, float]:
    """The same prompts and the same random draws each time; the random streams of training are not touched.

    Writes the answers with every part of their reward to `samples/`; {} without held-out prompts.
    """
    if not ppo.eval_prompts:
        return {}
    with metrics.phase("evaluate"):
        device = ppo.accelerator.device
        answers, texts = ppo.sample(ppo.eval_ids, torch.Generator(device).manual_seed(ppo.settings.seed + 1))
        prompts = texts_of(ppo.eval_prompts)
        reward = ppo.reward(ppo.eval_prompts, texts)
        fill = ppo.tokenizer.pad_token_id
        answer_ids = pad_answers([a.ids for a in answers], fill=fill, dtype=torch.long).to(device)
        keep = pad_answers([[1] * len(a.ids) for a in answers], fill=0, dtype=torch.bool).to(device)
        trunk = ppo.trunk(ppo.eval_ids, answer_ids, keep)
        logp, ref_logp, _, _ = ppo.log_probabilities(ppo.eval_ids, answer_ids, keep, trunk)
        graded = ask(ppo.grader, ppo.eval_prompts, texts) if ppo.grader else None
    rows = sample_rows(prompts, texts, reward, graded)
    watched = grader_watch(rows, ppo.run / "samples" / "step-000000.jsonl") if step else {}
    if ppo.accelerator.is_main_process:
        write_rows(ppo.run / "samples" / f"step-{step:06d}.jsonl", rows)
    measured = statistics(reward)
    return watched | {
        "eval/reward_mean": measured["reward/total_mean"],
        "eval/reward_std": measured["reward/total_std"],
        "eval/kl_per_answer": float((logp - ref_logp).masked_fill(~keep, 0.0).sum(dim=1).mean()),
        "eval/answer_tokens_mean": float(keep.sum(dim=1).float().mean()),
        "eval/finished_share": sum(a.finished for a in answers) / len(answers),
        **{
            f"eval/{name}_weighted_mean": measured[f"reward/{name}_weighted_mean"]
            for name in reward.parts.raw
            if f"reward/{name}_weighted_mean" in measured
        },
    }


def fit_scaling(ppo: PPO) -> None:
    """Scaling of the reward parts: from the file that was named, or fitted on answers of the reference."""
    settings, path = ppo.settings, ppo.run / "scaling.json"
    if settings.reward_scaling:
        ppo.reward.scaling = Scaling.load(resolve_path(settings.reward_scaling))
    elif settings.resume and path.exists():
        ppo.reward.scaling = Scaling.load(path)
    else:
        shuffle = torch.Generator().manual_seed(settings.seed + 3)  # alike on every rank
        rows = torch.randperm(len(ppo.prompts), generator=shuffle).tolist()[: settings.scaling_prompts]
        draws = torch.Generator(ppo.accelerator.device).manual_seed(settings.seed + 2)
        _, texts = ppo.sample([ppo.prompt_ids[r] for r in rows], draws, reference=True)
        ppo.reward.fit([ppo.prompts[r] for r in rows], texts)
    if ppo.accelerator.is_main_process:
        assert ppo.reward.scaling is not None
        ppo.reward.scaling.save(path)
