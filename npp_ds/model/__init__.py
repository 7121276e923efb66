"""The class-conditional transformer, patch grouping and the patch loss: pure torch, numbers in and numbers out.

This room knows no stages, no processes and no files; `training`, `sampling` and `evaluation` build on it.
"""

from npp_ds.model import patches
from npp_ds.model.loss import patch_cross_entropy
from npp_ds.model.transformer import ModelConfig, Transformer

__all__ = ["ModelConfig", "Transformer", "patch_cross_entropy", "patches"]
