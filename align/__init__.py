"""The four training stages (SFT, reward model, PPO, DPO) and the maths they share."""
