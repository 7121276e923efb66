"""Images to VQ codes and back: the tokenizer, its training, crops, image sources and the encoding of whole sets.

May use `npp_ds.data`; knows nothing of the model, of training runs or of sampling.
"""

from npp_ds.tokenizer.vq import VQ8, VQ16, VQConfig, VQModel, load_tokenizer, save_tokenizer, to_input, to_uint8

__all__ = ["VQ8", "VQ16", "VQConfig", "VQModel", "load_tokenizer", "save_tokenizer", "to_input", "to_uint8"]
