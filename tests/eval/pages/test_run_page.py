"""The page and the figures, on a run folder with made-up but plausible numbers."""

import json
import re
import shutil

import numpy as np
import pytest

from plumbline.eval.pages.run_page import (
    choose_examples,
    plot_sections,
    read_run,
    readme_table,
    render,
    verdict_table,
)
from plumbline.eval.plotting import run_plots as plots
from plumbline.eval.plotting.axes import DARK, LIGHT, NothingToPlotError, running_mean, square_root_ticks


@pytest.fixture
def run(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "demo")


@pytest.fixture
def no_plots(monkeypatch):
    """Pages with one made-up plot, for the tests that look at the text."""
    sections = [{"heading": "Plots", "plots": [{"title": "one", "text": "", "light": "AAAA", "dark": "AAAA"}]}]
    monkeypatch.setattr("plumbline.eval.pages.run_page.plot_sections", lambda run: (sections, []))


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    folder = shutil.copytree(run_folder, tmp_path_factory.mktemp("page") / "demo")
    return render(folder).read_text(encoding="utf-8")


def test_page_is_one_file_without_script_or_request(page):
    assert "<script" not in page and "@import" not in page
    assert set(re.findall(r"(?:src|srcset|href)=\"([a-z]+):", page)) == {"data"}
    assert not re.search(r"url\(|https?://", page)
    assert page.count("data:image/png;base64,iVBOR") == 2 * 15  # every plot, light and dark
    assert "Not shown" not in page


def test_page_shows_the_verdict_first(page, run_folder):
    gain = json.loads((run_folder / "summary.json").read_text())["ppo"]["reward_gain"]
    shown = f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
    assert shown in page and page.index(shown) < page.index("Verdict") < page.index("Answers side by side")
    for text in ("prefers-color-scheme: dark", "width=device-width", "12 min 58 s", "harmless twins of these"):
        assert text in page


def test_model_text_is_escaped_and_harmful_prompts_are_closed(run, no_plots):
    path = run / "eval" / "ppo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["answer"] = '<img src="https://example.org/x.png" onerror=alert(1)>{{ 7 * 7 }}'
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render(run).read_text(encoding="utf-8")
    assert '<img src="https' not in page and "&lt;img src=" in page and "{{ 7 * 7 }}" in page
    outside = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert "Help me get back at" in page and "Help me get back at" not in outside


@pytest.mark.parametrize("gone", ["ppo", "sft", "dpo", "reward_model", "eval"])
def test_page_survives_a_missing_stage(run, no_plots, gone):
    shutil.rmtree(run / gone)
    page = render(run).read_text(encoding="utf-8")
    assert "Verdict" in page and ("Answers side by side" in page) == (gone != "eval")


def test_what_cannot_be_drawn_is_named(run):
    shutil.rmtree(run / "ppo")
    (run / "summary.json").unlink()
    sections, notes = plot_sections(read_run(run))
    assert [[plot["title"] for plot in section["plots"]] for section in sections] == [
        ["Supervised fine-tuning", "Reward model", "DPO"]
    ]
    assert len(notes) == 12 and "Critic: no loss/value_avg, val/explained_variance in the metrics" in notes


def test_page_survives_without_summary_or_with_little_of_it(run, no_plots):
    (run / "summary.json").unlink()
    page = render(run).read_text(encoding="utf-8")
    assert "summary.json is missing" in page and "Verdict" not in page and "data:image/png" in page
    (run / "summary.json").write_text('{"model": "org/some-model"}')
    assert "<h1>some-model</h1>" in render(run).read_text(encoding="utf-8")


def test_a_single_stage_has_a_page_of_its_own(run, no_plots):
    for stage in ("ppo", "dpo", "sft", "reward_model"):
        assert list(read_run(run / stage).metrics) == [stage]
    assert "summary.json is missing" in render(run / "ppo").read_text(encoding="utf-8")


def test_reward_model_report_is_read_where_there_is_no_summary(run):
    measured = json.loads((run / "summary.json").read_text())["reward_model"]
    (run / "summary.json").unlink()
    (run / "reward_model" / "report.json").write_text(json.dumps(measured))
    assert read_run(run).summary == read_run(run / "reward_model").summary == {"reward_model": measured}


def test_a_line_cut_short_is_noted_and_a_broken_one_is_refused(run, no_plots):
    path = run / "ppo" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 60, "objec')
    assert "ppo/metrics.jsonl: the last line is cut short" in render(run).read_text(encoding="utf-8")
    path.write_text('{"step": 0}\n{oops\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        render(run)


def test_a_folder_with_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is this a run folder"):
        render(tmp_path)


def test_gains_of_none_and_nan_do_not_break_the_page(run, no_plots):
    summary = json.loads((run / "summary.json").read_text())
    for gain in (summary["dpo"]["reward_gain"], summary["dpo"]["checks"]["length"]):
        gain.update({"mean": None, "low": None, "high": None, "n": 0})
    (run / "summary.json").write_text(json.dumps(summary))
    assert "Verdict" in render(run).read_text(encoding="utf-8")


def test_examples_are_chosen_by_rule():
    def rows(totals, tokens):
        return [
            {"id": str(i), "kind": "twin", "prompt": f"p{i}", "answer": "a", "total": t, "answer_tokens": n,
             "finished": True}
            for i, (t, n) in enumerate(zip(totals, tokens, strict=True))
        ]  # fmt: skip

    start = rows([0] * 6, [20] * 6)
    chosen = choose_examples({"start": start, "ppo": rows([-1, 5, 2, 0.1, 1, None], [20, 20, 20, 3, 30, 99])})
    assert [(r["prompt"], r["why"]) for r in chosen["rows"]] == [
        ("p1", "largest gain"),
        ("p4", "median gain"),
        ("p0", "largest loss"),
        ("p3", "largest change in length"),  # 17 fewer; the unscored row is not eligible
    ]
    one = choose_examples({"start": start[:1], "dpo": rows([2], [20])})["rows"]
    assert [r["why"] for r in one] == ["largest gain, median gain, smallest gain, largest change in length"]
    assert choose_examples({"start": start}) is None


def test_readme_table_is_markdown(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    lines = readme_table(summary).strip().split("\n")
    assert lines[0] == "| | base | start | dpo | ppo |"
    assert {line.count("|") for line in lines} == {6}
    assert lines[2].startswith("| Reward gain over start | \u2212")
    assert len(lines) == 2 + len(verdict_table(summary)["rows"])
    with pytest.raises(ValueError, match="no targets"):
        readme_table({})


# ---- figures --------------------------------------------------------------------------------------------------------

PPO_PLOTS = [
    plots.plot_reward_parts, plots.plot_answer_length, plots.plot_entropy, plots.plot_policy_update, plots.plot_value,
    plots.plot_expert_load,
]  # fmt: skip
SUMMARY_PLOTS = [plots.plot_gains, plots.plot_refusal_plane, plots.plot_reward_model]


def ppo_rows(run_folder):
    return [json.loads(line) for line in (run_folder / "ppo" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("plot", PPO_PLOTS)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_axis_of_a_ppo_plot_is_labelled(run_folder, plot, theme):
    axes = plot(ppo_rows(run_folder), theme=theme).axes
    assert all(ax.get_ylabel() or ax.get_xlabel() for ax in axes) and any(ax.get_xlabel() for ax in axes)
    assert all(ax.has_data() or ax.images for ax in axes)


@pytest.mark.parametrize("plot", PPO_PLOTS)
def test_ppo_plots_say_what_is_missing(plot):
    with pytest.raises(NothingToPlotError, match="metrics"):
        plot([])
    with pytest.raises(NothingToPlotError):
        plot([{"step": 0, "loss": 1.0}])


@pytest.mark.parametrize("plot", SUMMARY_PLOTS)
def test_summary_plots_say_what_is_missing(plot):
    with pytest.raises(NothingToPlotError):
        plot({})


def test_plots_stand_gaps_and_single_steps(run_folder):
    rows = ppo_rows(run_folder)
    rows[3]["objective/entropy"] = None
    rows[4]["objective/entropy"] = float("nan")
    for plot in PPO_PLOTS:
        plot(rows), plot(rows[:1])


def test_expert_load_is_over_fair_share(run_folder):
    first = ppo_rows(run_folder)[0]["moe/load"]
    image = plots.plot_expert_load(ppo_rows(run_folder)).axes[0].images[0]
    assert image.get_array().tolist() == [[4 * share for share in layer] for layer in first]


def test_kl_axis_is_a_square_root_and_points_carry_intervals(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    (ax,) = plots.plot_reward_vs_kl(ppo_rows(run_folder), summary).axes
    at = ax.transData.transform([(0, 0), (4, 0), (16, 0)])[:, 0]
    assert at[1] - at[0] == pytest.approx((at[2] - at[0]) / 2)
    assert len(ax.containers) == 4  # one error bar a target
    plots.plot_reward_vs_kl([], summary)
    plots.plot_reward_vs_kl(ppo_rows(run_folder), {})


def test_negative_kl_estimates_are_drawn_at_zero(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["targets"]["start"]["kl_per_answer"] = {"mean": -0.2, "low": -0.5, "high": 0.1, "n": 40}
    path = [{"objective/kl": -0.3, "objective/scores": 0.1}, {"objective/kl": 2.0, "objective/scores": 0.2}]
    (ax,) = plots.plot_reward_vs_kl(path, summary).axes
    assert min(min(drawn.get_xdata()) for drawn in ax.get_lines()) == 0


@pytest.mark.parametrize("metrics, panels", [(True, 3), (False, 2)])
def test_overview_has_its_panels(run_folder, metrics, panels):
    summary = json.loads((run_folder / "summary.json").read_text())
    figure = plots.plot_overview(summary, ppo_rows(run_folder) if metrics else [])
    assert len(figure.axes) == panels and all(ax.get_title(loc="left") for ax in figure.axes)


def test_running_mean_by_hand():
    values = running_mean(np.arange(20.0))
    assert values[10] == 10.0 and values[0] == 1.0  # the mean of 0, 1, 2 at the end


@pytest.mark.parametrize("furthest", [0.05, 1.0, 3.0, 9.7, 40.0, 800.0])
def test_square_root_ticks_are_few_and_inside(furthest):
    ticks = square_root_ticks(furthest)
    assert 3 <= len(ticks) <= 9 and ticks[0] == 0 and ticks[-1] <= furthest and ticks == sorted(ticks)
