"""What is an image and what is a class: the one place that decides it, for folders, for tars and for lists of names.

All other files are ignored and counted by reason. ImageNet-1K's class list is shipped; its validation images carry
no class, so their labels are in another file. Needs no torch.
"""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from PIL import Image, features

from npp_ds.errors import UserError
from npp_ds.utils.files import explain_os_errors, open_regular, read_small

logger = logging.getLogger(__name__)

EXTENSIONS = {
    "JPEG": "jpg jpeg jpe jfif mpo",
    "PNG": "png apng",
    "WEBP": "webp",
    "BMP": "bmp dib",
    "GIF": "gif",
    "TIFF": "tif tiff",
    "PPM": "ppm pgm pbm pnm pfm",
    "JPEG2000": "jp2 j2k j2c jpc jpf jpx",
    "AVIF": "avif avifs",
}
"""Pillow's names of the formats that are taken, with their extensions. Pillow opens no other format: for some of them,
such as EPS, it starts other programs."""
OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # format: feature of Pillow's build
SYSTEM_FILES = {
    "@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "__pycache__", "$recycle.bin", "recycler",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
"""Names, in lower case, of files and folders that operating systems create. Names that begin with a dot count too."""
CLASSES_FILE = "classes.txt"
WORDNET_ID = re.compile(r"n\d{8}")
CLASS_LIST = Path(__file__).parent.parent / "assets" / "imagenet_classes.txt"
"""One line "<WordNet id> <name>" per class, in label order; `npp_ds/assets/README.md` says where it is from."""
VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}")
_LABEL_FORMATS = (
    "the devkit's ground truth with meta.mat or map_clsloc.txt beside it, one WordNet id a line, or for each image a "
    "line with its WordNet id (LOC_val_solution.csv, valprep.sh) or class number (Caffe's val.txt)"
)
HIDDEN = "hidden or left by a system"
PREFIX_BYTES = 32
MOST_REASONS = 20

PassedOver = Counter[str]
"""Number of files or folders that were ignored, by reason."""


@cache
def formats() -> tuple[str, ...]:
    """Return the formats of EXTENSIONS that the installed Pillow decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow 10 does not know the feature "avif"
        return tuple(name for name in EXTENSIONS if name not in OPTIONAL or features.check(OPTIONAL[name]))


@cache
def extensions() -> frozenset[str]:
    """Return the extensions of images, in lower case and without a dot."""
    return frozenset(extension for name in formats() for extension in EXTENSIONS[name].split())


def extension_of(name: str) -> str:
    """Return the extension of a file name in lower case, without the dot."""
    return os.path.splitext(name)[1][1:].lower()


def is_hidden_or_system(path: str) -> bool:
    """Return whether a part of a relative path is hidden, or a name of SYSTEM_FILES."""
    parts = path.split("/")
    return any(part.lower() in SYSTEM_FILES or (part[:1] == "." and part not in (".", "..")) for part in parts)


def is_image(name: str, read: Callable[[], bytes], passed_over: PassedOver) -> bool:
    """Return whether a file is an image by its extension; one without an extension by its first bytes, `read()`.

    A file that is none is counted in `passed_over`.
    """
    extension = extension_of(name)
    if extension in extensions() or (not extension and _begins_like_image(read())):
        return True
    kind = f".{extension}" if re.fullmatch(r"[a-z0-9]{1,8}", extension) else "no known extension"
    passed_over[f"not an image: {kind}"] += 1
    return False


def shortened(passed_over: PassedOver) -> dict[str, int]:
    """Return the MOST_REASONS most frequent reasons and the sum of all others, which may be very many."""
    most = dict(sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))[:MOST_REASONS])
    others = passed_over.total() - sum(most.values())
    return most | ({"other reasons": others} if others else {})


def passed_over_text(passed_over: Mapping[str, int]) -> str:
    """Return text such as "ignored: 2 (hidden or left by a system), 1 (not an image: .txt)", "" for none."""
    reasons = ", ".join(f"{count} ({reason})" for reason, count in passed_over.items())
    return reasons and f"ignored: {reasons}"


def log_passed_over(where: str, passed_over: Mapping[str, int]) -> None:
    """Log what was ignored, if anything was."""
    if text := passed_over_text(passed_over):
        logger.info(f"{where}: {text}")


def _begins_like_image(prefix: bytes) -> bool:
    Image.init()
    accepts = [accept for name in formats() if (accept := Image.OPEN[name][1])]
    return bool(prefix) and any(accept(prefix.ljust(PREFIX_BYTES, b"\0")) for accept in accepts)


def _is_image_file(entry: os.DirEntry, passed_over: PassedOver) -> bool:
    def prefix() -> bytes:
        with open_regular(entry.path) as file:
            return file.read(PREFIX_BYTES)

    try:
        return is_image(entry.name, prefix, passed_over)
    except OSError:  # without an extension and unreadable: listed, so that its loss is reported
        return True


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


FolderId = tuple[int, int]  # device and inode


def _identity(folder: Path) -> FolderId:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def image_files(
    root: Path, folder: str, passed_over: PassedOver, seen: dict[FolderId, Path] | None = None
) -> list[tuple[str, ...]]:
    """Return the sorted paths, as parts, of all images at any depth of `folder` ("" for the root itself).

    Links are followed. Raises UserError for a folder that can be reached in two ways, because the walk of a link to a
    folder above it would not end, and for a folder that cannot be read. `seen` has the folders of earlier calls.
    """
    found: list[tuple[str, ...]] = []
    seen = {} if seen is None else seen
    if folder:
        seen[_identity(root)] = root
    waiting: list[tuple[str, ...]] = [(folder,) if folder else ()]
    while waiting:
        parts = waiting.pop()
        path = root.joinpath(*parts)
        with explain_os_errors(path, "make the folder readable or remove it"), os.scandir(path) as entries:
            if first := seen.get(identity := _identity(path)):
                raise UserError(f"{path}: the same folder as {first}; remove the link, or keep one of the two")
            seen[identity] = path
            for entry in entries:
                if is_hidden_or_system(entry.name):
                    passed_over[HIDDEN] += 1
                elif _is_folder(entry):
                    waiting.append((*parts, entry.name))
                elif _is_image_file(entry, passed_over):
                    found.append((*parts, entry.name))
    return sorted(found)


def class_folders(root: Path, passed_over: PassedOver) -> list[str]:
    """Return the sorted names of the class folders in `root`.

    Raises UserError for a link to nothing, because without a class the labels of others would shift.
    """
    names = []
    with explain_os_errors(root, "make the folder readable"), os.scandir(root) as entries:
        for entry in entries:
            if is_hidden_or_system(entry.name):
                passed_over[HIDDEN] += 1
            elif _is_folder(entry):
                names.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise UserError(
                    f"{entry.path}: a link to {os.readlink(entry.path)}, which cannot be opened; if it is a class, the "
                    "labels of others depend on it: restore what it points to, or remove the link"
                )
            elif entry.name != CLASSES_FILE and _is_image_file(entry, passed_over):
                passed_over["image beside the class folders"] += 1
    return sorted(names)


def read_class_list(path: str | Path, folders: Sequence[str]) -> list[str]:
    """Read class names in label order from a file with one class per line: `name`, `id` or `id name`.

    `folders` are the sorted class folders of the images, or empty if the labels come with the images. A list with ids
    (WordNet ids, or names of class folders) must have the ids of the folders in their order, because any other order
    gives images wrong labels. A list without ids must have as many lines as there are folders, and the folders must
    have the same order as text and by their numbers. Raises UserError with the difference.
    """
    lines = _lines(path)
    ids = _ids(lines, set(folders))
    if ids is None:
        if folders and len(lines) != len(folders):
            raise UserError(f"{path}: {len(lines)} class names for {len(folders)} class folders")
        if list(folders) != sorted(folders, key=_by_number):
            raise UserError(
                f"{path}: names alone do not say whether they follow the class folders as text, which gives the "
                f"labels ({some(folders, 4)}), or by number; write `folder name` in each line"
            )
        return lines
    _check_ids(path, ids, folders)
    return [line.removeprefix(label).strip() or label for label, line in zip(ids, lines, strict=True)]


def checked_names(where: str | Path, names: list[str]) -> list[str]:
    """Return the names. Raises UserError for one with control characters, or not in UTF-8 as manifests must be."""
    if bad := [name for name in names if re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name)]:
        raise UserError(f"{where}: class {bad[0]!r} has control characters or is no UTF-8; rename it")
    return names


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _lines(path: str | Path) -> list[str]:
    try:
        lines = read_small(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of class names ({error})") from error
    lines = [line.strip().replace("\t", " ") for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path}: empty; expected one class name a line, in the order of the labels")
    return lines


def _ids(lines: list[str], folders: set[str]) -> list[str] | None:
    """Return the id of each line, or None for a list without ids."""
    if not folders.isdisjoint(lines):
        return lines
    first = [line.split(maxsplit=1)[0] for line in lines]
    return first if any(WORDNET_ID.fullmatch(word) or word in folders for word in first) else None


def _check_ids(path: str | Path, ids: list[str], folders: Sequence[str]) -> None:
    if twice := sorted({label for label in ids if ids.count(label) > 1}):
        raise UserError(f"{path}: lists {some(twice)} twice")
    expected = list(folders) or sorted(ids)
    problems = []
    if extra := [label for label in ids if label not in set(expected)]:
        problems.append(f"lists {some(extra)}, for which there is no class folder")
    if missing := [label for label in expected if label not in set(ids)]:
        problems.append(f"lacks {some(missing)}, for which there is one")
    if not problems and ids != expected:
        line = next(i for i, pair in enumerate(zip(ids, expected, strict=True)) if pair[0] != pair[1])
        problems.append(f"line {line + 1} is {ids[line]}, expected {expected[line]}: class ids follow the sorted ids")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; fix the list or the folders")


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names and the number of others, as text."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def class_list_file(name_or_path: str | Path) -> Path:
    """Return the file of a class list; "imagenet" is the shipped one."""
    return CLASS_LIST if str(name_or_path) == "imagenet" else Path(name_or_path)


def wordnet_ids() -> list[str]:
    """Return the 1,000 WordNet ids in sorted order, which is that of the labels."""
    return [line.split()[0] for line in CLASS_LIST.read_text().splitlines()]


def ids_of_images(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the WordNet id of each image, whatever the format of the file."""
    try:
        lines = [line.strip() for line in read_small(path).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no file of labels ({error}); expected {_LABEL_FORMATS}") from None
    pairs = [(VALIDATION_IMAGE.search(line), WORDNET_ID.search(line), line.split()[-1]) for line in lines]
    known = wordnet_ids()
    if both := {image[0]: wordnet_id[0] for image, wordnet_id, _ in pairs if image and wordnet_id}:
        ids = both
    elif all(image and last.isdecimal() and int(last) < len(known) for image, _, last in pairs):
        ids = {image[0]: known[int(last)] for image, _, last in pairs if image}
    elif len(lines) != len(names):
        raise UserError(f"{path}: {len(lines):,} lines for {len(names):,} images; expected {_LABEL_FORMATS}")
    elif all(map(WORDNET_ID.fullmatch, lines)):
        ids = dict(zip(names, lines, strict=True))
    elif all(line.isdecimal() for line in lines):
        of_number = _devkit_ids(path.parent)
        ids = {name: of_number.get(int(line), "") for name, line in zip(names, lines, strict=True)}
    else:
        raise UserError(f"{path}: begins with {lines[0][:60]!r}; expected {_LABEL_FORMATS}")
    if missing := [name for name in names if not ids.get(name)]:
        raise UserError(f"{path}: has no class for {missing[0]} ({len(missing):,} such images); fetch the file again")
    return ids


def _devkit_ids(folder: Path) -> dict[int, str]:
    """Return {number: WordNet id} of the devkit, whose numbers are not the labels, from map_clsloc.txt or meta.mat."""
    text, matlab = folder / "map_clsloc.txt", folder / "meta.mat"
    try:
        if text.is_file():
            rows = (line.split() for line in read_small(text).decode().splitlines() if line.strip())
            return {int(number): wordnet_id for wordnet_id, number, *_ in rows}
        from scipy.io import loadmat  # type: ignore[import-untyped]

        synsets = loadmat(matlab, squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return {int(number): str(wordnet_id) for number, wordnet_id in pairs}
    except ModuleNotFoundError:
        raise UserError(f"{matlab}: reading it needs scipy; install that, or put map_clsloc.txt beside it") from None
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(
            f"{folder}: {error}; the numbers of the ground truth mean something only with the devkit's meta.mat or "
            "map_clsloc.txt: put one beside it"
        ) from None
