"""Train the small classifier that ships with the package (npp_ds/assets/fashion_mnist_classifier.safetensors).

It was made by these commands, in about seven minutes on 2 cores:

    python data_prep/fashion_mnist.py --split train --out fashion_mnist_60k
    python data_prep/train_classifier.py --images fashion_mnist_60k --validation data_prep/fashion_mnist \\
        --out npp_ds/assets/fashion_mnist_classifier.safetensors
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

from npp_ds.cli.exit_codes import exit_code_of
from npp_ds.evaluation.extractors import Classifier, load_classifier
from npp_ds.tokenizer import load_tokenizer
from npp_ds.tokenizer.sources import load_images, open_source
from npp_ds.tokenizer.vq import VQModel, to_input, to_uint8
from npp_ds.utils.files import write_atomic

SHIFT = 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", required=True, help="folder with train-*.tar[.gz] image shards, or an ImageFolder tree")
    add("--validation", required=True, help="folder with val-*.tar[.gz] image shards, or an ImageFolder tree")
    add("--tokenizer", default="fashion_mnist", help="its reconstructions are trained on too (%(default)s)")
    add("--reconstructed", type=int, default=20000, help="number of images to reconstruct (%(default)s)")
    add("--out", type=Path, required=True, help="the .safetensors to write")
    add("--widths", type=int, nargs=4, default=[1, 32, 48, 64], help="channels before, between and after the "
        "convolutions; the first is 1 for grey values, 3 for colours (1 32 48 64)")  # fmt: skip
    add("--epochs", type=int, default=6, help="(%(default)s)")
    add("--batch-size", type=int, default=128, help="(%(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="peak (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--threads", type=int, default=2, help="of torch (%(default)s)")
    return parser.parse_args()


def reconstruct(tokenizer: VQModel, images: np.ndarray, batch_size: int = 250) -> np.ndarray:
    """Encode and decode images uint8 [N, H, W, 3]."""
    batches = (torch.from_numpy(images[i : i + batch_size]) for i in range(0, len(images), batch_size))
    return np.concatenate([to_uint8(tokenizer.decode(tokenizer.encode(to_input(batch)))).numpy() for batch in batches])


def augment(images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Shift images uint8 [B, 32, 32, 3] by up to SHIFT pixels and mirror half of them."""
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    side = images.shape[1]
    shifted = np.empty_like(images)
    for row, (top, left) in enumerate(rng.integers(0, 2 * SHIFT + 1, (len(images), 2))):
        shifted[row] = padded[row, top : top + side, left : left + side]
    mirrored = rng.random(len(images)) < 0.5
    shifted[mirrored] = shifted[mirrored, :, ::-1]
    return torch.from_numpy(shifted)


def fit(images: np.ndarray, labels: np.ndarray, options: argparse.Namespace) -> Classifier:
    """Train a classifier on images uint8 [N, 32, 32, 3] and labels int64 [N]."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = Classifier(int(labels.max()) + 1, options.widths).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    steps_per_epoch = len(images) // options.batch_size
    total = options.epochs * steps_per_epoch
    for epoch in range(options.epochs):
        order, losses, started = rng.permutation(len(images)), [], time.monotonic()
        for step in range(steps_per_epoch):
            done = (epoch * steps_per_epoch + step) / total
            optimizer.param_groups[0]["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            rows = order[step * options.batch_size : (step + 1) * options.batch_size]
            logits = model(augment(images[rows], rng))
            loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]), label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def save_classifier(model: Classifier, path: Path) -> None:
    """Write the weights in float16, atomically."""
    tensors = {name: value.half() for name, value in model.state_dict().items() if value.is_floating_point()}
    write_atomic(path, lambda file: file.write(save(tensors)))


@torch.no_grad()
def predict(images: np.ndarray, model: Classifier, batch_size: int = 500) -> np.ndarray:
    """Return the likeliest labels int64 [N] of images uint8 [N, 32, 32, 3]."""
    return torch.cat([model(batch).argmax(-1) for batch in torch.from_numpy(images).split(batch_size)]).numpy()


def train_classifier(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.tokenizer)
    images, labels = load_images(open_source([options.images], "train"), Classifier.image_size)
    validation, truth = load_images(open_source([options.validation], "val"), Classifier.image_size)
    extra = np.random.default_rng(options.seed).permutation(len(images))[: options.reconstructed]
    images = np.concatenate([images, reconstruct(tokenizer, images[extra])])
    save_classifier(fit(images, np.concatenate([labels, labels[extra]]), options), options.out)
    model = load_classifier(options.out)
    original = (predict(validation, model) == truth).mean()
    decoded = (predict(reconstruct(tokenizer, validation), model) == truth).mean()
    print(f"{options.out}: accuracy {original:.4f} on {len(truth)} validation images, {decoded:.4f} on reconstructions")


def main() -> int:
    options = parse()
    return exit_code_of(lambda: train_classifier(options))


if __name__ == "__main__":
    sys.exit(main())
