"""The class-conditional transformer, patch grouping and the patch loss.

It depends on torch only and knows no stages, processes or files. `training`, `sampling` and `evaluation` build on it.
"""

from npp_ds.model import patches
from npp_ds.model.loss import patch_cross_entropy
from npp_ds.model.transformer import ModelConfig, Transformer, mean_embedding

__all__ = ["ModelConfig", "Transformer", "mean_embedding", "patch_cross_entropy", "patches"]
