"""The same images as each variant of source: class folders, ImageNet's tar of tars, WebDataset image shards."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from npp_ds.tokenizer import VQConfig, VQModel, save_tokenizer
from npp_ds.tokenizer.sources import load_images, open_source

SHIPPED = Path(__file__).parents[2] / "data_prep" / "fashion_mnist"
TINY = VQConfig(8, (1, 2, 2), num_res_blocks=1, z_channels=8, codebook_size=64, codebook_dim=4, norm_groups=4)
UNREADABLE = ("n00000000/cut.JPEG", "n00000001/empty.JPEG", "n00000002/text.JPEG")


def shipped_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first shipped validation images uint8 [count, 32, 32, 3] and their labels."""
    images, labels = load_images(open_source([SHIPPED], "val"), 32)
    return images[:count], labels[:count]


def few_images(folder: Path, split: str, count: int) -> None:
    """The first `count` shipped images of a split, as one image shard with the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{split}-000000.tar.gz"
    with tarfile.open(SHIPPED / name) as source, tarfile.open(folder / name, "w:gz") as target:
        for _, member in zip(range(2 * count), source, strict=False):
            target.addfile(member, io.BytesIO(source.extractfile(member).read()))


def save_tiny_tokenizer(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = VQModel(TINY)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    save_tokenizer(model, path, {})
    return path


def encoded(pixels: np.ndarray, format: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


def image_files(count: int = 60) -> dict[str, bytes]:
    """Files by `<WordNet id>/<name>`: JPEGs (RGB, CMYK, grey) and PNGs, two of one name, and the UNREADABLE ones."""
    images, labels = shipped_images(count)
    files = {}
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        stem = f"n{label:08d}/n{label:08d}_{row}"
        if row % 4:
            files[f"{stem}.png"] = encoded(image)
        else:
            files[f"{stem}.JPEG"] = encoded(image, "JPEG", ("RGB", "CMYK", "L")[row // 4 % 3])
    files["n00000003/same.JPEG"], files["n00000003/same.png"] = encoded(images[1], "JPEG"), encoded(images[2])
    return files | dict(zip(UNREADABLE, (encoded(images[0], "JPEG")[:-80], b"", b"hello world"), strict=True))


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    """folder/train/<class>/<image>; returns the folder."""
    for name, data in files.items():
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_imagenet_tar(folder: Path, files: dict[str, bytes]) -> Path:
    """folder/ILSVRC2012_img_train.tar with one tar per class, in no particular order; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ILSVRC2012_img_train.tar"
    with tarfile.open(path, "w") as outer:
        for label in sorted({name.split("/")[0] for name in files}, reverse=True):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for name in sorted(files, reverse=True):
                    if name.startswith(f"{label}/"):
                        add(inner, name.split("/")[1], files[name])
            add(outer, f"{label}.tar", content.getvalue())
    return path


def write_image_shards(folder: Path, files: dict[str, bytes], shards: int = 2) -> Path:
    """folder/train-00000N.tar with the files in sorted order, the last one compressed; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, names in enumerate(np.array_split(sorted(files), shards)):
        last = shard == shards - 1
        with tarfile.open(folder / f"train-{shard:06d}.tar{'.gz' if last else ''}", "w:gz" if last else "w") as tar:
            for name in names:
                stem, _, extension = name.rpartition(".")
                add(tar, f"{stem}.{extension.lower()}", files[name])
                add(tar, f"{stem}.cls", str(int(name[1:9])).encode())
    return folder


WRITERS = {"imagefolder": write_tree, "imagenet-tar": write_imagenet_tar, "webdataset": write_image_shards}
