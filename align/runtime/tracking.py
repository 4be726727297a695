"""What a run leaves behind: metrics.jsonl, tables of samples, and the batch on which a loss stopped being finite."""

import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from plumbline.policy_models.balance import router_load
from plumbline.policy_models.logprobs import PackedRows
from plumbline.reward import Reward


class Metrics:
    """Appends one JSON object a step to `run/metrics.jsonl`; only the main process writes."""

    def __init__(self, run: Path, *, enabled: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        self.enabled = enabled
        self._times: dict[str, float] = {}

    def start_at(self, step: int) -> None:
        """Drops rows of `step` and later: after a resume they are written again."""
        if self.enabled and self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").split("\n") if line]
            self.path.write_text("".join(line + "\n" for line in lines if _step(line) < step), encoding="utf-8")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block to `time/<name>_s` of the next row."""
        started = time.perf_counter()
        try:
            yield
        finally:
            key = f"time/{name}_s"
            self._times[key] = self._times.get(key, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Wall time by phase since the last row."""
        return {key.removeprefix("time/").removesuffix("_s"): spent for key, spent in self._times.items()}

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Writes and returns the row with the phase times added; numbers that are not finite become null."""
        full = {**row, **self._times}
        self._times = {}
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps({name: _plain(value) for name, value in full.items()}) + "\n")
        return full


def _step(line: str) -> float:
    """The step of a row; infinite for a line that a killed run left half written."""
    try:
        return json.loads(line).get("step", 0)
    except ValueError:
        return math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON Lines, replacing the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = "".join(json.dumps({k: _plain(v) for k, v in row.items()}, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def stop_on_non_finite(run: Path, what: str, value: float, batch: Mapping[str, Any]) -> None:
    """Raises FloatingPointError when `value` is NaN or infinite, after saving the batch to run/non_finite_batch.pt."""
    if math.isfinite(value):
        return
    path = run / "non_finite_batch.pt"
    torch.save(dict(batch), path)
    raise FloatingPointError(
        f"{what} is {value}: the run stops here. The batch is in {path}; "
        "try a lower learning rate, a lower max_grad_norm or dtype=float32"
    )


def speed(row: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, float]:
    """perf/generated_tokens_per_s while sampling, perf/tokens_per_s of a step without evaluation, perf/peak_mib."""
    generated, step = seconds.get("generate", 0.0), sum(spent for name, spent in seconds.items() if name != "evaluate")
    tokens = row.get("rollout/answer_tokens", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {
        "perf/generated_tokens_per_s": tokens / generated if generated else 0.0,
        "perf/tokens_per_s": (tokens + row.get("rollout/prompt_tokens", 0)) / step if step else 0.0,
        "perf/peak_mib": peak,
    }


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


def sample_rows(
    prompts: Sequence[str], answers: Sequence[str], reward: Reward, graded: Sequence[float | None] | None
) -> list[dict[str, Any]]:
    """The table of an evaluation: a row a prompt, a column a weighted part, and one for the grader if there is one."""
    return [
        {
            "prompt": prompts[row],
            "answer": answers[row],
            "total": total,
            **{name: part[row] for name, part in reward.parts.weighted.items()},
            **({"grader": graded[row]} if graded else {}),
        }
        for row, total in enumerate(reward.total)
    ]


@torch.no_grad()
def expert_load(model: PreTrainedModel, pack: PackedRows) -> dict[str, Any]:
    """Share of each expert in every layer that has experts, pads left out; of all ranks, which all have to call."""
    config: Any = model.config
    ours = config.model_type == "moe_policy"  # says what it chose; others take the highest logits
    asked = {"output_router_logits": True} | ({"output_router_indices": True} if ours else {})
    routed = model.base_model(**pack.inputs(), **asked, use_cache=False)
    logits = routed.router_logits
    chosen = routed.router_indices if ours else [row.topk(config.num_experts_per_tok, dim=-1).indices for row in logits]
    load = router_load(logits, chosen, pack.attention_mask.bool(), over_ranks=True)
    layers = getattr(config, "moe_layers", None) or list(range(len(logits)))
    return {"moe/load": load.share_LE.tolist(), "moe/layers": layers, **load.metrics()}


class MetricsCallback(TrainerCallback):
    """Writes what a transformers Trainer logs to the same metrics.jsonl that PPO writes.

    After a resume at a step, rows up to that step stay.
    """

    def __init__(self, run: Path, *, resumed_at: int | None = None) -> None:
        self.metrics = Metrics(run)
        if resumed_at is None:
            self.metrics.path.unlink(missing_ok=True)
        else:
            self.metrics.start_at(resumed_at + 1)

    def on_log(self, args, state, control, logs=None, **_kwargs):
        if state.is_world_process_zero and logs:
            self.metrics.write({"step": state.global_step, **logs})


class StopOnNonFinite:
    """Mixin for a transformers Trainer: a loss that is not finite stops the run and the batch is kept."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        batch = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        run = Path(self.args.output_dir)  # type: ignore[attr-defined]
        stop_on_non_finite(run, "training loss", float(loss), batch)
        return loss
