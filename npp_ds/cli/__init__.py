"""The command line `npp`: thin calls into the rooms, a file for each group of commands."""

from npp_ds.cli.program import app, main

__all__ = ["app", "main"]
