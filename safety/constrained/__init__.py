"""Constrained and guided decoding: processors for our engine and for transformers, best-of-n by blocks, held-back streams.

A processor is a function of (rows, logits), see `plumbline.policy_models.rollout.generation.DecodeRow`. What it does to
a row depends on the prompt and the answer so far of that row alone: state inside is only a cache of that. So rows stay
independent, and left padding, beams, several sequences a prompt and rows that come and go need no care.
"""
