"""Encode images into VQ codes, as WebDataset shards with a manifest.

Rerun the same command to resume. Any number of processes, on any number of machines, may work on one output folder:
started by torchrun, `accelerate launch` or `srun`, each takes the next shard that no other one has taken.

    python data_prep/tokenize_imagenet.py --images /data/imagenet --split train --out codes/train \\
        --tokenizer vq_ds16_c2i.pt --crops ten --crop-range 1.1
    python data_prep/tokenize_imagenet.py --images ILSVRC2012_img_train.tar --split train --out codes/train \\
        --tokenizer vq_ds16_c2i.pt --dry-run
    python data_prep/tokenize_imagenet.py --images data_prep/fashion_mnist --split train --out codes/train \\
        --tokenizer fashion_mnist --image-size 32 --crops center
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from npp_ds.cli.exit_codes import exit_code_of
from npp_ds.distributed.environment import choose_device, processes_on_node, read_environment
from npp_ds.errors import UserError
from npp_ds.utils.screen import say

if TYPE_CHECKING:
    from npp_ds.data.manifest import Manifest
    from npp_ds.tokenizer.sources import Source

MOST_WORKERS = 16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", nargs="+", required=True, metavar="PATH", help="folder with <split>-*.tar[.gz] image shards, or "
        "such shards; or an ImageFolder tree (class folders, directly or under <split>/); or ILSVRC2012_img_train.tar "
        "(one tar per class in a tar), or its folder")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the code shards and their manifest")
    add("--split", default="train", help="prefix of the shards, read and written (%(default)s)")
    add("--source", choices=["auto", "webdataset", "imagefolder", "imagenet-tar"], default="auto", help="(%(default)s)")
    add("--labels", type=Path, metavar="FILE", help="classes of the images in ILSVRC2012_img_val.tar: the devkit's "
        "ground truth, a WordNet id a line, or image and class a line")  # fmt: skip
    add("--class-list", "--class-names", type=Path, metavar="FILE", help="one class a line in label order: name, id "
        "or 'id name', or imagenet for the shipped list; ids must be the class folders (default: classes.txt beside "
        "the images, or the class folders)")  # fmt: skip
    add("--tokenizer", required=True, metavar="NAME_OR_PATH", help="fashion_mnist, or a checkpoint file")
    add("--precision", choices=["fp32", "tf32", "fp16", "bf16"], default="fp32", help="of the encoder; for others than "
        "fp32 the agreement of the first codes with fp32 is measured, printed and recorded (%(default)s)")  # fmt: skip
    add("--image-size", type=int, default=256, metavar="PIXELS", help="side of a crop (%(default)s)")
    add("--crops", choices=["center", "center-flip", "ten"], default="ten", help="(%(default)s)")
    add("--crop-range", type=float, nargs="+", metavar="R", help="for ten crops: the crops are taken from the centre "
        "square of side image size x R, scaled to fit; 1.1 1.05 makes twenty (1.1)")  # fmt: skip
    add("--samples-per-shard", type=int, default=4096, metavar="N", help="images per shard (%(default)s)")
    add("--batch-size", type=int, metavar="CROPS", help="crops through the tokenizer at once (default: that of a set "
        "in --out; for a new one as many as fit half of the free memory, at most 256)")  # fmt: skip
    add("--workers", type=int, metavar="N", help="processes that decode images, for each process that encodes; 0: none "
        f"(the processor cores that are available to it, at most {MOST_WORKERS})")  # fmt: skip
    add("--max-skipped", type=float, default=0.001, metavar="FRACTION", help="largest accepted fraction of unreadable "
        "images (%(default)s)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    add(
        "--dry-run", action="store_true", help="write nothing; print images, shards, bytes and hours at a measured rate"
    )
    options = parser.parse_args(arguments)
    if options.crop_range is None:
        options.crop_range = [1.1] if options.crops == "ten" else []
    return options


def main() -> int:
    options = parse()
    try:
        return exit_code_of(lambda: tokenize(options))
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return 130


def tokenize(options: argparse.Namespace) -> None:
    try:
        encode_images(options)
    except OSError as error:
        text = f"{error.filename or options.out}: {error.strerror or error}"
        raise UserError(f"{text}; finished shards are kept, rerun the same command to resume") from error


def default_workers() -> int:
    """Return the processor cores that are available to this process: those of its SLURM task, else its share of all."""
    task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if task.isdecimal() and "RANK" not in os.environ:
        cores = int(task)
    else:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = usable // processes_on_node()
    return min(max(cores, 1), MOST_WORKERS)


def encode_images(options: argparse.Namespace) -> None:
    # OpenMP reads this when torch is loaded. Without it, threads that wait for each other spin, on cores that the
    # decoding processes need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from npp_ds.tokenizer import load_tokenizer
    from npp_ds.tokenizer.contents import estimate
    from npp_ds.tokenizer.encode import EncodeSettings, Encoding
    from npp_ds.tokenizer.sources import open_source

    started = time.monotonic()
    process = read_environment()
    settings = EncodeSettings(
        split=options.split,
        image_size=options.image_size,
        crops=options.crops,
        crop_ranges=tuple(options.crop_range),
        samples_per_shard=options.samples_per_shard,
        crop_batch_size=options.batch_size,
        max_skipped=options.max_skipped,
        device=choose_device(options.device, process.local_rank),
        precision=options.precision,
        workers=default_workers() if options.workers is None else options.workers,
    )
    source = open_source(options.images, options.split, options.class_list, options.source, options.labels)
    encoding = Encoding(source, load_tokenizer(options.tokenizer).to(settings.device), options.out, settings)
    if options.dry_run:
        if process.rank == 0:
            say_at_the_end(f"{options.out}, not written: {estimate(encoding, process.world_size)}{remarks(source)}")
        return
    encoded = encoding.run(process.rank, process.world_size)
    manifest = encoding.finish()
    if manifest is not None:
        report(manifest, source, options.out, encoded, time.monotonic() - started)
    else:
        say_at_the_end(f"process {process.rank} is done ({encoded} images); others are still encoding")


def say_at_the_end(text: str) -> None:
    """Print a line. The work is done by then, so a reader that has gone away or a full disk there is no failure."""
    try:
        say(text)
    except OSError:
        sys.stdout = None  # type: ignore[assignment]  # or Python would try again when it ends


def remarks(source: "Source") -> str:
    """Return what the closing line says of classes without images and of files that were ignored."""
    from npp_ds.tokenizer.listing import passed_over_text, some

    empty = source.classes_without_images
    found = [
        f"no images of {len(empty)} classes ({some(empty)})" if empty else "",
        passed_over_text(source.passed_over),
    ]
    return "".join(f"; {text}" for text in found if text)


def report(manifest: "Manifest", source: "Source", out: Path, encoded: int, seconds: float) -> None:
    from npp_ds.tokenizer.contents import compare_sizes
    from npp_ds.utils.format import counted

    size = compare_sizes(sum(shard.bytes for shard in manifest.shards), manifest.source.get("bytes"))
    say_at_the_end(
        f"{out}: {counted(manifest.num_samples, 'image')} x {counted(manifest.num_crops, 'crop')} x "
        f"{counted(manifest.num_tokens, 'code')} in {counted(len(manifest.shards), 'shard')}, {size}; "
        f"{counted(len(manifest.skipped), 'image')} skipped; "
        + (
            f"this process encoded {encoded} in {seconds:.1f} s ({encoded / seconds:.0f} images/s)"
            if encoded
            else "nothing was left to do"
        )
        + remarks(source)
    )


if __name__ == "__main__":
    sys.exit(main())
