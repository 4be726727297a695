"""Scanners of what a model answered, before a user sees it."""
