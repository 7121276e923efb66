"""Weights on disk: the checkpoints of a run, exported files, published files, and one way to open any of them.

This package imports nothing of training, sampling or evaluation, and no DeepSpeed.
"""
