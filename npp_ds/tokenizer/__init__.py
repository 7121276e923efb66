"""Images to VQ codes and back: the tokenizer, its training, crops, image sources and the encoding of whole sets.

May use `npp_ds.data`; knows nothing of the model, of training runs or of sampling. The names below are loaded when they
are first used, because the processes that decode images need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npp_ds.tokenizer.vq import VQ8, VQ16, VQConfig, VQModel, load_tokenizer, save_tokenizer, to_input, to_uint8

__all__ = ["VQ8", "VQ16", "VQConfig", "VQModel", "load_tokenizer", "save_tokenizer", "to_input", "to_uint8"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("npp_ds.tokenizer.vq"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
