"""Texts before any rule is applied: readings, words, redaction, disguises, the riskiest piece."""
