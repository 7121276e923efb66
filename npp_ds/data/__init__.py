"""From shards on disk to the batch of a step: the shard format, the store of a node, the order of samples, the loaders.

The order is a pure function of (seed, epoch, step), never the state of an object. Nothing here depends on engines,
training loops or tokenizers, and only `loader.py` imports torch.
"""
