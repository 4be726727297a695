"""Scanners of what a user sends, before a model sees it."""
