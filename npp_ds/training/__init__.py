"""The training loop and what it stands on: processes, DeepSpeed, stages, checkpoints, metrics.

The only room that imports DeepSpeed; nothing below it (model, data, config, schedule, tokenizer) imports it.
"""
