"""The steps of decoding one batch, and their recorded form on CUDA.

A step reads and writes only tensors that stay where they are (`Batch`), so it can be recorded as a CUDA graph and
replayed for the following batches.
"""

from collections.abc import Callable
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from npp_ds.model.patches import repeat_code
from npp_ds.model.transformer import Block, Transformer
from npp_ds.sampling.logits_processing import Drawing, draw

BUCKET = 16
"""A recorded step reads the cache up to the next multiple of this many positions."""


class Batch:
    """The tensors of B images being decoded with one model: inputs, cache, and the codes so far."""

    def __init__(self, model: Transformer, size: int, guided: bool, drawing: Drawing, device: torch.device):
        grid = model.config.grid_size // drawing.patch_side
        rows, dtype = size * (2 if guided else 1), next(model.parameters()).dtype
        self.size, self.positions, self.drawing = size, grid * grid, drawing
        self.cache = model.new_cache(rows, grid, dtype, device)
        self.labels = torch.full((rows,), model.config.num_classes, device=device)
        self.keys = torch.zeros((self.positions, size, 2), dtype=torch.int32, device=device)
        self.scales = torch.ones(self.positions, device=device)
        self.codes = torch.zeros((self.positions, size), dtype=torch.int64, device=device)

    def fill(self, labels: Tensor, keys: Tensor, scales: list[float]) -> None:
        """Takes labels[B], keys int32 [B, positions, 2] and the guidance scale at each position."""
        self.labels[: self.size] = labels
        self.keys.copy_(keys.transpose(0, 1))
        self.scales.copy_(torch.tensor(scales))

    def step(
        self,
        model: Transformer,
        position: int | Tensor,
        guided: bool,
        length: int | None = None,
        project: Callable[..., tuple[Tensor, Tensor, Tensor]] = Block.project,
        attend: Callable[..., Tensor] = Block.attend,
        draw: Callable[..., Tensor] = draw,
    ) -> None:
        """Writes the codes of `position` from those of the one before; `position` and `length` as in `decode_step`.

        Without `guided` the unconditional rows are left alone, from here to the last position.
        """
        at = slice(position, position + 1) if isinstance(position, int) else position
        rows = 2 * self.size if guided else self.size
        if isinstance(position, int) and position == 0:
            inputs = self.labels[:rows]
        else:
            before = slice(position - 1, position) if isinstance(position, int) else position - 1
            inputs = repeat_code(self.codes[before][0].repeat(rows // self.size), self.drawing.patch_side**2)
        logits = model.decode_step(inputs, position, self.cache, length, project, attend)
        d = self.drawing
        scale = self.scales[at] if guided else None
        self.codes[at] = draw(logits, scale, self.keys[at][0], d.temperature, d.top_k, d.top_p)[None]


@cache
def _compiled(function: Callable) -> Callable:
    """One compilation serves all layers, and a few all batch sizes and lengths: torch makes dimensions dynamic that
    have changed, and only those. With TORCHDYNAMO_DISABLE=1 in the environment the function stays as it is.
    """
    return torch.compile(function)


def _record(step: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
    """`step` as a CUDA graph that takes its memory from `pool`, after one unrecorded run, which compiles it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Recorded:
    """A batch whose steps are recorded, once for every `BUCKET` positions, and replayed.

    On other devices than CUDA the same steps run unrecorded and uncompiled, which is how they can be tested there.
    """

    def __init__(self, model: Transformer, size: int, guided: bool, drawing: Drawing, device: torch.device):
        self.batch = Batch(model, size, guided, drawing, device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        self._replay: dict[tuple[int, bool], Callable[[], None]] = {}

    def step(self, model: Transformer, position: int, guided: bool) -> None:
        """`Batch.step`; the model must be the one it was made for, its weights where they were."""
        if position == 0:
            self.batch.step(model, position, guided)
            return
        length = min(-(-(position + 1) // BUCKET) * BUCKET, self.batch.positions)
        self.position.fill_(position)
        if not self._cuda:
            self.batch.step(model, self.position, guided, length)
            return
        if (length, guided) not in self._replay:
            forms = {f.__name__: _compiled(f) for f in (Block.project, Block.attend, draw)}
            step = partial(self.batch.step, model, self.position, guided, length, **forms)
            self._replay[length, guided] = _record(step, self._pool)
        self._replay[length, guided]()


_kept: WeakKeyDictionary[Transformer, tuple[tuple, Recorded]] = WeakKeyDictionary()


def recorded_steps(model: Transformer, size: int, guided: bool, drawing: Drawing, device: torch.device) -> Recorded:
    """Recorded steps of batches of exactly `size` images; the latest of each model are kept as long as it lives."""
    addresses = tuple((p.data_ptr(), p.dtype) for p in model.parameters())  # where a recording reads the weights
    kind = (size, guided, drawing, device, addresses)
    found, recorded = _kept.pop(model, (None, None))
    if found != kind:
        recorded = None  # before the next one takes memory
        recorded = Recorded(model, size, guided, drawing, device)
    _kept[model] = kind, recorded
    return recorded


def worth_recording(model: Transformer, images: int, batch_size: int) -> bool:
    """Whether to record the steps of `images` drawn in batches: on CUDA, when they are more than one batch.

    For a single batch recording takes longer than it saves, and where hooks gather weights (ZeRO-3) it is impossible.
    The last bits of the logits depend on the answer, so it may depend only on what all processes of a job agree on.
    """
    hooked = any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return images > batch_size and not hooked and next(model.parameters()).is_cuda
