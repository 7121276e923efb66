"""Extractors for tests: a tiny one without weights, random weights for Inception, and a way to hand any of them to
torch-fidelity, so that its own numbers can be compared with ours.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch_fidelity import FeatureExtractorBase, calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as ported
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from npp_ds.evaluation.extractors import Extractor, Features
from npp_ds.evaluation.metrics import Moments, Statistics


class Projection:
    """A fixed random projection of small images: far from trivial features. Bright images are class 1."""

    name, sha256, standard = "projection", "0" * 64, True
    feature_dim, predicts_classes, batch_size = 24, True, 16

    def __init__(self, size: int = 8):
        self.matrix = (np.random.default_rng(0).standard_normal((3 * size**2, 24)) / 50).astype(np.float32)
        self.seen = 0

    def __call__(self, images: np.ndarray) -> Features:
        assert images.dtype == np.uint8 and len(images) <= self.batch_size
        self.seen += len(images)
        pool = images.astype(np.float32).transpose(0, 3, 1, 2).reshape(len(images), -1) @ self.matrix
        bright = 1 / (1 + np.exp((140 - images.mean((1, 2, 3))) / 10))
        return Features(pool, pool[:, :5] * 2, np.stack([1 - bright, bright], 1).astype(np.float32))


def random_images(count: int, seed: int, low: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, size, size, 3), dtype=np.uint8)


def random_inception(path: Path, seed: int = 0) -> Path:
    """Writes weights of the right names and shapes, drawn so that signals neither fade nor grow on their way."""

    class Untrained(ported.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, **_):
            """Keeps what the constructor drew."""

    placeholder = path.with_suffix(".empty")
    torch.save({}, placeholder)
    weights = Untrained("untrained", ["2048"], feature_extractor_weights_path=placeholder).state_dict()
    placeholder.unlink()
    generator = torch.Generator().manual_seed(seed)
    for name, value in weights.items():
        if value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
            value *= 4 if name == "fc.weight" else 1
        elif name.endswith(("bn.bias", "running_mean")):
            value.normal_(0, 0.1, generator=generator)
    torch.save(weights, path)
    return path


def statistics(features: np.ndarray) -> Statistics:
    """Of features [N, d], all rows at once."""
    moments = Moments(np.zeros(features.shape[1]))
    moments.add(features)
    return moments.statistics()


class Pixels(torch.utils.data.Dataset):
    """uint8 [N, H, W, 3] as the uint8 [3, H, W] tensors that torch-fidelity wants."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.images[i]).permute(2, 0, 1).contiguous()


class _Adapter(FeatureExtractorBase):
    def __init__(self, extractor: Extractor, name: str, features_list: list[str], **_):
        super().__init__(name, features_list)
        self.extractor = extractor

    @staticmethod
    def get_provided_features_list():
        return ("pool",)

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        return (torch.from_numpy(self.extractor(x.permute(0, 2, 3, 1).numpy()).pool),)


class _Factory(partial):
    """What torch-fidelity asks of an extractor's class before it makes one."""

    get_provided_features_list = staticmethod(_Adapter.get_provided_features_list)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pool"


def fidelity_distance(extractor: Extractor, first, second) -> float:
    """torch-fidelity's Frechet distance between two sets (arrays or folders) on the pool features of an extractor."""
    FEATURE_EXTRACTORS_REGISTRY[f"test-{extractor.name}"] = _Factory(_Adapter, extractor)
    first, second = (Pixels(x) if isinstance(x, np.ndarray) else str(x) for x in (first, second))
    found = calculate_metrics(
        input1=first,
        input2=second,
        fid=True,
        feature_extractor=f"test-{extractor.name}",
        batch_size=extractor.batch_size,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
    )
    return found["frechet_inception_distance"]
