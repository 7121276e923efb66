"""npp_ds trains class-conditional autoregressive image models with Next Patch Prediction (arXiv 2412.15321)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npp_ds.sampling.image_model import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `load` when it is first used: it needs torch, and `import npp_ds` stays fast."""
    if name == "load":
        from npp_ds.sampling.image_model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
