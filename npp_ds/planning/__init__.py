"""`npp plan`: memory, time and cost of a run before it starts, from its config alone.

Imports no torch.
"""
