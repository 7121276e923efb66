"""The shard format: WebDataset tars of VQ codes with a manifest; written atomically, read strictly, verified in full.

A set is a folder with `manifest.json` and `train-000000.tar`, ... Each image is two neighbouring members of one shard:
`<key>.codes.npy` (uint16 [crops, tokens]) and `<key>.cls` (the label as a decimal integer).
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from npp_ds import __version__
from npp_ds.data.coding import Coding
from npp_ds.errors import UserError
from npp_ds.utils.files import fsync_directory, sha256, write_json_atomic

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CODES_EXTENSION = "codes.npy"
LABEL_EXTENSION = "cls"
_NPY_PREFIX = b"\x93NUMPY\x01\x00"
_NPY_HEADER = 128  # bytes before the values of a small array
_HEX_DIGEST = r"^[0-9a-f]{64}$"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodeAgreement(_Record):
    """How many codes were `equal` to those of fp32, of the `codes` of the first `images`."""

    images: int = Field(ge=0)
    codes: int = Field(ge=0)
    equal: int = Field(ge=0)

    def __str__(self) -> str:
        share = self.equal / max(self.codes, 1)
        return f"{share:.2%} of {self.codes:,} codes of the first {self.images} images are those of fp32"


class TokenizerInfo(_Record):
    """What made the codes: `sha256` of the weights, `downsample` in pixels per code, arithmetic `precision`, and the
    measured `agreement` with fp32 where the precision is another one."""

    name: str
    sha256: str
    downsample: int = Field(ge=1)
    precision: str
    agreement: CodeAgreement | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out an absent agreement, so that manifests keep the fingerprint they had before there was one."""
        return {name: value for name, value in serialize(self).items() if value is not None}


class CropInfo(_Record):
    """The crops stored for every image, one name per row of its codes, such as "center-flip" or "1.1/top-left"."""

    scheme: Literal["center", "center-flip", "ten"]
    ranges: list[float]
    names: list[str] = Field(min_length=1)

    @property
    def center(self) -> int:
        """Index of the crop to evaluate on: the one named "center" or ".../center", else 0."""
        return next((i for i, name in enumerate(self.names) if name.split("/")[-1] == "center"), 0)


class ShardInfo(_Record):
    """One shard file: its plain name, number of images, size in bytes and SHA-256."""

    file: str = Field(pattern=r"^[^/\\]+\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_HEX_DIGEST)


class Manifest(_Record):
    """Everything that is known about a set of shards; `manifest.json` in its folder."""

    format: Literal["npp-codes"] = "npp-codes"
    version: Literal[1] = FORMAT_VERSION
    split: str
    grid_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1, le=65536)
    num_classes: int = Field(ge=1)
    class_names: list[str]
    image_size: int = Field(ge=1)
    tokenizer: TokenizerInfo
    crops: CropInfo
    num_samples: int = Field(ge=0)
    shards: list[ShardInfo]
    source: dict[str, Any]
    skipped: list[dict[str, Any]]
    created_by: str = f"npp_ds {__version__}"

    @model_validator(mode="after")
    def _counts_add_up(self) -> "Manifest":
        total = sum(shard.samples for shard in self.shards)
        if total != self.num_samples:
            raise ValueError(f"num_samples is {self.num_samples}, its shards hold {total}")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard file is listed twice")
        if len(set(self.crops.names)) != len(self.crops.names):
            raise ValueError("a crop name is listed twice")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for num_classes {self.num_classes}")
        return self

    @property
    def num_crops(self) -> int:
        """Stored crops per image."""
        return len(self.crops.names)

    @property
    def num_tokens(self) -> int:
        """Codes per crop."""
        return self.grid_size**2

    @property
    def coding(self) -> Coding:
        """What codes and labels stand for, to compare with other shards and with weights."""
        sizes = (self.grid_size, self.vocab_size, self.num_classes)
        return Coding(*sizes, self.tokenizer, tuple(self.class_names))

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """The manifest in `directory`; UserError when missing, unreadable, inconsistent or of another version."""
        path = Path(directory) / MANIFEST_NAME
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; expected the manifest of a folder of code shards. "
                "It is written last: run data_prep/tokenize_imagenet.py to its end, or correct the folder."
            ) from None
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: str | Path) -> "Manifest":
        """The manifest in the bytes of a file; UserError naming `path` when `load` would refuse that file."""
        try:
            raw = json.loads(content)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); tokenize again or restore the file.") from None
        found = {name: raw.get(name) if isinstance(raw, dict) else None for name in ("format", "version")}
        if found != {"format": "npp-codes", "version": FORMAT_VERSION}:
            raise UserError(
                f"{path}: found format {found['format']!r} version {found['version']!r}, expected 'npp-codes' version "
                f"{FORMAT_VERSION}; tokenize again with this version of npp_ds, or use the version that made it."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors())
            raise UserError(f"{path}: {problems}; tokenize again or restore the file.") from None

    def save(self, directory: str | Path) -> None:
        """Writes `manifest.json` into `directory`, atomically."""
        write_json_atomic(Path(directory) / MANIFEST_NAME, self.model_dump())

    def fingerprint(self) -> str:
        """SHA-256 of the manifest's content as 64 hexadecimal digits, the same whichever version of npp_ds wrote it."""
        content = json.dumps(self.model_dump(exclude={"created_by"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


def shard_name(split: str, index: int) -> str:
    """`train-000000.tar`."""
    return f"{split}-{index:06d}.tar"


def shard_bytes(samples: int, crops: int, tokens: int) -> int:
    """Size of a shard file in bytes."""
    codes = -(-(_NPY_HEADER + 2 * crops * tokens) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    content = samples * (codes + 3 * tarfile.BLOCKSIZE) + 2 * tarfile.BLOCKSIZE
    return -(-content // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


class ShardWriter:
    """Writes one shard through a temporary file; the shard appears whole on a clean exit, or not at all.

    The bytes depend on nothing but the samples. `info` describes the shard after the exit.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info: ShardInfo | None = None
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._keys: set[str] = set()
        self._shape: tuple[int, ...] | None = None

    def __enter__(self) -> "ShardWriter":
        from webdataset import TarWriter

        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, user="npp", group="npp", mode=0o644, mtime=0, encoder=False, compress=False)
        return self

    def write(self, key: str, codes: np.ndarray, label: int) -> None:
        """Appends one image: `codes` uint16 [crops, tokens] (the same shape for all), `label` >= 0, `key` unique."""
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

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is not None:
            self._discard()
            return
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            size, digest = self._temporary.stat().st_size, sha256(self._temporary)
            self._temporary.replace(self.path)
        except BaseException:
            self._discard()
            raise
        fsync_directory(self.path.parent)
        self.info = ShardInfo(file=self.path.name, samples=len(self._keys), bytes=size, sha256=digest)

    def _discard(self) -> None:
        for close in (self._tar.close, self._file.close):
            with contextlib.suppress(OSError):
                close()
        self._temporary.unlink(missing_ok=True)


def _check_key(key: str, where: str) -> None:
    """Refuses keys that stock WebDataset would split, skip or fail to read."""
    base = key.rsplit("/", 1)[-1]
    readable = (
        key.isprintable() and key.isascii() and base != "" and "." not in base and not key.startswith(("/", "__"))
    )
    if not readable or len(key) > 80:
        raise UserError(
            f"{where}: expected 1 to 80 printable ASCII characters, no leading '/' or '__', no '.' in the last part."
        )


def read_shard(path: str | Path) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields (key, codes uint16 [crops, tokens] read-only, label) in file order.

    UserError naming file and key at the first deviation from what `ShardWriter` writes: tar, pair, array or label.
    """
    key, fields = "", {}
    for name, data in _read_members(path):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        member_key = folder + slash + stem
        if extension not in (CODES_EXTENSION, LABEL_EXTENSION):
            raise UserError(f"{path}, member {name!r}: expected <key>.{CODES_EXTENSION} or <key>.{LABEL_EXTENSION}.")
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


def _incomplete(path: str | Path, key: str, fields: dict) -> UserError:
    return UserError(
        f"{path}, key {key!r}: only {', '.join(fields)} found, expected {CODES_EXTENSION} and {LABEL_EXTENSION}."
    )


def _read_members(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of every member; unlike `tarfile` alone, never takes damage for the archive's end."""
    name = None
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                name = member.name
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise UserError(f"{path}, member {name!r}: not a plain file.")
                tar.fileobj.seek(member.offset_data)
                data = tar.fileobj.read(member.size)
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield name, data
                tar.members = []
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read()
            if len(end) < 2 * tarfile.BLOCKSIZE or any(end):
                raise tarfile.ReadError("the end-of-archive mark is missing")
    except (tarfile.TarError, OSError) as error:
        place = f"after member {name!r}" if name else "at its start"
        raise UserError(f"{path}: damaged {place}: {error}; tokenize this shard again or restore it.") from None


def _parse_codes(data: bytes, where: str) -> np.ndarray:
    start = 10 + int.from_bytes(data[8:10], "little")
    try:
        if not data.startswith(_NPY_PREFIX):
            raise ValueError("not a version 1.0 .npy file")
        shape, fortran_order, dtype = _npy_layout(data[:start])
        if dtype != np.dtype("<u2") or len(shape) != 2 or fortran_order:
            raise ValueError(f"array of {dtype} {list(shape)}, expected uint16 [crops, tokens] in C order")
        return np.frombuffer(data, "<u2", offset=start).reshape(shape)
    except ValueError as error:
        raise UserError(f"{where}: bad {CODES_EXTENSION}: {error}.") from None


@lru_cache(maxsize=64)
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    return np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))


def _parse_label(data: bytes, where: str) -> int:
    if not data.isdigit() or len(data) > 9:
        raise UserError(
            f"{where}: bad {LABEL_EXTENSION}: found {data[:32]!r}, expected an integer of at least 0 as text."
        )
    return int(data)


def check(
    directory: str | Path,
    manifest: Manifest,
    accept: Callable[[np.ndarray, int], None] = lambda codes, label: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[str]:
    """Reads the whole set, yields every problem, and calls `accept(codes, label)` for each sound sample in order.

    `progress(images done, images in all)` is called after each shard.
    """
    directory = Path(directory)
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
        yield from check_file(directory / shard.file, shard)
        if (directory / shard.file).is_file():
            yield from _check_samples(directory / shard.file, shard, manifest, first_seen, accept)
        done += shard.samples
        progress(done, manifest.num_samples)


def read_sound(
    directory: str | Path,
    manifest: Manifest,
    accept: Callable[[np.ndarray, int], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Reads the whole set as `check` does; UserError at its first problem."""
    for problem in check(directory, manifest, accept, progress):
        raise UserError(f"{problem} (`npp shards verify {directory}` lists every problem)")


def verify(directory: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Every problem of the set in `directory`, each naming file and key; empty when it is sound. Reads everything."""
    try:
        manifest = Manifest.load(directory)
    except UserError as error:
        return [str(error)]
    return list(check(directory, manifest, progress=progress))


def check_file(path: Path, shard: ShardInfo) -> Iterator[str]:
    """Yields what size and hash of the file at `path` say against it being `shard`."""
    try:
        if (size := path.stat().st_size) != shard.bytes:
            yield f"{path}: found {size} bytes, expected {shard.bytes}; tokenize this shard again or restore it."
        elif (digest := sha256(path)) != shard.sha256:
            yield f"{path}: found SHA-256 {digest}, expected {shard.sha256}; tokenize this shard again or restore it."
    except OSError as error:
        yield f"{path}: {error.strerror}; tokenize this shard again or restore it."


def _check_samples(
    path: Path,
    shard: ShardInfo,
    manifest: Manifest,
    first_seen: dict[str, str],
    accept: Callable[[np.ndarray, int], None],
) -> Iterator[str]:
    count = 0
    try:
        for key, codes, label in read_shard(path):
            count += 1
            problem = _sample_problem(codes, label, manifest)
            if key in first_seen:
                problem = f"duplicate key, already in {first_seen[key]}"
            first_seen[key] = path.name
            if problem:
                yield f"{path}, key {key!r}: {problem}"
            else:
                accept(codes, label)
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
