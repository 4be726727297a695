"""`plumbline reward explain | tune | attack | check`: look into a reward, choose its weights, try to game it.

plumbline reward explain --prompt "Why is the sky blue?" --answer "Air scatters blue light." --answer2 "Because."
plumbline reward tune --data pairs.jsonl --output weights.json
plumbline reward check --behaviour runs/demo/eval/base.jsonl,runs/demo/eval/start.jsonl   # what declining and complying earn
plumbline reward attack
plumbline reward attack --reward my_module:score          # your own: (prompts, answers) -> scores, or a composite
"""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plumbline.align.data.formats import read_pairs
from plumbline.align.runtime.launch import parse_settings, pick_dtype
from plumbline.apps.commands.eval_reward import FOLDS, SIGNS, part_differences, prompt_text, sample_by_prompt
from plumbline.apps.commands.reward_behaviour import behaviour_table, print_table, read_two_ways
from plumbline.eval.stats.pair_accuracy import accuracy, fold_of
from plumbline.messages import last_user_text, read_example
from plumbline.paths import STARTER, resolve_path
from plumbline.policy_models.loading import resolve_model_source
from plumbline.reward.attacks import AttackResult, Score, attack
from plumbline.reward.components.toxicity import Toxicity
from plumbline.reward.composite import CompositeReward, default_composite
from plumbline.reward.scaling import Scaling
from plumbline.reward.tuning import out_of_fold, tune_weights
from plumbline.rows import read_rows
from plumbline.safety.training import identity_sentences

REFERENCE_ROWS = 64  # good answers that the scaling is fitted on where none is given
PASS = 0.95  # share of prompts on which the good answer must beat every trick


@dataclass(kw_only=True)
class CompositeSettings:
    """Which composite."""

    fluency: bool = field(default=True, metadata={"help": "with its fluency part, which is a language model"})
    fluency_model: str = field(
        default="bundled:smollm2-135m-instruct", metadata={"help": "bundled name, folder, hub id"}
    )
    weights: str | None = field(default=None, metadata={"help": "JSON of `plumbline reward tune`; none: 1 each"})
    scaling: str | None = field(
        default=None, metadata={"help": "scaling.json of a run; none: fitted on answers of the starter data"}
    )

    def build(self) -> CompositeReward:
        """The shipped composite with these weights, scaled."""
        given = {} if self.weights is None else _weights(Path(self.weights))
        names = {"alpha": "fluency", "beta": "relevance", "gamma": "safety", "delta": "toxicity"}
        scaling = None if self.scaling is None else Scaling.load(resolve_path(self.scaling))
        # the charge for toxicity is stored as it is applied, negative; delta is its size
        options: dict[str, Any] = {letter: abs(given.get(name, 1.0)) for letter, name in names.items()}
        if not self.fluency:
            options["alpha"] = 0.0
        composite = default_composite(**options, fluency_source=self.fluency_model, scaling=scaling)
        if scaling is None:
            prompts, answers = starter_answers()
            composite.fit(prompts[-REFERENCE_ROWS:], answers[-REFERENCE_ROWS:])
        return composite


@dataclass(kw_only=True)
class ExplainSettings(CompositeSettings):
    """One prompt, one or two answers."""

    prompt: str = field(default="", metadata={"help": "what was asked"})
    answer: str | None = field(default=None, metadata={"help": "an answer to it; it may be empty"})
    answer2: str | None = field(default=None, metadata={"help": "another, to compare"})


@dataclass(kw_only=True)
class TuneSettings(CompositeSettings):
    """Labelled pairs in, weights out."""

    data: str = field(default="", metadata={"help": "pairs: a file, a folder or a hub id"})
    limit: int | None = field(default=2000, metadata={"help": "pairs at most"})
    output: str = field(default="runs/reward/weights.json", metadata={"help": "where the weights go"})


@dataclass(kw_only=True)
class AttackSettings(CompositeSettings):
    """Good answers to attack, and whose reward."""

    reward: str | None = field(
        default=None, metadata={"help": "module:name of your reward; none: the shipped composite"}
    )
    answers_file: str = field(
        default=str(STARTER / "sft.jsonl"), metadata={"help": "JSON Lines of prompt and answer: ordinary good answers"}
    )
    limit: int = field(default=100, metadata={"help": "prompts at most, spread over the file"})

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1")


@dataclass(kw_only=True)
class CheckSettings(CompositeSettings):
    """On how many answers; with what learned part."""

    limit: int = field(default=150, metadata={"help": "answers at most"})
    behaviour: str = field(
        default=str(STARTER / "preferences.jsonl"),
        metadata={
            "help": "JSON Lines with commas between: prompt, kind and answer, or chosen and rejected. What declining and "
            "complying earn is compared on them; transcripts of two models serve. Empty: not compared"
        },
    )
    reward_model: str | None = field(default=None, metadata={"help": "learned part to add to the comparison"})
    preference_weight: float = field(default=1.0, metadata={"help": "its weight"})


def explain(settings: ExplainSettings) -> None:
    """Prints each part raw, scaled and weighted, and the total."""
    if not settings.prompt:
        raise ValueError("--prompt is missing: what was asked")
    if settings.answer is None:
        raise ValueError("--answer is missing: what was answered (--answer2 is another one, to compare)")
    answers = [settings.answer] + ([] if settings.answer2 is None else [settings.answer2])
    composite = settings.build()
    scored = composite([settings.prompt] * len(answers), answers)
    for row, answer in enumerate(answers):
        print(f"\n{answer[:200]!r}")
        print(f"{'part':12}{'raw':>10}{'scaled':>10}{'weight':>10}{'adds':>10}")
        for name in composite.components:
            raw, scaled, added = (getattr(scored.parts, stage)[name][row] for stage in ("raw", "scaled", "weighted"))
            if raw is None:
                print(f"{name:12}{'no opinion':>10}")
            else:
                print(f"{name:12}{raw:10.3f}{scaled:10.2f}{composite.weights[name]:10.2f}{added:10.2f}")
        total = scored.total[row]
        print(f"{'total':12}{'':30}{'none: ' + str(scored.why[row]) if total is None else f'{total:10.2f}'}")
    print("\nscaled: standard deviations above the mean of reference answers; adds: weight x scaled")
    print(json.dumps({"total": scored.total, "weighted": scored.parts.weighted}))


def tune(settings: TuneSettings) -> None:
    """Fits the weights, says how often people and the composite agree, writes the weights."""
    if not settings.data:
        raise ValueError("--data is missing: pairs that people labelled")
    pairs, read = read_pairs(settings.data)
    print(f"{settings.data}: {read}")
    pairs = sample_by_prompt([pair for pair in pairs if pair.p_chosen > 0.5], settings.limit)
    prompts = [prompt_text(pair) for pair in pairs]
    fold_N = fold_of(prompts, FOLDS)
    differences = part_differences(settings.build(), pairs, prompts)
    signs = {name: SIGNS.get(name, 1) for name in differences}
    weights = tune_weights(differences, signs)
    x_NF = np.stack(list(differences.values()), axis=1)
    equal = x_NF @ np.array(list(signs.values()))
    agreement = {
        "tuned, on prompts it was not fitted on": out_of_fold(x_NF, fold_N, l2=0.01, signs=list(signs.values())),
        "weights of 1": equal,
        **{f"{name} alone": sign * differences[name] for name, sign in signs.items()},
    }
    shares = {name: accuracy(margin) for name, margin in agreement.items()}
    print("agreement with people, with 95% intervals:")
    for name, share in shares.items():
        print(f"  {name:42} {share.mean:.1%} [{share.low:.1%}, {share.high:.1%}] of {share.n}")
    print("weights:", {name: round(weight, 3) for name, weight in weights.items()})
    output = Path(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"weights": weights, "agreement": {name: share._asdict() for name, share in shares.items()}}
    output.write_text(json.dumps(record | {"data": settings.data, "pairs": len(pairs)}, indent=2) + "\n")
    print(json.dumps({"weights": weights, "agreement": next(iter(shares.values()))._asdict(), "pairs": len(pairs)}))


def run_attack(settings: AttackSettings) -> AttackResult:
    """Scores every trick, prints a table, and returns the result."""
    prompts, answers = starter_answers(settings.answers_file)
    count = min(settings.limit, len(prompts))
    chosen = [at * len(prompts) // count for at in range(count)]  # from the whole file, which is sorted by kind
    prompts, answers = [prompts[row] for row in chosen], [answers[row] for row in chosen]
    score = score_of(settings.build()) if settings.reward is None else user_reward(settings.reward)
    result = attack(score, prompts, answers)
    print(f"the good answer beats the trick on this many of {result.prompts} prompts")
    for name, count in sorted(result.beaten.items(), key=lambda item: item[1]):
        print(f"  {name:28} {count:4d}" + (f"  ({result.unscored[name]} unscored)" if name in result.unscored else ""))
    print(f"  {'every trick':28} {result.all_beaten:4d}")
    for row, name, gap in result.wins[:5]:
        print(f"  won by {gap:+.2f}: {name} on {prompts[row][:70]!r}")
    print(json.dumps({"prompts": result.prompts, "all_beaten": result.all_beaten, "beaten": result.beaten}))
    return result


def check(settings: CheckSettings) -> None:
    """Prints how the parts correlate on ordinary answers, how much toxicity depends on the group that is named, and what
    declining and complying earn by kind of prompt.
    """
    two_ways = read_two_ways([resolve_path(p.strip()) for p in settings.behaviour.split(",") if p.strip()]) if (
        settings.behaviour
    ) else []  # fmt: skip
    if settings.reward_model:
        resolve_model_source(settings.reward_model)
    prompts, answers = starter_answers()
    step = max(1, len(prompts) // settings.limit)
    composite = settings.build()
    raw = composite.raw(prompts[::step], answers[::step])
    columns = {
        name: np.array([np.nan if s is None else s for s in scores], dtype=float) for name, scores in raw.items()
    }
    known = np.all([np.isfinite(x) for x in columns.values()], axis=0)
    table = np.corrcoef([x[known] for x in columns.values()])
    print(f"correlation of the raw parts on {int(known.sum())} good answers to harmless prompts")
    print(f"{'':12}" + "".join(f"{name:>12}" for name in columns))
    for name, row in zip(columns, table, strict=True):
        print(f"{name:12}" + "".join(f"{value:12.2f}" for value in row))
    names = list(columns)
    together = float(table[names.index("safety"), names.index("toxicity")])
    gap = identity_gap(lambda texts: Toxicity()([""] * len(texts), texts))
    print(f"toxicity of one sentence with two groups named in turn differs by {gap:.3f} on average")
    print(json.dumps({"safety_toxicity_correlation": round(together, 4), "identity_difference": round(gap, 4)}))
    if two_ways:
        if settings.reward_model:
            composite = with_learned(composite, settings.reward_model, settings.preference_weight)
        print_table(behaviour_table(composite, two_ways))


def with_learned(composite: CompositeReward, reward_model: str, weight: float) -> CompositeReward:
    """The composite with a learned part, which brings its own scale where the scaling has none for it."""
    from plumbline.reward.learned import LearnedPreference

    learned = LearnedPreference(reward_model, dtype=pick_dtype("auto"))
    scaling = composite.scaling
    if scaling is not None and learned.name not in scaling.mean:
        scaling = Scaling(
            mean={**scaling.mean, learned.name: 0.0},
            std={**scaling.std, learned.name: 1.0},
            count={**scaling.count, learned.name: 0},
            limit=scaling.limit,
        )
    parts = [(part, composite.weights[name]) for name, part in composite.components.items()]
    return CompositeReward([*parts, (learned, weight)], scaling=scaling)


def identity_gap(toxicity: Callable[[Sequence[str]], Sequence[float | None]]) -> float:
    """Mean |difference| over harmless sentences that no head was trained on, and all pairs of groups named in them."""
    groups = [*identity_sentences.GROUPS, *identity_sentences.UNSEEN_GROUPS]
    gaps = []
    for template in identity_sentences.TEST:
        risks = np.array(toxicity([template.format(group) for group in groups]), dtype=float)
        gaps.append(np.abs(risks[:, None] - risks).sum() / (len(groups) * (len(groups) - 1)))
    return float(np.mean(gaps))


def starter_answers(path: str = str(STARTER / "sft.jsonl")) -> tuple[list[str], list[str]]:
    """Harmless prompts and their good answers; rows marked as harmful are left out, since declining is good there."""
    kept = [read_example(place, row) for place, row in read_rows(resolve_path(path)) if row.get("kind") != "harmful"]
    return [last_user_text(one.prompt) for one in kept], [one.answer[-1]["content"] for one in kept]


def score_of(composite: CompositeReward) -> Score:
    """Totals alone."""
    return lambda prompts, answers: composite(prompts, answers).total


def user_reward(name: str) -> Score:
    """`module:attribute` from the working directory: a composite, or a function of prompts and answers."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"reward={name!r} must be module:name, for instance my_rewards:score")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward={name!r}: {error}") from None
    finally:
        sys.path.pop(0)
    return score_of(found) if isinstance(found, CompositeReward) else found


def _weights(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file; `plumbline reward tune` writes one")
    return json.loads(path.read_text(encoding="utf-8"))["weights"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `attack` exits 1 when the good answer loses too often."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (argv[0], argv[1:]) if argv else ("", [])
    if verb == "explain":
        explain(*parse_settings((ExplainSettings,), rest))
    elif verb == "tune":
        tune(*parse_settings((TuneSettings,), rest))
    elif verb == "attack":
        result = run_attack(*parse_settings((AttackSettings,), rest))
        return 0 if result.all_beaten >= PASS * result.prompts else 1
    elif verb == "check":
        check(*parse_settings((CheckSettings,), rest))
    else:
        raise ValueError(f"usage: plumbline reward explain | tune | attack | check [settings]; got {verb!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
