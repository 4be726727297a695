"""Bounds that a run must keep, and the suites that a training run answers to at its end."""
