"""From a model to images: which label image i has, its codes, its pixels."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npp_ds.checkpoint import safetensors_io
from npp_ds.checkpoint.open import Weights
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.sampling.decode import generate
from npp_ds.sampling.steps import worth_recording
from npp_ds.tokenizer import vq
from npp_ds.utils.hash_rng import mix64

_LABEL_STREAM = int.from_bytes(b"labels", "big")
LABEL_CHOICES = ("balanced", "random")
DTYPES = {name: safetensors_io.DTYPES[name] for name in ("fp32", "bf16")}


@dataclass(frozen=True)
class Options:
    """How codes are drawn; the meaning of each is that of `npp_ds.sampling.decode.generate`."""

    seed: int = 0
    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    patch_side: int = 1
    cfg_schedule: str = "constant"
    cfg_power: float = 1.0
    cfg_interval: int = -1


def labels_of(indices: np.ndarray, classes: Sequence[int], mode: str, seed: int) -> np.ndarray:
    """int64 labels of the images numbered `indices`: their label depends on (classes, mode, seed, index) only.

    "balanced" goes round the classes, so that asking for more images keeps the first ones; "random" draws each label
    uniformly, as the published sampling script does. Raises UserError for any other mode.
    """
    if mode not in LABEL_CHOICES:
        raise UserError(f"labels: found {mode!r}, expected one of {', '.join(LABEL_CHOICES)}")
    indices = np.asarray(indices, dtype=np.int64)
    turns = indices if mode == "balanced" else mix64(_LABEL_STREAM, seed, indices)
    return np.asarray(classes, dtype=np.int64)[(turns % np.uint64(len(classes))).astype(np.int64)]


def resize(images: Tensor, size: int | None) -> Tensor:
    """float [B, 3, H, W] -> [B, 3, size, size] by bicubic interpolation, before rounding, as published; None keeps the
    size.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic")


def sample_images(
    model: Transformer,
    decode: Callable[[Tensor], Tensor],
    labels: np.ndarray,
    indices: np.ndarray,
    options: Options,
    *,
    batch_size: int = 64,
    image_size: int | None = None,
    capture: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """labels and image numbers, int64 [N] -> images uint8 [N, H, W, 3]; `decode` maps codes [B, T] to float images in
    [-1, 1].

    Image i is the same whatever other numbers are asked for and however they are batched, up to the rounding of logits.
    With the same `batch_size` and `capture` that is the same too where every batch is full or `capture` is True: short
    batches are then filled up. `capture` is that of `generate`; None decides by `worth_recording` of these images, so
    who draws a larger set in several calls decides for the set.
    """
    device = next(model.parameters()).device
    if capture is None:
        capture = worth_recording(model, len(labels), batch_size)
    images = None
    for start in range(0, len(labels), batch_size):
        part = slice(start, min(start + batch_size, len(labels)))
        fill = batch_size - (part.stop - start) if capture else 0
        classes, numbers = (torch.from_numpy(np.pad(a[part], (0, fill), "edge")).to(device) for a in (labels, indices))
        codes = generate(model, classes, numbers, **asdict(options), capture=capture)[: part.stop - start]
        pixels = vq.to_uint8(resize(decode(codes), image_size)).cpu().numpy()
        if images is None:
            images = np.empty((len(labels), *pixels.shape[1:]), dtype=np.uint8)
        images[part] = pixels
        progress(part.stop, len(labels))
    return images


def build_model(weights: Weights, device: str | torch.device, dtype: str = "fp32") -> Transformer:
    """The model of `weights` on a device, in `dtype` (a key of DTYPES), in eval mode.

    Beyond the model itself one float32 tensor is in memory at a time. UserError when names or shapes do not fit.
    """
    with torch.device("meta"):
        model = Transformer(ModelConfig(**weights.model.arguments()))
    with weights.reading() as tensor:
        tensors = {name: tensor(name).to(device, DTYPES[dtype]) for name in weights.shapes}
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise UserError(f"{weights.path}: the weights do not fit the model of its config: {found}") from None
    return model.eval()
