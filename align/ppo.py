"""PPO against a composite reward, on accelerate.

Launch: `accelerate launch align/ppo.py --config configs/ppo/debug.yaml`

One step, as numbered below:
 1. draw prompts, 2. sample answers, 3. score them, 4. log-probabilities under policy and reference, and values,
 5. token rewards, GAE, whitening, 6. clipped updates over a few epochs, 7. KL coefficient, log, evaluation, checkpoint.

Where this departs from the usual code: the score goes on the last token of the answer, not on the first pad; a loss is
a sum over the tokens of an optimizer step (all micro-batches, all ranks) over their number; advantages are whitened
over all ranks; gradients are added up over ranks once per optimizer step, so no rank waits inside a backward.
"""

import shutil
import sys
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from align.actors import CRITICS, Actors, ModelSettings, load_start
from align.advantages import gae, token_rewards, whiten
from align.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from align.kl_control import ESTIMATORS, KLController, kl_estimate
from align.launch import STARTER, open_run, parse_settings, pick_dtype, resolve_path
from align.losses import clipped_policy_loss, clipped_value_loss
from align.preferences import Messages, read_prompts
from align.rollouts import RolloutBatch, drop_long_prompts, pad_answers, texts_of
from align.tracking import Metrics, stop_on_non_finite, write_rows
from policy_models.chat import encode_prompts, sample_answers
from policy_models.loading import load_tokenizer, resolve_model_source
from policy_models.logprobs import answer_logprobs, pack_rows, token_budget_batches
from policy_models.router import router_load
from reward import CompositeReward, Reward, Scaling, default_composite, statistics

RewardFunction = Callable[[Sequence[str], Sequence[str]], Reward]


_AT_LEAST_ONE = (
    "steps rollouts_per_step minibatches ppo_epochs max_new_tokens max_prompt_tokens scaling_prompts keep_checkpoints"
).split()
_NOT_NEGATIVE = "policy_lr critic_lr critic_warmup_steps eval_every eval_prompts save_every missing_eos_penalty".split()
_ABOVE_ZERO = "temperature clip value_clip score_clip max_grad_norm".split()


@dataclass(kw_only=True)
class PPOSettings(ModelSettings):
    """Settings of a PPO run. Counts say "per what"; rewards are in standard deviations of the reference policy."""

    model: str = field(
        default="bundled:tiny-moe", metadata={"help": "where the run starts: bundled name, folder or hub id"}
    )
    output_dir: str = field(default="runs/ppo", metadata={"help": "run folder"})
    prompts_file: str = field(
        default=str(STARTER / "prompts.jsonl"), metadata={"help": "JSON Lines with a field prompt"}
    )
    eval_prompts_file: str | None = field(default=None, metadata={"help": "held-out prompts; none: no evaluation"})
    seed: int = field(default=0, metadata={"help": "of prompts, sampling and initialisation"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in output_dir"})

    steps: int = field(default=20, metadata={"help": "rollouts, each followed by its updates"})
    rollouts_per_step: int = field(default=64, metadata={"help": "prompts a step, all ranks together"})
    minibatches: int = field(default=2, metadata={"help": "optimizer steps per pass over the rollouts"})
    ppo_epochs: int = field(default=2, metadata={"help": "passes over the rollouts"})
    tokens_per_micro_batch: int = field(
        default=2048, metadata={"help": "prompt, answer and padding tokens of a forward"}
    )
    max_prompt_tokens: int = field(default=256, metadata={"help": "longer prompts are left out"})
    max_new_tokens: int = field(default=64, metadata={"help": "limit of an answer"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling and of every log-probability"})

    critic: str = field(
        default="own", metadata={"help": "own: adapter or copy with a head; head: a head on the reference"}
    )

    policy_lr: float = field(default=2e-4, metadata={"help": "AdamW, linear to 0 over the run"})
    critic_lr: float = field(default=5e-4, metadata={"help": "the same for the critic"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "of policy and of critic gradients, each"})
    clip: float = field(default=0.2, metadata={"help": "half-width of the ratio band"})
    value_clip: float = field(default=0.5, metadata={"help": "half-width of the value band, in reward units"})
    gamma: float = field(default=1.0, metadata={"help": "discount per token"})
    lam: float = field(default=0.95, metadata={"help": "lambda of GAE"})
    critic_warmup_steps: int = field(default=0, metadata={"help": "first steps in which only the critic is updated"})

    kl_coef: float = field(default=0.05, metadata={"help": "charge per nat of KL to the reference, in the reward"})
    kl_target: float | None = field(default=None, metadata={"help": "nats per answer; set: kl_coef adapts towards it"})
    kl_horizon: float = field(default=2000.0, metadata={"help": "answers over which kl_coef adapts"})
    kl_estimator: str = field(default="k1", metadata={"help": "k1, k2 or k3"})

    fluency_weight: float = field(default=1.0, metadata={"help": "alpha"})
    relevance_weight: float = field(default=1.0, metadata={"help": "beta"})
    safety_weight: float = field(default=1.0, metadata={"help": "gamma"})
    toxicity_weight: float = field(default=1.0, metadata={"help": "delta, subtracted"})
    preference_weight: float = field(default=0.0, metadata={"help": "of the learned reward model, if there is one"})
    reward_model: str | None = field(default=None, metadata={"help": "folder of a trained reward model"})
    fluency_model: str = field(default="bundled:smollm2-135m-instruct", metadata={"help": "frozen language model"})
    reward_scaling: str | None = field(default=None, metadata={"help": "scaling.json; none: fitted on the reference"})
    scaling_prompts: int = field(default=96, metadata={"help": "reference answers that fit the scaling"})
    score_clip: float = field(default=10.0, metadata={"help": "bound of a score before the KL charge"})
    missing_eos_penalty: float = field(default=1.0, metadata={"help": "subtracted from an answer without a stop token"})

    eval_every: int = field(default=10, metadata={"help": "steps between evaluations; 0: only first and last"})
    eval_prompts: int = field(default=64, metadata={"help": "prompts of an evaluation"})
    save_every: int = field(default=100, metadata={"help": "steps between checkpoints; 0: only the last"})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints that stay"})
    log_with: str | None = field(default=None, metadata={"help": "trackio, wandb or tensorboard beside metrics.jsonl"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for names, ok, rule in (
            (_AT_LEAST_ONE, lambda x: x >= 1, "must be at least 1"),
            (_NOT_NEGATIVE, lambda x: x >= 0, "must be at least 0"),
            (_ABOVE_ZERO, lambda x: x > 0, "must be above 0"),
            (("gamma", "lam"), lambda x: 0 <= x <= 1, "must be between 0 and 1"),
        ):
            for name in names:
                if not ok(getattr(self, name)):  # NaN fails every rule
                    raise ValueError(f"{name}={getattr(self, name)}: {rule}")
        if self.rollouts_per_step % self.minibatches:
            raise ValueError(
                f"{self.rollouts_per_step=} does not split into {self.minibatches=}; "
                "make the first a multiple of the second"
            )
        if self.critic not in CRITICS:
            raise ValueError(f"critic={self.critic!r}: must be one of {', '.join(CRITICS)}")
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(f"kl_estimator={self.kl_estimator!r}: must be one of {', '.join(ESTIMATORS)}")
        if self.tokens_per_micro_batch < self.max_prompt_tokens + self.max_new_tokens:
            raise ValueError(
                f"{self.tokens_per_micro_batch=} is below {self.max_prompt_tokens=} + {self.max_new_tokens=}: "
                "one row might not fit; raise the first or lower the others"
            )
        if self.preference_weight and not self.reward_model:
            raise ValueError(f"{self.preference_weight=} but no reward_model: name its folder or set the weight to 0")
        KLController(self.kl_coef, self.kl_target, self.kl_horizon)  # refuses what it cannot use


class PPO:
    """A run in progress: models, optimizer, KL controller, random streams. `main` drives it."""

    def __init__(
        self, settings: PPOSettings, accelerator: Accelerator, run: Path, reward: CompositeReward | None = None
    ):
        self.settings, self.accelerator, self.run = settings, accelerator, run
        if settings.rollouts_per_step % (accelerator.num_processes * settings.minibatches):
            raise ValueError(
                f"rollouts_per_step={settings.rollouts_per_step} does not split into {accelerator.num_processes} "
                f"processes x {settings.minibatches} minibatches; make it a multiple of their product"
            )
        prompts, eval_prompts = read_prompt_files(settings)
        set_seed(settings.seed)
        self.dtype = pick_dtype(settings.dtype)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(settings.model)
        self.prompts, self.prompt_ids = self._encode(prompts)
        self.eval_prompts, self.eval_ids = self._encode(eval_prompts)

        backbone = load_start(settings.model, dtype=settings.weight_dtype).to(accelerator.device)
        lora = settings.lora_config(backbone)
        autocast = torch.bfloat16 if self.dtype == torch.bfloat16 else None
        self.actors = Actors(backbone, lora=lora, critic=settings.critic, autocast=autocast)
        self.groups = [self.actors.policy_parameters(), self.actors.critic_parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.groups[0], "lr": settings.policy_lr},
                {"params": self.groups[1], "lr": settings.critic_lr},
            ],
            eps=1e-5,
            weight_decay=0.0,
        )
        total = settings.steps * settings.ppo_epochs * settings.minibatches
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda done: max(0.0, 1.0 - done / total))
        self.kl = KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        # ranks draw different answers and shuffle alike
        self.sampling = torch.Generator(accelerator.device).manual_seed(
            settings.seed + 100_003 * accelerator.process_index
        )
        self.reward = reward or build_reward(settings)

    def _encode(self, prompts: list[Messages]) -> tuple[list[Messages], list[list[int]]]:
        if not prompts:
            return [], []
        return drop_long_prompts(prompts, encode_prompts(self.tokenizer, prompts), self.settings.max_prompt_tokens)

    # 1. prompts -------------------------------------------------------------------------------------------------------

    def prompts_of_step(self, step: int) -> list[int]:
        """Indices of this rank's prompts: a function of seed and step alone, so that a resumed run draws the same.

        Each pass over the prompts is shuffled anew and used up before the next begins.
        """
        n, per_step = len(self.prompts), self.settings.rollouts_per_step
        first = step * per_step
        order: list[int] = []
        for epoch in range(first // n, (first + per_step - 1) // n + 1):
            shuffle = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            order += torch.randperm(n, generator=shuffle).tolist()
        start = first - (first // n) * n
        share = per_step // self.accelerator.num_processes
        mine = start + self.accelerator.process_index * share
        return order[mine : mine + share]

    # 2 - 4. rollout, score, log-probabilities, values -----------------------------------------------------------------

    def sample(self, ids: list[list[int]], generator: torch.Generator, *, reference: bool = False):
        """Answers of the policy, or of the reference, as tokens and texts."""
        with self.actors.reference() if reference else self.actors.policy() as model:
            return sample_answers(
                model,
                self.tokenizer,
                ids,
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                generator=generator,
            )

    def rollout(self, rows: list[int], metrics: Metrics) -> tuple[RolloutBatch, Reward]:
        """Steps 2 to 4 for the given prompts."""
        ids, prompts = [self.prompt_ids[r] for r in rows], texts_of([self.prompts[r] for r in rows])
        with metrics.phase("generate"):
            answers, texts = self.sample(ids, self.sampling)
        with metrics.phase("score"):
            reward = self.reward(prompts, texts)
        with metrics.phase("logprobs"):
            device = self.accelerator.device
            answer_ids = pad_answers([a.ids for a in answers], fill=self.tokenizer.pad_token_id, dtype=torch.long).to(
                device
            )
            keep = pad_answers([[1] * len(a.ids) for a in answers], fill=0, dtype=torch.bool).to(device)
            old_logp, ref_logp, old_value, ref_states = self.log_probabilities(ids, answer_ids, keep)
        batch = RolloutBatch(
            prompt_ids=ids,
            answer_ids=answer_ids,
            keep=keep,
            old_logp=old_logp,
            ref_logp=ref_logp,
            old_value=old_value,
            sample_logp=pad_answers([a.logp for a in answers], fill=0.0, dtype=torch.float32).to(device),
            ref_states=ref_states,
            prompts=prompts,
            answers=texts,
            finished=torch.tensor([a.finished for a in answers], device=device),
        )
        return batch, reward

    @torch.no_grad()
    def log_probabilities(
        self, ids: list[list[int]], answer_ids: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(policy log-probabilities, reference log-probabilities, values), each (B, R), and the reference's states.

        By the training forward, one model at a time over all micro-batches: switching adapters touches every layer.
        """
        s = self.settings
        groups = list(micro_batches(ids, keep, range(len(ids)), s.tokens_per_micro_batch))
        packs = [pack_rows(ids, answer_ids, keep, rows, self.tokenizer.pad_token_id) for rows in groups]
        policy, reference, value = (torch.zeros(keep.shape, device=keep.device) for _ in range(3))
        states: list[Tensor] | None = [] if s.critic == "head" else None
        with self.actors.policy() as model:
            for rows, pack in zip(groups, packs, strict=True):
                policy[rows, : pack.keep.shape[1]] = answer_logprobs(model, pack, temperature=s.temperature)[0]
        with self.actors.reference() as model:
            for rows, pack in zip(groups, packs, strict=True):
                logp, _ = answer_logprobs(model, pack, temperature=s.temperature, states_out=states)
                reference[rows, : pack.keep.shape[1]] = logp
        for at, (rows, pack) in enumerate(zip(groups, packs, strict=True)):
            value_BR = self.actors.values(pack, states[at] if states else None)
            value[rows, : pack.keep.shape[1]] = value_BR.masked_fill(~pack.keep, 0.0)
        if not states:
            return policy, reference, value, None
        all_states = torch.zeros(*keep.shape, states[0].shape[-1], device=keep.device)
        for rows, part in zip(groups, states, strict=True):
            all_states[rows, : part.shape[1]] = part
        return policy, reference, value, all_states

    # 5. advantages ----------------------------------------------------------------------------------------------------

    def advantages(self, batch: RolloutBatch, reward: Reward) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """(keep, whitened advantages, returns), each (B, R), and metrics. Rows without a total take no part."""
        s, device = self.settings, self.accelerator.device
        scored = torch.tensor([t is not None for t in reward.total], device=device)
        score = torch.tensor([t if t is not None else 0.0 for t in reward.total], device=device)
        # an answer that never ended is charged before the clip, and its tokens still count
        score = (score - s.missing_eos_penalty * (~batch.finished)).clamp(-s.score_clip, s.score_clip)
        score = score.masked_fill(~scored, 0.0)
        keep = batch.keep & scored[:, None]
        kl = kl_estimate(batch.old_logp, batch.ref_logp, s.kl_estimator).masked_fill(~keep, 0.0)
        rewards = token_rewards(score, kl, keep, kl_coef=self.kl.coef)
        advantage, returns = gae(rewards, batch.old_value, keep, gamma=s.gamma, lam=s.lam)
        white = whiten(advantage, keep, all_reduce=self.all_reduce)

        kl_B = kl_estimate(batch.old_logp, batch.ref_logp, "k1").masked_fill(~batch.keep, 0.0).sum(dim=1)
        unexplained = (returns - batch.old_value)[keep].double()
        totals = self.sum_over_ranks(
            {
                "answers": torch.tensor(len(batch)),
                "scored": scored.sum(),
                "kl": kl_B.sum(),
                "score": score.sum(),
                "reward": rewards.sum(),
                "finished": batch.finished.sum(),
                "tokens": batch.keep.sum(),
                "mismatch": (batch.old_logp - batch.sample_logp).abs().masked_fill(~batch.keep, 0.0).sum(),
                "kept": keep.sum(),
                "return": returns[keep].double().sum(),
                "return_squared": returns[keep].double().square().sum(),
                "unexplained": unexplained.sum(),
                "unexplained_squared": unexplained.square().sum(),
            }
        )
        answers, num_scored = totals["answers"], max(totals["scored"], 1.0)
        tokens, kept = max(totals["tokens"], 1.0), max(totals["kept"], 1.0)
        variance = totals["return_squared"] / kept - (totals["return"] / kept) ** 2
        residual = totals["unexplained_squared"] / kept - (totals["unexplained"] / kept) ** 2
        measured = {
            "objective/kl": totals["kl"] / answers,
            "objective/scores": totals["score"] / num_scored,
            "objective/rlhf_reward": totals["reward"] / num_scored,
            "objective/non_score_reward": (totals["reward"] - totals["score"]) / num_scored,
            "rollout/answer_tokens_mean": totals["tokens"] / answers,
            "rollout/answer_tokens_max": float(batch.keep.sum(dim=1).max()),
            "rollout/finished_share": totals["finished"] / answers,
            "rollout/logp_mismatch": totals["mismatch"] / tokens,
            "rollout/dropped_rows": answers - totals["scored"],
            "rollout/answers": answers,
            "rollout/answer_tokens": totals["tokens"],
            "val/explained_variance": 1.0 - residual / variance if variance > 0 else 0.0,
        }
        return keep, white, returns, measured

    def sum_over_ranks(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Scalars summed over all ranks, in one exchange."""
        flat = torch.stack([value.to(self.accelerator.device, torch.float64) for value in totals.values()])
        return dict(zip(totals, self.all_reduce(flat).tolist(), strict=True))

    # 6. updates -------------------------------------------------------------------------------------------------------

    def update(
        self, step: int, batch: RolloutBatch, keep: Tensor, advantage: Tensor, returns: Tensor
    ) -> dict[str, float]:
        """`ppo_epochs` passes of clipped updates; every row is used once a pass."""
        s = self.settings
        sums: dict[str, Tensor] = {}
        tokens_used = 0.0
        train_policy = step >= s.critic_warmup_steps
        shuffle = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
        for _epoch in range(s.ppo_epochs):
            order = torch.randperm(len(batch), generator=shuffle).tolist()
            for part in range(s.minibatches):
                rows = order[part :: s.minibatches]
                num_tokens = self.all_reduce(keep[rows].sum().double()).clamp(min=1.0)
                tokens_used += float(num_tokens)
                self._accumulate(batch, rows, keep, advantage, returns, num_tokens, train_policy, sums)
                self._optimizer_step(batch, rows, num_tokens, sums, train_policy)
        reduced = self.all_reduce(torch.stack([sums[name].double() for name in sorted(sums)])).tolist()
        means = dict(zip(sorted(sums), (value / tokens_used for value in reduced), strict=True))
        steps = s.ppo_epochs * s.minibatches
        ranks = self.accelerator.num_processes
        for name in ("policy/grad_norm", "value/grad_norm"):
            means[name] = means[name] * tokens_used / (steps * ranks)
        return means

    def _accumulate(self, batch, rows, keep, advantage, returns, num_tokens, train_policy, sums) -> None:
        """Adds the gradients of one minibatch, micro-batch by micro-batch; the sums for the log stay on the device."""
        s = self.settings
        groups = list(micro_batches(batch.prompt_ids, batch.keep, rows, s.tokens_per_micro_batch))
        packs = [
            pack_rows(batch.prompt_ids, batch.answer_ids, keep, group, self.tokenizer.pad_token_id) for group in groups
        ]

        def cut(x: Tensor, group: list[int], width: int) -> Tensor:
            return x[group][:, :width]

        def add(stats: dict[str, Tensor]) -> None:
            for name, value in stats.items():
                sums[name] = sums.get(name, torch.zeros((), device=keep.device)) + value.detach()

        if train_policy:
            with self.actors.policy() as model:
                for group, pack in zip(groups, packs, strict=True):
                    R = pack.keep.shape[1]
                    logp, entropy = answer_logprobs(model, pack, temperature=s.temperature)
                    loss, stats = clipped_policy_loss(
                        logp,
                        cut(batch.old_logp, group, R),
                        cut(advantage, group, R),
                        pack.keep,
                        clip=s.clip,
                        num_tokens=num_tokens,
                    )
                    loss.backward()
                    add({**stats, "policy/entropy": entropy.sum(), "policy/loss": loss * num_tokens})
        for group, pack in zip(groups, packs, strict=True):
            R = pack.keep.shape[1]
            states = None if batch.ref_states is None else batch.ref_states[group][:, :R]
            value = self.actors.values(pack, states)
            loss, stats = clipped_value_loss(
                value,
                cut(batch.old_value, group, R),
                cut(returns, group, R),
                pack.keep,
                clip=s.value_clip,
                num_tokens=num_tokens,
            )
            loss.backward()
            add({**stats, "value/loss": loss * num_tokens})

    def _optimizer_step(self, batch, rows, num_tokens, sums, train_policy: bool) -> None:
        norms = []
        for parameters in self.groups:
            self._add_up_gradients(parameters)
            norms.append(nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
        # one look at the device per optimizer step: a NaN anywhere in the window shows in a norm
        norm = float(norms[0] + norms[1])
        kept = {"prompt_ids": [batch.prompt_ids[r] for r in rows], "answer_ids": batch.answer_ids[rows]}
        stop_on_non_finite(self.run, "gradient norm (policy + critic)", norm, kept)
        if not train_policy:
            for parameter in self.groups[0]:
                parameter.grad = None
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in zip(("policy/grad_norm", "value/grad_norm"), norms, strict=True):
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()

    def _add_up_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sums gradients over ranks; a parameter that saw no token on this rank counts as 0."""
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float() for p in parameters]
        )
        flat = self.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype)

    def all_reduce(self, totals: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(totals, reduction="sum")

    # 7. evaluation, checkpoints ---------------------------------------------------------------------------------------

    def evaluate(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The same prompts and the same random draws each time; the random streams of training are not touched."""
        if not self.eval_prompts:
            return {}
        with metrics.phase("evaluate"):
            generator = torch.Generator(self.accelerator.device).manual_seed(self.settings.seed + 1)
            answers, texts = self.sample(self.eval_ids, generator)
            prompts = texts_of(self.eval_prompts)
            reward = self.reward(prompts, texts)
            answer_ids = pad_answers([a.ids for a in answers], fill=self.tokenizer.pad_token_id, dtype=torch.long)
            keep = pad_answers([[1] * len(a.ids) for a in answers], fill=0, dtype=torch.bool).to(
                self.accelerator.device
            )
            logp, ref_logp, _, _ = self.log_probabilities(self.eval_ids, answer_ids.to(keep.device), keep)
        if self.accelerator.is_main_process:
            rows = [
                {
                    "prompt": p,
                    "answer": a,
                    "total": t,
                    **{name: part[i] for name, part in reward.parts.weighted.items()},
                }
                for i, (p, a, t) in enumerate(zip(prompts, texts, reward.total, strict=True))
            ]
            write_rows(self.run / "samples" / f"step-{step:06d}.jsonl", rows)
        measured = statistics(reward)
        return {
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

    def fit_scaling(self) -> None:
        """Scaling of the reward parts: from the file that was named, or fitted on answers of the reference."""
        path = self.run / "scaling.json"
        if self.settings.reward_scaling:
            self.reward.scaling = Scaling.load(resolve_path(self.settings.reward_scaling))
        elif self.settings.resume and path.exists():
            self.reward.scaling = Scaling.load(path)
        else:
            rows = self.prompts_of_all()[: self.settings.scaling_prompts]
            generator = torch.Generator(self.accelerator.device).manual_seed(self.settings.seed + 2)
            _, texts = self.sample([self.prompt_ids[r] for r in rows], generator, reference=True)
            self.reward.fit(texts_of([self.prompts[r] for r in rows]), texts)
        if self.accelerator.is_main_process:
            assert self.reward.scaling is not None
            self.reward.scaling.save(path)

    def prompts_of_all(self) -> list[int]:
        """All prompts in one fixed shuffled order, alike on every rank."""
        return torch.randperm(
            len(self.prompts), generator=torch.Generator().manual_seed(self.settings.seed + 3)
        ).tolist()

    @torch.no_grad()
    def expert_metrics(self, batch: RolloutBatch) -> dict[str, Any]:
        """Share of each expert in every layer that has experts, pads left out; empty for a dense model."""
        if not getattr(self.actors.lm.config, "num_experts", 0):
            return {}
        rows = next(
            micro_batches(batch.prompt_ids, batch.keep, range(len(batch)), self.settings.tokens_per_micro_batch)
        )
        pack = pack_rows(batch.prompt_ids, batch.answer_ids, batch.keep, rows, self.tokenizer.pad_token_id)
        with self.actors.policy() as model:
            logits = model.base_model(
                input_ids=pack.input_ids,
                attention_mask=pack.attention_mask,
                position_ids=pack.position_ids,
                output_router_logits=True,
                use_cache=False,
            ).router_logits
        chosen = [layer.topk(model.config.num_experts_per_tok, dim=-1).indices for layer in logits]
        load = router_load(logits, chosen, pack.attention_mask.bool())
        layers = getattr(self.actors.lm.config, "moe_layers", None) or list(range(len(logits)))
        return {"moe/load": load.share_LE.tolist(), "moe/layers": layers, **load.metrics()}

    def state(self) -> dict[str, Any]:
        """All that changes during a run."""
        return {
            "actors": self.actors.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "kl": self.kl.state_dict(),
            "sampling": self.sampling.get_state(),
            "rng": rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes a run up where `state` left it."""
        self.actors.load_state_dict(state["actors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.kl.load_state_dict(state["kl"])
        self.sampling.set_state(state["sampling"])
        set_rng_state(state["rng"])


def micro_batches(
    prompt_ids: Sequence[Sequence[int]], keep: Tensor, rows: Sequence[int], budget: int
) -> Iterator[list[int]]:
    """Groups of the given rows whose packed form holds at most `budget` tokens."""
    prompt_lengths = [len(prompt_ids[row]) for row in rows]
    for group in token_budget_batches(prompt_lengths, keep[list(rows)].sum(dim=1).tolist(), budget):
        yield [rows[at] for at in group]


def read_prompt_files(settings: PPOSettings) -> tuple[list[Messages], list[Messages]]:
    """(prompts to train on, prompts to evaluate on); the latter are taken at even steps through their file."""
    prompts = read_prompts(resolve_path(settings.prompts_file))
    held_out = read_prompts(resolve_path(settings.eval_prompts_file)) if settings.eval_prompts_file else []
    count = min(settings.eval_prompts, len(held_out))
    return prompts, [held_out[at * len(held_out) // count] for at in range(count)]


def build_reward(settings: PPOSettings) -> CompositeReward:
    """The composite reward that the settings describe, not yet scaled."""
    composite = default_composite(
        alpha=settings.fluency_weight,
        beta=settings.relevance_weight,
        gamma=settings.safety_weight,
        delta=settings.toxicity_weight,
        fluency_source=settings.fluency_model,
    )
    if not settings.preference_weight:
        return composite
    from reward.learned import LearnedPreference

    assert settings.reward_model is not None
    learned = LearnedPreference(settings.reward_model, dtype=pick_dtype(settings.dtype))
    parts = [(part, composite.weights[name]) for name, part in composite.components.items()]
    return CompositeReward([*parts, (learned, settings.preference_weight)])


def train(settings: PPOSettings, *, reward: CompositeReward | None = None) -> Path:
    """Runs PPO and returns the run folder. `reward` replaces the composite that the settings describe."""
    accelerator = Accelerator(log_with=settings.log_with, project_dir=settings.output_dir)
    read_prompt_files(settings)  # bad rows show before a model is built, loaded or downloaded
    resolve_model_source(settings.model)
    if reward is None:
        if settings.fluency_weight:
            resolve_model_source(settings.fluency_model)
        if settings.preference_weight and settings.reward_model:
            resolve_model_source(settings.reward_model)
    run = open_run(settings.output_dir, settings) if accelerator.is_main_process else Path(settings.output_dir)
    if accelerator.is_main_process and not settings.resume:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # of an older run: a later resume must not take them up
    accelerator.wait_for_everyone()
    checkpoint = latest_checkpoint(run, num_ranks=accelerator.num_processes) if settings.resume else None
    ppo = PPO(settings, accelerator, run, reward)
    metrics = Metrics(run, enabled=accelerator.is_main_process)
    if settings.log_with:
        accelerator.init_trackers("plumbline")
    first = 0
    ppo.fit_scaling()
    if checkpoint:
        first, state = load_checkpoint(checkpoint, rank=accelerator.process_index)
        ppo.restore(state)
    metrics.start_at(first)

    bar = tqdm(
        range(first, settings.steps),
        initial=first,
        total=settings.steps,
        desc="ppo",
        disable=not accelerator.is_main_process,
    )
    for step in bar:
        row: dict[str, Any] = {"step": step, "episode": step * settings.rollouts_per_step}
        if step == 0 or (settings.eval_every and step % settings.eval_every == 0):
            row |= ppo.evaluate(step, metrics)
        batch, scored = ppo.rollout(ppo.prompts_of_step(step), metrics)
        keep, advantage, returns, measured = ppo.advantages(batch, scored)
        row |= statistics(scored) | measured | ppo.expert_metrics(batch) | {"kl_coef": ppo.kl.coef}
        with metrics.phase("update"):
            row |= trl_names(ppo.update(step, batch, keep, advantage, returns))
        ppo.kl.update(measured["objective/kl"], settings.rollouts_per_step)
        row["lr"] = ppo.scheduler.get_last_lr()[0]
        bar.set_postfix(score=f"{measured['objective/scores']:.2f}", kl=f"{measured['objective/kl']:.2f}")
        last = step + 1 == settings.steps
        if last or (settings.save_every and (step + 1) % settings.save_every == 0):
            save_checkpoint(run, step + 1, ppo.state(), rank=accelerator.process_index)
            accelerator.wait_for_everyone()  # every rank's file is there before an older step goes
            if accelerator.is_main_process:
                prune_checkpoints(run, keep_last=settings.keep_checkpoints)
        row = metrics.write(row)
        if settings.log_with:
            accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)
    final = {"step": settings.steps, "episode": settings.steps * settings.rollouts_per_step}
    metrics.write(final | ppo.evaluate(settings.steps, metrics))
    if accelerator.is_main_process:
        ppo.actors.save_policy(run / "model")
        ppo.tokenizer.save_pretrained(run / "model")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def trl_names(sums: dict[str, float]) -> dict[str, float]:
    """Means over kept tokens under the names that TRL's PPO logged, where there is one."""
    names = {
        "policy/loss": "loss/policy_avg",
        "value/loss": "loss/value_avg",
        "policy/approx_kl": "policy/approxkl_avg",
        "policy/clip_fraction": "policy/clipfrac_avg",
        "value/clip_fraction": "val/clipfrac_avg",
        "policy/entropy": "objective/entropy",
        "policy/ratio": "val/ratio",
    }
    return {names.get(name, name): value for name, value in sums.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    (settings,) = parse_settings((PPOSettings,), argv)
    run = train(settings)
    print(f"ppo: finished, the policy is in {run / 'model'}")


if __name__ == "__main__":
    main()
