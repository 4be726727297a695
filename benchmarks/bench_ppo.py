"""Episodes a second of one PPO step: TRL 1.12's PPOTrainer (the last release that had one) against ours, in one run.

Both train the bundled SmolLM2-135M in bf16 (fp32 on a CPU that would emulate it) on the same 32 prompts of about 40
tokens, 48 new tokens each (no stop token, so that every answer has the full length), one epoch, one optimizer step, the
same learning rate, a reward model of the same size. `same_models` holds four full-size models as TRL does;
`shared_weights` holds one, with adapters on every linear layer as policy and as reward model, and the critic as a head
on the reference.

Every turn is a process of its own, so that the peak of its memory is its own: warm-up, then `--steps` steps. Providers
take turns, so that whatever else the machine does hits all alike.

    make bench-peers        # .venv-peers: trl==1.12.0 without dependencies over the packages of .venv
    python benchmarks/bench_ppo.py --turns 2

Appends to benchmarks/results/ppo.csv and ends with a line of JSON: ratios of median seconds a step.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # launched by path, not imported: look from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.records import append_dicts, commit, device_name
from plumbline.align.runtime.launch import pick_dtype

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ppo.csv"
COLUMNS = (
    "commit device threads provider shape s_per_step cpu_s_per_step episodes_per_s tokens_per_s generated_tokens_per_s "
    "generate_s score_s logprobs_s update_s peak_mib"
).split()
PHASES = ("generate", "score", "logprobs", "update")
PROVIDERS = ("trl", "same_models", "shared_weights")
MODEL = "bundled:smollm2-135m-instruct"
LEARNING_RATE = 1e-5


def main() -> None:
    args = parse_args()
    if args.only:
        torch.set_num_threads(args.threads)
        prompts = json.loads(Path(args.prompts).read_text())
        run = {"trl": trl_steps, "same_models": same_models, "shared_weights": shared_weights}[args.only]
        print(json.dumps(run(prompts, args)))
        return
    if not Path(args.peers_python).exists():
        raise SystemExit(f"{args.peers_python} is missing: run `make bench-peers` first, or name it by --peers-python")
    with tempfile.TemporaryDirectory() as folder:
        prompts_file = Path(folder) / "prompts.json"
        prompts = choose_prompts(args.prompts_per_step)
        prompts_file.write_text(json.dumps(prompts))
        turns: dict[str, list[dict]] = {name: [] for name in args.providers}
        for _ in range(args.turns):
            for name in args.providers:
                turns[name].append(one_turn(name, prompts_file, args))
    prompt_tokens = sum(len(row["ids"]) for row in prompts)
    rows = [summary(name, turns[name], prompt_tokens, args) for name in args.providers]
    append_dicts(RESULTS, COLUMNS, rows)
    for row in rows:
        print(", ".join(f"{key} {row[key]}" for key in COLUMNS[3:]), flush=True)
    result: dict[str, float] = {}
    by_name = {row["provider"]: row for row in rows}
    for name in args.providers:
        result[f"s_per_step_{name}"] = by_name[name]["s_per_step"]
        result[f"peak_mib_{name}"] = by_name[name]["peak_mib"]
        if name != "trl" and "trl" in by_name:
            for unit in ("s_per_step", "cpu_s_per_step"):
                key = f"ratio_{name}" if unit == "s_per_step" else f"cpu_ratio_{name}"
                result[key] = round(by_name["trl"][unit] / by_name[name][unit], 3)
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2, help="processes of each provider")
    parser.add_argument("--steps", type=int, default=2, help="measured steps a process, after one as warm-up")
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--dtype", default="auto", help="of both: auto (the CPU's fast type), bfloat16 or float32")
    parser.add_argument("--trl-micro-batch", type=int, default=8, help="rows of TRL's forwards and backwards")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1024, help="of ours")
    parser.add_argument("--lora-top-layers", type=int, default=None, help="shared_weights: adapters on the last n only")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--only", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    return parser.parse_args()


def choose_prompts(count: int) -> list[dict]:
    """Starter prompts of 35 to 45 tokens in the chat template, the nearest to 40 first."""
    from plumbline.align.data.rows import read_prompts
    from plumbline.policy_models.chat import encode_prompts
    from plumbline.policy_models.loading import load_tokenizer

    prompts = read_prompts(ROOT / "data" / "starter" / "prompts.jsonl")
    rows = [
        {"messages": m, "ids": ids}
        for m, ids in zip(prompts, encode_prompts(load_tokenizer(MODEL), prompts), strict=True)
    ]
    rows.sort(key=lambda row: abs(len(row["ids"]) - 40))
    return rows[:count]


def one_turn(name: str, prompts_file: Path, args: argparse.Namespace) -> dict:
    """Runs one provider in a process of its own and returns what it printed last."""
    python = args.peers_python if name == "trl" else sys.executable
    options = (
        "steps",
        "new_tokens",
        "threads",
        "dtype",
        "trl_micro_batch",
        "tokens_per_micro_batch",
        "lora_top_layers",
    )
    command = [python, __file__, "--only", name, "--prompts", str(prompts_file)]
    for option in options:
        if getattr(args, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    turn = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = " ".join(f"{s:.1f} ({c:.1f} CPU)" for s, c in zip(turn["seconds"], turn["cpu_seconds"], strict=True))
    phases = ", ".join(f"{phase} {turn['phases'][phase]:.1f}" for phase in PHASES)
    print(f"{name}: {seconds} s a step ({phases}), peak {turn['peak_mib']} MiB, {turn['note']}", flush=True)
    return turn


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str):
        started = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started

    def timed(self, function: Callable, name: str) -> Callable:
        def inner(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return inner


def now() -> tuple[float, float]:
    """(wall, CPU) seconds."""
    return time.perf_counter(), time.process_time()


def report(ends: list[tuple[float, float]], phases_at: list[dict[str, float]], note: str) -> dict:
    """What a turn hands back, from the ends of its steps, the warm-up first; phases are seconds a step."""
    steps = len(ends) - 1
    return {
        "seconds": [b[0] - a[0] for a, b in itertools.pairwise(ends)],
        "cpu_seconds": [b[1] - a[1] for a, b in itertools.pairwise(ends)],
        "phases": {name: (phases_at[-1][name] - phases_at[0][name]) / steps for name in PHASES},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "note": note,
    }


def trl_steps(prompts: list[dict], args: argparse.Namespace) -> dict:
    """TRL's PPOTrainer. Its old log-probabilities come with the generation; `logprobs` is the reference and values."""
    import datasets
    import transformers
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from plumbline.policy_models.loading import load_policy, load_scalar_model, load_tokenizer

    if trl.__version__ != "1.12.0":
        raise SystemExit(f"trl {trl.__version__} in this environment; `make bench-peers` installs 1.12.0")
    dtype = pick_dtype(args.dtype)
    models = [load_policy(MODEL, dtype=dtype) for _ in range(2)] + [load_scalar_model(MODEL, dtype=dtype) for _ in "vr"]
    rows = len(prompts)
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            report_to="none",
            learning_rate=LEARNING_RATE,
            total_episodes=rows * (args.steps + 1),
            per_device_train_batch_size=args.trl_micro_batch,
            gradient_accumulation_steps=rows // args.trl_micro_batch,
            local_rollout_forward_batch_size=rows,
            num_mini_batches=1,
            num_ppo_epochs=1,
            response_length=args.new_tokens,
            temperature=1.0,
            num_sample_generations=0,
            save_strategy="no",
            logging_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        clock = Clock()
        ppo_trainer.batch_generation = clock.timed(ppo_trainer.batch_generation, "generate")
        scoring = ppo_trainer.get_reward

        def get_reward(model, *rest):  # one function for scores and values
            with clock.phase("score" if model is models[3] else "logprobs"):
                return scoring(model, *rest)

        ppo_trainer.get_reward = get_reward
        forward = ppo_trainer.forward
        ppo_trainer.forward = lambda *a: (
            forward(*a) if torch.is_grad_enabled() else clock.timed(forward, "logprobs")(*a)
        )
        ends: list[tuple[float, float]] = []
        phases_at: list[dict[str, float]] = []

        class Steps(transformers.TrainerCallback):
            def on_step_end(self, *_args, **_kwargs):
                ends.append(now())
                clock.spent["update"] = ends[-1][0] - ends[0][0] - sum(clock.spent[p] for p in PHASES if p != "update")
                phases_at.append(dict(clock.spent))

        data = datasets.Dataset.from_list([{"input_ids": row["ids"]} for row in prompts])
        tokenizer = load_tokenizer(MODEL)
        tokenizer.padding_side = "left"
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=models[0],
            ref_model=models[1],
            value_model=models[2],
            reward_model=models[3],
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Steps()],
        )
        trainer.train()
    return report(ends, phases_at, f"trl {trl.__version__}, {next(models[0].parameters()).dtype} weights")


def same_models(prompts: list[dict], args: argparse.Namespace) -> dict:
    """Ours with four full-size models: policy, reference, critic, reward model."""
    from plumbline.policy_models.loading import load_scalar_model, load_tokenizer
    from plumbline.reward.learned import LearnedPreference

    dtype = pick_dtype(args.dtype)
    reward_model = load_scalar_model(MODEL, dtype=dtype)
    component = LearnedPreference(model=reward_model, tokenizer=load_tokenizer(MODEL))
    weights = "bfloat16" if dtype == torch.bfloat16 else "auto"  # trained in the type that TRL trains in
    return our_steps(prompts, args, lambda _ppo: component, lora=False, weights=weights, critic="own")


def shared_weights(prompts: list[dict], args: argparse.Namespace) -> dict:
    """Ours with one backbone: adapters for policy and reward model, the critic a head on the reference."""
    from peft import LoraConfig, get_peft_model

    from plumbline.policy_models.loading import load_scalar_model, load_tokenizer
    from plumbline.reward.learned import LearnedPreference

    with tempfile.TemporaryDirectory() as folder:  # an untrained reward adapter costs as much as a trained one
        scalar = load_scalar_model(MODEL, dtype=pick_dtype(args.dtype))
        peft = get_peft_model(scalar, LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS"))
        peft.save_pretrained(folder)
        del scalar, peft

        def component(ppo) -> LearnedPreference:
            return LearnedPreference(model=ppo.actors.reward_model(Path(folder)), tokenizer=load_tokenizer(MODEL))

        return our_steps(prompts, args, component, critic="head", lora_top_layers=args.lora_top_layers)


class _Nothing:
    """Stands in until the reward that may share the policy's weights can be built."""

    name = "nothing"

    def __call__(self, prompts, answers):
        return [0.0] * len(prompts)


def our_steps(prompts: list[dict], args: argparse.Namespace, component: Callable, **options) -> dict:
    """One warm-up step and `args.steps` measured ones of `plumbline.align.ppo.PPO`, as its own loop runs them."""
    from accelerate import Accelerator

    import plumbline.policy_models.chat
    from plumbline.align.ppo import PPO, PPOSettings
    from plumbline.policy_models.rollout.memory import tune_cpu_memory
    from plumbline.reward import CompositeReward

    tune_cpu_memory()
    never = 1 << 30
    plumbline.policy_models.chat.stop_ids = lambda *_: [never]
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOSettings(
            model=MODEL,
            output_dir=folder,
            dtype=args.dtype,
            steps=args.steps + 1,
            rollouts_per_step=len(prompts),
            minibatches=1,
            ppo_epochs=1,
            max_new_tokens=args.new_tokens,
            tokens_per_micro_batch=args.tokens_per_micro_batch,
            policy_lr=LEARNING_RATE,
            critic_lr=LEARNING_RATE,
            old_logp="rollout",  # as TRL does
            **options,
        )
        ppo = PPO(settings, Accelerator(cpu=True), Path(folder), CompositeReward([(_Nothing(), 1.0)]))
        ppo.reward = CompositeReward([(component(ppo), 1.0)])
        ppo.prompts, ppo.prompt_ids = [row["messages"] for row in prompts], [row["ids"] for row in prompts]
        ends, phases_at = [], []
        clock = Clock()
        for step in range(args.steps + 1):
            ppo.step(step, clock)
            ends.append(now())
            phases_at.append(dict(clock.spent))
    weights = {str(p.dtype) for p in ppo.actors.policy_parameters()}
    return report(ends, phases_at, f"{', '.join(sorted(weights))} trained weights")


def summary(name: str, turns: list[dict], prompt_tokens: int, args: argparse.Namespace) -> dict:
    """One CSV row: medians over the steps of all turns; the peak is the largest."""
    seconds = median([s for turn in turns for s in turn["seconds"]])
    episodes, generated = args.prompts_per_step, args.prompts_per_step * args.new_tokens
    return {
        "commit": commit(),
        "device": device_name(),
        "threads": args.threads,
        "provider": name,
        "shape": f"smollm2-135m {str(pick_dtype(args.dtype)).removeprefix('torch.')} b{episodes} n{args.new_tokens}"
        + (f" top{args.lora_top_layers}" if args.lora_top_layers and name == "shared_weights" else ""),
        "s_per_step": round(seconds, 2),
        "cpu_s_per_step": round(median([s for turn in turns for s in turn["cpu_seconds"]]), 2),
        "episodes_per_s": round(episodes / seconds, 3),
        "tokens_per_s": round((prompt_tokens + generated) / seconds, 1),
        "generated_tokens_per_s": round(generated / seconds, 1),
        **{f"{phase}_s": round(median([turn["phases"][phase] for turn in turns]), 2) for phase in PHASES},
        "peak_mib": max(turn["peak_mib"] for turn in turns),
    }


def median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


if __name__ == "__main__":
    main()
