"""PPO checklist, I: resume to the bit, checkpoints, evaluation that disturbs nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import plumbline.align.runtime.checkpoints
from plumbline.align.ppo import train
from plumbline.align.rl.evaluation import evaluate
from plumbline.align.runtime.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from plumbline.reward import CompositeReward

REPOSITORY = Path(__file__).resolve().parents[3]
N = 2  # steps before the interruption; as many after it


class StoppedError(Exception):
    pass


def stopping(component, after):
    """The component, and an exception at its call number `after` + 1."""

    class Stopping:
        name = component.name
        calls = 0

        def __call__(self, prompts, answers):
            self.calls += 1
            if self.calls > after:
                raise StoppedError
            return component(prompts, answers)

    return Stopping()


def final_state(run, step=2 * N):
    """Everything in the last checkpoint, flat: name -> value."""
    flat = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, list | tuple):
            for at, inner in enumerate(value):
                walk(f"{name}[{at}]", inner)
        else:
            flat[name] = value

    walk("", load_checkpoint(run / "checkpoints" / f"step-{step:06d}")[1])
    return flat


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


def timeless(rows):
    """Metrics without wall times and rates."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


# I1


RUNS = [
    {"model": "moe", "lora": True, "critic": "own"},
    {"model": "gpt2", "lora": True, "critic": "head", "seed": 3},
    {"model": "llama", "lora": False, "critic": "own", "policy_lr": 1e-3},
    {"model": "llama", "lora_top_layers": 1, "cost_component": "length", "cost_limit": 5.0, "target_kl": 1e-3},
    {"model": "qwen2", "advantage": "rloo", "answers_per_prompt": 2, "kl_in": "loss", "adaptive_clip": 0.05},
    {"model": "mixtral", "lora": False, "policy_lr": 1e-3, "old_logp": "rollout", "gradient_checkpointing": True},
    {"model": "llama", "lora": False, "policy_lr": 1e-3, "optimizer": "adamw_8bit"},
]


@pytest.mark.parametrize(
    "options", RUNS, ids=["moe-lora", "gpt2-head", "llama-full", "constraint", "rloo", "mixtral-full", "llama-8bit"]
)
def test_I1_resume_equals_an_unbroken_run_to_the_bit(
    settings, share, length, read_metrics, prompts_file, tmp_path, options
):
    """2N steps, or N and a crash and N: all state in the last checkpoint and all metrics are equal."""
    if options.get("optimizer") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    common = {
        "steps": 2 * N,
        "save_every": N,
        "minibatches": 2,
        "ppo_epochs": 2,
        "rollouts_per_step": 6,  # of 8 prompts: the break is inside a pass over them
        "kl_target": 0.3,  # the coefficient adapts
        "kl_coef": 0.2,
        "kl_horizon": 60.0,
        "eval_prompts_file": prompts_file,
        "eval_every": 1,
        **options,
    }
    whole, broken = (settings(output_dir=str(tmp_path / name), **common) for name in ("whole", "broken"))
    reward = [(share(), 1.0), (length(), -0.2)]
    train(whole, reward=CompositeReward(reward))
    # calls: the fit, then evaluation and rollout of each step; it dies in the rollout after that of the checkpoint
    dies = [(stopping(share(), after=1 + 2 * N + 2), 1.0), (length(), -0.2)]
    with pytest.raises(StoppedError):
        train(broken, reward=CompositeReward(dies))
    before_resume = latest_checkpoint(tmp_path / "broken")
    assert before_resume.name == f"step-{N:06d}"
    again = settings(output_dir=str(tmp_path / "broken"), resume=True, **common)
    torch.manual_seed(12345)  # a new process starts with another state of the global generators
    train(again, reward=CompositeReward(reward))
    states = [final_state(tmp_path / name) for name in ("whole", "broken")]
    assert_same_state(*states)
    moments = {
        value.dtype for name, value in states[0].items() if name.startswith(".optimizer") and torch.is_tensor(value)
    }
    assert (torch.uint8 in moments) == (options.get("optimizer") == "adamw_8bit")
    rows = [timeless(read_metrics(tmp_path / name)) for name in ("whole", "broken")]
    assert rows[0] == rows[1]
    assert len({row["kl_coef"] for row in rows[0][:-1]}) > 1  # there was something to restore
    weights = [next((tmp_path / name / "model").glob("*.safetensors")).read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_I1_resume_of_a_finished_run_changes_nothing(settings, share, read_metrics, tmp_path):
    reward = CompositeReward([(share(), 1.0)])
    run = train(settings(steps=1), reward=reward)
    rows, state = timeless(read_metrics(run)), final_state(run, 1)
    train(settings(steps=1, resume=True), reward=reward)
    assert timeless(read_metrics(run)) == rows
    assert_same_state(final_state(run, 1), state)


def test_I1_resume_without_a_checkpoint_is_an_error(settings, share):
    with pytest.raises(ValueError, match=r"resume: no checkpoint in .*; leave it out to begin at the start"):
        train(settings(steps=1, resume=True), reward=CompositeReward([(share(), 1.0)]))


def test_I1_checkpoint_holds_what_changes_in_a_run(make_ppo, one_step):
    state = make_ppo("moe").state()
    assert {"actors", "optimizer", "scheduler", "kl", "sampling", "rng"} <= state.keys()
    assert set(state["rng"]) == {"python", "numpy", "torch", "cuda"}


def test_I1_restore_takes_back_every_part(make_ppo, one_step, policy_tensors):
    ppo = make_ppo("moe", steps=4, kl_target=0.1, kl_coef=0.2)
    one_step(ppo, 0)
    ppo.kl.update(5.0, 100)
    state = torch.load(_saved(ppo), weights_only=True)
    want = one_step(ppo, 1)
    other = make_ppo("moe", steps=4, kl_target=0.1, kl_coef=0.2)
    other.restore(state)
    got = one_step(other, 1)
    assert other.kl.coef == ppo.kl.coef != 0.2
    assert want.batch.answers == got.batch.answers and want.updated == got.updated
    a, b = policy_tensors(ppo), policy_tensors(other)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def _saved(ppo):
    folder = save_checkpoint(ppo.run, 1, ppo.state())
    return folder / "rank-0.pt"


def test_I1_D7_reference_stays_the_start_after_a_resume(make_ppo, one_step):
    """KL to the reference right after the restore is KL before it, and not 0."""
    ids, keep = torch.tensor([[40, 41, 42]]), torch.ones(1, 3, dtype=torch.bool)
    for options in ({}, {"lora": False, "policy_lr": 1e-3}):
        ppo = make_ppo("llama", steps=3, **options)
        one_step(ppo, 0)
        before = ppo.log_probabilities([[5, 6, 7]], ids, keep)
        resumed = make_ppo("llama", steps=3, **options)
        resumed.restore(torch.load(_saved(ppo), weights_only=True))
        after = resumed.log_probabilities([[5, 6, 7]], ids, keep)
        for a, b in zip(before[:3], after[:3], strict=True):
            assert torch.equal(a, b)
        assert (after[0] - after[1]).abs().max() > 1e-4


def test_I1_random_streams_go_on_where_they_were():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


# I2


def test_I2_a_crash_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.tensor([1.0])})

    def half(state, path):
        Path(path).write_bytes(b"half of a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(plumbline.align.runtime.checkpoints.torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 2, {"x": torch.tensor([2.0])})
    found = latest_checkpoint(tmp_path)
    assert load_checkpoint(found) == (1, {"x": torch.tensor([1.0])})


def test_I2_sigterm_saves_and_exits_and_the_run_goes_on_as_if_nothing_had_been(settings, share, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    class Terminating:
        name, calls = "share", 0

        def __call__(self, prompts, answers):
            self.calls += 1
            if self.calls == 3:  # the fit, the first rollout, the second
                os.kill(os.getpid(), signal.SIGTERM)
            return share()(prompts, answers)

    whole, broken = (str(tmp_path / name) for name in ("whole", "broken"))
    train(settings(steps=4, output_dir=whole), reward=CompositeReward([(share(), 1.0)]))
    with pytest.raises(SystemExit, match="after step 2; go on with --resume"):
        train(settings(steps=4, output_dir=broken), reward=CompositeReward([(Terminating(), 1.0)]))
    assert latest_checkpoint(tmp_path / "broken").name == "step-000002"
    train(settings(steps=4, output_dir=broken, resume=True), reward=CompositeReward([(share(), 1.0)]))
    assert_same_state(final_state(tmp_path / "whole", 4), final_state(tmp_path / "broken", 4))
    signal.signal(signal.SIGTERM, before)


def test_I2_only_complete_checkpoints_are_found(tmp_path):
    for rank in range(2):
        save_checkpoint(tmp_path, 1, {"rank": rank}, rank=rank)
    save_checkpoint(tmp_path, 2, {"rank": 0}, rank=0)  # rank 1 died before it wrote its part: nothing is pruned yet
    assert latest_checkpoint(tmp_path, num_ranks=2).name == "step-000001"
    assert load_checkpoint(latest_checkpoint(tmp_path, num_ranks=2), rank=1) == (1, {"rank": 1})
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_I2_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, step, {})
    prune_checkpoints(tmp_path, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000010"]


def test_I2_no_code_is_run_from_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    folder = save_checkpoint(tmp_path, 1, {"x": Evil()})
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_checkpoint(folder)


def test_I2_a_fresh_run_leaves_no_older_checkpoint_to_resume_from(settings, share, tmp_path):
    """Two runs in one folder, the second shorter and fresh: a resume goes on from the second."""
    reward = CompositeReward([(share(), 1.0)])
    train(settings(steps=3, save_every=1), reward=reward)
    train(settings(steps=1, save_every=1), reward=reward)
    assert latest_checkpoint(tmp_path / "run").name == "step-000001"


def test_I2_other_number_of_ranks_is_refused_and_not_started_anew(tmp_path, settings, share, read_metrics):
    """A checkpoint of two ranks cannot be resumed by one; to begin again at 0 would lose the run without a word."""
    run = train(settings(steps=1), reward=CompositeReward([(share(), 1.0)]))
    folder = latest_checkpoint(run)
    (folder / "rank-1.pt").write_bytes((folder / "rank-0.pt").read_bytes())
    with pytest.raises(ValueError, match="(?i)ranks|processes"):
        train(settings(steps=2, resume=True), reward=CompositeReward([(share(), 1.0)]))


# I3


def test_I3_evaluation_leaves_the_training_curve_as_it_was(settings, share, read_metrics, prompts_file, tmp_path):
    runs = {}
    for name, options in {
        "off": {},
        "on": {"eval_prompts_file": prompts_file, "eval_every": 1},
    }.items():
        run = train(
            settings("moe", steps=3, ppo_epochs=2, output_dir=str(tmp_path / name), **options),
            reward=CompositeReward([(share(), 1.0)]),
        )
        runs[name] = timeless(read_metrics(run))
    curve = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in runs["on"]]
    assert curve == runs["off"]
    assert all("eval/reward_mean" in row for row in runs["on"])  # at step 0, at each step, at the end
    states = [final_state(tmp_path / name, step=3) for name in ("off", "on")]
    assert_same_state(*states)


def test_I3_evaluation_draws_the_same_each_time(make_ppo, prompts_file, tmp_path):
    from plumbline.align.runtime.tracking import Metrics

    ppo = make_ppo("llama", eval_prompts_file=prompts_file, perturb=0.05)
    first, second = (evaluate(ppo, step, Metrics(tmp_path, enabled=False)) for step in (0, 1))
    assert first == second
    files = [(tmp_path / "run" / "samples" / f"step-00000{n}.jsonl").read_text() for n in (0, 1)]
    assert files[0] == files[1] and len(files[0].splitlines()) == 8


# Real processes


def script(tmp_path, body):
    """A file that trains as a user's own script would, with a reward of its own; once for each list of flags in its
    argument, so that torch is imported once for all of them."""
    path = tmp_path / "toy_run.py"
    path.write_text(
        textwrap.dedent(
            """
            import json, os, signal, sys
            from pathlib import Path
            import torch
            torch.set_num_threads(1)
            from accelerate import Accelerator
            from plumbline.align.runtime.launch import parse_settings
            from plumbline.align.ppo import PPOSettings, train
            from plumbline.reward import CompositeReward

            class Share:
                name = "share"
                calls = 0
                def __call__(self, prompts, answers):
                    Share.calls += 1
                    heard(Share.calls, prompts, answers)
                    return [sum(c.islower() for c in a) / max(len(a), 1) for a in answers]
            """
        )
        + textwrap.dedent(body)
        + textwrap.dedent(
            """
            if __name__ == "__main__":
                runs = json.loads(sys.argv[1])
                if len(runs) > 1:
                    Accelerator.end_training = lambda self: None  # it closes the process group that the next run needs
                for flags in runs:
                    Share.calls = 0
                    (settings,) = parse_settings((PPOSettings,), flags)
                    train(settings, reward=CompositeReward([(Share(), 1.0)]))
            """
        )
    )
    return path


def argument(*runs):
    """The argument of a script: the flags of each run."""
    return json.dumps([[piece for name, value in run.items() for piece in (f"--{name}", str(value))] for run in runs])


def environment():
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def toy_values(tmp_path, prompts_file, **overrides):
    return {
        "model": "bundled:tiny-moe",
        "prompts_file": prompts_file,
        "output_dir": str(tmp_path / "run"),
        "dtype": "float32",
        "lora_r": 4,
        "rollouts_per_step": 8,
        "minibatches": 2,
        "ppo_epochs": 1,
        "max_prompt_tokens": 120,
        "max_new_tokens": 6,
        "scaling_prompts": 8,
        "fluency_weight": 0,
        "kl_target": 0.3,
        "policy_lr": 1e-2,
        **overrides,
    }


def torchrun(path, port, *runs):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.run(
        [*command, str(path), argument(*runs)],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_F11_two_processes_draw_different_answers_and_end_with_equal_weights(tmp_path, prompts_file):
    path = script(
        tmp_path,
        """
        def heard(call, prompts, answers):
            rank = os.environ["RANK"]
            with open(Path(__file__).parent / f"heard-{rank}.jsonl", "a") as out:
                out.write(json.dumps([call, prompts, answers]) + "\\n")
        """,
    )
    done = torchrun(path, free_port(), toy_values(tmp_path, prompts_file, steps=2, save_every=1, eval_every=0))
    assert done.returncode == 0, done.stderr[-3000:]
    heard = [[json.loads(line) for line in (tmp_path / f"heard-{r}.jsonl").read_text().splitlines()] for r in (0, 1)]
    assert len(heard[0]) == len(heard[1]) == 3  # the fit, then two rollouts
    assert heard[0][0] == heard[1][0]  # the scaling is fitted on the same reference answers
    for first, second in zip(heard[0][1:], heard[1][1:], strict=True):
        assert len(first[2]) == len(second[2]) == 4
        assert not set(first[1]) & set(second[1])  # 8 prompts a step, each rank its own four
        assert first[2] != second[2]
    ranks = [load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002", rank=rank)[1] for rank in (0, 1)]
    for part, tensors in ranks[0]["actors"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ranks[1]["actors"][part][name]), name
    assert ranks[0]["kl"] == ranks[1]["kl"]  # one coefficient
    assert not torch.equal(ranks[0]["sampling"], ranks[1]["sampling"])  # and two random streams
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3  # one process writes


@pytest.mark.slow
def test_F10_reward_rises_on_a_toy_task_with_two_processes(tmp_path, prompts_file):
    """Write lower-case letters: a tenth of what a random model writes. With one pass over the rollouts, and with four."""
    runs = {}
    for ppo_epochs in (1, 4):
        runs[ppo_epochs] = toy_values(
            tmp_path,
            prompts_file,
            output_dir=str(tmp_path / f"epochs-{ppo_epochs}"),
            model="bundled:tiny-llama",
            lora="false",
            steps=10,
            rollouts_per_step=32,
            ppo_epochs=ppo_epochs,
            kl_coef=0.0,
            save_every=0,
            eval_every=0,
            max_new_tokens=4,
        )
        del runs[ppo_epochs]["kl_target"]
    done = torchrun(script(tmp_path, "def heard(*_): pass"), free_port(), *runs.values())
    assert done.returncode == 0, done.stderr[-3000:]
    for ppo_epochs in runs:
        lines = (tmp_path / f"epochs-{ppo_epochs}" / "metrics.jsonl").read_text().splitlines()
        scores = [json.loads(line)["reward/share_raw_mean"] for line in lines[:-1]]
        assert len(scores) == 10
        assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.1, (ppo_epochs, scores)


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


KILLED = """
KILL_AT = int(os.environ.get("KILL_AT", "0"))
def heard(call, prompts, answers):
    if call == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)
"""


KILLED_RUNS = {
    "lora-moe": {},
    "full-dense-constraint": {
        "model": "bundled:tiny-llama", "lora": "false", "cost_component": "share", "policy_lr": 1e-3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """A folder with <name>/whole, run through, and <name>/broken, killed in a rollout after the checkpoint and resumed.

    One process runs all that are whole, one for each is killed, and one resumes all.
    """
    folder = tmp_path_factory.mktemp("killed")
    path, prompts = script(folder, KILLED), folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(8)), encoding="utf-8")

    def values(name, part, **overrides):
        options = KILLED_RUNS[name] | overrides
        return toy_values(folder, prompts, steps=4, save_every=2, output_dir=str(folder / name / part), **options)

    def launch(*runs, kill_at=0):
        return subprocess.run(
            [sys.executable, str(path), argument(*runs)],
            env=environment() | {"KILL_AT": str(kill_at)},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=600,
        )

    whole = launch(*[values(name, "whole") for name in KILLED_RUNS])
    assert whole.returncode == 0, whole.stderr[-3000:]
    for name in KILLED_RUNS:
        killed = launch(values(name, "broken"), kill_at=1 + 4)  # the fit, then rollouts 0 to 3: in that of step 3
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert latest_checkpoint(folder / name / "broken").name == "step-000002"
    resumed = launch(*[values(name, "broken", resume="true") for name in KILLED_RUNS])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED_RUNS)
def test_I1_resume_after_sigkill_equals_an_unbroken_run(killed_runs, name):
    whole, broken = killed_runs / name / "whole", killed_runs / name / "broken"
    assert_same_state(final_state(whole, 4), final_state(broken, 4))
    weights = [next((run / "model").glob("*.safetensors")).read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    rows = [
        timeless([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
        for run in (whole, broken)
    ]
    assert rows[0] == rows[1]


# What a resume is refused, or says


def test_I1_a_resume_with_other_settings_lists_the_differences(settings, share, tmp_path, prompts_file):
    reward = CompositeReward([(share(), 1.0)])
    train(settings(steps=2), reward=reward)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Something else"}\n{"prompt": "Two"}\n' * 4)
    changed = {"seed": 5, "policy_lr": 0.5, "prompts_file": str(other)}
    again = dataclasses.replace(settings(steps=2, resume=True, **changed), model="bundled:tiny-moe")
    with pytest.raises(ValueError, match="belongs to another run") as refused:
        train(again, reward=reward)
    for name in ("model", *changed):
        assert f"{name}: " in str(refused.value)
    train(settings(steps=2, resume=True, save_every=1, tokens_per_micro_batch=4096), reward=reward)  # when, not what


def test_I1_a_finished_run_is_not_resumed_for_more_steps(settings, share):
    reward = CompositeReward([(share(), 1.0)])
    train(settings(steps=2, save_every=1), reward=reward)
    with pytest.raises(
        ValueError, match=r"ended a run of steps=2, whose rate has fallen to 0; with steps=4 it would come"
    ):
        train(settings(steps=4, resume=True), reward=reward)
    with pytest.raises(ValueError, match=r"steps=1 are fewer than the 2"):
        train(settings(steps=1, resume=True), reward=reward)


def test_I1_more_steps_go_on_falling_from_where_the_rate_was(settings, share, read_metrics, tmp_path, capsys):
    reward = CompositeReward([(share(), 1.0)])
    run = train(settings(steps=4, save_every=2, keep_checkpoints=5), reward=reward)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    train(settings(steps=8, resume=True), reward=reward)
    rates = [row["lr"] for row in read_metrics(run) if "lr" in row]
    assert len(rates) == 8 and all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert "steps was 4, is 8: from step 2 the rate falls to 0 at the new end" in capsys.readouterr().out


def test_I2_a_newest_checkpoint_that_is_cut_off_gives_way_to_the_one_before(tmp_path, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.tensor([float(step)])})
    file = tmp_path / "checkpoints" / "step-000002" / "rank-0.pt"
    file.write_bytes(file.read_bytes()[:-30])
    (tmp_path / "checkpoints" / "step-junk").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-000001"
    assert "step-000002 is not whole (rank-0.pt is cut off): going on from step-000001" in capsys.readouterr().out
    file.with_name("rank-0.pt").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "step-000001")
    with pytest.raises(ValueError, match="processes"):
        latest_checkpoint(tmp_path)
