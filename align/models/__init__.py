"""The models of a stage: policy, reference and critic of PPO, and the start that every stage loads."""
