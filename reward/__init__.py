"""The composite reward: R = alpha * fluency + beta * relevance + gamma * safety - delta * toxicity.

    reward = default_composite(alpha=1, beta=1, gamma=1, delta=1)
    reward.fit(prompts, reference_answers)      # once, on answers of the frozen reference policy
    scored = reward(prompts, answers)           # scored.total, scored.parts.raw["safety"], scored.why

This package never imports the training code; components look at text only.
"""

from plumbline.reward.composite import CompositeReward, default_composite, statistics
from plumbline.reward.contracts import Parts, Reward, RewardComponent
from plumbline.reward.scaling import Scaling, fit_scaling

__all__ = [
    "CompositeReward",
    "Parts",
    "Reward",
    "RewardComponent",
    "Scaling",
    "default_composite",
    "fit_scaling",
    "statistics",
]
