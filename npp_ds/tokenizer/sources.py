"""Sources of images: lists the images of class folders, of ImageNet's tar or of image shards, without unpacking them.

The order is fixed and no image is left out: damage stops the listing, and what is no image is counted. Needs no torch.
"""

import hashlib
import os
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from npp_ds.data.manifest import LARGEST_CLASS_COUNT
from npp_ds.data.shards import LABEL_EXTENSION, LARGEST_MEMBER
from npp_ds.errors import UserError
from npp_ds.tokenizer.images import ImageItem, crop, decoded_images, open_decompressed, with_unique_keys
from npp_ds.tokenizer.listing import (
    CLASSES_FILE,
    HIDDEN,
    PREFIX_BYTES,
    VALIDATION_IMAGE,
    FolderId,
    PassedOver,
    checked_names,
    class_folders,
    class_list_file,
    extensions,
    ids_of_images,
    image_files,
    is_hidden_or_system,
    is_image,
    log_passed_over,
    read_class_list,
    shortened,
    wordnet_ids,
)
from npp_ds.utils.files import tar_members

VALIDATION_TAR = "ILSVRC2012_img_val.tar"
VARIANTS = ("webdataset", "imagefolder", "imagenet-tar")
SHARD_SUFFIXES = (".tar", ".tar.gz")
SHARD_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
"""Extensions of the images of shards, the preferred one first; others are taken where a sample has none of these."""
SPLIT_NAMES = {"train", "val", "test", "validation"}
MORE_SPLIT_NAMES = SPLIT_NAMES | {"training", "testing", "valid", "dev"}
"""Names that a class may have, too: two of them are splits."""
MAX_LABEL_BYTES = LARGEST_MEMBER[LABEL_EXTENSION]


@dataclass(frozen=True)
class Source:
    """Images in a fixed order. `class_names` may be empty; labels are below `num_classes` in any case.

    `passed_over` counts the files and folders that are no images, by reason.
    """

    variant: str
    name: str
    items: list[ImageItem]
    class_names: list[str]
    num_classes: int
    passed_over: dict[str, int]

    @property
    def bytes(self) -> int:
        """Size of all encoded images."""
        return sum(item.size for item in self.items)

    @property
    def classes_without_images(self) -> list[str]:
        """Names of the classes that no image has, or numbers if there are no names."""
        counts = np.bincount([item.label for item in self.items], minlength=self.num_classes)
        return [self.class_names[label] if self.class_names else str(label) for label in np.flatnonzero(counts == 0)]

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry; its fingerprint covers keys, labels and sizes, but not paths."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.key}\t{item.label}\t{item.size}\n".encode())
        return {
            "kind": self.variant,
            "name": self.name,
            "images": len(self.items),
            "bytes": self.bytes,
            "fingerprint": digest.hexdigest(),
        }


def open_source(
    images: Sequence[str | Path],
    split: str,
    class_list: str | Path | None = None,
    variant: str = "auto",
    labels: Path | None = None,
) -> Source:
    """List a source of one of VARIANTS; auto detects which.

    webdataset: image shards, as a folder with `<split>-*.tar` or .tar.gz, or as such files. imagefolder: a folder with
    class folders, directly or under `<split>/`. imagenet-tar: a tar of one tar per class, or a folder with
    ILSVRC2012_img_<split>.tar. `class_list` is a file, or "imagenet" for the shipped one. With `labels` the images are
    those of ILSVRC2012_img_val.tar (or its folder), and that file has their classes. Raises UserError if there is none
    of these, or if labels and class list disagree.
    """
    paths = [Path(path) for path in images]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not found; expected a folder of images or of image shards, or tar files")
    if labels is not None:
        tar = paths[0] / VALIDATION_TAR if paths[0].is_dir() else paths[0]
        variant, found = "imagenet-val-tar", [tar]
    else:
        variant, found = _find(paths, split, variant)
    folders: list[str] = []
    passed_over: PassedOver = Counter()
    if variant == "webdataset":
        items = list_shards(found, passed_over)
        name, beside = found[0].parent.name, found[0].parent / CLASSES_FILE
    elif variant == "imagefolder":
        items, folders = _list_image_folder(found[0], passed_over)
        name, beside = found[0].name, found[0] / CLASSES_FILE
    elif labels is not None:
        items, folders = _list_validation_tar(found[0], labels)
        name, beside = found[0].name, found[0].parent / CLASSES_FILE
    else:
        items, folders = _list_imagenet_tar(found[0], passed_over)
        name, beside = found[0].name, found[0].parent / CLASSES_FILE
    use = class_list or os.path.lexists(beside)
    names = read_class_list(class_list_file(class_list or beside), folders) if use else folders
    checked_names(class_list or found[0], names)
    highest = max(items, key=lambda item: item.label)
    if names and highest.label >= len(names):
        raise UserError(f"{highest.where}, {highest.key}: label {highest.label}, but only {len(names)} class names")
    return Source(
        variant, name, with_unique_keys(items), names, len(names) or highest.label + 1, shortened(passed_over)
    )


def load_images(source: Source, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Load all images of a small source: centre crops uint8 [N, image_size, image_size, 3] and labels int64 [N]."""
    log_passed_over(source.name, source.passed_over)
    images = np.empty((len(source.items), image_size, image_size, 3), np.uint8)
    for row, (_, image) in enumerate(decoded_images(source.items)):
        images[row] = crop(image, image_size, "center")[0]
    return images, np.array([item.label for item in source.items])


def _find(paths: Sequence[Path], split: str, variant: str) -> tuple[str, list[Path]]:
    """Return the variant and its shards, the root of its class folders, or its tar of tars."""
    if variant not in ("auto", *VARIANTS):
        raise UserError(f"source {variant!r}: expected auto or one of {', '.join(VARIANTS)}")
    shards = _find_shards(paths, split)
    if variant in ("auto", "imagenet-tar") and (outer := _find_imagenet_tar(paths, split, shards, variant)):
        return "imagenet-tar", [outer]
    if variant == "webdataset" or (variant == "auto" and shards):
        if not shards:
            raise UserError(f"{paths[0]}: no {split}-*.tar or {split}-*.tar.gz in it")
        return "webdataset", shards
    return "imagefolder", [_find_image_folder(paths, split)]


def _find_shards(paths: Sequence[Path], split: str) -> list[Path]:
    shards = []
    for path in paths:
        if path.is_dir():
            shards += sorted(p for p in path.iterdir() if p.name.startswith(f"{split}-") and _is_shard(p))
            if bad := [p for p in path.glob(f"{split}-*") if p.name.endswith(SHARD_SUFFIXES) and p not in shards]:
                raise UserError(f"{min(bad)}: not a plain file, but a folder, a pipe or a link to nothing; remove it")
        elif _is_shard(path):
            shards.append(path)
        else:
            raise UserError(f"{path}: expected a folder, or tar files ending in {' or '.join(SHARD_SUFFIXES)}")
    return shards


def _is_shard(path: Path) -> bool:
    return path.name.endswith(SHARD_SUFFIXES) and path.is_file()


def _find_imagenet_tar(paths: Sequence[Path], split: str, shards: list[Path], variant: str) -> Path | None:
    """Return the tar that is given, or that is in the folder that is given, if it holds tars."""
    named = paths[0] / f"ILSVRC2012_img_{split}.tar" if paths[0].is_dir() else paths[0]
    if variant == "auto":
        if len(paths) > 1 or not named.is_file() or (shards and named not in shards):
            return None
        if paths[0].is_dir() and _class_root([paths[0] / split]):
            return None
        return named if named != paths[0] or _holds_tars(named) else None
    if len(paths) > 1 or not named.is_file():
        raise UserError(f"{named}: expected one tar of tars, such as ILSVRC2012_img_train.tar")
    return named


def _holds_tars(path: Path) -> bool:
    if path.suffix != ".tar":
        return False
    with _open_tar(path) as file:
        first = next(_files_in(file, Counter()), tarfile.TarInfo())
        return first.name.endswith(".tar")


def _class_root(candidates: Sequence[Path]) -> Path | None:
    """Return the first folder that has class folders and no folders of splits."""
    for root in candidates:
        folders = class_folders(root, Counter()) if root.is_dir() else []
        names = {name.casefold() for name in folders}
        if folders and not names & SPLIT_NAMES and len(names & MORE_SPLIT_NAMES) < 2:
            return root
    return None


def _find_image_folder(paths: Sequence[Path], split: str) -> Path:
    root = _class_root([paths[0] / split, paths[0]]) if len(paths) == 1 else None
    if root is None:
        raise UserError(
            f"{paths[0]}: found neither shards ({split}-*.tar, {split}-*.tar.gz) nor ILSVRC2012_img_{split}.tar nor "
            f"class folders, directly or under {split}/"
        )
    return root


def _list_image_folder(root: Path, passed_over: PassedOver) -> tuple[list[ImageItem], list[str]]:
    """Return the items of `root/<class>/**/<image>` in sorted order, and the sorted class folders."""
    classes = class_folders(root, passed_over)
    seen: dict[FolderId, Path] = {}
    items = [
        file_item(root, parts, label)
        for label, name in enumerate(classes)
        for parts in image_files(root, name, passed_over, seen)
    ]
    if not items:
        raise UserError(f"{root}: no images ({', '.join(sorted(extensions()))}) in its {len(classes)} class folders")
    return items, classes


def file_item(root: Path, parts: tuple[str, ...], label: int) -> ImageItem:
    """Return the item of the file at `parts` below `root`; one that cannot be opened has a `problem`."""
    path = os.path.join(root, *parts)
    key = os.path.splitext("/".join(parts))[0]
    try:
        status = os.stat(path)
    except OSError as error:
        return ImageItem(key, label, path, 0, problem=error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        return ImageItem(key, label, path, 0, problem="not a plain file")
    return ImageItem(key, label, path, status.st_size)


def _list_imagenet_tar(path: Path, passed_over: PassedOver) -> tuple[list[ImageItem], list[str]]:
    """Return the items of a tar of `<class>.tar` files, in the order of extracted files, and the sorted classes."""
    found: dict[str, list[ImageItem]] = {}
    with _open_tar(path) as file:
        for member in _files_in(file, passed_over):
            folder, extension = os.path.splitext(os.path.basename(member.name))
            if extension == ".tar":
                if folder in found:
                    raise UserError(f"{path}: holds {member.name} twice; expected one tar per class")
                found[folder] = list(_list_class(file, path, member, passed_over))
            elif _is_image(file, member, passed_over):
                raise UserError(
                    f"{path}: holds the image {member.name} and not only one tar per class, so its class is not known; "
                    "give the file of their labels (--labels), or sort the images into class folders"
                )
    classes = sorted(found)
    items = []
    for label, name in enumerate(classes):
        members = sorted(found[name], key=lambda item: (item.name.split("/"), item.offset))
        items += [replace(item, label=label) for item in members]
    if not items:
        raise UserError(f"{path}: no images; expected one tar of images per class in it")
    return items, classes


def _list_validation_tar(path: Path, labels: Path) -> tuple[list[ImageItem], list[str]]:
    """Return the images in the order and with the keys of class folders, and the WordNet id of each label.

    `labels` is a file of one of the usual formats. Raises UserError for another file, or if it lacks an image.
    """
    with _open_tar(path) as file:
        found = {Path(m.name).stem: m for m in tar_members(file) if m.isreg() and VALIDATION_IMAGE.search(m.name)}
    if not found:
        raise UserError(f"{path}: holds no ILSVRC2012_val_*.JPEG; --labels is for {VALIDATION_TAR} only")
    ids = ids_of_images(labels, sorted(found))
    known = wordnet_ids()
    classes = known if set(ids.values()) <= set(known) else sorted(set(ids.values()))
    number = {wordnet_id: label for label, wordnet_id in enumerate(classes)}
    items = [_member_item(f"{ids[name]}/{name}", number[ids[name]], path, member) for name, member in found.items()]
    return sorted(items, key=lambda item: item.key), classes


def _is_image(file: BinaryIO, member: tarfile.TarInfo, passed_over: PassedOver) -> bool:
    def prefix() -> bytes:
        file.seek(member.offset_data)
        return file.read(min(PREFIX_BYTES, member.size))

    return is_image(member.name, prefix, passed_over)


def _list_class(file: BinaryIO, path: Path, archive: tarfile.TarInfo, passed_over: PassedOver) -> Iterator[ImageItem]:
    """Yield the images of one class, without their label."""
    file.seek(archive.offset_data)
    for member in _files_in(file, passed_over):
        if member.offset_data + member.size > archive.offset_data + archive.size:
            raise tarfile.ReadError(f"{archive.name} is cut short: {member.name} reaches beyond it")
        if _is_image(file, member, passed_over):
            name = member.name.removeprefix("./")
            key = f"{os.path.splitext(os.path.basename(archive.name))[0]}/{os.path.splitext(name)[0]}"
            yield replace(_member_item(key, -1, path, member), name=f"{archive.name}/{name}")


def _member_item(key: str, label: int, path: Path, member: tarfile.TarInfo) -> ImageItem:
    problem = "" if member.isreg() else "a link, not a file, in its archive"
    return ImageItem(key, label, str(path), member.size, member.offset_data, member.name, problem)


def list_shards(shards: Sequence[Path], passed_over: PassedOver) -> list[ImageItem]:
    """Return the items of WebDataset image shards, in their order."""
    items: list[ImageItem] = []
    for path in shards:
        with _open_tar(path) as file:
            items += _list_shard(path, file, passed_over)
    if not items:
        raise UserError(f"{shards[0]}: no images; expected <key>.{{{','.join(SHARD_EXTENSIONS)}}} beside <key>.cls")
    return items


def _list_shard(path: Path, file: BinaryIO, passed_over: PassedOver) -> Iterator[ImageItem]:
    choices = (*SHARD_EXTENSIONS, *sorted(extensions()))
    for key, fields, label in _samples(file, passed_over):
        image = next((fields[extension] for extension in choices if extension in fields), None)
        if image is None and label is None:
            passed_over["sample without image and label"] += 1
            continue
        if (
            not label
            or len(label) > MAX_LABEL_BYTES
            or not label.strip().isdigit()
            or int(label) >= LARGEST_CLASS_COUNT
        ):
            raise UserError(
                f"{path}, {key}: cls is {label!r}, expected a label as text, below {LARGEST_CLASS_COUNT}, beside the "
                "image"
            )
        if image is None:
            found = ", ".join(fields)
            yield ImageItem(key, int(label), str(path), 0, name=key, problem=f"only {found} found, and no image")
        else:
            yield _member_item(key, int(label), path, image)


def _samples(file: BinaryIO, passed_over: PassedOver) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], bytes | None]]:
    """Yield (key, members by extension, content of cls) of consecutive members with the same key.

    A second image, or a second member of the same name, begins another sample, so repeated keys lose no image.
    """
    key, label = "", None
    fields: dict[str, tarfile.TarInfo] = {}
    for member in _files_in(file, passed_over):
        stem, extension = _split(member)
        second_image = extension in SHARD_EXTENSIONS and not fields.keys().isdisjoint(SHARD_EXTENSIONS)
        if fields and (stem != key or extension in fields or second_image):
            yield key, fields, label
            fields, label = {}, None
        key = stem
        fields[extension] = member
        if extension == "cls":
            file.seek(member.offset_data)
            label = file.read(min(member.size, MAX_LABEL_BYTES + 1))
    if fields:
        yield key, fields, label


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Return key and extension by WebDataset's rule: split at the first dot of the base name."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


@contextmanager
def _open_tar(path: Path) -> Iterator[BinaryIO]:
    """Open a tar file, decompressed. Damage that the block finds becomes a UserError."""
    try:
        with open_decompressed(path) as file:
            yield file
            while path.name.endswith(".gz") and file.read(1 << 20):  # up to the checksum at the end
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged, or no tar file ({error}); fetch or make it again") from error


def _files_in(file: BinaryIO, passed_over: PassedOver) -> Iterator[tarfile.TarInfo]:
    for member in tar_members(file):
        if is_hidden_or_system(member.name):
            passed_over[HIDDEN] += 1
        elif not member.isdir():
            yield member
