"""Train the small VQ tokenizer that ships with the package (npp_ds/assets/fashion_mnist_vq.safetensors).

The shipped weights were made with the defaults below, in 25 minutes on 2 busy cores:

    python data_prep/fashion_mnist.py --split train --out fashion_mnist_60k
    python data_prep/train_tokenizer.py --images fashion_mnist_60k --validation data_prep/fashion_mnist \\
        --out npp_ds/assets/fashion_mnist_vq.safetensors
"""

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from npp_ds.cli.exit_codes import exit_code_of


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


def main() -> int:
    options = parse()
    return exit_code_of(lambda: train_tokenizer(options))


def train_tokenizer(options: argparse.Namespace) -> None:
    import torch

    from npp_ds.tokenizer import load_tokenizer, save_tokenizer
    from npp_ds.tokenizer.sources import load_images, open_source
    from npp_ds.tokenizer.training import SMALL_VQ, TokenizerTraining, measure, train

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
