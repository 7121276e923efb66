"""The training loop and what it uses: DeepSpeed's engine, stages, checkpoints, metrics, signals.

The only package that imports DeepSpeed.
"""
