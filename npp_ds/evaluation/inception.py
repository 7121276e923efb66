"""The Inception network of ADM's evaluator, as torch-fidelity ported it, and its file of weights."""

import hashlib
import http.client
import io
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npp_ds.errors import UserError
from npp_ds.evaluation.features import INCEPTION, Features
from npp_ds.utils.files import sha256, write_atomic

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
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # torch-fidelity (0.4.0) unpickles any object in its file, so it gets a copy of the tensors, read safely.
        safe = io.BytesIO()
        torch.save(tensors, safe)
        safe.seek(0)
        return FeatureExtractorInceptionV3(INCEPTION, [POOL, LOGITS], feature_extractor_weights_path=safe)
    except Exception as error:  # damaged files raise exceptions of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
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
    judges_classes = False
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
