"""From weights to images: decode codes with a cache and guidance, turn them into pixels, write them to a folder.

This package builds on `model`, `checkpoint` and `tokenizer`. It imports nothing of training, evaluation or DeepSpeed.
"""
