"""Several named components in one reward, each scaled before it is weighted.

    R = alpha * fluency + beta * relevance + gamma * safety - delta * toxicity

The minus of toxicity is the negative weight that `default_composite` gives it, and stands nowhere else.

None means "no opinion". An optional component's None is left out of its row and counted. A required component's None
(safety, unless told otherwise) leaves the whole row without a total: an answer whose safety is not known earns nothing
from the rest. Wrong lengths and scores that are not finite are errors, never None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plumbline.reward.components.known import HarmOfPrompts
from plumbline.reward.contracts import Parts, Prompt, Reward, RewardComponent, ask
from plumbline.reward.scaling import Scaling, fit_scaling


class CompositeReward:
    """Weighted sum of scaled components.

    Args:
        components: (component, weight) pairs; names must differ. Weights may be negative (more is worse) or 0 (logged,
            not rewarded). With a scaling, weights are in standard deviations of reference-policy answers.
        scaling: frozen statistics; None weights the raw scores as they are, until `fit` is called.
        required: names whose None leaves the total None. By default "safety", if there is such a component.
    """

    def __init__(
        self,
        components: Sequence[tuple[RewardComponent, float]],
        *,
        scaling: Scaling | None = None,
        required: Sequence[str] | None = None,
    ) -> None:
        names = [component.name for component, _ in components]
        if not names:
            raise ValueError("a composite reward needs at least one (component, weight) pair")
        if len(set(names)) < len(names):
            raise ValueError(f"component names must differ, got {names}; give one of them another name")
        for component, weight in components:
            if not math.isfinite(weight):
                raise ValueError(f"weight of {component.name!r} is {weight}; weights must be finite")
        self.components = {component.name: component for component, _ in components}
        self.weights = {component.name: float(weight) for component, weight in components}
        self.required = [name for name in ["safety"] if name in names] if required is None else list(required)
        if missing := sorted(set(self.required) - set(names)):
            raise ValueError(f"required components {missing} are not among {names}")
        self.scaling = scaling
        if scaling is not None and (missing := sorted(set(names) - set(scaling.mean))):
            raise ValueError(f"no scaling for components {missing}; fit again with fit(prompts, reference_answers)")

    def raw(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, list[float | None]]:
        """Raw scores by component name, checked: right lengths, finite."""
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; rewards need one answer a prompt")
        return {
            name: _checked(name, ask(component, prompts, answers), len(prompts))
            for name, component in self.components.items()
        }

    def fit(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scaling:
        """Fits the scaling on answers of the reference policy, keeps it and returns it (save it with the run)."""
        return self.fit_raw(self.raw(prompts, answers))

    def fit_raw(self, raw: dict[str, list[float | None]]) -> Scaling:
        """The same for scores that are at hand."""
        min_std = {name: float(getattr(part, "min_std", 0.0)) for name, part in self.components.items()}
        self.scaling = fit_scaling(raw, min_std=min_std)
        return self.scaling

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Reward:
        """Scores of answers to prompts; a prompt is a text, or the messages of a conversation that ends with the user."""
        return self.combine(self.raw(prompts, answers))

    def combine(self, raw: dict[str, list[float | None]]) -> Reward:
        """The reward of raw scores, as `raw` gives them: scaled, weighted, summed."""
        scaling = self.scaling
        scaled = {
            name: [None if score is None else scaling.scale(name, score) if scaling else score for score in scores]
            for name, scores in raw.items()
        }
        weighted = {
            name: [None if score is None else self.weights[name] * score for score in scores]
            for name, scores in scaled.items()
        }
        total: list[float | None] = []
        why: list[str | None] = []
        for row in range(len(next(iter(raw.values())))):
            known = [scores[row] for scores in weighted.values() if scores[row] is not None]
            missing = [name for name in self.required if weighted[name][row] is None]
            if missing:
                why.append(f"no score from required component {', '.join(missing)}")
            elif not known:
                why.append("no component has an opinion")
            else:
                why.append(None)
            total.append(None if why[-1] else sum(known))  # type: ignore[arg-type]
        return Reward(total=total, parts=Parts(raw=raw, scaled=scaled, weighted=weighted), why=why)


def _checked(name: str, scores: Any, rows: int) -> list[float | None]:
    """The component's scores as floats, or an error that names the component and the fault."""
    if scores is None or len(scores) != rows:
        count = "None" if scores is None else len(scores)
        raise ValueError(f"component {name!r} returned {count} scores for {rows} answers; it must return one each")
    checked = [None if score is None else float(score) for score in scores]
    for row, score in enumerate(checked):
        if score is not None and not math.isfinite(score):
            raise ValueError(f"component {name!r} returned {score} for row {row}; return None for no opinion")
    return checked


def statistics(reward: Reward) -> dict[str, float]:
    """Metrics of one batch; standard deviations are over the population of known scores, 0 for a single one.

    For each component: reward/<name>_raw_mean, _raw_std, _weighted_mean, _none_fraction, _scaled_extreme (largest
    absolute scaled score; at the scaling limit, an outlier was held) and _variance_share, which is
    cov(weighted, total) / var(total) over rows with a total, None counting as 0: shares add to 1, and one near 1 means
    that this component alone decides the reward. Then reward/total_mean, reward/total_std and reward/none_fraction
    (rows without a total). A mean over no scores is left out.
    """
    metrics: dict[str, float] = {}
    rows = [row for row, total in enumerate(reward.total) if total is not None]
    totals = [reward.total[row] for row in rows]
    total_mean, total_std = _mean_std(totals)  # type: ignore[arg-type]
    for name, scores in reward.parts.raw.items():
        known = [score for score in scores if score is not None]
        if known:
            metrics[f"reward/{name}_raw_mean"], metrics[f"reward/{name}_raw_std"] = _mean_std(known)
            weighted = [score for score in reward.parts.weighted[name] if score is not None]
            metrics[f"reward/{name}_weighted_mean"] = _mean_std(weighted)[0]
            scaled = [abs(score) for score in reward.parts.scaled[name] if score is not None]
            metrics[f"reward/{name}_scaled_extreme"] = max(scaled)
        metrics[f"reward/{name}_none_fraction"] = 1 - len(known) / len(scores) if scores else 0.0
        if rows:
            part = [reward.parts.weighted[name][row] or 0.0 for row in rows]
            centre = math.fsum(part) / len(part)
            products = ((p - centre) * (t - total_mean) for p, t in zip(part, totals, strict=True))  # type: ignore[operator]
            covariance = math.fsum(products) / len(rows)
            metrics[f"reward/{name}_variance_share"] = covariance / total_std**2 if total_std > 0 else 0.0
    if rows:
        metrics["reward/total_mean"], metrics["reward/total_std"] = total_mean, total_std
    metrics["reward/none_fraction"] = 1 - len(rows) / len(reward.total) if reward.total else 0.0
    return metrics


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def default_composite(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    delta: float = 1.0,
    fluency_source: str = "bundled:smollm2-135m-instruct",
    scaling: Scaling | None = None,
    harm: HarmOfPrompts | None = None,
) -> CompositeReward:
    """The embedded default, R = alpha * fluency + beta * relevance + gamma * safety - delta * toxicity.

    Runs without a network: MiniLM embeddings with the shipped heads, and a small frozen language model for fluency
    (`fluency_source`: any source that `plumbline.policy_models.loading.load_policy` takes; not loaded when alpha is 0). `harm` says
    how harmful prompts are, to safety and to relevance alike: the shipped scanner if not given.
    """
    from plumbline.reward.components.relevance import Relevance, declined_harm
    from plumbline.reward.components.safety import Safety
    from plumbline.reward.components.toxicity import Toxicity

    components: list[tuple[RewardComponent, float]] = []
    if alpha != 0:
        from plumbline.reward.components.fluency import Fluency

        components.append((Fluency.load(fluency_source), alpha))
    components += [
        (Relevance(declined=declined_harm(harm)), beta),
        (Safety(harm=harm), gamma),
        (Toxicity(), -delta),  # the one place where toxicity turns into a charge
    ]
    return CompositeReward(components, scaling=scaling)
