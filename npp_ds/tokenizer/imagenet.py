"""ImageNet-1K: its class list, and ILSVRC2012_img_val.tar, whose images carry no class: labels are in another file."""

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from npp_ds.errors import UserError
from npp_ds.tokenizer.images import ImageItem
from npp_ds.tokenizer.listing import WORDNET_ID
from npp_ds.utils.files import open_regular, read_small, tar_members

CLASS_LIST = Path(__file__).parent.parent / "assets" / "imagenet_classes.txt"
"""One line "<WordNet id> <name>" per class, in label order; `npp_ds/assets/README.md` says where it is from."""
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}")
_FORMATS = (
    "the devkit's ground truth with meta.mat or map_clsloc.txt beside it, one WordNet id a line, or for each image a "
    "line with its WordNet id (LOC_val_solution.csv, valprep.sh) or class number (Caffe's val.txt)"
)


def class_list_file(name_or_path: str | Path) -> Path:
    """Return the file of a class list; "imagenet" is the shipped one."""
    return CLASS_LIST if str(name_or_path) == "imagenet" else Path(name_or_path)


def wordnet_ids() -> list[str]:
    """Return the 1,000 WordNet ids in sorted order, which is that of the labels."""
    return [line.split()[0] for line in CLASS_LIST.read_text().splitlines()]


def list_validation_tar(path: Path, labels: Path) -> tuple[list[ImageItem], list[str]]:
    """Return the images in the order and with the keys of class folders, and the WordNet id of each label.

    `labels` is a file of one of the usual formats. Raises UserError for another file, or if it lacks an image.
    """
    try:
        with open_regular(path) as file:
            members = [m for m in tar_members(file) if m.isreg()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: damaged, or no tar file ({error}); fetch it again") from error
    found = {Path(member.name).stem: member for member in members if _IMAGE.search(member.name)}
    if not found:
        raise UserError(f"{path}: holds no ILSVRC2012_val_*.JPEG; --labels is for {VALIDATION_TAR} only")
    ids = _ids_of_images(labels, sorted(found))
    known = wordnet_ids()
    classes = known if set(ids.values()) <= set(known) else sorted(set(ids.values()))
    number = {wordnet_id: label for label, wordnet_id in enumerate(classes)}
    items = [
        ImageItem(f"{ids[name]}/{name}", number[ids[name]], str(path), m.size, m.offset_data, m.name)
        for name, m in found.items()
    ]
    return sorted(items, key=lambda item: item.key), classes


def _ids_of_images(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the WordNet id of each image, whatever the format of the file."""
    try:
        lines = [line.strip() for line in read_small(path).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no file of labels ({error}); expected {_FORMATS}") from None
    pairs = [(_IMAGE.search(line), WORDNET_ID.search(line), line.split()[-1]) for line in lines]
    known = wordnet_ids()
    if both := {image[0]: wordnet_id[0] for image, wordnet_id, _ in pairs if image and wordnet_id}:
        ids = both
    elif all(image and last.isdecimal() and int(last) < len(known) for image, _, last in pairs):
        ids = {image[0]: known[int(last)] for image, _, last in pairs if image}
    elif len(lines) != len(names):
        raise UserError(f"{path}: {len(lines):,} lines for {len(names):,} images; expected {_FORMATS}")
    elif all(map(WORDNET_ID.fullmatch, lines)):
        ids = dict(zip(names, lines, strict=True))
    elif all(line.isdecimal() for line in lines):
        of_number = _devkit_ids(path.parent)
        ids = {name: of_number.get(int(line), "") for name, line in zip(names, lines, strict=True)}
    else:
        raise UserError(f"{path}: begins with {lines[0][:60]!r}; expected {_FORMATS}")
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
