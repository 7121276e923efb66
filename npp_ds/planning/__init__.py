"""Memory, time and cost of a run before it starts, from its config alone: `npp plan`.

Imports no torch.
"""
