"""The composite reward: R = alpha * fluency + beta * relevance + gamma * safety - delta * toxicity.

    reward = default_composite(alpha=1, beta=1, gamma=1, delta=1)
    reward.fit(prompts, reference_answers)      # once, on answers of the frozen reference policy
    scored = reward(prompts, answers)           # scored.total, scored.parts.raw["safety"], scored.why

This package never imports the training code; components look at text only.
"""

from plumbline.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "CompositeReward": "composite",
        "HubClassifier": "hub",
        "LearnedPreference": "learned",
        "Parts": "contracts",
        "PreferenceEnsemble": "learned",
        "RemoteReward": "remote",
        "Reward": "contracts",
        "RewardComponent": "contracts",
        "Scaling": "scaling",
        "default_composite": "composite",
        "fit_scaling": "scaling",
        "statistics": "composite",
    },
)
