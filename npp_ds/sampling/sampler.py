"""From a model to images: the label of image i, its codes, its pixels.

Codes are decoded step by step with a key-value cache; on CUDA the steps are captured as CUDA graphs.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npp_ds.checkpoint import safetensors_io
from npp_ds.checkpoint.open import Weights
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig
from npp_ds.model.patches import repeat_code, ungroup
from npp_ds.model.transformer import Block, Transformer
from npp_ds.sampling.logits_processing import Options, guide_and_choose, noise_keys
from npp_ds.sizes import num_positions
from npp_ds.tokenizer import vq
from npp_ds.utils.hash_rng import mix64

_LABEL_STREAM = int.from_bytes(b"labels", "big")
LABEL_CHOICES = ("balanced", "random")
DTYPES = {name: safetensors_io.DTYPES[name] for name in ("fp32", "bf16")}
BUCKET = 16
"""A captured step reads the cache up to the next multiple of this many positions."""


class DecodingBatch:
    """The tensors of `size` images that one model decodes: inputs, key-value cache, and the codes so far.

    Of `options` it uses `patch_side`, `temperature`, `top_k` and `top_p`.
    """

    def __init__(self, model: Transformer, size: int, guided: bool, options: Options, device: torch.device):
        self.size, self.options = size, options
        grid_size, rows, side = model.config.grid_size, size * (2 if guided else 1), options.patch_side
        self.positions = num_positions(grid_size, side)
        self.cache = model.new_cache(rows, grid_size // side, next(model.parameters()).dtype, device, side)
        self.labels = torch.full((rows,), model.config.num_classes, device=device)
        self.keys = torch.zeros((self.positions, size, 2), dtype=torch.int32, device=device)
        self.scales = torch.ones(self.positions, device=device)
        self.codes = torch.zeros((self.positions, size), dtype=torch.int64, device=device)

    def fill(self, labels: Tensor, keys: Tensor, scales: list[float]) -> None:
        """Copy in labels [size], keys int32 [size, positions, 2] and the guidance scale at each position."""
        self.labels[: self.size] = labels
        self.keys.copy_(keys.transpose(0, 1))
        self.scales.copy_(torch.tensor(scales))

    def step(self, model: Transformer, position: int, guided: bool) -> None:
        """Compute the codes of `position` from those of the position before.

        Once a step is not `guided`, all later ones must not be either: it leaves out the unconditional rows.
        """
        self._compute(model, position, guided)

    def _compute(
        self,
        model: Transformer,
        position: int | Tensor,
        guided: bool,
        length: int | None = None,
        project: Callable[..., tuple[Tensor, Tensor, Tensor]] = Block.project,
        attend: Callable[..., Tensor] = Block.attend,
        guide_and_choose: Callable[..., Tensor] = guide_and_choose,
    ) -> None:
        """Compute one step; `position` and `length` are those of `Transformer.decode_step`."""
        at = slice(position, position + 1) if isinstance(position, int) else position
        rows = 2 * self.size if guided else self.size
        if isinstance(position, int) and position == 0:
            inputs = self.labels[:rows]
        else:
            before = slice(position - 1, position) if isinstance(position, int) else position - 1
            inputs = repeat_code(self.codes[before][0].repeat(rows // self.size), self.options.patch_side**2)
        logits = model.decode_step(inputs, position, self.cache, length, project, attend)
        scale = self.scales[at] if guided else None
        o = self.options
        self.codes[at] = guide_and_choose(logits, scale, self.keys[at][0], o.temperature, o.top_k, o.top_p)[None]


class CapturedBatch(DecodingBatch):
    """A batch whose steps are compiled, captured once for every `BUCKET` positions, and replayed.

    The model must be the one it was made for, with its weights at the same addresses. On devices other than CUDA the
    same steps run without compilation and capture, so that they can be tested there.
    """

    def __init__(self, model: Transformer, size: int, guided: bool, options: Options, device: torch.device):
        super().__init__(model, size, guided, options, device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        self._replay: dict[tuple[int, bool], Callable[[], None]] = {}

    def step(self, model: Transformer, position: int, guided: bool) -> None:
        if position == 0:
            self._compute(model, position, guided)
            return
        length = min(-(-(position + 1) // BUCKET) * BUCKET, self.positions)
        self.position.fill_(position)
        if not self._cuda:
            self._compute(model, self.position, guided, length)
            return
        if (length, guided) not in self._replay:
            compiled = {f.__name__: _compiled(f) for f in (Block.project, Block.attend, guide_and_choose)}
            compute = partial(self._compute, model, self.position, guided, length, **compiled)
            self._replay[length, guided] = _capture(compute, self._pool)
        self._replay[length, guided]()


@cache
def _compiled(function: Callable) -> Callable:
    """Compile a function once for all layers. A few compilations serve all batch sizes and lengths.

    torch makes those dimensions dynamic that have changed, and no others. TORCHDYNAMO_DISABLE=1 in the environment
    leaves the function as it is.
    """
    return torch.compile(function)


def _capture(compute: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Capture `compute` as a CUDA graph with memory from `pool`, after a run that compiles it. Return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        compute()
    return graph.replay


_kept: WeakKeyDictionary[Transformer, tuple[tuple, CapturedBatch]] = WeakKeyDictionary()


def captured_batch(
    model: Transformer, size: int, guided: bool, options: Options, device: torch.device
) -> CapturedBatch:
    """Return a captured batch of exactly `size` images. The latest of each model is kept for as long as the model."""
    o = options
    addresses = tuple((p.data_ptr(), p.dtype) for p in model.parameters())  # a graph reads the weights at these
    key = (size, guided, o.patch_side, o.temperature, o.top_k, o.top_p, device, addresses)
    found, batch = _kept.pop(model, (None, None))
    if batch is None or found != key:
        batch = None  # frees its memory before the next one takes some
        batch = CapturedBatch(model, size, guided, options, device)
    _kept[model] = key, batch
    return batch


def worth_capturing(model: Transformer, images: int, batch_size: int) -> bool:
    """Return whether capturing pays for `images` images: on CUDA, if they are more than one batch.

    For a single batch the capture takes longer than it saves. It is impossible if hooks gather the weights (ZeRO-3).
    The answer changes the last bits of the logits, so it must depend only on what all processes of a job agree on.
    """
    hooked = any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return images > batch_size and not hooked and next(model.parameters()).is_cuda


def _label_problems(labels: Tensor, num_classes: int) -> list[str]:
    """Return what is wrong with labels: on a GPU, one out of range would end the process without a message."""
    if not labels.numel() or (int(labels.min()) >= 0 and int(labels.max()) <= num_classes):
        return []
    found = f"{int(labels.min())}..{int(labels.max())}"
    return [f"labels: found {found}, expected classes 0..{num_classes - 1} ({num_classes} is the null class)"]


@torch.no_grad()
def generate(model: Transformer, labels: Tensor, indices: Tensor, options: Options, *, capture: bool = False) -> Tensor:
    """Sample the codes, int64 [B, grid_size**2] in raster order, of images with labels [B] and image numbers [B].

    Image i depends only on (seed, i), its label and the options, never on the other images of the batch, the batch size
    or the number of processes: codes are sampled by Gumbel-max, with noise that is a function of (seed, i, position,
    code). Logits differ in their last bits between batch sizes. With Gumbel-max this changes a code only if two of the
    V noisy logits are that close; with the inverse of the cumulative distribution, each rounding error of the sum would
    shift all intervals.

    While a later position needs guidance, the conditional and the unconditional half run as one batch of 2B.

    With `capture`, steps run in the form that on CUDA is compiled, captured as CUDA graphs and replayed, for batches of
    exactly this size. That is faster from the second batch on (`worth_capturing`). Its logits differ from the plain
    ones in their last bits. Raises UserError that names all options out of range.
    """
    grid_size, side = model.config.grid_size, options.patch_side
    if problems := options.problems(grid_size) + _label_problems(labels, model.config.num_classes):
        raise UserError("sampling options: " + "; ".join(problems))
    positions = num_positions(grid_size, side)
    if not len(labels):
        return labels.new_zeros((0, grid_size**2), dtype=torch.int64)
    scales = options.guidance_scales(positions)
    guided = max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)
    batch = (captured_batch if capture else DecodingBatch)(model, len(labels), guided > 0, options, labels.device)
    batch.fill(labels, noise_keys(options.seed, indices, positions), scales)
    for position in range(positions):
        batch.step(model, position, position < guided)
    codes = batch.codes.t().clone()
    return ungroup(repeat_code(codes, side**2), side)


def labels_of(indices: np.ndarray, classes: Sequence[int], mode: str, seed: int) -> np.ndarray:
    """Return the int64 labels of the images numbered `indices`; each depends on (classes, mode, seed, index) only.

    "balanced" cycles through the classes, so a larger number of images keeps the first ones. "random" draws each label
    uniformly, as the published sampling script does.
    """
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
