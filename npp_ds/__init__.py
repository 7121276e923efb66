"""npp_ds trains class-conditional autoregressive image models with Next Patch Prediction (arXiv 2412.15321)."""

__version__ = "0.1.0"
