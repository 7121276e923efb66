"""From a model to images: the label of image i, its codes, its pixels."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npp_ds.checkpoint import safetensors_io
from npp_ds.checkpoint.open import Weights
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.sampling.decode import generate, worth_capturing
from npp_ds.sampling.logits_processing import Options
from npp_ds.tokenizer import vq
from npp_ds.utils.hash_rng import mix64

_LABEL_STREAM = int.from_bytes(b"labels", "big")
LABEL_CHOICES = ("balanced", "random")
DTYPES = {name: safetensors_io.DTYPES[name] for name in ("fp32", "bf16")}


def labels_of(indices: np.ndarray, classes: Sequence[int], mode: str, seed: int) -> np.ndarray:
    """Return the int64 labels of the images numbered `indices`; each depends on (classes, mode, seed, index) only.

    "balanced" cycles through the classes, so a larger number of images keeps the first ones. "random" draws each label
    uniformly, as the published sampling script does. Raises UserError for any other mode.
    """
    if mode not in LABEL_CHOICES:
        raise UserError(f"labels: found {mode!r}, expected one of {', '.join(LABEL_CHOICES)}")
    indices = np.asarray(indices, dtype=np.int64)
    turns = indices if mode == "balanced" else mix64(_LABEL_STREAM, seed, indices)
    return np.asarray(classes, dtype=np.int64)[(turns % np.uint64(len(classes))).astype(np.int64)]


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize float [B, 3, H, W] to [B, 3, size, size], bicubic, before rounding, as published; None keeps the size."""
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
    """Return images uint8 [N, H, W, 3] for labels and image numbers, int64 [N].

    `decode` maps codes [B, T] to float images in [-1, 1]. `progress(done, total)` is called after each batch.

    Image i does not depend on the other numbers or on the batches, up to the rounding of logits. The rounding too is
    the same for one `batch_size` and `capture` if every batch is full or `capture` is true, because short batches are
    then filled up. `capture` is that of `generate`. None means `worth_capturing` of these images; a caller that samples
    a larger set in several calls decides for the whole set.
    """
    device = next(model.parameters()).device
    if capture is None:
        capture = worth_capturing(model, len(labels), batch_size)
    images = None
    for start in range(0, len(labels), batch_size):
        part = slice(start, min(start + batch_size, len(labels)))
        fill = batch_size - (part.stop - start) if capture else 0
        classes, numbers = (torch.from_numpy(np.pad(a[part], (0, fill), "edge")).to(device) for a in (labels, indices))
        codes = generate(model, classes, numbers, options, capture=capture)[: part.stop - start]
        pixels = vq.to_uint8(resize(decode(codes), image_size)).cpu().numpy()
        if images is None:
            images = np.empty((len(labels), *pixels.shape[1:]), dtype=np.uint8)
        images[part] = pixels
        progress(part.stop, len(labels))
    assert images is not None, "no image was requested"
    return images


def build_model(weights: Weights, device: str | torch.device, dtype: str = "fp32") -> Transformer:
    """Return the model of `weights` on a device, in `dtype` (a key of DTYPES), in eval mode.

    Beside the model, one float32 tensor is in memory at a time. Raises UserError if names or shapes do not fit.
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
