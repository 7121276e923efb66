"""The shard format: WebDataset tars of VQ codes with a manifest; written atomically, read strictly, verified in full.

A set is a folder with `manifest.json` and `train-000000.tar`, ... Each image is two consecutive members of one shard:
`<key>.codes.npy` (uint16 [crops, tokens]) and `<key>.cls` (the label as a decimal integer).
"""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from npp_ds import __version__
from npp_ds.data.coding import Coding
from npp_ds.errors import UserError
from npp_ds.utils.files import atomic_file, sha256, tar_members, write_json_atomic
from npp_ds.utils.progress import track

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"
CODES_EXTENSION = "codes.npy"
LABEL_EXTENSION = "cls"
_NPY_PREFIX = b"\x93NUMPY\x01\x00"
_HEX_DIGEST = r"^[0-9a-f]{64}$"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodeAgreement(_Record):
    """How many codes of the first `images` images, `codes` in all, were `equal` to those of fp32."""

    images: int = Field(ge=0)
    codes: int = Field(ge=0)
    equal: int = Field(ge=0)

    def __str__(self) -> str:
        share = self.equal / max(self.codes, 1)
        return f"{share:.2%} of {self.codes:,} codes of the first {self.images} images are those of fp32"


class TokenizerInfo(_Record):
    """The tokenizer that made the codes.

    `sha256` is that of its weights ("" if unknown, as of imported codes), `downsample` is in pixels per code,
    `precision` is that of its arithmetic, and `agreement` compares its codes with those of fp32 if the precision is
    another one.
    """

    name: str
    sha256: str
    downsample: int = Field(ge=1)
    precision: str
    agreement: CodeAgreement | None = None

    @model_serializer(mode="wrap")
    def _omit_absent(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Omit an absent agreement, so that manifests keep the fingerprint that they had before the field existed."""
        return {name: value for name, value in serialize(self).items() if value is not None}


class CropInfo(_Record):
    """The crops stored of each image: a name for each row of its codes, such as "center-flip" or "1.1/top-left"."""

    scheme: Literal["center", "center-flip", "ten"]
    ranges: list[float]
    names: list[str] = Field(min_length=1)

    @property
    def center(self) -> int:
        """Index of the crop for evaluation: the one named "center" or ".../center", else 0."""
        return next((i for i, name in enumerate(self.names) if name.split("/")[-1] == "center"), 0)


class ShardInfo(_Record):
    """One shard file: its name without a folder, its number of images, its size in bytes and its SHA-256."""

    file: str = Field(pattern=r"^[^/\\]+\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_HEX_DIGEST)


class Manifest(_Record):
    """The description of a set of shards, `manifest.json` in its folder."""

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
        """Number of crops stored of each image."""
        return len(self.crops.names)

    @property
    def num_tokens(self) -> int:
        """Number of codes of a crop."""
        return self.grid_size**2

    @property
    def coding(self) -> Coding:
        """What codes and labels stand for, to compare with other shards and with weights."""
        sizes = (self.grid_size, self.vocab_size, self.num_classes)
        return Coding(*sizes, self.tokenizer, tuple(self.class_names))

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read the manifest in `directory`. Raises UserError if it is missing, damaged or of another version."""
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
        """Parse the bytes of the manifest at `path`. Raises UserError as `load` does."""
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
        """Write `manifest.json` into `directory`, atomically."""
        write_json_atomic(Path(directory) / MANIFEST_NAME, self.model_dump())

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content in 64 hexadecimal digits, the same whichever version of npp_ds wrote it."""
        content = json.dumps(self.model_dump(exclude={"created_by"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


def shard_name(split: str, index: int) -> str:
    """Return a name such as `train-000000.tar`."""
    return f"{split}-{index:06d}.tar"


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


def _incomplete(path: str | Path, key: str, fields: dict[str, bytes]) -> UserError:
    return UserError(
        f"{path}, key {key!r}: only {', '.join(fields)} found, expected {CODES_EXTENSION} and {LABEL_EXTENSION}."
    )


def _read_members(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each member. Raises UserError for anything but complete plain files."""
    name = None
    try:
        with open(path, "rb") as file:
            for member in tar_members(file):
                name = member.name
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise UserError(f"{path}, member {name!r}: not a plain file.")
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield name, data
            if len(rest := file.read()) < tarfile.BLOCKSIZE or any(rest):
                raise tarfile.ReadError("the end-of-archive mark is missing")
    except (tarfile.TarError, OSError) as error:
        where = f"after member {name!r}" if name else "at its start"
        raise UserError(f"{path}: damaged {where}: {error}; tokenize this shard again or restore it.") from None


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
