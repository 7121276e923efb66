"""The command line `npp`: thin calls into the other packages, a module per group of commands.

Modules import torch and matplotlib inside functions, so that `npp --help` stays fast.
"""

from npp_ds.cli.program import app, main

__all__ = ["app", "main"]
