"""What codes and labels stand for: the facts that shards, weights and tokenizers carry, compared in one place."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol


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
