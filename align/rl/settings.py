"""Settings of a PPO run, checked before any model loads."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from plumbline.align.models.start import ModelSettings
from plumbline.align.rl.advantages import ESTIMATORS as ADVANTAGES
from plumbline.align.rl.kl_control import ESTIMATORS, KLController
from plumbline.align.rl.lagrangian import Lagrangian
from plumbline.align.runtime.launch import pick_dtype
from plumbline.align.runtime.optimizers import OPTIMIZERS
from plumbline.paths import STARTER

_AT_LEAST_ONE = (
    "steps rollouts_per_step answers_per_prompt minibatches ppo_epochs max_new_tokens max_prompt_tokens "
    "scaling_prompts keep_checkpoints gate_samples gradient_rank"
).split()
_NOT_NEGATIVE = "policy_lr critic_lr critic_warmup_steps eval_every eval_prompts save_every missing_eos_penalty".split()
_ABOVE_ZERO = "temperature clip value_clip score_clip max_grad_norm target_kl adaptive_clip".split()


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
    prompt_shares: str | None = field(
        default=None,
        metadata={"help": "kinds of a step's prompts, such as harmful=0.4,twin=0.4,ordinary=0.2; none: as in the file"},
    )
    trust_kinds: bool = field(
        default=True,
        metadata={
            "help": "where a prompt's row says its kind, reward by that and not by what the harm scanner guesses"
        },
    )
    eval_prompts_file: str | None = field(default=None, metadata={"help": "held-out prompts; none: no evaluation"})
    seed: int = field(default=0, metadata={"help": "of prompts, sampling and initialisation"})

    steps: int = field(default=20, metadata={"help": "rollouts, each followed by its updates"})
    rollouts_per_step: int = field(default=64, metadata={"help": "answers a step, all ranks together"})
    answers_per_prompt: int = field(default=1, metadata={"help": "answers to each prompt, a group of the estimators"})
    minibatches: int = field(default=2, metadata={"help": "optimizer steps per pass over the rollouts"})
    ppo_epochs: int = field(default=2, metadata={"help": "passes over the rollouts"})
    tokens_per_micro_batch: int = field(
        default=2048, metadata={"help": "prompt, answer and padding tokens of a forward"}
    )
    max_prompt_tokens: int = field(default=256, metadata={"help": "longer prompts are left out"})
    max_new_tokens: int = field(default=64, metadata={"help": "limit of an answer"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling and of every log-probability"})

    weights: str = field(
        default="auto",
        metadata={
            "help": "trained weights of a full fine-tune: auto (float32) or bfloat16, which takes half the memory"
        },
    )
    critic: str = field(
        default="own", metadata={"help": "own: adapter or copy with a head; head: a head on the reference"}
    )

    advantage: str = field(
        default="gae",
        metadata={"help": "gae: with a critic; grpo, rloo or gdpo: against the answers to the same prompt"},
    )
    old_logp: str = field(
        default="forward",
        metadata={"help": "forward: by the training forward; rollout: as drawn, which saves a forward of the policy"},
    )
    rollout_server: str | None = field(
        default=None,
        metadata={"help": "URL of a vLLM server that draws the answers, for LoRA (align/rl/rollout_server.py)"},
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or adamw_8bit of bitsandbytes (extra: quant)"})
    policy_lr: float = field(default=2e-4, metadata={"help": "AdamW, linear to 0 over the run"})
    critic_lr: float = field(default=5e-4, metadata={"help": "the same for the critic"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "of policy and of critic gradients, each"})
    adaptive_clip: float | None = field(
        default=None, metadata={"help": "bound of a gradient row's norm against its weight row's norm, such as 0.01"}
    )
    gradient_rank: int | None = field(
        default=None,
        metadata={"help": "send gradients between processes as matrices of this rank (PowerSGD); none: as they are"},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "forget activations and compute them again in the backward: less memory"}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "nats per token from the rollout's policy beyond which the epochs stop"}
    )
    clip: float = field(default=0.2, metadata={"help": "half-width of the ratio band"})
    value_clip: float = field(default=0.5, metadata={"help": "half-width of the value band, in reward units"})
    gamma: float = field(default=1.0, metadata={"help": "discount per token"})
    lam: float = field(default=0.95, metadata={"help": "lambda of GAE"})
    critic_warmup_steps: int = field(default=0, metadata={"help": "first steps in which only the critic is updated"})

    kl_coef: float = field(default=0.05, metadata={"help": "charge per nat of KL to the reference, in the reward"})
    kl_target: float | None = field(default=None, metadata={"help": "nats per answer; set: kl_coef adapts towards it"})
    kl_horizon: float = field(default=2000.0, metadata={"help": "answers over which kl_coef adapts"})
    kl_estimator: str = field(default="k1", metadata={"help": "k1, k2 or k3"})
    kl_in: str = field(default="reward", metadata={"help": "reward: charged per token; loss: added to the policy loss"})

    cost_component: str | None = field(
        default=None, metadata={"help": "reward part that becomes a constraint, such as toxicity or safety"}
    )
    cost_limit: float = field(
        default=0.0, metadata={"help": "bound of its mean raw score; of the negated score where its weight is positive"}
    )
    multiplier_start: float = field(default=1.0, metadata={"help": "Lagrange multiplier at the start"})
    multiplier_lr: float = field(
        default=0.1, metadata={"help": "rate of its logarithm, or of the integral of pid, once a rollout"}
    )
    multiplier_control: str = field(
        default="log", metadata={"help": "log: its logarithm follows the excess cost; pid: proportional and integral"}
    )
    multiplier_gain: float = field(default=1.0, metadata={"help": "of pid: per unit of excess cost, at once"})
    multiplier_damping: float = field(default=0.0, metadata={"help": "of pid: per unit by which the excess rose"})
    multiplier_max: float = field(default=10.0, metadata={"help": "its upper bound"})

    fluency_weight: float = field(default=1.0, metadata={"help": "alpha"})
    relevance_weight: float = field(default=1.0, metadata={"help": "beta"})
    safety_weight: float = field(default=1.0, metadata={"help": "gamma"})
    toxicity_weight: float = field(default=1.0, metadata={"help": "delta, subtracted"})
    preference_weight: float = field(default=0.0, metadata={"help": "of the learned reward model, if there is one"})
    reward_model: str | None = field(
        default=None, metadata={"help": "folder of a trained reward model, or of its adapter"}
    )
    fluency_model: str = field(default="bundled:smollm2-135m-instruct", metadata={"help": "frozen language model"})
    reward_scaling: str | None = field(default=None, metadata={"help": "scaling.json; none: fitted on the reference"})
    scaling_prompts: int = field(default=96, metadata={"help": "reference answers that fit the scaling"})
    score_clip: float = field(default=10.0, metadata={"help": "bound of a score before the KL charge"})
    missing_eos_penalty: float = field(default=1.0, metadata={"help": "subtracted from an answer without a stop token"})

    grader_model: str | None = field(
        default=None, metadata={"help": "reward model that only grades evaluations: does it agree with the reward?"}
    )
    eval_every: int = field(default=10, metadata={"help": "steps between evaluations; 0: only first and last"})
    eval_prompts: int = field(default=64, metadata={"help": "prompts of an evaluation"})
    gate: str | None = field(
        default=None,
        metadata={"help": "gate file (configs/eval/gates.yaml): asked of the policy at the end; a failure exits 1"},
    )
    gate_samples: int = field(default=100, metadata={"help": "samples a suite of the gate file"})
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
                value = getattr(self, name)
                if value is not None and not ok(value):  # NaN fails every rule
                    raise ValueError(f"{name}={getattr(self, name)}: {rule}")
        shares = self.kind_shares  # refuses what it cannot read
        if shares is not None and abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"prompt_shares={self.prompt_shares!r} add to {sum(shares.values()):g}: must add to 1")
        if self.rollouts_per_step % self.minibatches:
            raise ValueError(
                f"rollouts_per_step={self.rollouts_per_step} does not split into minibatches={self.minibatches}; "
                "make the first a multiple of the second"
            )
        if self.critic not in ("own", "head"):  # "none" is what a group estimator makes of it
            raise ValueError(f"critic={self.critic!r}: must be one of own, head")
        if self.weights not in ("auto", "bfloat16"):
            raise ValueError(f"weights={self.weights!r}: must be auto or bfloat16")
        if self.weights != "auto" and self.lora:
            raise ValueError(
                f"weights={self.weights!r} with lora=true: adapters are always float32; drop one of the two"
            )
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(f"kl_estimator={self.kl_estimator!r}: must be one of {', '.join(ESTIMATORS)}")
        if self.tokens_per_micro_batch < self.max_prompt_tokens + self.max_new_tokens:
            raise ValueError(
                f"tokens_per_micro_batch={self.tokens_per_micro_batch} is below "
                f"max_prompt_tokens={self.max_prompt_tokens} + max_new_tokens={self.max_new_tokens}: "
                "one row might not fit; raise the first or lower the others"
            )
        if self.grader_model and self.grader_model == self.reward_model and self.preference_weight:
            raise ValueError(f"grader_model={self.grader_model!r} is trained on as reward_model: name another, or none")
        if self.preference_weight and not self.reward_model:
            raise ValueError(
                f"preference_weight={self.preference_weight} but no reward_model: name its folder or set the "
                "weight to 0"
            )
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"advantage={self.advantage!r}: must be one of {', '.join(ADVANTAGES)}")
        if self.rollouts_per_step % self.answers_per_prompt:
            raise ValueError(
                f"rollouts_per_step={self.rollouts_per_step} is not a multiple of "
                f"answers_per_prompt={self.answers_per_prompt}; make it one"
            )
        if self.advantage != "gae" and self.answers_per_prompt < 2:
            raise ValueError(
                f"advantage={self.advantage!r} compares the answers to one prompt: set answers_per_prompt to 2 or more"
            )
        if self.old_logp not in ("forward", "rollout"):
            raise ValueError(f"old_logp={self.old_logp!r}: must be forward or rollout")
        if self.rollout_server and not self.lora:
            raise ValueError(
                f"rollout_server={self.rollout_server!r} with lora=false: a server is handed adapters; set lora: true"
            )
        if self.rollout_server and self.old_logp == "rollout":
            raise ValueError(
                f"rollout_server={self.rollout_server!r} with old_logp='rollout': a server's log-probabilities are not "
                "those of the training forward; set old_logp: forward"
            )
        if self.kl_in not in ("reward", "loss"):
            raise ValueError(f"kl_in={self.kl_in!r}: must be reward or loss")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: must be one of {', '.join(OPTIMIZERS)}")
        if self.cost_component and self.advantage != "gae":
            raise ValueError(f"cost_component={self.cost_component!r} needs a critic of costs: use advantage: gae")
        if self.gradient_rank and pick_dtype(self.dtype) == torch.float16:
            raise ValueError(
                f"gradient_rank={self.gradient_rank} with dtype={self.dtype!r}: what compression keeps back for "
                "later has no fixed loss scale; use bfloat16 or float32, or no gradient_rank"
            )
        self.lagrangian()
        KLController(self.kl_coef, self.kl_target, self.kl_horizon)  # refuses what it cannot use

    @property
    def kind_shares(self) -> dict[str, float] | None:
        """`prompt_shares` as numbers; ValueError for what is not kind=share, twice the same kind, or a share below 0."""
        if self.prompt_shares is None:
            return None
        shares: dict[str, float] = {}
        for part in self.prompt_shares.split(","):
            kind, _, text = (piece.strip() for piece in part.partition("="))
            try:
                share = float(text)
            except ValueError:
                share = -1.0
            if not kind or kind in shares or not 0 <= share <= 1:
                raise ValueError(
                    f"prompt_shares={self.prompt_shares!r}: {part.strip()!r} must be kind=share with a share from 0 to 1, "
                    "each kind once"
                )
            shares[kind] = share
        return shares

    @property
    def shares_reward_model(self) -> bool:
        """Whether the reward model is an adapter, to be put on the policy's weights."""
        return self.lora and (Path(self.reward_model or "") / "adapter_config.json").is_file()

    @property
    def has_critic(self) -> bool:
        """Group estimators build none."""
        return self.advantage == "gae"

    def lagrangian(self) -> Lagrangian | None:
        """The multiplier of the constraint at the start of a run; None without a constraint."""
        start = Lagrangian(
            self.multiplier_start,
            limit=self.cost_limit,
            lr=self.multiplier_lr,
            maximum=self.multiplier_max,
            control=self.multiplier_control,
            gain=self.multiplier_gain,
            damping=self.multiplier_damping,
        )
        return start if self.cost_component else None

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type that the trained model is loaded in."""
        return torch.bfloat16 if self.weights == "bfloat16" else super().weight_dtype
