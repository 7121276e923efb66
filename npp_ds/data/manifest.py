"""The manifest of a set of code shards: what its files are, and what codes and labels stand for (`Coding`)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.utils.files import parse_json, plain_name, read_small, write_json_atomic

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"
LARGEST_CLASS_COUNT = 1_000_000
_HEX_DIGEST = r"^[0-9a-f]{64}$"
_SHOWN_PROBLEMS = 5


class HasTokenizerId(Protocol):
    """Anything that names a tokenizer: `TokenizerId`, the entry of a manifest, a loaded tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...


class TokenizerId(NamedTuple):
    """A tokenizer: its name when it made the codes, and the SHA-256 of its file, which identifies it ("": unknown)."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} ({self.sha256[:12]}..)"


@dataclass(frozen=True)
class Coding:
    """What the codes and labels of shards or weights stand for.

    `class_names[i]` is the name of label i. `tokenizer` is None and `class_names` is empty where they are unknown.
    """

    grid_size: int
    vocab_size: int
    num_classes: int
    tokenizer: HasTokenizerId | None = None
    class_names: tuple[str, ...] = ()


class Mismatch(NamedTuple):
    """A fact in which two codings differ, such as "vocab_size" or "label 3", and the value of each as text."""

    fact: str
    found: str
    expected: str


def size_mismatches(found: Coding, expected: Coding) -> list[Mismatch]:
    """Return how two codings differ in the grid and in the numbers of codes and classes."""
    names = ("grid_size", "vocab_size", "num_classes")
    sizes = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    return [Mismatch(name, str(a), str(b)) for name, a, b in sizes if a != b]


def meaning_mismatches(found: Coding, expected: Coding) -> list[Mismatch]:
    """Return how two codings differ in the tokenizer and in the first label whose class name differs.

    What one of them does not know is not compared.
    """
    mismatches = [tokenizer_mismatch(found.tokenizer, expected.tokenizer)]
    pairs = enumerate(zip(found.class_names, expected.class_names, strict=False))
    mismatches += [next((Mismatch(f"label {i}", repr(a), repr(b)) for i, (a, b) in pairs if a != b), None)]
    return [mismatch for mismatch in mismatches if mismatch]


def tokenizer_mismatch(found: HasTokenizerId | None, expected: HasTokenizerId | None) -> Mismatch | None:
    """Return how two tokenizers differ, by SHA-256; None if they are the same or one is unknown (None, or "")."""
    if found is None or expected is None or found.sha256 == expected.sha256 or not (found.sha256 and expected.sha256):
        return None
    return Mismatch("tokenizer", *(str(TokenizerId(one.name, one.sha256)) for one in (found, expected)))


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
    `precision` is that of its arithmetic; if it is not fp32, `agreement` compares its codes with those of fp32.
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

    file: Annotated[str, AfterValidator(plain_name), Field(pattern=r"\.tar$")]
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_HEX_DIGEST)


class Manifest(_Record):
    """The description of a set of shards, `manifest.json` in its folder."""

    format: Literal["npp-codes"] = "npp-codes"
    version: Literal[1] = FORMAT_VERSION
    split: str
    grid_size: int = Field(ge=1, le=4096)
    vocab_size: int = Field(ge=1, le=65536)
    num_classes: int = Field(ge=1, le=LARGEST_CLASS_COUNT)
    class_names: list[str]
    image_size: int = Field(ge=1, le=65536)
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
        counts = self.source.get("passed_over", {})
        if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
            raise ValueError(f"passed_over is {counts!r:.40}, expected a number of files for each reason")
        others = {name: value for name, value in self.source.items() if name != "passed_over"}
        for name, value in chain.from_iterable(record.items() for record in (others, *self.skipped)):
            if isinstance(value, list | dict) or (name in ("images", "bytes") and not isinstance(value, int)):
                raise ValueError(f"{name} is {value!r:.40}, expected an integer, or a text if it is no count")
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
            content = read_small(path)
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
            raw = parse_json(content)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); tokenize again or restore the file.") from None
        found = {name: raw.get(name) if isinstance(raw, dict) else None for name in ("format", "version")}
        if found != {"format": "npp-codes", "version": FORMAT_VERSION}:
            raise UserError(
                f"{path}: found format {found['format']!r:.40} version {found['version']!r:.40}, expected 'npp-codes' "
                f"version {FORMAT_VERSION}; tokenize again with this version of npp_ds, or use the one that made it."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
            texts = [f"{'.'.join(map(str, e['loc'])) or 'manifest':.60}: {e['msg']:.200}" for e in errors]
            if more := len(texts[_SHOWN_PROBLEMS:]):
                texts[_SHOWN_PROBLEMS:] = [f"and {more} more problems"]
            raise UserError(f"{path}: {'; '.join(texts)}; tokenize again or restore the file.") from None

    def save(self, directory: str | Path) -> None:
        """Write `manifest.json` into `directory`, atomically."""
        write_json_atomic(Path(directory) / MANIFEST_NAME, self.model_dump())

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content in 64 hexadecimal digits, the same whichever version of npp_ds wrote it."""
        content = json.dumps(self.model_dump(exclude={"created_by"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()
