"""A small classifier of the shipped Fashion-MNIST images: it predicts the class of a sample and extracts features.

Its Frechet distances compare runs on Fashion-MNIST with each other; they are not the FID of Inception.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.checkpoint.safetensors_io import as_weights
from npp_ds.errors import UserError
from npp_ds.evaluation.features import FASHION_MNIST, Features
from npp_ds.utils.files import sha256, write_atomic

SHIPPED = Path(__file__).parent.parent / "assets" / "fashion_mnist_classifier.safetensors"


class Classifier(nn.Module):
    """Three convolutions and two linear layers on the grey values of 32x32 images."""

    image_size = 32
    num_features = 64

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((1, 32), (32, 48), (48, 64)))
        self.norm = nn.ModuleList(nn.BatchNorm2d(c) for c in (32, 48, 64))
        self.hidden = nn.Linear(64 * 4 * 4, self.num_features)
        self.output = nn.Linear(self.num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the last layer, float32 [B, 64] >= 0, for images uint8 [B, 32, 32, 3]."""
        x = images.float().mean(-1).unsqueeze(1).div(127.5).sub(1)
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
        model = Classifier(len(tensors["output.bias"]))
        model.load_state_dict(
            {name: as_weights(Path(path), name, value) for name, value in tensors.items()}, strict=False
        )
        missing = [name for name, _ in model.named_parameters() if name not in tensors]
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: no classifier of data_prep/train_classifier.py ({error}); make it again") from error
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; make it again with data_prep/train_classifier.py")
    return model.requires_grad_(False).eval()


def save_classifier(model: Classifier, path: str | Path) -> None:
    """Write the weights in float16, atomically."""
    from safetensors.torch import save

    tensors = {name: value.half() for name, value in model.state_dict().items() if value.is_floating_point()}
    write_atomic(path, lambda file: file.write(save(tensors)))


@cache
def _shipped() -> Classifier:
    return load_classifier()


@torch.no_grad()
def predict(images: np.ndarray | Tensor, model: Classifier | None = None, batch_size: int = 500) -> np.ndarray:
    """Return the likeliest labels int64 [B] of images uint8 [B, 32, 32, 3]; `model` None is the shipped classifier."""
    images = torch.as_tensor(images)
    _check_images(images, (Classifier.image_size, Classifier.image_size, 3))
    model = model or _shipped()
    return torch.cat([model(batch).argmax(-1) for batch in images.split(batch_size)]).numpy()


class ClassifierExtractor:
    """The shipped classifier as an extractor for 32x32 images: pool [N, 64], probabilities [N, 10]."""

    name = FASHION_MNIST
    standard = True
    feature_dim = Classifier.num_features
    judges_classes = True
    batch_size = 256

    def __init__(self, device: str | torch.device = "cpu"):
        self.sha256 = sha256(SHIPPED)
        self._device = device
        self._model = load_classifier().to(device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Return the features of images uint8 [N, 32, 32, 3]. Raises UserError for others."""
        pixels = torch.tensor(images, device=self._device)
        _check_images(pixels, (Classifier.image_size, Classifier.image_size, 3))
        pool = self._model.features(pixels)
        probabilities = self._model.output(pool).softmax(-1)
        return Features(pool.cpu().numpy(), None, probabilities.cpu().numpy())


def _check_images(images: Tensor, shape: tuple[int, ...]) -> None:
    if images.dtype != torch.uint8 or images.shape[1:] != shape:
        raise UserError(
            f"images: found {images.dtype} {list(images.shape)}, the Fashion-MNIST classifier takes torch.uint8 "
            f"{['B', *shape]}; give another extractor for other images"
        )
