"""From shards on disk to the batch of a step: the shard format, the per-node store, the order of samples, the loaders.

Order is a pure function of (seed, epoch, step), never the state of an object; nothing here knows of engines, training
loops or tokenizers, and only `loader.py` imports torch.
"""
