"""The training stages, launched by `accelerate launch align/<stage>.py` or `plumbline <stage>`.

sft, reward_model, sample_pairs, dpo and ppo are the loop; safety_expert trains the adapter that SafeDecoding asks.
The rooms hold what they are made of: rl/, models/, data/, runtime/, parallel/.
"""

from plumbline.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "PPOSettings": "rl.settings",
        "PreferencePair": "data.rows",
        "gae": "rl.advantages",
        "read_pairs": "data.formats",
        "read_preferences": "data.rows",
        "read_prompts": "data.rows",
        "read_sft": "data.rows",
    },
)
