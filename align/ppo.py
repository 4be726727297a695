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

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from plumbline.align.data.rows import Messages
from plumbline.align.models.actors import Actors
from plumbline.align.models.start import load_start
from plumbline.align.parallel.gradient_compression import PowerSGD
from plumbline.align.parallel.sharding import asks_for_shards, mesh_of, whole
from plumbline.align.rl.evaluation import evaluate, fit_scaling
from plumbline.align.rl.inputs import build_reward, check_sharding, kinds_of, read_prompt_files, rows_of_step
from plumbline.align.rl.kl_control import KLController
from plumbline.align.rl.losses import clipped_policy_loss, clipped_value_loss, kl_loss, like
from plumbline.align.rl.rollout_server import RolloutServer
from plumbline.align.rl.rollouts import RolloutBatch, encode_fitting, micro_batches, pad_answers, texts_of
from plumbline.align.rl.settings import PPOSettings
from plumbline.align.rl.signals import over_ranks, signals
from plumbline.align.rl.watch import Grader, rollout_watch
from plumbline.align.runtime.checkpoints import (
    catch_sigterm,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from plumbline.align.runtime.launch import (
    claim_run,
    disk_faults,
    launched,
    open_run,
    parse_settings,
    pick_dtype,
    replacing,
)
from plumbline.align.runtime.optimizers import (
    FallingRate,
    add_up_gradients,
    build_optimizer,
    clip_adaptively,
    clip_gradients,
)
from plumbline.align.runtime.resuming import check_same_run, planned_steps, stamp
from plumbline.align.runtime.tracking import Metrics, expert_load, speed, stop_on_non_finite, trl_names
from plumbline.eval.gates.after_training import gate_suites, run_gates
from plumbline.paths import resolve_path
from plumbline.policy_models.chat import sample_answers, stop_ids
from plumbline.policy_models.loading import load_tokenizer, model_summary, resolve_model_source
from plumbline.policy_models.logprobs import PackedRows, Trunk, answer_logprobs, pack_rows
from plumbline.policy_models.rollout.memory import tune_cpu_memory
from plumbline.reward import CompositeReward, Reward, statistics
from plumbline.reward.learned import LearnedPreference


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
        if settings.rollouts_per_step % (accelerator.num_processes * settings.answers_per_prompt):
            raise ValueError(
                f"rollouts_per_step={settings.rollouts_per_step} does not split into {accelerator.num_processes} "
                f"processes x {settings.answers_per_prompt} answers per prompt; make it a multiple of their product"
            )
        prompts, eval_prompts = read_prompt_files(settings)
        url = settings.rollout_server
        self.server = RolloutServer(url, accelerator, adapters=run / "rollout_adapters") if url else None
        set_seed(settings.seed)
        self.dtype = pick_dtype(settings.dtype)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(settings.model)
        self.prompts, self.prompt_ids = self._encode(prompts, "ppo")
        self.kinds = kinds_of(settings, prompts, self.prompts)
        self.eval_prompts, self.eval_ids = self._encode(eval_prompts, "ppo: eval_prompts_file")

        mesh = mesh_of(accelerator)
        backbone = load_start(settings.model, dtype=settings.weight_dtype, quantise=settings.quantise)
        if mesh is None:  # else shards go there layer by layer: no device ever holds the whole
            backbone = backbone.to(accelerator.device)
        lora = settings.lora_config(backbone)
        autocast = None if self.dtype == torch.float32 else self.dtype
        self.actors = Actors(
            backbone,
            lora=lora,
            critic=settings.critic if settings.has_critic else "none",
            autocast=autocast,
            num_values=2 if settings.cost_component else 1,
            gradient_checkpointing=settings.gradient_checkpointing,
            mesh=mesh,
        )
        if accelerator.is_main_process:
            print(f"ppo: {model_summary(self.actors.lm)}")
        self.groups = [self.actors.policy_parameters(), self.actors.critic_parameters()]
        rates = (settings.policy_lr, settings.critic_lr)
        self.optimizer = build_optimizer(settings.optimizer, list(zip(self.groups, rates, strict=True)))
        # float16 has too few exponents for small gradients: the loss is scaled up, by less after each overflow
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=self.dtype == torch.float16)
        self.compression = PowerSGD(settings.gradient_rank) if settings.gradient_rank else None
        self.rate = FallingRate(settings.steps * settings.ppo_epochs * settings.minibatches)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.kl = KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.lagrangian = settings.lagrangian()
        # ranks draw different answers and shuffle alike
        self.sampling = torch.Generator(accelerator.device).manual_seed(
            settings.seed + 100_003 * accelerator.process_index
        )
        self.reward = reward or build_reward(settings, self.actors, self.tokenizer)
        self.grader: Grader | None = (
            LearnedPreference(settings.grader_model, dtype=self.dtype) if settings.grader_model else None
        )
        if settings.cost_component and settings.cost_component not in self.reward.weights:
            raise ValueError(
                f"cost_component={settings.cost_component!r} is no part of the reward; "
                f"choose one of {', '.join(self.reward.weights)}"
            )

    def _encode(self, prompts: list[Messages], what: str) -> tuple[list[Messages], list[list[int]]]:
        if not prompts:
            return [], []
        return encode_fitting(self.tokenizer, prompts, self.settings.max_prompt_tokens, what=what)

    def step(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """One rollout and its updates, steps 1 to 7 but for evaluation and checkpoint; returns the row for the log."""
        batch, scored = self.rollout(self.prompts_of_step(step), metrics)
        keep, advantage, returns, measured = self.advantages(batch, scored)
        if self.server is not None:
            self.server.check(measured["rollout/logp_mismatch"])
        row = statistics(over_ranks(scored, self.accelerator)) | measured
        row |= self.expert_metrics(batch) | {"kl_coef": self.kl.coef}
        row |= rollout_watch(scored.total, batch.answers, batch.answer_lengths())
        row["rollout/prompt_tokens"] = sum(map(len, batch.prompt_ids))
        with metrics.phase("update"):
            row |= trl_names(self.update(step, batch, keep, advantage, returns))
        self.kl.update(measured["objective/kl"], self.settings.rollouts_per_step)
        if self.lagrangian is not None:
            spread = self.reward.scaling.std[str(self.settings.cost_component)] if self.reward.scaling else 1.0
            self.lagrangian.update(measured["lagrangian/cost"], unit=spread)
        return row | {"lr": self.scheduler.get_last_lr()[0]}

    # 1. prompts -------------------------------------------------------------------------------------------------------

    def prompts_of_step(self, step: int) -> list[int]:
        """Indices of this rank's prompts (`plumbline.align.rl.inputs.rows_of_step`)."""
        s, answers_each = self.settings, self.settings.answers_per_prompt
        per_step = s.rollouts_per_step // answers_each
        rows = rows_of_step(self.kinds, step, per_step, seed=s.seed, shares=s.kind_shares)
        share = per_step // self.accelerator.num_processes
        mine = self.accelerator.process_index * share
        return [row for row in rows[mine : mine + share] for _ in range(answers_each)]

    # 2 - 4. rollout, score, log-probabilities, values -----------------------------------------------------------------

    def sample(self, ids: list[list[int]], generator: torch.Generator, *, reference: bool = False):
        """Answers of the policy, or of the reference, as tokens and texts."""
        asked: dict[str, Any] = {
            "max_new_tokens": self.settings.max_new_tokens,
            "temperature": self.settings.temperature,
            "generator": generator,
        }
        if self.server is not None:
            served = self.server.base if reference else self.server.hand_over(self.actors.save_policy)
            answers = self.server.generate(served, ids, stop_ids=stop_ids(self.actors.lm, self.tokenizer), **asked)
            return answers, self.tokenizer.batch_decode([a.ids for a in answers], skip_special_tokens=True)
        with self.actors.reference() if reference else self.actors.policy() as model, whole(model):
            return sample_answers(model, self.tokenizer, ids, **asked)

    def rollout(self, rows: list[int], metrics: Metrics) -> tuple[RolloutBatch, Reward]:
        """Steps 2 to 4 for the given prompts."""
        ids, prompts = [self.prompt_ids[r] for r in rows], [self.prompts[r] for r in rows]
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
            sample_logp = pad_answers([a.logp for a in answers], fill=0.0, dtype=torch.float32).to(device)
            trunk = self.trunk(ids, answer_ids, keep)
            as_drawn = sample_logp if self.settings.old_logp == "rollout" else None
            old_logp, ref_logp, old_value, ref_states = self.log_probabilities(
                ids, answer_ids, keep, trunk, policy_logp=as_drawn
            )
        batch = RolloutBatch(
            prompt_ids=ids,
            answer_ids=answer_ids,
            keep=keep,
            old_logp=old_logp,
            ref_logp=ref_logp,
            old_value=old_value,
            sample_logp=sample_logp,
            trunk=trunk,
            ref_states=ref_states,
            prompts=texts_of(prompts),
            answers=texts,
            finished=torch.tensor([a.finished for a in answers], device=device),
        )
        return batch, reward

    def packs(
        self, ids: list[list[int]], answer_ids: Tensor, keep: Tensor, rows: Sequence[int], trunk: Trunk | None = None
    ) -> list[tuple[list[int], PackedRows]]:
        """(rows, packed) of each micro-batch that the given rows make."""
        groups = micro_batches(ids, keep, rows, self.settings.tokens_per_micro_batch)
        return [(g, pack_rows(ids, answer_ids, keep, g, self.tokenizer.pad_token_id, trunk)) for g in groups]

    def trunk(self, ids: list[list[int]], answer_ids: Tensor, keep: Tensor) -> Trunk | None:
        """What the layers below the first adapter make of the rollout, for every forward of this step."""
        packs = self.packs(ids, answer_ids, keep, range(len(ids)))
        return self.actors.trunk([pack for _, pack in packs], [rows for rows, _ in packs])

    def log_probabilities(
        self,
        ids: list[list[int]],
        answer_ids: Tensor,
        keep: Tensor,
        trunk: Trunk | None = None,
        *,
        policy_logp: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(policy log-probabilities, reference log-probabilities, values), each (B, R), and the reference's states.

        By the training forward; with `policy_logp` the first is that, and takes no forward.
        """
        packs = self.packs(ids, answer_ids, keep, range(len(ids)), trunk)
        return self.actors.measure(packs, keep, temperature=self.settings.temperature, policy_logp=policy_logp)

    # 5. advantages ----------------------------------------------------------------------------------------------------

    def advantages(self, batch: RolloutBatch, reward: Reward) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """(keep, advantages, returns) and metrics, by `plumbline.align.rl.signals`."""
        made = signals(
            batch,
            reward,
            settings=self.settings,
            weights=self.reward.weights,
            kl_coef=self.kl.coef,
            lagrangian=self.lagrangian,
            all_reduce=self.all_reduce,
        )
        return made.keep, made.advantage, made.returns, made.measured

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
        orders = [torch.randperm(len(batch), generator=shuffle).tolist() for _ in range(s.ppo_epochs)]
        plan = [order[part :: s.minibatches] for order in orders for part in range(s.minibatches)]
        taken = 0
        for rows in plan:
            taken += 1
            num_tokens = self.all_reduce(keep[rows].sum().double()).clamp(min=1.0)
            tokens_used += float(num_tokens)
            kl_before = sums.get("policy/approx_kl", torch.zeros((), device=keep.device))
            self._accumulate(batch, rows, keep, advantage, returns, num_tokens, train_policy, sums)
            self._optimizer_step(batch, rows, num_tokens, sums, train_policy)
            if s.target_kl is not None and train_policy:  # from sums over ranks, so that all stop or none
                moved = self.all_reduce((sums["policy/approx_kl"] - kl_before).double()) / num_tokens
                if float(moved) > s.target_kl:
                    break
        for _ in plan[taken:]:  # the rate falls with the rollouts, whether or not all updates were made
            self.scheduler.step()
        reduced = self.all_reduce(torch.stack([sums[name].double() for name in sorted(sums)])).tolist()
        means = dict(zip(sorted(sums), (value / tokens_used for value in reduced), strict=True))
        ranks = self.accelerator.num_processes
        for name in ("policy/grad_norm", "value/grad_norm"):
            means[name] = means[name] * tokens_used / (taken * ranks)
        if s.target_kl is not None:
            means["policy/optimizer_steps"] = taken
        if self.scaler.is_enabled():
            means["policy/loss_scale"] = self.scaler.get_scale()
        return means

    def _accumulate(self, batch, rows, keep, advantage, returns, num_tokens, train_policy, sums) -> None:
        """Adds the gradients of one minibatch, micro-batch by micro-batch; the sums for the log stay on the device."""
        s = self.settings
        packs = self.fill_up(self.packs(batch.prompt_ids, batch.answer_ids, keep, rows, batch.trunk))

        def cut(x: Tensor, group: list[int], width: int) -> Tensor:
            return x[group][:, :width]

        def add(stats: dict[str, Tensor]) -> None:
            for name, value in stats.items():
                sums[name] = sums.get(name, torch.zeros((), device=keep.device)) + value.detach()

        if train_policy:
            with self.actors.policy() as model:
                for group, pack in packs:
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
                    if s.kl_in == "loss":
                        near = kl_loss(
                            logp, cut(batch.ref_logp, group, R), pack.keep, kind=s.kl_estimator, num_tokens=num_tokens
                        )
                        loss = loss + self.kl.coef * near
                        stats["policy/kl_loss"] = near * num_tokens
                    self.scaler.scale(loss).backward()
                    add({**stats, "policy/entropy": entropy.sum(), "policy/loss": loss * num_tokens})
        for group, pack in packs if self.actors.critic != "none" else []:
            R = pack.keep.shape[1]
            states = None if batch.ref_states is None else batch.ref_states[group][:, :R]
            value = self.actors.values(pack, states)
            loss, stats = clipped_value_loss(
                value,
                cut(batch.old_value, group, R),
                cut(returns, group, R),
                like(pack.keep, value),
                clip=s.value_clip,
                num_tokens=num_tokens,
            )
            self.scaler.scale(loss).backward()
            add({**stats, "value/loss": loss * num_tokens})

    def _optimizer_step(self, batch, rows, num_tokens, sums, train_policy: bool) -> None:
        norms = []
        if self.accelerator.num_processes > 1:
            parameters = [*self.groups[0], *self.groups[1]]
            if self.compression is None:
                add_up_gradients(parameters, self.all_reduce)
            else:
                self.compression.add_up(parameters, self.all_reduce)
        self.scaler.unscale_(self.optimizer)
        for parameters in self.groups:
            if self.settings.adaptive_clip is not None:
                clip_adaptively(parameters, self.settings.adaptive_clip)
            norms.append(clip_gradients(parameters, self.settings.max_grad_norm))
        # one look at the device per optimizer step: a NaN anywhere in the window shows in a norm
        norm = float(norms[0] + norms[1])
        kept = {"prompt_ids": [batch.prompt_ids[r] for r in rows], "answer_ids": batch.answer_ids[rows]}
        if self.scaler.get_scale() <= 1:  # without scaling this is 1; below it a smaller scale cannot help
            stop_on_non_finite(self.run, "gradient norm (policy + critic)", norm, kept)
        if not train_policy:
            for parameter in self.groups[0]:
                parameter.grad = None
        self.scaler.step(self.optimizer)  # leaves the step out after an overflow
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in zip(("policy/grad_norm", "value/grad_norm"), norms, strict=True):
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()

    def fill_up(self, packs: list[tuple[list[int], PackedRows]]) -> list[tuple[list[int], PackedRows]]:
        """As many packs as on the rank that has most: layers that are sharded wait for all ranks. What fills up keeps no token."""
        if not self.actors.sharded:
            return packs
        most = int(self.accelerator.gather(torch.tensor([len(packs)], device=self.accelerator.device)).max())
        group, last = packs[-1]
        nothing = replace(last, keep=torch.zeros_like(last.keep))
        return packs + [(group, nothing)] * (most - len(packs))

    def all_reduce(self, totals: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(totals, reduction="sum")

    # 7. evaluation is in align/rl/evaluation.py; checkpoints -----------------------------------------------------------

    def expert_metrics(self, batch: RolloutBatch) -> dict[str, Any]:
        """Load of each expert over the first micro-batch; empty for a dense model."""
        if not getattr(self.actors.lm.config, "num_experts", 0):
            return {}
        (_, pack), *_ = self.packs(batch.prompt_ids, batch.answer_ids, batch.keep, range(len(batch)))
        with self.actors.policy() as model:
            return expert_load(model, pack)

    def state(self) -> dict[str, Any]:
        """All that changes during a run."""
        return {
            "actors": self.actors.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch, "rate": self.rate.state_dict()},
            "scaler": self.scaler.state_dict(),
            "compression": self.compression.state_dict() if self.compression else {},
            "kl": self.kl.state_dict(),
            "lagrangian": self.lagrangian.state_dict() if self.lagrangian else {},
            "sampling": self.sampling.get_state(),
            "rng": rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes a run up where `state` left it."""
        self.actors.load_state_dict(state["actors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.rate.go_on(state["scheduler"].get("rate"), at=self.scheduler.last_epoch)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.compression:
            self.compression.load_state_dict(state["compression"])
        self.kl.load_state_dict(state["kl"])
        if self.lagrangian:
            self.lagrangian.load_state_dict(state["lagrangian"])
        self.sampling.set_state(state["sampling"])
        set_rng_state(state["rng"])


def train(settings: PPOSettings, *, reward: CompositeReward | None = None) -> Path:
    """Runs PPO and returns the run folder. `reward` replaces the composite that the settings describe."""
    accelerator = Accelerator(log_with=settings.log_with, project_dir=settings.output_dir)
    if asks_for_shards(accelerator):
        check_sharding(settings)
    if accelerator.device.type == "cpu":
        tune_cpu_memory()
    prompts, _ = read_prompt_files(settings)  # bad rows show before a model is built, loaded or downloaded
    resolve_model_source(settings.model)
    if settings.gate:
        gate_suites(settings.gate)
    if reward is None:
        if settings.fluency_weight:
            resolve_model_source(settings.fluency_model)
        if settings.preference_weight and settings.reward_model and not settings.shares_reward_model:
            resolve_model_source(settings.reward_model)
    run = Path(settings.output_dir)
    what = run_stamp(settings, prompts, own_reward=reward is not None)
    checkpoint = checkpoint_of(settings, run, what, accelerator.num_processes) if settings.resume else None
    lock = claim_run(run)  # held until this function ends
    if accelerator.is_main_process:
        open_run(run, settings)
    if accelerator.is_main_process and not settings.resume:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # of an older run: a later resume must not take them up
    accelerator.wait_for_everyone()
    with disk_faults(run, "checkpoints before this step are whole: make room and go on with --resume true"):
        _run(settings, accelerator, run, reward, checkpoint, what)
    if lock is not None:
        lock.close()
    return run


def run_stamp(settings: PPOSettings, prompts: list[Messages], *, own_reward: bool) -> dict[str, Any]:
    """What tells this run from another one; `own_reward`: the settings' reward models are not used."""
    models: dict[str, str | None] = {"model": settings.model}
    data: dict[str, Any] = {"prompts_file": prompts}
    if not own_reward:
        models["fluency_model"] = settings.fluency_model if settings.fluency_weight else None
        models["reward_model"] = settings.reward_model if settings.preference_weight else None
    if settings.reward_scaling:
        data["reward_scaling"] = resolve_path(settings.reward_scaling).read_text(encoding="utf-8")
    return stamp([settings], data=data, models=models)


def checkpoint_of(settings: PPOSettings, run: Path, what: dict[str, Any], num_ranks: int) -> Path:
    """The newest whole checkpoint of this very run. ValueError when there is none, or it is of another run or finished."""
    checkpoint = latest_checkpoint(run, num_ranks=num_ranks)
    if checkpoint is None:
        raise ValueError(f"resume: no checkpoint in {run}; leave it out to begin at the start")
    check_same_run(checkpoint, what, schedule=False)
    done, planned = int(checkpoint.name.removeprefix("step-")), planned_steps(checkpoint) or settings.steps
    if settings.steps < done:
        raise ValueError(f"resume: steps={settings.steps} are fewer than the {done} that {checkpoint} has made")
    if planned <= done < settings.steps:
        raise ValueError(
            f"resume: {checkpoint} ended a run of steps={planned}, whose rate has fallen to 0; with steps={settings.steps} "
            f"it would come back: start a new run from {run / 'model'} in another output_dir"
        )
    if planned != settings.steps:
        print(f"ppo: steps was {planned}, is {settings.steps}: from step {done} the rate falls to 0 at the new end")
    return checkpoint


def _run(
    settings: PPOSettings,
    accelerator: Accelerator,
    run: Path,
    reward: CompositeReward | None,
    checkpoint: Path | None,
    what: dict[str, Any],
) -> None:
    """The loop of `train`, from its start or from a checkpoint."""
    ppo = PPO(settings, accelerator, run, reward)
    metrics = Metrics(run, enabled=accelerator.is_main_process)
    if settings.log_with:
        accelerator.init_trackers("plumbline")
    first = 0
    fit_scaling(ppo)
    if checkpoint:
        first, state = load_checkpoint(checkpoint, rank=accelerator.process_index)
        ppo.restore(state)
    metrics.start_at(first)
    asked_to_stop = catch_sigterm()

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
            row |= evaluate(ppo, step, metrics)
        row |= ppo.step(step, metrics)
        bar.set_postfix(score=f"{row['objective/scores']:.2f}", kl=f"{row['objective/kl']:.2f}")
        stopping = ppo.all_reduce(torch.tensor(float(asked_to_stop()), device=accelerator.device)) > 0
        last = step + 1 == settings.steps
        if last or stopping or (settings.save_every and (step + 1) % settings.save_every == 0):
            save_checkpoint(run, step + 1, ppo.state(), rank=accelerator.process_index, stamp=what)
            accelerator.wait_for_everyone()  # every rank's file is there before an older step goes
            if accelerator.is_main_process:
                prune_checkpoints(run, keep_last=settings.keep_checkpoints)
        row = metrics.write(row | speed(row, metrics.seconds()))
        if settings.log_with:
            accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)
        if stopping and not last:
            bar.close()
            raise SystemExit(f"ppo: stopped by SIGTERM after step {step + 1}; go on with --resume true")
    final = {"step": settings.steps, "episode": settings.steps * settings.rollouts_per_step}
    metrics.write(final | evaluate(ppo, settings.steps, metrics))
    with replacing(run / "model") if accelerator.is_main_process else nullcontext(run) as folder:
        ppo.actors.save_policy(folder, write=accelerator.is_main_process)
        if accelerator.is_main_process:
            ppo.tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this stage."""
    (settings,) = parse_settings((PPOSettings,), argv, stage="ppo")
    run = train(settings)
    if PartialState().is_main_process:
        print(f"ppo: finished, the policy is in {run / 'model'}")
    if settings.gate and PartialState().is_main_process:
        dtype, device = pick_dtype(settings.dtype), str(PartialState().device)
        asked: dict[str, Any] = {"dtype": dtype, "device": device, "limit": settings.gate_samples}
        verdicts = run_gates(settings.gate, settings.model, str(run), run / "gate", **asked)
        print("\n".join(verdict.line for verdict in verdicts))
        if not all(verdict.passed for verdict in verdicts):
            raise SystemExit(1)


if __name__ == "__main__":
    launched(main, "ppo")
