"""Finding and listing the images of each kind of source, in place: nothing is unpacked, nothing silently left out."""

import gzip
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from npp_ds.errors import UserError
from npp_ds.tokenizer.sources import IMAGE_EXTENSIONS, KINDS, SHARD_SUFFIXES, ImageItem

# What else Pillow reads, in class folders: an image must not be passed over for its name.
FOLDER_EXTENSIONS = (*IMAGE_EXTENSIONS, "bmp", "gif", "pgm", "ppm", "tif", "tiff")
SPLIT_NAMES = {"train", "val", "test", "validation"}


def find(paths: Sequence[Path], split: str, kind: str) -> tuple[str, list[Path]]:
    """(kind, the shards, or the root of the class folders, or the tar of tars); UserError when there is none."""
    if kind not in ("auto", *KINDS):
        raise UserError(f"source {kind!r}: expected auto or one of {', '.join(KINDS)}")
    shards = _find_shards(paths, split)
    if kind in ("auto", "imagenet-tar") and (outer := _find_imagenet_tar(paths, split, shards, kind)):
        return "imagenet-tar", [outer]
    if kind == "webdataset" or (kind == "auto" and shards):
        if not shards:
            raise UserError(f"{paths[0]}: no {split}-*.tar or {split}-*.tar.gz in it")
        return "webdataset", shards
    return "imagefolder", [_find_image_folder(paths, split)]


def _find_shards(paths: Sequence[Path], split: str) -> list[Path]:
    shards = []
    for path in paths:
        if path.is_dir():
            shards += sorted(p for p in path.iterdir() if p.name.startswith(f"{split}-") and _is_shard(p))
        elif _is_shard(path):
            shards.append(path)
        else:
            raise UserError(f"{path}: expected a folder, or tar files ending in {' or '.join(SHARD_SUFFIXES)}")
    return shards


def _is_shard(path: Path) -> bool:
    return path.name.endswith(SHARD_SUFFIXES) and path.is_file()


def _find_imagenet_tar(paths: Sequence[Path], split: str, shards: list[Path], kind: str) -> Path | None:
    """The one tar that was given or lies in the folder that was given, when it holds tars."""
    named = paths[0] / f"ILSVRC2012_img_{split}.tar" if paths[0].is_dir() else paths[0]
    if kind == "auto":
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
        first, _ = next(_members(file), (tarfile.TarInfo(), 0))
        return first.name.endswith(".tar")


def _class_root(candidates: Sequence[Path]) -> Path | None:
    """The first that has class folders, and not folders of splits."""
    for root in candidates:
        folders = _class_folders(root) if root.is_dir() else []
        if folders and SPLIT_NAMES.isdisjoint(folders):
            return root
    return None


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _find_image_folder(paths: Sequence[Path], split: str) -> Path:
    root = _class_root([paths[0] / split, paths[0]]) if len(paths) == 1 else None
    if root is None:
        raise UserError(
            f"{paths[0]}: found neither shards ({split}-*.tar, {split}-*.tar.gz) nor ILSVRC2012_img_{split}.tar nor "
            f"class folders, directly or under {split}/"
        )
    return root


def list_image_folder(root: Path) -> tuple[list[ImageItem], list[str]]:
    """Items of `root/<class>/**/<image>` in sorted order, and the sorted class folder names."""
    classes = _class_folders(root)
    items = []
    for label, name in enumerate(classes):
        for parts in sorted(_image_files(root, (name,))):
            items.append(_file_item(root, parts, label))
    if not items:
        raise UserError(f"{root}: no images ({', '.join(FOLDER_EXTENSIONS)}) in its {len(classes)} class folders")
    return items, classes


def _image_files(root: Path, folder: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Parts of the paths below `root` of everything under `folder` that is named like an image, links followed."""
    for entry in os.scandir(root.joinpath(*folder)):
        if entry.is_dir():
            yield from _image_files(root, (*folder, entry.name))
        elif _extension(entry.name) in FOLDER_EXTENSIONS:
            yield (*folder, entry.name)


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _file_item(root: Path, parts: tuple[str, ...], label: int) -> ImageItem:
    path = os.path.join(root, *parts)
    key = os.path.splitext("/".join(parts))[0]
    try:
        status = os.stat(path)
    except OSError as error:
        return ImageItem(key, label, path, 0, problem=error.strerror)
    if not stat.S_ISREG(status.st_mode):
        return ImageItem(key, label, path, 0, problem="not a plain file")
    return ImageItem(key, label, path, status.st_size)


def list_imagenet_tar(path: Path) -> tuple[list[ImageItem], list[str]]:
    """Items of a tar that holds one `<class>.tar` per class, sorted as their files would be, and the sorted classes."""
    found: dict[str, list[ImageItem]] = {}
    with _open_tar(path) as file:
        for member, offset in _members(file):
            folder, extension = os.path.splitext(os.path.basename(member.name))
            if extension == ".tar":
                if folder in found:
                    raise UserError(f"{path}: holds {member.name} twice; expected one tar per class")
                found[folder] = list(_list_class(file, path, member, offset))
            elif extension[1:].lower() in FOLDER_EXTENSIONS:
                raise UserError(
                    f"{path}: holds the image {member.name} and not only one tar per class, so its class is not known; "
                    "sort the images into class folders and give their root"
                )
    classes = sorted(found)
    items = []
    for label, name in enumerate(classes):
        members = sorted(found[name], key=lambda item: (item.name.split("/"), item.offset))
        items += [replace(item, label=label) for item in members]
    if not items:
        raise UserError(f"{path}: no images; expected one tar of images per class in it")
    return items, classes


def _list_class(file: BinaryIO, path: Path, archive: tarfile.TarInfo, offset: int) -> Iterator[ImageItem]:
    """The images of one class, labelled later; the archive begins at `offset` of `file`."""
    file.seek(offset)
    for member, start in _members(file):
        if _extension(member.name) in FOLDER_EXTENSIONS:
            if start + member.size > offset + archive.size:
                raise tarfile.ReadError(f"{archive.name}/{member.name} reaches beyond its archive")
            name = member.name.removeprefix("./")
            key = f"{os.path.splitext(os.path.basename(archive.name))[0]}/{os.path.splitext(name)[0]}"
            yield replace(_member_item(key, -1, path, member, start), name=f"{archive.name}/{name}")


def _member_item(key: str, label: int, path: Path, member: tarfile.TarInfo, offset: int) -> ImageItem:
    problem = "" if member.isreg() else "a link, not a file, in its archive"
    return ImageItem(key, label, str(path), member.size, offset, member.name, problem)


def list_shards(shards: Sequence[Path]) -> list[ImageItem]:
    """Items of WebDataset image shards, in their order."""
    items = []
    for path in shards:
        with _open_tar(path) as file:
            items += _list_shard(path, file)
    if not items:
        raise UserError(f"{shards[0]}: no images; expected <key>.{{{','.join(IMAGE_EXTENSIONS)}}} beside <key>.cls")
    return items


def _list_shard(path: Path, file: BinaryIO) -> Iterator[ImageItem]:
    for key, fields, label in _samples(file):
        image = next((fields[extension] for extension in IMAGE_EXTENSIONS if extension in fields), None)
        if image is None and label is None:
            continue
        if label is None or not label.isdigit():
            raise UserError(f"{path}, {key}: cls is {label!r}, expected a label of at least 0 as text beside the image")
        if image is None:
            found = ", ".join(fields)
            yield ImageItem(key, int(label), str(path), 0, name=key, problem=f"only {found} found, and no image")
        else:
            yield _member_item(key, int(label), path, *image)


def _samples(file: BinaryIO) -> Iterator[tuple[str, dict[str, tuple[tarfile.TarInfo, int]], bytes | None]]:
    """(key, members by extension, content of cls) of neighbouring members with one key.

    A second image, or a second member of one name, begins another sample: no image is lost where keys repeat.
    """
    key, fields, label = "", {}, None
    for member, offset in _members(file):
        stem, extension = _split(member)
        second_image = extension in IMAGE_EXTENSIONS and not fields.keys().isdisjoint(IMAGE_EXTENSIONS)
        if fields and (stem != key or extension in fields or second_image):
            yield key, fields, label
            fields, label = {}, None
        key = stem
        fields[extension] = (member, offset)
        if extension == "cls":
            file.seek(offset)
            label = file.read(member.size).strip()
    if fields:
        yield key, fields, label


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member by WebDataset's rule: split at the first dot of the base name."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


@contextmanager
def _open_tar(path: Path) -> Iterator[BinaryIO]:
    """The (decompressed) file; damage found inside the context becomes a UserError."""
    try:
        with open(path, "rb") as file:
            if path.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked
                    while unpacked.read(1 << 20):  # to the checksum
                        pass
            else:
                yield file
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged, or no tar file ({error}); fetch or make it again") from error


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """(member, offset of its data) of all but folders in the archive that begins where `file` stands.

    tarfile alone takes a damaged header for the archive's end; here it is a tarfile.ReadError.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []
            if not member.isdir():
                yield member, member.offset_data
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the end-of-archive mark is missing")
