"""Importing DeepSpeed without its builds and banners."""

import logging
import os
from types import ModuleType

import torch


def import_deepspeed() -> ModuleType:
    """The package `deepspeed`, quiet below warnings and ready on machines without a compiler."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Built with a C++ compiler on first use (40 s, and a failure where there is none) to speed up collectives between
    # CPU processes of one host: not worth it for CPU runs, unused on GPUs. As of deepspeed 0.19.8.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
