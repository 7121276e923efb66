"""Images -> VQ codes in WebDataset shards with a manifest.

The same command again goes on where it was stopped. Under `accelerate launch` each process takes its share of shards.

    python data_prep/tokenize_imagenet.py --images /data/imagenet --split train --out codes/train \\
        --tokenizer vq_ds16_c2i.pt --crops ten --crop-range 1.1
    python data_prep/tokenize_imagenet.py --images data_prep/fashion_mnist --split train --out codes/train \\
        --tokenizer fashion_mnist --image-size 32 --crops center
"""

import argparse
import sys
import time
from pathlib import Path

from npp_ds.errors import UserError, exit_code_of


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", nargs="+", required=True, metavar="PATH", help="folder with <split>-*.tar[.gz] image shards, such "
        "shards, or an ImageFolder tree (class folders, directly or under <split>/)")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the code shards and their manifest")
    add("--split", default="train", help="prefix of the shards, read and written (%(default)s)")
    add("--source", choices=["auto", "webdataset", "imagefolder"], default="auto", help="(%(default)s)")
    add("--class-names", type=Path, metavar="FILE", help="class names in label order, one a line "
        "(default: classes.txt beside the images, or the class folders)")  # fmt: skip
    add("--tokenizer", required=True, metavar="NAME_OR_PATH", help="fashion_mnist, or a checkpoint file")
    add("--image-size", type=int, default=256, metavar="PIXELS", help="side of a crop (%(default)s)")
    add("--crops", choices=["center", "center-flip", "ten"], default="ten", help="(%(default)s)")
    add("--crop-range", type=float, nargs="+", metavar="R", help="for ten crops: the crops are taken from the centre "
        "square of side image size x R, scaled to fit; 1.1 1.05 makes twenty (1.1)")  # fmt: skip
    add("--samples-per-shard", type=int, default=4096, metavar="N", help="images per shard (%(default)s)")
    add(
        "--batch-size", type=int, default=256, metavar="CROPS", help="crops through the tokenizer at once (%(default)s)"
    )
    add("--max-skipped", type=float, default=0.001, metavar="FRACTION", help="of unreadable images (%(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    options = parser.parse_args(arguments)
    if options.crop_range is None:
        options.crop_range = [1.1] if options.crops == "ten" else []
    return options


def main() -> int:
    options = parse()
    return exit_code_of(lambda: tokenize(options))


def tokenize(options: argparse.Namespace) -> None:
    try:
        encode_images(options)
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror}") from error


def encode_images(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from npp_ds.tokenizer.encode import EncodeSettings, Encoding
    from npp_ds.tokenizer.sources import open_source
    from npp_ds.tokenizer.vq import load_tokenizer

    started = time.monotonic()
    processes = PartialState(cpu=options.device == "cpu")
    device = str(processes.device) if options.device == "auto" else options.device
    settings = EncodeSettings(
        split=options.split,
        image_size=options.image_size,
        crops=options.crops,
        crop_ranges=tuple(options.crop_range),
        samples_per_shard=options.samples_per_shard,
        crop_batch_size=options.batch_size,
        max_skipped=options.max_skipped,
        device=device,
    )
    source = open_source(options.images, options.split, options.class_names, options.source)
    encoding = Encoding(source, load_tokenizer(options.tokenizer).to(device), options.out, settings)
    processes.wait_for_everyone()
    encoding.run(processes.process_index, processes.num_processes)
    processes.wait_for_everyone()
    if processes.is_main_process:
        report(encoding.finish(), options.out, time.monotonic() - started)


def report(manifest, out: Path, seconds: float) -> None:
    crops, stored = manifest.num_crops, sum(shard.bytes for shard in manifest.shards)
    print(
        f"{out}: {manifest.num_samples} images x {crops} crops x {manifest.num_tokens} codes "
        f"in {len(manifest.shards)} shards, {stored / 1e6:.1f} MB, {len(manifest.skipped)} images skipped, "
        f"{seconds:.1f} s ({manifest.num_samples / seconds:.0f} images/s)"
    )


if __name__ == "__main__":
    sys.exit(main())
