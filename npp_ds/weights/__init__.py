"""Weights at rest: the checkpoints of a run, and one way to open whatever holds trained weights.

Reads and writes files; knows nothing of processes that train or sample, nor of DeepSpeed.
"""
