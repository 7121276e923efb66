"""Measure a trained model: the likelihood of held-out codes, and how its samples compare with real images.

This package reads models, codes and images and returns numbers. It imports nothing of training or DeepSpeed. Only
`sweep.py` also samples images, with `npp_ds.sampling`, which knows nothing of evaluation.
"""
