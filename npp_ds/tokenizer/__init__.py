"""Images to VQ codes and back: the tokenizer, sources of images, crops, and the encoding of whole sets.

May use `npp_ds.data` and the file formats of `npp_ds.checkpoint`; depends neither on the model nor on training runs or
sampling. The names below are imported when they are first used, because processes that decode images need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npp_ds.tokenizer.loading import load_tokenizer, save_tokenizer
    from npp_ds.tokenizer.vq import VQ8, VQ16, VQConfig, VQModel, to_input, to_uint8

__all__ = ["VQ8", "VQ16", "VQConfig", "VQModel", "load_tokenizer", "save_tokenizer", "to_input", "to_uint8"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "loading" if name.endswith("_tokenizer") else "vq"
        return getattr(import_module(f"npp_ds.tokenizer.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
