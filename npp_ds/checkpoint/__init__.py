"""Weights on disk: checkpoints of a run, exported and published files, and one way to open any of them.

Imports nothing of training, sampling or evaluation, and no DeepSpeed.
"""
