"""`plumbline eval-reward`: how often rewards agree with people, on any file, folder or hub id of preference pairs.

    plumbline eval-reward --model runs/reward_model/model --data FOLDER_OR_FILE[,ANOTHER]

One table: "the longer answer is better", a linear model on embeddings, the shipped composite, and the reward models. What
is fitted on pairs (the linear model, the composite's scaling and weights) never sees the prompts that it is measured on:

- alone, it is fitted on four fifths of the prompts and measured on the other fifth, five times over
- with `--holdout_every N`, the data are split as `plumbline reward-model` splits them with that setting: measured are the
  prompts that it held out, fitted is on those that it trained on
- with `--train_file`, it is fitted there and measured on all of the data

In the last two cases prompts of the data that are, nearly word for word, among those fitted on are left out and counted.
Each temperature is fitted on other prompts than those whose calibration is measured. Ends with one line of JSON.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plumbline.align.data.formats import read_pairs
from plumbline.align.data.rows import PreferencePair, last_user_text, split_pairs
from plumbline.align.runtime.launch import parse_settings, pick_dtype
from plumbline.eval.plotting.pair_plots import plot_pair_reports
from plumbline.eval.stats.intervals import paired_bootstrap
from plumbline.eval.stats.pair_accuracy import as_percent, fold_of, hits, pair_report, shared_prompts
from plumbline.policy_models.loading import resolve_model_source
from plumbline.reward.composite import CompositeReward, default_composite
from plumbline.reward.learned import LearnedPreference
from plumbline.reward.tuning import embedding_features, fit_logistic, out_of_fold

FOLDS = 5
SIGNS = {"toxicity": -1}  # every other part is one of which more is better
EMBEDDING_L2 = 0.03
COMPOSITE_L2 = 0.01
# Of the pairs to fit on, for the composite: it has four weights, and its language model takes most of the time.
WEIGHT_PAIRS, WEIGHT_CHARS = 500, 2000
RESAMPLES = 2000


@dataclass(kw_only=True)
class EvalRewardSettings:
    """What is measured, on what."""

    data: str = field(default="", metadata={"help": "pairs: files, folders (all their files), hub ids, with commas"})
    model: str | None = field(
        default=None, metadata={"help": "reward models: folders or hub ids, with commas; none: baselines only"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "pairs to fit on, as for data: what the model was trained on; none: folds"}
    )
    holdout_every: int | None = field(
        default=None, metadata={"help": "measure the one prompt in this many that reward-model held out of the data"}
    )
    group: str | None = field(
        default=None, metadata={"help": "word: one more column over the subsets whose name has it, such as harmless"}
    )
    embedding: bool = field(default=True, metadata={"help": "measure the linear model on embeddings"})
    composite: bool = field(default=True, metadata={"help": "measure the composite, weights fitted as said above"})
    fluency: bool = field(default=True, metadata={"help": "with its fluency part, a language model: most of the time"})
    weights: str | None = field(default=None, metadata={"help": "JSON of `plumbline reward tune`, instead of fitting"})
    limit: int | None = field(
        default=None, metadata={"help": "pairs at most, drawn by prompt, the same ones each time"}
    )
    max_chars: int | None = field(
        default=None, metadata={"help": "leave out pairs with more characters in prompt and longer answer"}
    )
    per_prompt: int | None = field(default=None, metadata={"help": "pairs of one prompt at most, the first ones"})
    dtype: str = field(default="auto", metadata={"help": "of the reward model: auto, bfloat16 or float32"})
    output_dir: str = field(default="runs/eval_reward", metadata={"help": "folder of report.json and report.png"})

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data is missing: a file, a folder or a hub id of preference pairs")
        if self.limit is not None and self.limit < 2 * FOLDS:
            raise ValueError(f"limit={self.limit}: at least {2 * FOLDS} pairs are needed for {FOLDS} folds")
        if self.holdout_every is not None and self.holdout_every < 2:
            raise ValueError(f"holdout_every={self.holdout_every}: must be at least 2, as for reward-model")
        if self.holdout_every is not None and self.train_file is not None:
            raise ValueError("holdout_every and train_file both say what to fit on; give one of them")
        for name in ("per_prompt", "max_chars"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def models(self) -> dict[str, str]:
        """Sources by the name in the table."""
        sources = self.model.split(",") if self.model else []
        if len(sources) == 1:
            return {"reward model": sources[0]}
        paths = [Path(source) for source in sources]
        return {f"reward model {p.parent.name if p.name == 'model' else p.name}": str(p) for p in paths}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Pairs to measure with their prompts, and pairs to fit on (empty: fit by folds)."""

    pairs: list[PreferencePair]
    prompts: list[str]
    fit: list[PreferencePair]
    leaked: int = 0

    @property
    def folds(self) -> np.ndarray:
        """ValueError for too few prompts."""
        return fold_of(self.prompts, FOLDS)


def split(settings: EvalRewardSettings, pairs: list[PreferencePair]) -> Split:
    """What is measured and what is fitted on; see the top of this file."""
    fit: list[PreferencePair] = []
    leaked = 0
    if settings.holdout_every is not None:
        fit, pairs = split_pairs(pairs, settings.holdout_every)
    elif settings.train_file is not None:
        fit = [pair for pair in read_pairs(settings.train_file)[0] if pair.p_chosen > 0.5]
    if fit:
        leaks = {row for row, _, _ in shared_prompts([prompt_text(p) for p in fit], [prompt_text(p) for p in pairs])}
        leaked, pairs = len(leaks), [pair for row, pair in enumerate(pairs) if row not in leaks]
        print(f"left out: {leaked} pairs whose prompt is among the {len(fit)} pairs to fit on")
    if settings.max_chars is not None:
        short = [pair for pair in pairs if chars(pair) <= settings.max_chars]
        print(f"left out: {len(pairs) - len(short)} of {len(pairs)} pairs of more than {settings.max_chars} characters")
        pairs = short
    pairs = sample_by_prompt(first_of_prompt(pairs, settings.per_prompt), settings.limit)
    return Split(pairs=pairs, prompts=[prompt_text(pair) for pair in pairs], fit=fit, leaked=leaked)


def run(settings: EvalRewardSettings) -> dict[str, Any]:
    """Measures, prints the table, writes report.json and report.png; returns the report."""
    for source in settings.models.values():
        resolve_model_source(source)
    pairs, read = read_pairs(settings.data)
    print(f"{settings.data}: {read}")
    data = split(settings, [pair for pair in pairs if pair.p_chosen > 0.5])
    assert data.folds is not None  # before any model loads: too few prompts stop here
    margins = {
        "length": np.array([len(answer_text(p.chosen)) - len(answer_text(p.rejected)) for p in data.pairs], dtype=float)
    }
    if settings.embedding:
        tell(data, "embedding + linear")
        margins["embedding + linear"] = embedding_baseline(data)
    if settings.composite:
        tell(data, "composite")
        composite = default_composite(alpha=1.0 if settings.fluency else 0.0)
        weights = None if settings.weights is None else json.loads(Path(settings.weights).read_text())["weights"]
        margins["composite"] = composite_margins(composite, data, weights)
    for name, source in settings.models.items():
        from plumbline.align.reward_model import score_pairs

        tell(data, name)
        chosen, rejected = score_pairs(LearnedPreference(source, dtype=pick_dtype(settings.dtype)), data.pairs)
        margins[name] = chosen - rejected
    report: dict[str, Any] = {
        "data": settings.data,
        "model": settings.model,
        "read": str(read),
        "pairs": len(data.pairs),
        "prompts": len(set(data.prompts)),
        "ties_left_out": read.ties,
        "fitted_on": len(data.fit),
        "leaked": data.leaked,
        "scorers": {name: scorer_report(margin, data, settings.group) for name, margin in margins.items()},
        "differences": differences(margins, data, settings),
    }
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot_pair_reports(report["scorers"]).savefig(folder / "report.png")
    print(table(report))
    for name, one in report["differences"].items():
        print(f"{name}: {100 * one['mean']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}] points")
    return report


def tell(data: Split, scorer: str) -> None:
    """What is under way: on a thousand pairs a scorer may take a quarter of an hour."""
    print(f"scoring {len(data.pairs)} pairs: {scorer}", flush=True)


def first_of_prompt(pairs: list[PreferencePair], count: int | None) -> list[PreferencePair]:
    """The first `count` pairs of each prompt; all for None."""
    seen: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        seen[prompt_text(pair)] += 1
        if count is None or seen[prompt_text(pair)] <= count:
            kept.append(pair)
    return kept


def chars(pair: PreferencePair) -> int:
    """Of the prompt with the longer of its answers."""
    return sum(len(m["content"]) for m in pair.prompt) + max(
        len(answer_text(pair.chosen)), len(answer_text(pair.rejected))
    )


def sample_by_prompt(pairs: list[PreferencePair], limit: int | None) -> list[PreferencePair]:
    """At most `limit` pairs: all pairs of some prompts, chosen by the hash of the prompt, in the order of the file."""
    if limit is None or len(pairs) <= limit:
        return pairs
    keys = [hashlib.sha256(prompt_text(pair).encode()).hexdigest() for pair in pairs]
    kept = set(sorted(range(len(pairs)), key=lambda row: keys[row])[:limit])
    return [pair for row, pair in enumerate(pairs) if row in kept]


def prompt_text(pair: PreferencePair) -> str:
    """What composites see of a conversation: what the user said, all turns, since the last one alone may be "go on"."""
    return "\n\n".join(m["content"] for m in pair.prompt if m["role"] == "user") or last_user_text(pair.prompt)


def answer_text(answer: list[dict[str, str]]) -> str:
    """The last turn of an answer."""
    return answer[-1]["content"]


def subset_name(pair: PreferencePair) -> str:
    """Where the pair is from; where it has a category of several levels, such as RMB's, with the one that tells most."""
    levels = pair.tags.get("category", "").split("/")
    return f"{pair.source} {levels[1].lower()}" if len(levels) > 2 else pair.source


def embedding_baseline(data: Split) -> np.ndarray:
    """(N,) margins of a logistic model on MiniLM embeddings that was fitted on other prompts."""
    from plumbline.safety.embedder.embedding import load_embedder

    embed: Callable = load_embedder().embed

    def features(pairs: Sequence[PreferencePair]) -> np.ndarray:
        prompts = [prompt_text(pair) for pair in pairs]
        chosen, rejected = (
            embedding_features(embed, prompts, [answer_text(getattr(p, side)) for p in pairs])
            for side in ("chosen", "rejected")
        )
        return chosen - rejected

    x_NF = features(data.pairs)
    if not data.fit:
        return out_of_fold(x_NF, data.folds, l2=EMBEDDING_L2)
    return x_NF @ fit_logistic(features(data.fit), l2=EMBEDDING_L2)


def part_differences(
    composite: CompositeReward, pairs: Sequence[PreferencePair], prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """(N,) scaled part of chosen less that of rejected, by name; no opinion counts as the mean, 0.

    A composite without a scaling gets one from the answers of these pairs.
    """
    answers = [answer_text(p.chosen) for p in pairs] + [answer_text(p.rejected) for p in pairs]
    twice = [*prompts, *prompts]
    raw = composite.raw(twice, answers)
    if composite.scaling is None:
        composite.fit_raw(raw)
    scaled = composite.combine(raw).parts.scaled
    n = len(pairs)
    values = {name: np.array([0.0 if s is None else s for s in scores]) for name, scores in scaled.items()}
    return {name: x[:n] - x[n:] for name, x in values.items()}


def composite_margins(composite: CompositeReward, data: Split, weights: dict[str, float] | None) -> np.ndarray:
    """(N,) margins under the given weights, or under weights fitted on other prompts."""
    short = [pair for pair in data.fit if chars(pair) <= WEIGHT_CHARS]
    fit = sample_by_prompt(short or data.fit, WEIGHT_PAIRS)
    fitted_on = part_differences(composite, fit, [prompt_text(p) for p in fit]) if fit and weights is None else {}
    parts = part_differences(composite, data.pairs, data.prompts)
    if weights is None:
        signs = [SIGNS.get(name, 1) for name in parts]
        x_NF = np.stack(list(parts.values()), axis=1)
        if not fit:
            return out_of_fold(x_NF, data.folds, l2=COMPOSITE_L2, signs=signs)
        return x_NF @ fit_logistic(np.stack(list(fitted_on.values()), axis=1), l2=COMPOSITE_L2, signs=signs)
    if missing := sorted(set(parts) - set(weights)):
        raise ValueError(
            f"the weights file has no weight for {missing}; run `plumbline reward tune` with the same parts"
        )
    return np.sum([weights[name] * x for name, x in parts.items()], axis=0)


def scorer_report(margin: np.ndarray, data: Split, group: str | None = None) -> dict[str, Any]:
    """`pair_report` over the pairs that were scored; `unscored` counts the others. `by_subset` has `group` as well."""
    rows = np.flatnonzero(np.isfinite(margin))
    if not len(rows):
        raise ValueError("the reward model scored no pair: all are longer than its positions")
    kept, prompts = [data.pairs[row] for row in rows], [data.prompts[row] for row in rows]
    extra = np.array([len(answer_text(p.chosen)) - len(answer_text(p.rejected)) for p in kept])
    subsets = [subset_name(pair) for pair in kept]
    report = pair_report(
        margin[rows],
        subsets=subsets,
        extra_length=extra,
        groups=prompts,
        agreement=[pair.tags.get("agreement", "") for pair in kept],
    )
    inside = [at for at, name in enumerate(subsets) if group and group in name]
    if inside:
        part = pair_report(
            margin[rows][inside],
            subsets=[str(group)] * len(inside),
            extra_length=extra[inside],
            groups=[prompts[at] for at in inside],
        )
        report["by_subset"] |= {f"all {group}": part["accuracy"] | {"ece": part.get("ece")}}
    report["confident_mistakes"] = [
        {"prompt": prompts[at], "chosen": answer_text(kept[at].chosen), "rejected": answer_text(kept[at].rejected)}
        for at in report.get("confident_mistakes", [])
    ]
    return report | {"unscored": len(data.pairs) - len(rows)}


def differences(margins: dict[str, np.ndarray], data: Split, settings: EvalRewardSettings) -> dict[str, dict[str, Any]]:
    """How much more often each reward model is right than each other scorer, in all and on the group: paired bootstrap
    over prompts, on the pairs that both scored."""
    group, out = settings.group, {}
    for mine in settings.models:
        for other in [name for name in margins if name not in settings.models]:
            both = np.isfinite(margins[mine]) & np.isfinite(margins[other])
            for word in [None, *([group] if group else [])]:
                rows = [at for at in np.flatnonzero(both) if word is None or word in subset_name(data.pairs[at])]
                if not rows:
                    continue
                gain = paired_bootstrap(
                    hits(margins[mine][rows]),
                    hits(margins[other][rows]),
                    clusters=[data.prompts[at] for at in rows],
                    resamples=RESAMPLES,
                )
                out[f"{mine} less {other}, {word or 'all'}"] = gain._asdict() | {"pairs": len(rows)}
    return out


def table(report: dict[str, Any]) -> str:
    """Markdown: a column a scorer; accuracy in all, at equal lengths and by subset, and calibration."""
    scorers = report["scorers"]
    first = next(iter(scorers.values()))
    lines = ["| % of pairs ranked right | pairs | " + " | ".join(scorers) + " |", "|---" * (len(scorers) + 2) + "|"]

    def line(name: str, shares: list[dict[str, Any] | None]) -> None:
        cells = ["-" if share is None else as_percent(share) for share in shares]
        lines.append("| " + " | ".join([name, str((shares[0] or {}).get("n", "-")), *cells]) + " |")

    line("all", [one["accuracy"] for one in scorers.values()])
    line("at equal lengths", [one["length_controlled"] for one in scorers.values()])
    for subset in first["by_subset"] if len(first["by_subset"]) > 1 else []:
        line(subset, [one["by_subset"].get(subset) for one in scorers.values()])
    errors = [f"{one['ece']:.3f}" if "ece" in one else "-" for one in scorers.values()]
    lines.append("| calibration error (ECE) | | " + " | ".join(errors) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (settings,) = parse_settings((EvalRewardSettings,), argv)
    report = run(settings)
    short = {
        name: {
            "accuracy": one["accuracy"],
            "length_controlled": one["length_controlled"],
            "ece": one.get("ece"),
            "group": one["by_subset"].get(f"all {settings.group}"),
        }
        for name, one in report["scorers"].items()
    }
    print(json.dumps({"pairs": report["pairs"], "scorers": short, "differences": report["differences"]}))
