"""Compare how fast crops become codes with the published way, on JPEGs of ImageNet's usual size.

The published way encodes ten crops of one image at a time from a DataLoader and writes two .npy files per image. Both
ways take turns with an encoder that does nothing. Then VQ-16 runs alone and in the whole pipeline:

    python -m benchmarks.tokenize --out benchmarks/results
    python -m benchmarks.tokenize --gpu --tokenizer vq_ds16_c2i.pt --out benchmarks/results
"""

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # When run by its path, this folder is first on sys.path, and this file would hide the standard library's tokenize.
    sys.path[0] = os.path.dirname(sys.path[0])

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for both ways, as in data_prep/tokenize_imagenet.py

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.common import command_line, machine, made_by, parsed, publish, spread
from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import ShardWriter
from npp_ds.tokenizer import VQ16, VQModel, load_tokenizer
from npp_ds.tokenizer.batches import BatchEncoder
from npp_ds.tokenizer.encode import EncodeSettings, Encoding
from npp_ds.tokenizer.images import ImageReader, decode, squares
from npp_ds.tokenizer.sources import Source, open_source
from npp_ds.tokenizer.vq import PRECISIONS

SIZE, RANGE, CROPS, TOKENS = 256, 1.1, 10, 256
WIDTH, HEIGHT, QUALITY = 500, 375, 88
PUBLISHED, HERE = "published way", "this software"


class NullTokenizer:
    """A tokenizer with the shapes of VQ-16 that returns zeros."""

    name, sha256, downsample, config = "null", "0" * 64, VQ16.downsample, VQ16

    def encode(self, images: torch.Tensor, precision: str = "fp32") -> torch.Tensor:
        return torch.zeros((len(images), TOKENS), dtype=torch.int64)


def write_images(folder: Path, count: int, different: int = 150, classes: int = 4) -> Source:
    """Write JPEGs of noise with the spectrum of photographs (amplitude 1/f): `different` ones, copied up to `count`."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    for number in range(min(count, different)):
        spectrum = np.fft.rfft2(rng.normal(size=(3, HEIGHT, WIDTH))) / frequency
        pixels = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
        pixels = 127.5 + 55 * pixels / pixels.std((1, 2), keepdims=True)
        encoded = io.BytesIO()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(encoded, "JPEG", quality=QUALITY)
        for copy in range(number, count, different):
            path = folder / "train" / f"n{copy % classes:08d}" / f"{copy:06d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded.getvalue())
    return open_source([folder], "train")


def published_way(images: Path, out: Path, encode: Callable[[torch.Tensor], torch.Tensor], workers: int) -> None:
    """Encode the float crops of one image at a time from a DataLoader, and write two .npy files per image."""
    out.mkdir()
    dataset = datasets.ImageFolder(str(images), published_transform())
    fork = "fork" if workers else None  # the transforms contain lambdas, which cannot be pickled
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, multiprocessing_context=fork)
    for number, (crops, label) in enumerate(loader):
        codes = encode(crops.flatten(0, 1)).reshape(1, CROPS, -1)
        np.save(out / f"{number}_codes.npy", codes.cpu().numpy())
        np.save(out / f"{number}_label.npy", label.numpy())


def published_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the whole image and cut the crop from an array, as `center_crop` of the published script does."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return Image.fromarray(np.array(image)[top : top + size, left : left + size])


def published_transform() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Lambda(lambda image: published_center_crop(image, int(SIZE * RANGE))),
            transforms.TenCrop(SIZE),
            transforms.Lambda(lambda crops: torch.stack([transforms.functional.to_tensor(crop) for crop in crops])),
            transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
        ]
    )


def this_way(source: Source, tokenizer, out: Path, **changes) -> Encoding:
    """Encode ten crops of each image into shards and write the manifest."""
    settings = {"crops": "ten", "crop_ranges": (RANGE,), "samples_per_shard": 4096, "crop_batch_size": 160}
    encoding = Encoding(source, tokenizer, out, EncodeSettings("train", SIZE, **{**settings, **changes}))
    encoding.run()
    encoding.finish()
    return encoding


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def clock_and_cpu(action: Callable[[], object]) -> dict[str, float]:
    """Return the wall-clock seconds, and the CPU seconds of this process and of its children that have ended."""
    before = sum(os.times()[:4])
    took = seconds(action)
    return {"clock": took, "cpu": sum(os.times()[:4]) - before}


def measure_parts(source: Source, folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Return the crops per second of each part alone on `count` images: part -> {way: crops/s}."""
    reader, items = ImageReader(), source.items[:count]
    data = [reader.read(item) for item in items]
    images: list[Image.Image] = []
    took = {"decode": {HERE: seconds(lambda: images.extend(map(decode, data)))}}
    took["decode"][PUBLISHED] = took["decode"][HERE]
    encoder, transform = BatchEncoder(NullTokenizer(), SIZE, "ten", (RANGE,), count * CROPS), published_transform()
    codes = np.zeros((CROPS, TOKENS), np.uint16)

    def crop() -> None:
        encoder.encode([np.stack([squares(image, SIZE, (RANGE,))[0] for image in images])])

    def write() -> None:
        with ShardWriter(folder / "part.tar") as writer:
            for item in items:
                writer.write(item.key, codes, item.label)

    def write_published() -> None:
        for number, item in enumerate(items):
            np.save(folder / f"{number}_codes.npy", codes[None].astype(np.int64))
            np.save(folder / f"{number}_label.npy", np.array([item.label]))

    crop()  # allocates the memory that all later batches reuse
    took["crop, scale to floats"] = {HERE: seconds(crop), PUBLISHED: seconds(lambda: list(map(transform, images)))}
    took["write"] = {HERE: seconds(write), PUBLISHED: seconds(write_published)}
    return {part: {way: count * CROPS / time for way, time in ways.items()} for part, ways in took.items()}


def measure_null(source: Source, folder: Path, workers: int) -> dict[str, dict[str, float]]:
    """Run both ways from files to files, one after the other, with an encoder that does nothing.

    Return the images per second of wall-clock time, and per second of CPU time of all processes.
    """
    images, tokenizer = Path(source.items[0].path).parents[1], NullTokenizer()
    ways = {
        PUBLISHED: lambda: published_way(images, folder / "published", tokenizer.encode, workers),
        HERE: lambda: this_way(source, tokenizer, folder / "here", workers=workers),
    }
    took = {way: clock_and_cpu(action) for way, action in ways.items()}
    return {way: {by: len(source.items) / time for by, time in times.items()} for way, times in took.items()}


def measure_vq16(
    source: Source, tokenizer: VQModel, folder: Path, workers: int, count: int
) -> dict[str, dict[str, float]]:
    """Return the seconds of VQ-16 on center crops of `count` images, alone and in the whole pipeline."""
    few = replace(source, items=source.items[:count])
    settings = {"crops": "center", "crop_ranges": (), "crop_batch_size": 4, "workers": workers}
    alone = BatchEncoder(tokenizer, SIZE, "center", (), 4)
    batch = [np.zeros((4, SIZE, SIZE, 3), np.uint8)]
    return {
        "alone": clock_and_cpu(lambda: [alone.encode(batch) for _ in range(count // 4)]),
        "in the pipeline": clock_and_cpu(lambda: this_way(few, tokenizer, folder / "vq16", **settings)),
    }


def encoder_rate(tokenizer: VQModel, crops: int, device: str, precision: str, batches: int = 8) -> float:
    """Return the crops per second of the encoder alone, in batches of about `crops` crops of noise from the host."""
    encoder = BatchEncoder(tokenizer, SIZE, "ten", (RANGE,), crops, device, precision)
    side = int(SIZE * RANGE)
    noise = [np.random.default_rng(0).integers(0, 256, (encoder.images, side, side, 3), np.uint8)]
    encoder.encode(noise).cpu()
    took = seconds(lambda: [encoder.encode(noise) for _ in range(batches)][-1].cpu())
    return batches * encoder.images * CROPS / took


def measure_gpu(source: Source, tokenizer: VQModel, folder: Path, options: argparse.Namespace) -> list[dict]:
    """Return for each precision the crops per second of encoder and pipeline, and the agreement with fp32."""
    rows = []
    tokenizer = tokenizer.to("cuda")
    for precision in PRECISIONS:
        settings = {"device": "cuda", "precision": precision, "crop_batch_size": options.batch_size}
        out = folder / precision
        whole = seconds(lambda out=out, s=settings: this_way(source, tokenizer, out, workers=options.workers, **s))
        agreement = Manifest.load(out).tokenizer.agreement
        rows.append(
            {
                "precision": precision,
                "encoder_crops_per_second": encoder_rate(tokenizer, options.batch_size, "cuda", precision),
                "pipeline_crops_per_second": len(source.items) * CROPS / whole,
                "agreement_with_fp32": agreement.equal / agreement.codes if agreement else 1.0,
            }
        )
    return rows


def medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(turn[name] for turn in turns) for name in turns[0]}


def run_cpu(options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as name:
        source = write_images(Path(name) / "images", options.images)
        turns, parts, vq16 = [], [], []
        torch.manual_seed(0)
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else VQModel(VQ16).eval()
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory(dir=name) as folder:
                turns.append(measure_null(source, Path(folder), options.workers))
                parts.append(measure_parts(source, Path(folder), min(24, options.images)))
                vq16.append(measure_vq16(source, tokenizer, Path(folder), options.workers, options.vq16_images))
        sizes = source.bytes / len(source.items)
    ratios = {by: [turn[HERE][by] / turn[PUBLISHED][by] for turn in turns] for by in ("clock", "cpu")}
    overheads = {by: [turn["in the pipeline"][by] / turn["alone"][by] - 1 for turn in vq16] for by in ("clock", "cpu")}
    return {
        "images": options.images,
        "mean_jpeg_bytes": round(sizes),
        "workers": options.workers,
        "repeats": options.repeats,
        "images_per_second": {way: medians([turn[way] for turn in turns]) for way in turns[0]},
        "ratio": {by: spread(values) for by, values in ratios.items()},
        "parts_crops_per_second": {part: medians([turn[part] for turn in parts]) for part in parts[0]},
        "vq16": {
            "weights": tokenizer.name,
            "crops": options.vq16_images,
            "seconds": {way: medians([turn[way] for turn in vq16]) for way in vq16[0]},
            "overhead": {by: spread(values) for by, values in overheads.items()},
        },
        "ratios": {
            "to_published": round(median(ratios["clock"]), 3),
            "to_published_in_processor_time": round(median(ratios["cpu"]), 3),
            "vq16_alone_to_pipeline": round(1 / (1 + median(overheads["clock"])), 3),
        },
    }


def run_gpu(options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else VQModel(VQ16).eval()
    with tempfile.TemporaryDirectory() as name:
        source = write_images(Path(name) / "images", options.images)
        rows = measure_gpu(source, tokenizer, Path(name), options)
    return {
        "images": options.images,
        "weights": tokenizer.name,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "precisions": rows,
        "ratios": {
            f"pipeline_to_encoder_{row['precision']}": row["pipeline_crops_per_second"]
            / row["encoder_crops_per_second"]
            for row in rows
        },
    }


def cpu_table(result: dict) -> list[str]:
    rate, ratio, vq16 = result["images_per_second"], result["ratio"], result["vq16"]
    encoder, overhead = vq16["crops"] / vq16["seconds"]["alone"]["clock"], vq16["overhead"]
    lines = [
        "# Images to codes",
        "",
        f"Ten crops of {SIZE} pixels of {result['images']} JPEGs of {WIDTH} x {HEIGHT} "
        f"({result['mean_jpeg_bytes'] / 1e3:.0f} kB each), {result['workers']} decoding processes; medians of "
        f"{result['repeats']} turns. From files to files, with an encoder that does nothing:",
        "",
        "| way | images/s | crops/s | images per second of CPU time |",
        "|---|---|---|---|",
        *(
            f"| {way} | {rate[way]['clock']:.1f} | {rate[way]['clock'] * CROPS:.0f} | {rate[way]['cpu']:.1f} |"
            for way in (PUBLISHED, HERE)
        ),
        "",
        f"Ratio in the same turn: **{ratio['clock']['median']:.2f}** ({ratio['clock']['lowest']:.2f} .. "
        f"{ratio['clock']['highest']:.2f}); in CPU time {ratio['cpu']['median']:.2f}.",
        "",
        f"| part alone, crops/s | {PUBLISHED} | {HERE} |",
        "|---|---|---|",
    ]
    for part, ways in result["parts_crops_per_second"].items():
        lines.append(f"| {part} | {ways[PUBLISHED]:,.0f} | {ways[HERE]:,.0f} |")
    lines += [
        f"| encode, VQ-16 in fp32 ({vq16['weights']} weights) | {encoder:.2f} | {encoder:.2f} |",
        "",
        f"VQ-16 on {vq16['crops']} center crops: {vq16['seconds']['alone']['clock']:.1f} s alone, "
        f"{vq16['seconds']['in the pipeline']['clock']:.1f} s in the whole pipeline: "
        f"**{overhead['clock']['median']:+.1%}** ({overhead['clock']['lowest']:+.1%} .. "
        f"{overhead['clock']['highest']:+.1%}); in CPU time {overhead['cpu']['median']:+.1%}.",
    ]
    return lines


def gpu_table(result: dict) -> list[str]:
    lines = [
        "# Images to codes on a GPU",
        "",
        f"Ten crops of {SIZE} pixels of {result['images']} JPEGs, VQ-16 ({result['weights']} weights), batches of "
        f"{result['batch_size']} crops, {result['workers']} decoding processes.",
        "",
        "| precision | encoder alone, crops/s | whole pipeline, crops/s | codes as in fp32 |",
        "|---|---|---|---|",
    ]
    for row in result["precisions"]:
        lines.append(
            f"| {row['precision']} | {row['encoder_crops_per_second']:.0f} | {row['pipeline_crops_per_second']:.0f} | "
            f"{row['agreement_with_fp32']:.2%} |"
        )
    return lines


def main() -> None:
    parser = command_line(
        __doc__,
        fast="300 JPEGs, 4 crops for VQ-16, 3 turns",
        gpu="measure VQ-16 on the first GPU, in every precision",
        repeats=5,
    )
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    add("--tokenizer", help="a VQ-16 checkpoint (default: random weights)")
    add("--images", type=int, default=2000, help="number of JPEGs (%(default)s)")
    add("--workers", type=int, default=min(cores, 16), help="decoding processes (%(default)s)")
    add("--vq16-images", type=int, default=8, help="crops for VQ-16 on the CPU, a multiple of 4 (%(default)s)")
    add("--batch-size", type=int, default=250, help="crops per batch of VQ-16 on the GPU (%(default)s)")
    options = parsed(parser, fast={"images": 300, "vq16_images": 4, "repeats": 3})
    result = {
        "benchmark": "tokenize_gpu" if options.gpu else "tokenize",
        "fast": options.fast,
        **(run_gpu(options) if options.gpu else run_cpu(options)),
        "machine": machine("numpy", "pillow", "torch", gpu=options.gpu),
    }
    lines = gpu_table(result) if options.gpu else cpu_table(result)
    publish(result, "\n".join([*lines, "", made_by(result)]) + "\n", options.out)


if __name__ == "__main__":
    main()
