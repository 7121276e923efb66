"""Train the small VQ tokenizer that ships with the package (npp_ds/assets/fashion_mnist_vq.safetensors).

The shipped weights were made with the defaults below, in 25 minutes on 2 busy cores:

    python data_prep/fashion_mnist.py --split train --out fashion_mnist_60k
    python data_prep/train_tokenizer.py --images fashion_mnist_60k --validation data_prep/fashion_mnist \\
        --out npp_ds/assets/fashion_mnist_vq.safetensors

Between encoder and decoder is a spherical k-means codebook whose unused codes are revived.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npp_ds.cli.exit_codes import exit_code_of
from npp_ds.errors import UserError
from npp_ds.tokenizer import VQConfig, VQModel, load_tokenizer, save_tokenizer, to_input
from npp_ds.tokenizer.sources import load_images, open_source

SMALL_VQ = VQConfig(
    channels=16, channel_multipliers=(1, 2, 3), num_res_blocks=1, z_channels=32, codebook_size=512, norm_groups=8
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", required=True, help="folder with train-*.tar[.gz] image shards, or an ImageFolder tree")
    add("--validation", required=True, help="folder with val-*.tar[.gz] image shards, or an ImageFolder tree")
    add("--out", type=Path, required=True, help="the .safetensors to write")
    add("--image-size", type=int, default=32, help="(%(default)s)")
    add("--steps", type=int, help="optimizer updates (default: as shipped)")
    add("--batch-size", type=int, help="images per update (default: as shipped)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--threads", type=int, default=2, help="of torch (%(default)s)")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of encoder and decoder (%(default)s)")
    return parser.parse_args()


@dataclass(frozen=True)
class TokenizerTraining:
    """Settings of `train`; steps are optimizer updates."""

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    autoencoder_steps: int = 300  # first steps without quantization, so that the latents for k-means are spread out
    commitment_weight: float = 0.25
    l2_weight: float = 1.0
    codebook_decay: float = 0.99
    dead_code_threshold: float = 1.0  # codes seen less often per batch (moving average) move to a random latent
    settle_fraction: float = 0.1  # no code moves to a random latent in this last part of the run
    seed: int = 0
    precision: str = "bf16"  # of encoder and decoder under autocast: bf16 or fp32; the codebook is always fp32


def learning_rate(step: int, settings: TokenizerTraining) -> float:
    """Return the learning rate of a step: linear warm-up times half a cosine to 0."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


class SphericalCodebook:
    """Unit vectors that follow the latents by k-means with moving averages; unused ones move to a random latent.

    The updates are those of van den Oord et al. (arXiv 1711.00937, appendix A.1), on the sphere.
    """

    def __init__(self, latents: Tensor, config: VQConfig, settings: TokenizerTraining, lloyd_iterations: int = 10):
        """Begin with random latents float [n, dim] of length 1, then `lloyd_iterations` of k-means over all of them."""
        self.decay, self.threshold = settings.codebook_decay, settings.dead_code_threshold
        self.vectors = latents[torch.randperm(len(latents))[: config.codebook_size]]
        for _ in range(lloyd_iterations):
            self.counts, self.sums = self._assigned(latents, self.nearest(latents))
            self.vectors = F.normalize(self.sums, dim=-1)
        self._revive(latents)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the codes int64 [n] of unit latents float [n, dim]."""
        return (latents @ self.vectors.T).argmax(-1)

    def _assigned(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(codes, minlength=len(self.vectors)).float()
        return counts, torch.zeros_like(self.vectors).index_add_(0, codes, latents)

    def _revive(self, latents: Tensor) -> None:
        dead = (self.counts < self.threshold).nonzero().squeeze(1)
        self.vectors[dead] = latents[torch.randint(len(latents), (len(dead),))]
        self.counts[dead] = self.threshold
        self.sums[dead] = self.vectors[dead] * self.threshold

    def update(self, latents: Tensor, codes: Tensor, revive: bool) -> None:
        """Move the vectors towards unit latents float [n, dim] with `codes` int64 [n], and unused ones if `revive`."""
        counts, sums = self._assigned(latents, codes)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.vectors = F.normalize(self.sums, dim=-1)
        if revive:
            self._revive(latents)


def _batches(count: int, settings: TokenizerTraining) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows int64 [batch_size], in a new order each epoch, and whether each row is mirrored."""
    rng = np.random.default_rng(settings.seed)
    rows = np.empty(0, np.int64)
    while True:
        if len(rows) < settings.batch_size:
            rows = np.concatenate([rows, rng.permutation(count)])
        yield rows[: settings.batch_size], rng.random(settings.batch_size) < 0.5
        rows = rows[settings.batch_size :]


def _load(images: np.ndarray, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
    batch = images[rows]
    batch[mirrored] = batch[mirrored, :, ::-1]
    return to_input(torch.from_numpy(batch)).contiguous()


def train(images: np.ndarray, config: VQConfig, settings: TokenizerTraining, log_every: int = 100) -> VQModel:
    """Train a tokenizer on images uint8 [N, H, W, 3]; print step, loss, mean absolute error and images/s."""
    if settings.steps <= settings.autoencoder_steps:
        raise UserError(
            f"steps: found {settings.steps}, expected more than the first {settings.autoencoder_steps}, "
            "which do not quantize"
        )
    torch.manual_seed(settings.seed)
    model = VQModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16")
    codebook: SphericalCodebook | None = None
    started = time.monotonic()
    for step, (rows, mirrored) in zip(range(settings.steps), _batches(len(images), settings), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        batch = _load(images, rows, mirrored)
        with autocast:
            latents = model.latents(batch)
        vectors, commitment = F.normalize(latents.float(), dim=-1), torch.zeros(())
        if step >= settings.autoencoder_steps:
            flat = vectors.detach().flatten(0, 2)
            codebook = codebook or SphericalCodebook(flat, config, settings)
            codes = codebook.nearest(flat)
            nearest = codebook.vectors[codes].view(vectors.shape)
            codebook.update(flat, codes, revive=step < settings.steps * (1 - settings.settle_fraction))
            commitment = (vectors - nearest).square().mean()
            vectors = vectors + (nearest - vectors).detach()
        with autocast:
            output = model.reconstruct(vectors)
        error = output.float() - batch
        l1 = error.abs().mean()
        loss = l1 + settings.l2_weight * error.square().mean() + settings.commitment_weight * commitment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log_every == 0 or step + 1 == settings.steps:
            rate = (step + 1) * settings.batch_size / (time.monotonic() - started)
            facts = f"loss {loss.item():.4g}, mae {l1.item() / 2:.4g}, images_per_second {rate:.4g}"
            print(f"step {step + 1}, {facts}", flush=True)
    assert codebook is not None
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(codebook.vectors)
    return model.eval()


@torch.no_grad()
def measure(model: VQModel, images: np.ndarray, batch_size: int = 250) -> dict[str, float]:
    """Return mean absolute error (pixels in [0, 1]), fraction of codes used and perplexity on uint8 [N, H, W, 3]."""
    error, counts = 0.0, torch.zeros(model.config.codebook_size, dtype=torch.float64)
    for start in range(0, len(images), batch_size):
        batch = to_input(torch.from_numpy(images[start : start + batch_size]))
        codes = model.encode(batch)
        error += (model.decode(codes).clamp(-1, 1) - batch).abs().double().mean((1, 2, 3)).sum().item() / 2
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return {
        "mean_absolute_error": error / len(images),
        "codes_used": (counts > 0).double().mean().item(),
        "perplexity": torch.exp(-(share * share.log()).sum()).item(),
    }


def main() -> int:
    options = parse()
    return exit_code_of(lambda: train_tokenizer(options))


def train_tokenizer(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    chosen = {name: value for name in ("steps", "batch_size") if (value := getattr(options, name)) is not None}
    settings = replace(TokenizerTraining(seed=options.seed, precision=options.precision), **chosen)
    images, _ = load_images(open_source([options.images], "train"), options.image_size)
    validation, _ = load_images(open_source([options.validation], "val"), options.image_size)
    started = time.monotonic()
    model = train(images, SMALL_VQ, settings)
    facts = {"images": len(images), "settings": asdict(settings), "seconds": round(time.monotonic() - started)}
    save_tokenizer(model, options.out, facts)
    measured = measure(load_tokenizer(options.out), validation)
    save_tokenizer(model, options.out, {**facts, "validation": {name: round(v, 6) for name, v in measured.items()}})
    size = options.out.stat().st_size
    print(f"{options.out}: {size / 1e6:.2f} MB; on {len(validation)} validation images: {format_facts(measured)}")


def format_facts(measured: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())


if __name__ == "__main__":
    sys.exit(main())
