"""docs/run_folders.md says what the code does: its settings tables and its metrics."""

import importlib.util
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pages import REPOSITORY  # noqa: E402

SPEC = importlib.util.spec_from_file_location("print_settings", REPOSITORY / "docs" / "print_settings.py")
print_settings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(print_settings)
PAGE = (REPOSITORY / "docs" / "run_folders.md").read_text(encoding="utf-8")
AREAS = "policy|value|val|loss|objective|rollout|eval|watch|lagrangian|perf|router|moe|reward"
RENAMED = {"policy/loss", "value/loss", "policy/approx_kl", "policy/clip_fraction", "value/clip_fraction", "policy/entropy",
           "policy/ratio"}  # logged under TRL's names: `trl_names` in align/runtime/tracking.py  # fmt: skip


def test_the_settings_tables_are_those_of_the_code():
    assert print_settings.page() == PAGE, "run `python docs/print_settings.py`"


def test_every_metric_of_ppo_is_explained():
    files = [REPOSITORY / "align" / "ppo.py", *(REPOSITORY / "align" / "rl").glob("*.py"),
             REPOSITORY / "align" / "runtime" / "tracking.py", REPOSITORY / "policy_models" / "balance.py",
             REPOSITORY / "reward" / "composite.py"]  # fmt: skip
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    written = set(re.findall(rf'f?"((?:{AREAS})/[a-z_{{}}]+)"', source))
    written = {re.sub(r"\{name\}", "<part>", metric) for metric in written} - RENAMED
    written = {metric for metric in written if not metric.startswith("watch/<part>")}  # proxy and grader, by name
    assert len(written) > 40
    explained = set(re.findall(r"`([a-z]+/[a-z_<>]+)`", PAGE))
    assert not written - explained, "docs/run_folders.md does not explain these metrics"
    assert not {m for m in explained - written if m.split("/")[0] in AREAS.split("|")} - {
        "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio",
        "objective/entropy", "watch/proxy_gain", "watch/grader_gain", "watch/proxy_gain_margin", "watch/grader_gain_margin",
    }  # fmt: skip
