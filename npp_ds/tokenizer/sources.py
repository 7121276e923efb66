"""Where images come from: an ordered list of `ImageItem`s, each a range of bytes in some file.

A new kind of source is a function that lists items, and a line in `open_source`.
"""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from npp_ds.errors import UserError
from npp_ds.tokenizer.crops import crop

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
SHARD_SUFFIXES = (".tar", ".tar.gz")
CLASSES_FILE = "classes.txt"
KEY_LENGTH = 72


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One encoded image: `size` bytes at `offset` of the (decompressed) file at `path`; size -1 is the whole file."""

    key: str
    label: int
    path: Path
    offset: int = 0
    size: int = -1


@dataclass(frozen=True)
class Source:
    """Images in a fixed order; `class_names` may be empty, then labels are only known to be below `num_classes`."""

    kind: str
    name: str
    items: list[ImageItem]
    class_names: list[str]
    num_classes: int

    def describe(self) -> dict:
        """What the manifest says of the source; its fingerprint covers keys, labels and sizes, not where it lies."""
        digest = hashlib.sha256()
        for item in self.items:
            size = item.size if item.size >= 0 else item.path.stat().st_size
            digest.update(f"{item.key}\t{item.label}\t{size}\n".encode())
        return {
            "kind": self.kind,
            "name": self.name,
            "images": len(self.items),
            "fingerprint": digest.hexdigest(),
        }


def open_source(
    images: Sequence[str | Path], split: str, class_names: str | Path | None = None, kind: str = "auto"
) -> Source:
    """Image shards (a folder with `<split>-*.tar` or .tar.gz, or such files) or an ImageFolder tree (with or without
    a `<split>` folder). UserError when nothing fits, or when labels and class names disagree."""
    paths = [Path(path) for path in images]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not there; expected a folder of images or of image shards, or shard files")
    shards = _find_shards(paths, split)
    if kind == "auto":
        kind = "webdataset" if shards else "imagefolder"
    if kind == "webdataset":
        if not shards:
            raise UserError(f"{paths[0]}: no {split}-*.tar or {split}-*.tar.gz in it")
        items, folder_names = _list_shards(shards), []
        name, beside = shards[0].parent.name, shards[0].parent / CLASSES_FILE
    else:
        root = _find_image_folder(paths, split)
        items, folder_names = _list_image_folder(root)
        name, beside = root.name, root / CLASSES_FILE
    names = read_class_names(class_names or beside) if class_names or beside.is_file() else folder_names
    if folder_names and len(names) != len(folder_names):
        raise UserError(f"{class_names or beside}: {len(names)} class names for {len(folder_names)} class folders")
    highest = max(items, key=lambda item: item.label)
    if names and highest.label >= len(names):
        raise UserError(f"{highest.path}, {highest.key}: label {highest.label}, but only {len(names)} class names")
    return Source(kind, name, _with_unique_keys(items), names, len(names) or highest.label + 1)


def read_images(items: Iterable[ImageItem]) -> Iterator[tuple[ImageItem, bytes]]:
    """The items with their bytes, in order; each file is opened once per run of items in it."""
    for path, group in groupby(items, key=lambda item: item.path):
        with ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            if path.name.endswith(".gz"):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            for item in group:
                file.seek(item.offset)
                yield item, file.read(item.size)


def load_images(source: Source, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images as centre crops uint8 [N, image_size, image_size, 3] and labels int64 [N]; for small sets."""
    images = np.empty((len(source.items), image_size, image_size, 3), np.uint8)
    for row, (_, data) in enumerate(read_images(source.items)):
        images[row] = crop(Image.open(io.BytesIO(data)), image_size, "center")[0]
    return images, np.array([item.label for item in source.items])


def read_class_names(path: str | Path) -> list[str]:
    """One class name a line, in the order of the labels."""
    try:
        names = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of class names ({error})") from error
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f"{path}: empty; expected one class name a line, in the order of the labels")
    return names


def _find_shards(paths: Sequence[Path], split: str) -> list[Path]:
    shards = []
    for path in paths:
        if path.is_dir():
            shards += sorted(p for p in path.iterdir() if p.name.startswith(f"{split}-") and _is_shard(p))
        elif _is_shard(path):
            shards.append(path)
        else:
            raise UserError(f"{path}: expected a folder, or image shards ending in {' or '.join(SHARD_SUFFIXES)}")
    return shards


def _is_shard(path: Path) -> bool:
    return path.name.endswith(SHARD_SUFFIXES) and path.is_file()


def _list_shards(shards: Sequence[Path]) -> list[ImageItem]:
    items = []
    for path in shards:
        try:
            with tarfile.open(path) as tar:
                items += _list_shard(path, tar)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{path}: damaged, or no tar file ({error}); fetch or make it again") from error
    if not items:
        raise UserError(f"{shards[0]}: no images; expected <key>.{{{','.join(IMAGE_EXTENSIONS)}}} beside <key>.cls")
    return items


def _list_shard(path: Path, tar: tarfile.TarFile) -> Iterator[ImageItem]:
    for key, members in groupby((member for member in tar if member.isfile()), key=lambda member: _split(member)[0]):
        image = label = None
        for member in members:
            extension = _split(member)[1]
            if extension == "cls":
                label = tar.extractfile(member).read().strip()
            elif extension in IMAGE_EXTENSIONS:
                image = member
        if image is None:
            continue
        if label is None or not label.isdigit():
            raise UserError(f"{path}, {key}: cls is {label!r}, expected a label of at least 0 as text beside the image")
        yield ImageItem(key, int(label), path, image.offset_data, image.size)


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member by WebDataset's rule: split at the first dot of the base name."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _find_image_folder(paths: Sequence[Path], split: str) -> Path:
    for root in (paths[0] / split, paths[0]):
        if len(paths) == 1 and root.is_dir() and any(path.is_dir() for path in root.iterdir()):
            return root
    raise UserError(
        f"{paths[0]}: found neither shards ({split}-*.tar, {split}-*.tar.gz) nor class folders, "
        f"directly or under {split}/"
    )


def _list_image_folder(root: Path) -> tuple[list[ImageItem], list[str]]:
    """Items of `root/<class>/**/<image>` in sorted order, and the sorted class folder names."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    items = []
    for label, name in enumerate(classes):
        for path in sorted((root / name).rglob("*")):
            if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file():
                items.append(ImageItem(path.relative_to(root).with_suffix("").as_posix(), label, path))
    if not items:
        raise UserError(f"{root}: no images ({', '.join(IMAGE_EXTENSIONS)}) in its {len(classes)} class folders")
    return items, classes


def _with_unique_keys(items: Iterable[ImageItem]) -> list[ImageItem]:
    """Keys that any tar reader takes, numbered where two images would share one (`a.png` beside `a.jpg`)."""
    seen: set[str] = set()
    result = []
    for item in items:
        key = base = _plain(item.key)
        number = 1
        while key in seen:
            number += 1
            key = f"{base}-{number}"
        seen.add(key)
        result.append(item if key == item.key else replace(item, key=key))
    return result


def _plain(key: str) -> str:
    path = PurePosixPath(key.lstrip("/_") or "image")
    key = (path.parent / path.name.replace(".", "_")).as_posix()
    return "".join(c if c.isascii() and c.isprintable() else "_" for c in key)[-KEY_LENGTH:].lstrip("/_")
