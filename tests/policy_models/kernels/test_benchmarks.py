"""The benchmarks run, compare what they time and print what the documentation quotes; at toy sizes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.experts import bench_logprob, bench_lora_experts, bench_moe
from benchmarks.experts.bench_moe import Shape
from plumbline.policy_models.experts import DEFAULT_EXPERTS


def test_expert_layer():
    rows = bench_moe.measure(["eager", DEFAULT_EXPERTS], Shape(8, 16, 24, 4, 2, skew=1.0), "cpu", torch.bfloat16, 1)
    assert [row["pass"] for row in rows] == ["fwd", "fwd", "fwd_bwd", "fwd_bwd"]
    assert all(0 <= row["roofline"] and set(row) == set(bench_moe.COLUMNS) for row in rows)
    assert bench_moe.ratio(rows, "fwd_bwd", "eager", DEFAULT_EXPERTS) > 0


def test_a_provider_that_is_wrong_stops_the_benchmark_and_one_that_fails_is_left_out():
    from transformers.integrations.moe import ExpertsInterface

    def broken(*_args):
        raise RuntimeError("not built for this device")

    shape = Shape(8, 16, 24, 4, 2)
    ExpertsInterface.register("test_broken", broken)
    rows = bench_moe.measure(["eager"], shape, "cpu", torch.bfloat16, 1, ["test_broken"])
    assert {row["provider"] for row in rows} == {"eager"}
    ExpertsInterface.register(
        "test_wrong", lambda experts, x, i, w: x * (w.sum() + sum(weight.sum() for weight in experts.parameters()))
    )
    with pytest.raises(SystemExit, match="differs from eager"):
        bench_moe.measure(["eager"], shape, "cpu", torch.bfloat16, 1, ["test_wrong"])


def test_log_probabilities():
    rows = bench_logprob.measure((5, 16, 40), "cpu", 1)
    assert {row["provider"] for row in rows} >= {"naive", "chunked"}
    assert all(set(row) == set(bench_logprob.COLUMNS) for row in rows)
    assert bench_logprob.ratios(rows)["logprob_fwd_bwd_chunked_vs_naive"] > 0


def test_adapters_on_experts():
    rows = bench_lora_experts.measure(Shape(8, 32, 32, 4, 2), 8, "cpu", 1)
    assert {row["provider"] for row in rows} == {"peft", "split"}


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_its_path_on_a_cpu():
    command = [sys.executable, "-m", "benchmarks.bench_gpu", "--cpu"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["worst_error_vs_grouped_mm"] < 3 and result["logprob_worst_error_nats"] < 1e-3
    assert any(name.startswith("fwd_bwd_vs_grouped_mm") for name in result)
