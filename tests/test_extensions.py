"""Other packages add commands, scanners and suites without a change to ours."""

import importlib.metadata
import textwrap

import pytest

from plumbline import extensions
from plumbline.apps import cli
from plumbline.eval.suites import load_suites
from plumbline.safety import Guard

POLICY = {
    "id": "mine/1",
    "scanners": ["bank_terms"],
    "rules": [{"name": "terms", "stages": ["input"], "if": {"scanner": "bank_terms", "score": 0.5}, "action": "block"}],
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution as pip would leave it: a module, and metadata with entry points."""

    def install(name: str, points: str, code: str = "") -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(points))
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    return install


def test_a_command_of_another_package_runs_and_is_listed(installed, capsys):
    installed(
        "greeter", "[plumbline.commands]\ngreet = greeter", "def main(argv):\n    print('hello', *argv)\n    return 3\n"
    )
    assert cli.main(["greet", "you"]) == 3
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "hello you" in said and "greet" in said and "from greeter" in said


def test_a_suite_of_another_package_is_loaded_by_name(installed):
    installed("quizzes", "[plumbline.suites]\nmine = quizzes:mine", """
        from plumbline.eval import EvalTask, Sample
        from plumbline.eval.suites.capability import quiz
        def mine():
            return quiz()
    """)  # fmt: skip
    assert load_suites(["mine"], limit=1)[0].samples


def test_a_scanner_of_another_package_serves_a_policy(installed):
    installed("bank", "[plumbline.scanners]\nbank_terms = bank:BankTerms", """
        from plumbline.safety.findings import Finding
        from plumbline.safety.input_filter.length import Length
        class BankTerms(Length):
            def scan(self, items):
                return [[Finding(scanner=self.name, version="1", category="x_hid", score=1.0)] * ("swap" in i.text) for i in items]
    """)  # fmt: skip
    guard = Guard(POLICY, model=lambda messages: "fine")
    assert guard.chat("a swap, please").action.name == "BLOCK" and guard.chat("tea, please").text == "fine"
    with pytest.raises(ValueError, match="no kind 'bonk_terms'; known are bank_terms, "):
        Guard(POLICY | {"scanners": ["bonk_terms"]})


def test_a_name_of_ours_or_one_name_twice_is_refused(installed):
    installed("thief", "[plumbline.commands]\ndemo = thief")
    with pytest.raises(ValueError, match=r"both thief and plumbline-rlhf add 'demo'; uninstall or rename one"):
        extensions.added("plumbline.commands", cli.COMMANDS)
    installed("one", "[plumbline.suites]\nmine = one:f")
    installed("two", "[plumbline.suites]\nmine = two:f")
    with pytest.raises(ValueError, match=r"both (one and two|two and one) add 'mine'"):
        extensions.added("plumbline.suites", [])
