"""Sets of shards behind a URL: fetches the manifest, then each shard, and keeps only what the manifest describes.

A set is named by the URL of its folder (`https://host/data/train`, `s3://bucket/train`) or by a URL or command in which
`{file}` stands for the name of a file (`pipe:ssh host cat /data/train/{file}`). `webdataset.gopen` or fsspec opens it.
"""

import contextlib
import hashlib
import logging
import re
import shlex
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeGuard, TypeVar

from npp_ds.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from npp_ds.data.shards import check_file
from npp_ds.errors import UserError
from npp_ds.utils.files import atomic_file
from npp_ds.utils.logs import ANY_RANK

logger = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 2.0
STALL_SECONDS = 60
_BLOCK_BYTES = 1 << 20

Content = TypeVar("Content")


_CLOSING = "\"'}]/ "  # what may follow a command in a word of the command line
_allowed_words: list[str] = []


class _TransferError(Exception):
    """The network delivered nothing, or not what was expected; another attempt may succeed."""


def is_remote(source: str | Path) -> TypeGuard[str]:
    """Return whether `source` is a URL or a `pipe:` command, not a folder."""
    return isinstance(source, str) and re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def allow_commands(words: Iterable[str]) -> None:
    """Let this process run the `pipe:` commands that `words`, typed by a person, end with; all others are refused.

    Otherwise the config of somebody else's run could run any command.
    """
    _allowed_words.extend(word.rstrip(_CLOSING) for word in words)


def load_manifest(source: str) -> Manifest:
    """Fetch the manifest of the set at `source`.

    Raises UserError if it cannot be fetched, is damaged, lists file names that do not fit into a URL, or if `source` is
    a command that `allow_commands` has not allowed.
    """
    address = _address(source, MANIFEST_NAME)
    content = _retry(address, lambda: b"".join(_blocks(address)), logging.DEBUG)  # every process reads it
    manifest = Manifest.parse(content, address)
    for shard in manifest.shards:
        if not re.fullmatch(r"\w[\w.-]*", shard.file, re.ASCII):
            raise UserError(
                f"{address}: shard {shard.file!r}: expected only letters, digits, '.', '_' and '-' in the name of a "
                "shard that is fetched; rename it there and in the manifest."
            )
    return manifest


def download(source: str, manifest: Manifest, folder: Path) -> None:
    """Fetch into `folder` every shard that is not in it yet; a shard gets its name once its size and SHA-256 are right.

    No other process may use `folder` meanwhile. Raises UserError if a shard does not arrive as the manifest describes
    it, OSError if it cannot be written; the next call keeps the shards that have arrived.
    """
    for unfinished in folder.glob(".*.tmp"):
        unfinished.unlink()
    missing = [shard for shard in manifest.shards if check_file(folder / shard.file, shard)]
    size = sum(shard.bytes for shard in missing)
    text = f"{source}: fetching {len(missing)} of {len(manifest.shards)} shards ({size:,} bytes) into {folder}"
    logger.info(text, extra=ANY_RANK)
    for shard in missing:
        address = _address(source, shard.file)
        _retry(address, partial(_fetch, address, shard, folder / shard.file))


def _address(source: str, file: str) -> str:
    if source.startswith("pipe:") and not any(word.endswith(source.rstrip(_CLOSING)) for word in _allowed_words):
        raise UserError(
            f"{source}: found in a file, expected on the command line, because it runs a command; if you trust it, "
            "give it there, as in data.train='pipe:..' or --data 'pipe:..'."
        )
    if "{file}" in source:
        return source.replace("{file}", file)
    if source.startswith("pipe:"):
        raise UserError(
            f"{source}: found no {{file}} in the command; expected it in place of a file's name, as in "
            "pipe:ssh host cat /data/train/{file}."
        )
    return f"{source.rstrip('/')}/{file}"


def _retry(address: str, transfer: Callable[[], Content], level: int = logging.INFO) -> Content:
    """Return the result of `transfer()`, repeated up to ATTEMPTS times, each time after a longer pause."""
    for attempt in range(1, ATTEMPTS):
        try:
            return transfer()
        except _TransferError as error:
            logger.log(level, f"{address}: {error}; trying again", extra=ANY_RANK)
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    try:
        return transfer()
    except _TransferError as error:
        raise UserError(
            f"{address}: {error}, in each of {ATTEMPTS} tries; see that this node can read the file and that it is the "
            "one in the manifest, then run again: shards that have arrived are kept."
        ) from None


def _fetch(address: str, shard: ShardInfo, path: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with atomic_file(path) as file, contextlib.closing(_blocks(address)) as blocks:
        for block in blocks:
            size += len(block)
            if size > shard.bytes:
                raise _TransferError(f"found more than the {shard.bytes} bytes expected")
            digest.update(block)
            file.write(block)
        if size < shard.bytes:
            raise _TransferError(f"found {size} bytes, expected {shard.bytes}")
        if digest.hexdigest() != shard.sha256:
            raise _TransferError(f"found SHA-256 {digest.hexdigest()}, expected {shard.sha256}")


def _blocks(address: str) -> Generator[bytes]:
    stream = None
    try:
        stream = _open(address)
        with stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except Exception as error:  # each protocol has its own exceptions, and not all of them are OSErrors
        if status := getattr(stream, "status", None):
            program = "curl" if address.startswith("http") else "the command"
            raise _TransferError(f"{program} ended with exit code {status} (see its message)") from None
        raise _TransferError(f"{type(error).__name__}: {error}") from None


def _open(address: str) -> BinaryIO:
    from webdataset.gopen import gopen, gopen_schemes

    if re.match("https?://", address):
        # webdataset 1.0's own call of curl would wait without end for a server that sends nothing.
        patience = f"--connect-timeout 30 --speed-limit 1 --speed-time {STALL_SECONDS}"
        return gopen(f"pipe:curl -fsSL {patience} {shlex.quote(address)}")
    if address.split(":", 1)[0] in gopen_schemes:
        return gopen(address)
    import fsspec

    return fsspec.open(address, "rb").open()
