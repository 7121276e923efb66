"""The shard format: WebDataset tars of VQ codes, written atomically, read strictly, verified against the manifest.

A set is a folder with `manifest.json` and `train-000000.tar`, ... Each image is two consecutive members of one shard:
`<key>.codes.npy` (uint16 [crops, tokens]) and `<key>.cls` (the label as a decimal integer).
"""

import io
import logging
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from npp_ds.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from npp_ds.distributed.work_queue import SETTINGS_FILE, WORK_FOLDER
from npp_ds.errors import UserError
from npp_ds.utils.files import atomic_file, open_regular, sha256, tar_members
from npp_ds.utils.records import check_same_settings
from npp_ds.utils.screen import track

logger = logging.getLogger(__name__)

CODES_EXTENSION = "codes.npy"
LABEL_EXTENSION = "cls"
LARGEST_MEMBER = {CODES_EXTENSION: 16 << 20, LABEL_EXTENSION: 32}  # bytes
_NPY_PREFIX = b"\x93NUMPY\x01\x00"


def shard_name(split: str, index: int) -> str:
    """Return a name such as `train-000000.tar`."""
    return f"{split}-{index:06d}.tar"


def check_same_set(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the shards in `out`, finished or not; {} if there are none.

    Raises UserError if they differ from the `wanted` ones, and for shards of unknown settings.
    """
    found = check_same_settings(out, (out / WORK_FOLDER / SETTINGS_FILE, out / MANIFEST_NAME), wanted, "shards")
    if not found and (tars := sorted(out.glob("*.tar"))):
        raise UserError(f"{out}: holds {tars[0].name} but no manifest; choose another folder or empty it")
    return found


class ShardWriter:
    """A context manager that writes one shard, which appears complete when the block ends, or not at all.

    The bytes of the file depend on the samples alone. `info` describes the shard once the block has ended.
    """

    info: ShardInfo

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._keys: set[str] = set()
        self._shape: tuple[int, ...] | None = None

    def __enter__(self) -> "ShardWriter":
        from webdataset import TarWriter

        self._stack = ExitStack()
        file = self._stack.enter_context(atomic_file(self.path))
        tar = TarWriter(file, user="npp", group="npp", mode=0o644, mtime=0, encoder=False, compress=False)
        self._tar = self._stack.enter_context(closing(tar))
        return self

    def write(self, key: str, codes: np.ndarray, label: int) -> None:
        """Append one image: `codes` uint16 [crops, tokens], of one shape for all images, `label` >= 0, unique `key`.

        Raises UserError for anything else.
        """
        where = f"{self.path}, key {key!r}"
        _check_key(key, where)
        if key in self._keys:
            raise UserError(f"{where}: written twice; keys must be unique.")
        if codes.dtype != np.uint16 or codes.ndim != 2 or self._shape not in (None, codes.shape):
            expected = f"uint16 {list(self._shape) if self._shape else '[crops, tokens]'}"
            raise UserError(f"{where}: codes are {codes.dtype} {list(codes.shape)}, expected {expected}.")
        if label != int(label) or label < 0:
            raise UserError(f"{where}: label {label!r}, expected an integer of at least 0.")
        encoded = io.BytesIO()
        np.lib.format.write_array(encoded, np.ascontiguousarray(codes, "<u2"), version=(1, 0))
        sample = {"__key__": key, CODES_EXTENSION: encoded.getvalue(), LABEL_EXTENSION: str(int(label)).encode()}
        self._tar.write(sample)
        self._keys.add(key)
        self._shape = codes.shape

    def __exit__(self, exception_type: type[BaseException] | None, *details: Any) -> None:
        self._stack.__exit__(exception_type, *details)
        if exception_type is None:
            size, digest = self.path.stat().st_size, sha256(self.path)
            self.info = ShardInfo(file=self.path.name, samples=len(self._keys), bytes=size, sha256=digest)


def _check_key(key: str, where: str) -> None:
    """Raise UserError for a key that stock WebDataset would split, skip or fail to read."""
    base = key.rsplit("/", 1)[-1]
    readable = (
        key.isprintable() and key.isascii() and base != "" and "." not in base and not key.startswith(("/", "__"))
    )
    if not readable or len(key) > 80:
        raise UserError(
            f"{where}: expected 1 to 80 printable ASCII characters, no leading '/' or '__', no '.' in the last part."
        )


def read_shard(path: str | Path) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield (key, codes uint16 [crops, tokens] read-only, label) of each image in file order.

    Raises UserError, with file and key, at the first thing that `ShardWriter` would not have written.
    """
    key = ""
    fields: dict[str, bytes] = {}
    for member_key, extension, data in _read_members(path):
        if fields and (member_key != key or extension in fields):
            raise _incomplete(path, key, fields)
        key = member_key
        fields[extension] = data
        if len(fields) == 2:
            where = f"{path}, key {key!r}"
            yield key, _parse_codes(fields[CODES_EXTENSION], where), _parse_label(fields[LABEL_EXTENSION], where)
            fields = {}
    if fields:
        raise _incomplete(path, key, fields)


def _incomplete(path: str | Path, key: str, fields: dict[str, bytes]) -> UserError:
    return UserError(
        f"{path}, key {key!r}: only {', '.join(fields)} found, expected {CODES_EXTENSION} and {LABEL_EXTENSION}."
    )


def _read_members(path: str | Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key, extension, content) of each member.

    Raises UserError for anything but complete plain files with the two extensions and at most LARGEST_MEMBER bytes.
    """
    name = None
    try:
        with open_regular(path) as file:
            for member in tar_members(file):
                name = f"{member.name!r:.200}"
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                    raise UserError(f"{path}, member {name}: not a plain file.")
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if extension not in LARGEST_MEMBER:
                    raise UserError(f"{path}, member {name}: expected <key>.{' or <key>.'.join(LARGEST_MEMBER)}.")
                if member.size > (limit := LARGEST_MEMBER[extension]):
                    raise UserError(f"{path}, member {name}: {member.size:,} bytes, expected at most {limit:,}.")
                _check_key(key := folder + slash + stem, f"{path}, member {name}")
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield key, extension, data
            rest = file.read(tarfile.BLOCKSIZE)
            if len(rest) < tarfile.BLOCKSIZE or any(map(any, chain([rest], iter(partial(file.read, 1 << 20), b"")))):
                raise tarfile.ReadError("the end-of-archive mark is missing")
    except (tarfile.TarError, OSError) as error:
        where = f"after member {name}" if name else "at its start"
        raise UserError(f"{path}: damaged {where}: {error}; tokenize this shard again or restore it.") from None


def _parse_codes(data: bytes, where: str) -> np.ndarray:
    start = 10 + int.from_bytes(data[8:10], "little")
    try:
        if not data.startswith(_NPY_PREFIX):
            raise ValueError("not a version 1.0 .npy file")
        shape, fortran_order, dtype = _npy_layout(data[:start])
        if dtype != np.dtype("<u2") or len(shape) != 2 or fortran_order:
            raise ValueError(f"array of {dtype} {list(shape)}, expected uint16 [crops, tokens] in C order")
        if len(data) - start != 2 * shape[0] * shape[1]:
            raise ValueError(f"{len(data) - start} bytes for the shape {list(shape)}")
        return np.frombuffer(data, "<u2", offset=start).reshape(shape)
    except ValueError as error:
        raise UserError(f"{where}: bad {CODES_EXTENSION}: {error}.") from None


@lru_cache(maxsize=64)
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parse the start of a .npy file. Raises ValueError if it describes no array."""
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
    except Exception as error:  # it evaluates a Python literal, which may fail in many ways
        raise ValueError(f"bad header ({type(error).__name__})") from None
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"the shape is {shape!s:.60}")
    return shape, fortran_order, dtype


def _parse_label(data: bytes, where: str) -> int:
    if not data.isdigit() or len(data) > 9:
        raise UserError(
            f"{where}: bad {LABEL_EXTENSION}: found {data[:32]!r}, expected an integer of at least 0 as text."
        )
    return int(data)


Sample = tuple[np.ndarray, int]  # codes uint16 [crops, tokens], read-only, and the label of an image


def verify(directory: str | Path, show_progress: bool = False) -> list[str]:
    """Read the whole set in `directory`; return every problem, with file and key, or [] if there is none."""
    try:
        manifest = Manifest.load(directory)
    except UserError as error:
        return [str(error)]
    found = track(_read_set(Path(directory), manifest), "verifying", manifest.num_samples, show_progress)
    return [problem for problem in found if isinstance(problem, str)]


def read_set(directory: str | Path, manifest: Manifest) -> Iterator[Sample]:
    """Verify the whole set in `directory` and yield its samples in order. Raises UserError at the first problem."""
    for found in _read_set(Path(directory), manifest):
        if isinstance(found, str):
            raise UserError(f"{found} (`npp shards verify {directory}` lists every problem)")
        yield found


def _read_set(directory: Path, manifest: Manifest) -> Iterator[Sample | str]:
    """Yield each sound sample of a set in order, and the text of each problem where it is found."""
    listed = {shard.file for shard in manifest.shards}
    for path in sorted(directory.glob("*.tar")):
        if path.name not in listed:
            yield f"{path}: not in {MANIFEST_NAME}; remove the file, or restore the manifest that lists it."
    images = manifest.source.get("images")
    if isinstance(images, int) and images != manifest.num_samples + len(manifest.skipped):
        yield (
            f"{directory / MANIFEST_NAME}: {images} images in the source, {manifest.num_samples} in the shards and "
            f"{len(manifest.skipped)} skipped do not add up; tokenize again or restore the file."
        )
    first_seen: dict[str, str] = {}
    done = 0
    for shard in manifest.shards:
        path = directory / shard.file
        if problem := check_file(path, shard):
            yield problem
        if path.is_file():
            yield from _read_samples(path, shard, manifest, first_seen)
        done += shard.samples
        logger.debug("%s: read, %d of %d samples", path, done, manifest.num_samples)


def check_file(path: Path, shard: ShardInfo) -> str | None:
    """Return what is wrong if the file at `path` does not have the size and hash of `shard`, else None."""
    advice = "tokenize this shard again or restore it."
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return f"{path}: found {size} bytes, expected {shard.bytes}; {advice}"
        if (digest := sha256(path)) != shard.sha256:
            return f"{path}: found SHA-256 {digest}, expected {shard.sha256}; {advice}"
    except OSError as error:
        return f"{path}: {error.strerror}; {advice}"
    return None


def _read_samples(
    path: Path, shard: ShardInfo, manifest: Manifest, first_seen: dict[str, str]
) -> Iterator[Sample | str]:
    count = 0
    try:
        for key, codes, label in read_shard(path):
            count += 1
            problem = _sample_problem(codes, label, manifest)
            if key in first_seen:
                problem = f"duplicate key, already in {first_seen[key]}"
            first_seen[key] = path.name
            yield f"{path}, key {key!r}: {problem}" if problem else (codes, label)
    except UserError as error:
        yield str(error)
        return
    if count != shard.samples:
        yield f"{path}: found {count} samples, expected {shard.samples}"


def _sample_problem(codes: np.ndarray, label: int, manifest: Manifest) -> str | None:
    expected = (manifest.num_crops, manifest.num_tokens)
    if codes.shape != expected:
        return f"codes are {list(codes.shape)}, expected {list(expected)}"
    if (largest := int(codes.max())) >= manifest.vocab_size:
        return f"code {largest} out of range, expected below {manifest.vocab_size}"
    if label >= manifest.num_classes:
        return f"label {label} out of range, expected below {manifest.num_classes}"
    return None
