"""Samples of a run: which labels, which weights, codes, pixels, and the folder they are written to."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.files import sha256
from npp_ds.mixing import mix64
from npp_ds.model import ModelConfig, Transformer
from npp_ds.sampling.decode import generate
from npp_ds.sampling.folder import repeated_images, write_samples
from npp_ds.tokenizer import vq
from npp_ds.tokenizer.loading import SHIPPED
from npp_ds.weights.source import open_weights

if TYPE_CHECKING:
    from npp_ds.config import RunConfig

_LABEL_STREAM = int.from_bytes(b"labels", "big")
LABEL_CHOICES = ("balanced", "random")


@dataclass(frozen=True)
class Options:
    """How codes are drawn; the meaning of each is that of `npp_ds.sampling.decode.generate`."""

    seed: int = 0
    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    patch_side: int = 1


@dataclass(frozen=True)
class Samples:
    """What `sample_run` made: images uint8 [N, H, W, 3], labels int64 [N], the record beside them and their folder."""

    images: np.ndarray
    labels: np.ndarray
    record: dict[str, Any]
    directory: Path


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


def parse_classes(wanted: Sequence[int | str] | None, num_classes: int, class_names: Sequence[str]) -> list[int]:
    """Class numbers from numbers or names, None meaning all. Raises UserError naming every one that does not exist."""
    if wanted is None:
        return list(range(num_classes))
    numbers = {name: i for i, name in enumerate(class_names)}
    found = [numbers.get(str(w), int(w) if str(w).isdigit() else -1) for w in wanted]
    unknown = [str(w) for w, c in zip(wanted, found, strict=True) if not 0 <= c < num_classes]
    if unknown or not found:
        names = f" or one of {', '.join(class_names[:20])}" if class_names else ""
        raise UserError(f"classes: found {', '.join(unknown) or 'none'}, expected numbers 0..{num_classes - 1}{names}")
    return found


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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """labels and image numbers, int64 [N] -> images uint8 [N, H, W, 3]; `decode` maps codes [B, T] to float images in
    [-1, 1].

    Image i is the same whatever other numbers are asked for and however they are batched.
    """
    device = next(model.parameters()).device
    images = None
    for start in range(0, len(labels), batch_size):
        part = slice(start, min(start + batch_size, len(labels)))
        classes, numbers = (torch.from_numpy(a[part]).to(device) for a in (labels, indices))
        codes = generate(model, classes, numbers, **asdict(options))
        pixels = vq.to_uint8(resize(decode(codes), image_size)).cpu().numpy()
        if images is None:
            images = np.empty((len(labels), *pixels.shape[1:]), dtype=np.uint8)
        images[part] = pixels
        progress(part.stop, len(labels))
    return images


def build_model(config: "RunConfig", state_dict: dict[str, Tensor], device: str | torch.device) -> Transformer:
    """The run's model with these weights, float32, in eval mode. Raises UserError when names or shapes do not fit."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**config.model.arguments()))
    weights = {name: tensor.to(device, torch.float32) for name, tensor in state_dict.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise UserError(f"weights: they do not fit the model of config.yaml: {found}") from None
    return model.eval()


def _read_config(run_dir: Path) -> "RunConfig":
    from npp_ds.config_checks import load_config

    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the folder of a run, as `npp train` makes it")
    return load_config(file=path)


def _manifest(config: "RunConfig"):
    """The training data's manifest (class names, the tokenizer's hash), or None where it is not at hand."""
    from npp_ds.data.store import manifest_at_hand

    return manifest_at_hand(config.data.train, config.data.cache_dir)


def _tokenizer(config: "RunConfig", manifest, device: str | torch.device):
    """The tokenizer that decodes the run's codes: the one the config names, else a shipped one that made the shards."""
    made_by = manifest.tokenizer if manifest else None
    shipped = (name for name, path in SHIPPED.items() if made_by and sha256(path) == made_by.sha256)
    name = config.data.tokenizer or next(shipped, None)
    if name is None:
        known = f"the codes were made by {made_by.name}" if made_by else f"{config.data.train} holds no manifest"
        raise UserError(f"data.tokenizer: not set, and {known}; set it to the tokenizer's file")
    tokenizer = vq.load_tokenizer(name)
    if made_by and tokenizer.sha256 != made_by.sha256:
        raise UserError(
            f"data.tokenizer: {name} has SHA-256 {tokenizer.sha256[:12]}.., the codes in {config.data.train} were made "
            f"by {made_by.name} ({made_by.sha256[:12]}..); decode with that one"
        )
    return tokenizer.to(device)


def sample_run(
    run_dir: str | Path,
    *,
    step: int | None = None,
    weights: str = "raw",
    out: str | Path | None = None,
    classes: Sequence[int | str] | None = None,
    labels: str = "balanced",
    per_class: int = 10,
    options: Options | None = None,
    batch_size: int = 64,
    image_size: int | None = None,
    device: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Samples `per_class` x classes images of a run's checkpoint and writes them to `out`.

    Weights are those of `step` (None: the newest complete checkpoint), `weights` "raw" or "ema" (their moving average),
    or `state_dict` when given. `out` defaults to a folder under <run_dir>/samples named after step and settings.
    With `labels` "random" the number of images stays and the labels are drawn.
    """
    run_dir, options = Path(run_dir), options or Options()
    for name, value in (("per_class", per_class), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}: found {value}, expected a whole number of at least 1")
    config = _read_config(run_dir)
    manifest = _manifest(config)
    class_names = list(manifest.class_names) if manifest else []
    chosen = parse_classes(classes, config.model.num_classes, class_names)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if state_dict is None:
        source = open_weights(run_dir, step=step, kind=weights)
        state_dict, step = source.read(), source.step
    model = build_model(config, state_dict, device)
    tokenizer = _tokenizer(config, manifest, device)
    indices = np.arange(per_class * len(chosen))
    image_labels = labels_of(indices, chosen, labels, options.seed)
    started = time.perf_counter()
    images = sample_images(
        model,
        tokenizer.decode,
        image_labels,
        indices,
        options,
        batch_size=batch_size,
        image_size=image_size,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    record = {
        "run": config.name,
        "checkpoint_step": step,
        "weights": weights,
        **asdict(options),
        "labels": labels,
        "classes": chosen,
        "per_class": per_class,
        **_described(images, seconds),
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
    }
    directory = Path(out) if out else run_dir / "samples" / _folder_name(step, weights, labels, options)
    write_samples(directory, images, image_labels, record, class_names)
    return Samples(images, image_labels, record, directory)


def _described(images: np.ndarray, seconds: float) -> dict[str, Any]:
    return {
        "count": len(images),
        "image_size": list(images.shape[1:3]),
        "repeated_images": repeated_images(images),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 3),
        "created_by": f"npp_ds {__version__}",
    }


def _folder_name(step: int | None, weights: str, labels: str, options: Options) -> str:
    """Step, guidance and seed, then whatever else differs from the defaults, so that no two settings share a folder."""
    usual = asdict(Options())
    others = [f"{name}-{value:g}" for name, value in asdict(options).items() if value != usual[name]]
    others = [text.replace("_", "-") for text in others if not text.startswith(("cfg_scale", "seed"))]
    parts = [f"step-{step or 0:08d}", f"cfg-{options.cfg_scale:g}", f"seed-{options.seed}", *others]
    return "-".join([*parts, *(word for word in (weights, labels) if word not in ("raw", "balanced"))])
