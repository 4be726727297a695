"""Intervals and tests, and the tables of figures made with them."""
