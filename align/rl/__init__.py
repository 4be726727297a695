"""The parts of PPO: rollouts, advantages, losses, KL control, the constraint, settings, evaluation."""
