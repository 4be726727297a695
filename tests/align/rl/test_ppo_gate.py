"""`gate:` of a PPO run: the trained policy is asked the suites of a gate file, and the exit status says what came of it."""

import pytest

from plumbline.align.ppo import main

GATES = """
gates:
  - {suite: over_refusal, figure: refused, at_most: 1.0}
  - {suite: over_refusal, figure: non_answer, rises_at_most: 1.0}
"""
TOY = (
    "--config configs/ppo/debug.yaml --steps 1 --rollouts_per_step 4 --minibatches 1 --ppo_epochs 1 --scaling_prompts 4"
)


def launch(tmp_path, gates):
    (tmp_path / "gates.yaml").write_text(gates)
    more = f"--eval_prompts 2 --gate_samples 4 --output_dir {tmp_path / 'run'} --gate {tmp_path / 'gates.yaml'}"
    main([*TOY.split(), *more.split()])


def test_a_policy_that_fails_its_gates_ends_the_run_with_status_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        launch(tmp_path, GATES + "  - {suite: ordinary, figure: refused, at_least: 0.99}\n")
    assert left.value.code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("pass", "FAIL"))]
    assert [line.split()[0] for line in lines] == ["pass", "pass", "FAIL"] and "ordinary/refused" in lines[2]
    assert all("trained" in line for line in lines)
    assert (tmp_path / "run" / "gate" / "report.html").is_file() and (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize(
    "gates, rule",
    [
        ("gates: [{suite: nowhere, figure: refused, at_most: 1}]", "nowhere"),
        ("gates: [{suite: quiz, figure: correct, at_most: 1, target: best}]", "start and trained"),
        ("gates: []", "at least one gate"),
    ],
)
def test_a_gate_file_that_cannot_be_used_is_refused_before_training(tmp_path, gates, rule):
    with pytest.raises(ValueError, match=rule):
        launch(tmp_path, gates)
    assert not (tmp_path / "run").exists()
