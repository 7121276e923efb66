"""Extractors of features: Inception as in ADM's evaluator, and a small classifier of the shipped images."""

import hashlib
import http.client
import io
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.checkpoint.safetensors_io import as_weights, read_torch
from npp_ds.errors import UserError
from npp_ds.evaluation.images import ImageSet
from npp_ds.evaluation.metrics import Moments, Statistics
from npp_ds.sampling.folder import pixel_digest
from npp_ds.utils.files import sha256, write_atomic

Progress = Callable[[int, int], None]
INCEPTION, FASHION_MNIST = "inception", "fashion_mnist"


@dataclass(frozen=True)
class Features:
    """Features of N images, float32: `pool` [N, d], and of some extractors `spatial` [N, s], `probabilities` [N, C]."""

    pool: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None


class Extractor(Protocol):
    """A network that maps images to features.

    `sha256` is that of its weights; `standard` says whether these are the weights that published results use.
    `predicts_classes` says whether its class numbers are those of the data set, so predictions compare with labels.
    """

    name: str
    sha256: str
    standard: bool
    feature_dim: int
    predicts_classes: bool
    batch_size: int

    def __call__(self, images: np.ndarray) -> Features:
        """Return the features of images uint8 [N, H, W, 3]. Raises UserError for a size that it does not support."""
        ...


@dataclass(frozen=True)
class Measurement:
    """The result of one pass over `count` images of `image_size` [height, width].

    `sha256` is that of the pixels of all images in order. `pool` and `spatial` are statistics of all images, `features`
    [M, d] the pool features of the kept images in order. `predicted` int64 [N] holds the likeliest classes if the
    extractor predicts them, `probabilities` [N, C] the class probabilities if they are scored. `repeated` samples equal
    an earlier one in all pixels; 0 for a reference, whose images are not compared.
    """

    count: int
    image_size: list[int]
    sha256: str
    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray
    predicted: np.ndarray | None
    probabilities: np.ndarray | None
    repeated: int


def measure(
    images: ImageSet, extractor: Extractor, keep: int | None = None, progress: Progress = lambda done, total: None
) -> Measurement:
    """Run the extractor over all images in batches.

    Samples are measured without `keep`: all their features and probabilities are kept. For a reference the pool
    features of `keep` evenly spaced images are kept, and no probabilities: those of ImageNet's training images would
    take 5 GB. Raises UserError for fewer than 2 images.
    """
    wanted = np.arange(images.count)
    if keep is not None and keep < images.count:
        wanted = np.linspace(0, images.count - 1, keep).round().astype(np.int64)
    pool, spatial, digest, done = Moments(), Moments(), hashlib.sha256(), 0
    kept: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    distinct: set[bytes] = set()
    size = [0, 0]
    for batch in images.batches(extractor.batch_size):
        found = extractor(batch)
        digest.update(np.ascontiguousarray(batch).data)
        size = list(batch.shape[1:3])
        pool.add(found.pool)
        if found.spatial is not None:
            spatial.add(found.spatial)
        if found.probabilities is not None:
            if extractor.predicts_classes:
                predicted.append(found.probabilities.argmax(-1))
            if keep is None:
                probabilities.append(found.probabilities)
        if keep is None:
            distinct.update(map(pixel_digest, batch))
        kept.append(found.pool[wanted[(wanted >= done) & (wanted < done + len(batch))] - done])
        done += len(batch)
        progress(done, images.count)
    return Measurement(
        count=done,
        image_size=size,
        sha256=digest.hexdigest(),
        pool=pool.statistics(),
        spatial=spatial.statistics() if spatial.count else None,
        features=np.concatenate(kept),
        predicted=np.concatenate(predicted) if predicted else None,
        probabilities=np.concatenate(probabilities) if probabilities else None,
        repeated=done - len(distinct) if keep is None else 0,
    )


SHIPPED = Path(__file__).parent.parent / "assets" / "fashion_mnist_classifier.safetensors"


class Classifier(nn.Module):
    """Three convolutions and two linear layers on 32x32 images.

    `widths` are the channels before, between and after the convolutions; the first is 1 for grey values, 3 for colours.
    """

    image_size = 32
    num_features = 64

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = (1, 32, 48, 64)):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairwise(widths))
        self.norm = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[1:])
        self.hidden = nn.Linear(widths[-1] * 4 * 4, self.num_features)
        self.output = nn.Linear(self.num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the last layer, float32 [B, 64] >= 0, for images uint8 [B, 32, 32, 3]."""
        is_grey = self.conv[0].in_channels == 1
        x = images.float().mean(-1).unsqueeze(1) if is_grey else images.float().permute(0, 3, 1, 2)
        x = x.div(127.5).sub(1)
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits float32 [B, classes] for images uint8 [B, 32, 32, 3]."""
        return self.output(self.features(images))


def load_classifier(path: str | Path = SHIPPED) -> Classifier:
    """Load a classifier in eval mode. Raises UserError if the file is missing or holds something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        widths = [tensors["conv.0.weight"].shape[1], *(len(tensors[f"conv.{i}.weight"]) for i in range(3))]
        model = Classifier(len(tensors["output.bias"]), widths)
        model.load_state_dict(
            {name: as_weights(Path(path), name, value) for name, value in tensors.items()}, strict=False
        )
        missing = [name for name, _ in model.named_parameters() if name not in tensors]
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: no classifier of data_prep/train_classifier.py ({error}); make it again") from error
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; make it again with data_prep/train_classifier.py")
    return model.requires_grad_(False).eval()


class ClassifierExtractor:
    """A classifier, by default the shipped one, of 32x32 images: pool [N, 64], probabilities [N, C]."""

    standard = True
    feature_dim = Classifier.num_features
    predicts_classes = True
    batch_size = 256

    def __init__(self, device: str | torch.device = "cpu", path: Path = SHIPPED):
        self.name = FASHION_MNIST if path == SHIPPED else path.name
        self.sha256 = sha256(path)
        self._device = device
        self._model = load_classifier(path).to(device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Return the features of images uint8 [N, 32, 32, 3]. Raises UserError for others."""
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise UserError(
                f"images: found {images.dtype} {list(images.shape)}, the classifier takes uint8 [N, 32, 32, 3]; give "
                "another extractor for other images"
            )
        pixels = torch.tensor(images, device=self._device)
        pool = self._model.features(pixels)
        probabilities = self._model.output(pool).softmax(-1)
        return Features(pool.cpu().numpy(), None, probabilities.cpu().numpy())


WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
WEIGHTS_SHA256 = "6726825d"  # the first digits, which end the file's name
TIMEOUT = 20  # seconds without a byte from the server
POOL, LOGITS = "2048", "logits_unbiased"
SPATIAL_CHANNELS = 7


def find_weights(file: str | Path | None = None) -> tuple[Path, str]:
    """Return (path, SHA-256) of `file`, else of torch-fidelity's file in the folder of torch.hub, fetched if missing.

    Raises UserError with name, address, hash and path if there is no file, and if a file with the standard name has
    another hash. A file with another name may hold other weights.
    """
    path = Path(file) if file else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        if file:
            raise UserError(f"{path}: not found; expected {_wanted()}")
        _fetch(path)
    found = sha256(path)
    if path.name == WEIGHTS_FILE and not found.startswith(WEIGHTS_SHA256):
        raise UserError(f"{path}: damaged, its SHA-256 begins with {found[:8]}; remove it and fetch {_wanted()}")
    return path, found


def _wanted() -> str:
    return f"{WEIGHTS_FILE} from {WEIGHTS_URL} (SHA-256 {WEIGHTS_SHA256}...)"


def _fetch(path: Path) -> None:
    try:
        with urllib.request.urlopen(WEIGHTS_URL, timeout=TIMEOUT) as answer:
            data = answer.read()
        if not hashlib.sha256(data).hexdigest().startswith(WEIGHTS_SHA256):
            raise OSError("the fetched file has another SHA-256")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(data))
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"Inception's weights are not at {path} and could not be fetched ({reason}); fetch {_wanted()} on another "
            "machine, and copy it there or give it as --inception-weights FILE"
        ) from None


def _load_network(path: Path) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        tensors = {
            name: tensor if name.endswith(".num_batches_tracked") else as_weights(path, name, tensor)
            for name, tensor in read_torch(path).items()
        }
        # torch-fidelity (0.4.0) unpickles any object in its file, so it gets a copy of the tensors, read safely.
        safe = io.BytesIO()
        torch.save(tensors, safe)
        safe.seek(0)
        return FeatureExtractorInceptionV3(INCEPTION, [POOL, LOGITS], feature_extractor_weights_path=safe)
    except Exception as error:  # damaged files raise exceptions of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__).removeprefix(f"{path}: ")
        raise UserError(
            f"{path}: holds no weights of torch-fidelity's Inception ({reason}); expected {_wanted()}"
        ) from error


class Inception:
    """torch-fidelity's `inception-v3-compat`. It resizes images of any size as the TensorFlow graph does.

    pool: `pool_3` [N, 2048]. probabilities: softmax over 1008 classes of the logits without bias, as in ADM's
    evaluator. spatial: the first 7 channels of `mixed_6/conv`, flattened as height, width, channel: [N, 2023].
    torch-fidelity's table of names maps `mixed_6/conv` to Mixed_6d.branch1x1. The TensorFlow node with the bare name of
    a convolution is the last one of its scope, the ReLU after batch norm.
    """

    name = INCEPTION
    feature_dim = 2048
    predicts_classes = False
    batch_size = 64

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        path, self.sha256 = find_weights(weights)
        self.standard = self.sha256.startswith(WEIGHTS_SHA256)
        self._device = device
        self._network = _load_network(path).to(device)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Return the features of images uint8 [N, H, W, 3], computed in float32 without TF32."""
        pixels = torch.tensor(images, device=self._device).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool, logits = self._network(pixels)
        found = (pool, self._spatial, logits.softmax(-1))
        return Features(*(x.float().cpu().numpy() for x in found))


def load_extractor(name: str, weights: str | Path | None = None, device: str | torch.device | None = None) -> Extractor:
    """Load the extractor of that name. `weights` is a file to use instead of Inception's standard weights.

    Raises UserError for an unknown name and for missing or damaged weights.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == INCEPTION:
        return Inception(weights, device)
    if name == FASHION_MNIST:
        return ClassifierExtractor(device)
    raise UserError(f"extractor: found {name!r}, expected {INCEPTION} or {FASHION_MNIST}")
