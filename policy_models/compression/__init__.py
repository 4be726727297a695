"""Smaller weights: 4 and 8 bits, experts included."""
