"""Other people's harnesses, both ways: lm-evaluation-harness and inspect_ai."""
