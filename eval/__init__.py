"""Evaluation: samples, scorers, statistics, reports."""
