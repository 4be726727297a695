"""Watching a served model: what it measures about itself."""
