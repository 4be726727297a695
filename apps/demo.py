"""`plumbline demo`: the whole loop on the bundled model, from a dense checkpoint to an aligned policy and its report.

    1 upcycle       SmolLM2-135M-Instruct becomes a Mixture-of-Experts policy with the same logits
    2 self_answers  its own answers to harmless prompts and declines in its own words: the set that SFT learns from
    3 sft           the start that everything later is compared with: it declines harm and answers the rest
    4 reward_model  on preference pairs, and on pairs that say when to decline
    5 pairs         answers of the start, paired by what the prompt is and by the reward, whose scaling they fit
    6 dpo           the offline baseline, on those pairs
    7 ppo           against the composite reward
    8 evaluate      base, start, DPO and PPO answer prompts that no stage trained on, bare and behind the guard
    9 report        report.html and summary.json

Each training stage is started by the same words a user would type; they are printed.
"""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from peft import PeftModel

import plumbline.align.dpo
import plumbline.align.ppo
import plumbline.align.reward_model
import plumbline.align.sample_pairs
import plumbline.align.self_answers
import plumbline.align.sft
import plumbline.apps.commands.upcycle
from plumbline.align.rl.inputs import build_reward
from plumbline.align.rl.settings import PPOSettings
from plumbline.align.runtime.launch import parse_settings, pick_dtype
from plumbline.align.runtime.tracking import write_rows
from plumbline.eval.pages.run_page import render
from plumbline.eval.samples import read_samples
from plumbline.eval.stats.gains import summarise
from plumbline.eval.transcripts import add_kl, transcribe
from plumbline.paths import CONFIGS, STARTER
from plumbline.policy_models.devices import default_device
from plumbline.policy_models.loading import load_for_answers, load_tokenizer
from plumbline.reward import Scaling
from plumbline.safety.pipeline import Guard

STAGES = ("upcycle", "self_answers", "sft", "reward_model", "dpo", "ppo")


@dataclass(kw_only=True)
class DemoSettings:
    """What the stages share; the rest of their settings is in configs/<stage>/<configs>.yaml."""

    output_dir: str = field(default="runs/demo", metadata={"help": "folder of the run"})
    model: str = field(default="bundled:smollm2-135m-instruct", metadata={"help": "dense model to start from"})
    eval_prompts: int = field(default=120, metadata={"help": "held-out prompts, spread over the three kinds"})
    configs: str = field(default="demo", metadata={"help": "which settings file of each stage: demo or debug"})
    pair_prompts: int = field(default=64, metadata={"help": "prompts whose answers make the pairs for DPO"})
    seed: int = field(default=0, metadata={"help": "of every stage"})

    def __post_init__(self) -> None:
        if missing := [s for s in STAGES if not (CONFIGS / s / f"{self.configs}.yaml").is_file()]:
            raise ValueError(
                f"configs={self.configs!r}: no {self.configs}.yaml in configs/{missing[0]}; try demo or debug"
            )
        if self.eval_prompts < 3:
            raise ValueError(f"eval_prompts={self.eval_prompts}: must be at least 3, one of each kind")


class Clock:
    """Wall time by stage, and one line on the screen when a stage begins and ends."""

    def __init__(self, stages: int) -> None:
        self.stages, self.done = stages, 0
        self.started = time.perf_counter()
        self.wall_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str):
        self.done += 1
        print(f"\n[{self.done}/{self.stages}] {name}: {what}", flush=True)
        begun = time.perf_counter()
        yield
        self.wall_s[name] = round(time.perf_counter() - begun, 1)
        gc.collect()
        print(f"    {self.wall_s[name]:.0f} s, {time.perf_counter() - self.started:.0f} s since the start", flush=True)


def run_stage(main: Callable[[Sequence[str]], Any], command: str, config: Path, **flags: str | Path | int) -> None:
    """Calls a stage as the command line would, and prints that command line."""
    argv = arguments(config, **flags)
    print(f"    plumbline {command} {' '.join(argv)}", flush=True)
    main(argv)


def arguments(config: Path, **flags: str | Path | int) -> list[str]:
    """The words of a command line."""
    return ["--config", str(config), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def processes() -> int:
    """How many processes share the work: two where there are two cores and no GPU, each with one thread.

    At this size a second process nearly doubles the speed and a second thread adds next to nothing.
    """
    return min(2, os.cpu_count() or 1) if default_device().type == "cpu" else 1


def run_on_all_cores(stage: ModuleType, name: str, config: Path, **flags: str | Path | int) -> None:
    """Runs a stage by torchrun on `processes()`, or as any stage where that is one.

    The stages of TRL's trainers take rows a process: theirs are divided, so that a step has as many rows as the file says.

    As a module: launched by its file in an installed package, that package's folder would come first on `sys.path`, and
    its `safety/` would hide a distribution of that name.
    """
    if processes() == 1:
        run_stage(stage.main, name, config, **flags)
        return
    rows = yaml.safe_load(config.read_text(encoding="utf-8")).get("per_device_train_batch_size")
    if rows is not None:
        flags["per_device_train_batch_size"] = max(1, rows // processes())
    argv = arguments(config, **flags)
    command = ["torchrun", "--standalone", "--nproc_per_node", str(processes()), "-m", stage.__name__, *argv]
    print(f"    OMP_NUM_THREADS=1 {' '.join(command)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    code = subprocess.run(torchrun + command[1:], env=environment, check=False).returncode
    if code:
        raise SystemExit(code)  # the stage has said why


def demo(settings: DemoSettings) -> Path:
    """Runs the loop and returns the run folder."""
    samples = read_samples(STARTER / "eval.jsonl", limit=settings.eval_prompts)
    out = Path(settings.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    policy, start = out / "policy", out / "sft" / "model"
    seed = settings.seed
    clock = Clock(stages=9)

    def config(stage: str) -> Path:
        return CONFIGS / stage / f"{settings.configs}.yaml"

    with clock.stage("upcycle", "the dense model becomes a Mixture-of-Experts policy"):
        run_stage(
            plumbline.apps.commands.upcycle.main, "upcycle", config("upcycle"), model=settings.model, output_dir=policy
        )
    own = out / "self_answers"
    with clock.stage("self_answers", "own answers to harmless prompts, declines in the model's own words"):
        run_stage(
            plumbline.align.self_answers.main,
            "self-answers",
            config("self_answers"),
            model=policy,
            output_dir=own,
            seed=seed,
        )
    with clock.stage("sft", "supervised fine-tuning on these"):
        flags: dict[str, str | Path | int] = {"model": policy, "output_dir": out / "sft", "seed": seed}
        run_on_all_cores(plumbline.align.sft, "sft", config("sft"), train_file=own / "sft.jsonl", **flags)
    with clock.stage("reward_model", "Bradley-Terry on data/starter/preferences.jsonl and on pairs of both behaviours"):
        flags = {"model": start, "output_dir": out / "reward_model", "seed": seed}
        files = f"{STARTER / 'preferences.jsonl'},{own / 'pairs.jsonl'}"
        run_stage(plumbline.align.reward_model.main, "reward-model", config("reward_model"), train_file=files, **flags)
    # From here on all stages share the reward: its learned part, its settings (of PPO) and its scaling.
    flags = {"model": start, "reward_model": out / "reward_model" / "model", "seed": seed}
    with clock.stage("pairs", "answers of the start to training prompts, paired by kind and by the composite reward"):
        asked = flags | {"pair_prompts": settings.pair_prompts, "output_dir": out / "pairs"}
        run_on_all_cores(plumbline.align.sample_pairs, "sample-pairs", config("ppo"), **asked)
    with clock.stage("dpo", "the offline baseline on those pairs"):
        data: dict[str, str | Path | int] = {"train_file": out / "pairs" / "pairs.jsonl", "holdout_every": 0}
        data |= {"model": start, "output_dir": out / "dpo", "seed": seed}
        run_on_all_cores(plumbline.align.dpo, "dpo", config("dpo"), **data)
    with clock.stage("ppo", "PPO against the composite reward"):
        scaling = out / "pairs" / "scaling.json"
        run_on_all_cores(
            plumbline.align.ppo, "ppo", config("ppo"), **flags, reward_scaling=scaling, output_dir=out / "ppo"
        )
    with clock.stage("evaluate", f"base, start, DPO and PPO on {len(samples)} prompts that no stage trained on"):
        transcripts = evaluate(out, samples, seed)
    with clock.stage("report", "summary.json and report.html"):
        summary = summarise(transcripts, start="start", seed=seed)
        report = json.loads((out / "reward_model" / "report.json").read_text())
        summary |= {
            "model": settings.model,
            "seed": seed,
            "machine": machine(),
            "reward_model": report,
            "pairs": json.loads((out / "pairs" / "report.json").read_text()),
            "self_answers": json.loads((own / "report.json").read_text()),
            "settings": {s: yaml.safe_load((out / s / "settings.yaml").read_text()) for s in ("sft", "dpo", "ppo")},
            "wall_s": clock.wall_s | {"total": round(time.perf_counter() - clock.started, 1)},
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        page = render(out)
    print(closing_lines(summary, page))
    return out


def evaluate(out: Path, samples, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Transcripts of base, start, DPO and PPO, by the reward and the sampling of the PPO run; written to out/eval/."""
    shares = processes()
    if shares == 1:
        transcripts = transcripts_of(out, samples, seed)
    else:
        with ProcessPoolExecutor(shares, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            work = [pool.submit(transcripts_of, out, samples[at::shares], seed) for at in range(shares)]
            parts = [one.result() for one in work]
        transcripts = {
            name: [row for rows in zip_longest(*(part[name] for part in parts)) for row in rows if row is not None]
            for name in parts[0]
        }
    for name, rows in transcripts.items():
        write_rows(out / "eval" / f"{name}.jsonl", rows)
    return transcripts


def transcripts_of(out: Path, samples, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The same of some of the samples."""
    ppo = PPOSettings(**_settings_of(out / "ppo", PPOSettings))
    reward = build_reward(ppo)
    reward.scaling = Scaling.load(out / "ppo" / "scaling.json")
    dtype = pick_dtype(ppo.dtype)
    tokenizer = load_tokenizer(str(out / "policy"))

    def answers(name: str, model) -> list[dict[str, Any]]:
        begun = time.perf_counter()
        rows = transcribe(
            model,
            tokenizer,
            samples,
            reward=reward,
            max_new_tokens=ppo.max_new_tokens,
            temperature=ppo.temperature,
            seed=seed + 7,
        )
        add_guarded(rows)
        print(f"    {name}: {len(rows)} answers in {time.perf_counter() - begun:.0f} s", flush=True)
        return rows

    transcripts = {"base": answers("base", load_for_answers(str(out / "policy"), dtype=dtype))}
    start = load_for_answers(str(out / "sft" / "model"), dtype=dtype)
    transcripts["start"] = answers("start", start)
    adapted = PeftModel.from_pretrained(start, str(out / "dpo" / "model"), adapter_name="dpo")
    adapted.load_adapter(str(out / "ppo" / "model"), adapter_name="ppo")
    for name in ("dpo", "ppo"):
        adapted.set_adapter(name)
        transcripts[name] = answers(name, adapted.get_base_model())
    with adapted.disable_adapter():
        for name, rows in transcripts.items():
            if name == "start":
                for row in rows:
                    row["kl"] = 0.0
            else:
                add_kl(rows, start, tokenizer, temperature=ppo.temperature)
    return transcripts


def add_guarded(rows: list[dict[str, Any]]) -> None:
    """Sets `guarded_answer`: what the default policy lets through of an answer to its prompt."""
    said = ""
    guard = Guard("default", model=lambda _messages: said)
    for row in rows:
        said = row["answer"]
        row["guarded_answer"] = guard.chat(row["prompt"]).text


def _settings_of(run: Path, cls: type) -> dict[str, Any]:
    stored = yaml.safe_load((run / "settings.yaml").read_text())
    return {field.name: stored[field.name] for field in fields(cls) if field.name in stored}


def machine() -> dict[str, Any]:
    """What the wall times were measured on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": pick_dtype("auto") == torch.bfloat16,
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def closing_lines(summary: dict[str, Any], page: Path) -> str:
    """What a person wants to know at the end."""
    lines = [""]
    for name in summary["targets"]:
        rates = ", ".join(f"{kind} {rate['rate']:.0%}" for kind, rate in summary[name]["refusals"].items())
        lines.append(f"{name}: refuses {rates}; {summary[name]['ended']['rate']:.0%} of answers end")
    for name in ("dpo", "ppo"):
        gain = summary[name]["reward_gain"]
        lines.append(
            f"{name.upper()}: reward {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] over the start, "
            f"KL {summary[name]['kl_per_answer']:.1f} nats per answer"
        )
    lines.append(f"{summary['wall_s']['total']:.0f} s in all. Open {page}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    (settings,) = parse_settings((DemoSettings,), argv)
    demo(settings)
