"""Subcommands of `plumbline`, one a file."""
