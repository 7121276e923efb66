"""Sets of shards behind a URL: the manifest, then each shard into a folder, either as the manifest says or not at all.

A set is named by the URL of its folder (`https://host/data/train`, `s3://bucket/train`) or by a URL or command with
`{file}` where a file's name belongs (`pipe:ssh host cat /data/train/{file}`). `webdataset.gopen` opens it, or fsspec.
"""

import contextlib
import hashlib
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from npp_ds.data.shards import MANIFEST_NAME, Manifest, ShardInfo, check_file
from npp_ds.errors import UserError
from npp_ds.utils.files import write_atomic

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 2.0
STALL_SECONDS = 60
_BLOCK_BYTES = 1 << 20


class _TransferError(Exception):
    """Nothing, or not what was expected, came over the network; trying again may help."""


def is_remote(source: str | Path) -> bool:
    """Whether `source` is a URL or a `pipe:` command, not a folder."""
    return isinstance(source, str) and re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def load_manifest(source: str) -> Manifest:
    """The manifest of the set at `source`; UserError when it cannot be had, is bad, or lists names unfit for a URL."""
    address = _address(source, MANIFEST_NAME)
    content = _persistently(address, lambda: b"".join(_blocks(address)), lambda text: None)
    manifest = Manifest.parse(content, address)
    for shard in manifest.shards:
        if not re.fullmatch(r"\w[\w.-]*", shard.file, re.ASCII):
            raise UserError(
                f"{address}: shard {shard.file!r}: expected only letters, digits, '.', '_' and '-' in the name of a "
                "shard that is fetched; rename it there and in the manifest."
            )
    return manifest


def download(source: str, manifest: Manifest, folder: Path, say: Callable[[str], None]) -> None:
    """Fetches into `folder` every shard that is not there yet, size and SHA-256 checked before it gets its name.

    The caller has `folder` to itself. UserError when a shard does not arrive as the manifest says, OSError when it
    cannot be written; what has arrived by then stays for the next call.
    """
    for unfinished in folder.glob(".*.tmp"):
        unfinished.unlink()
    missing = [shard for shard in manifest.shards if any(check_file(folder / shard.file, shard))]
    size = sum(shard.bytes for shard in missing)
    say(f"{source}: fetching {len(missing)} of {len(manifest.shards)} shards ({size:,} bytes) into {folder}")
    for shard in missing:
        address = _address(source, shard.file)
        _persistently(address, lambda a=address, s=shard: _fetch(a, s, folder / s.file), say)


def _address(source: str, file: str) -> str:
    if "{file}" in source:
        return source.replace("{file}", file)
    if source.startswith("pipe:"):
        raise UserError(
            f"{source}: found no {{file}} in the command; expected it in place of a file's name, as in "
            "pipe:ssh host cat /data/train/{file}."
        )
    return f"{source.rstrip('/')}/{file}"


def _persistently(address: str, transfer: Callable[[], bytes | None], say: Callable[[str], None]) -> bytes | None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return transfer()
        except _TransferError as error:
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{address}: {error}, in each of {ATTEMPTS} tries; see that this node can read the file and that "
                    "it is the one in the manifest, then run again: shards that have arrived are kept."
                ) from None
            say(f"{address}: {error}; trying again")
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    return None


def _fetch(address: str, shard: ShardInfo, path: Path) -> None:
    def write(file: BinaryIO) -> None:
        digest, size = hashlib.sha256(), 0
        with contextlib.closing(_blocks(address)) as blocks:
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

    write_atomic(path, write)


def _blocks(address: str) -> Iterator[bytes]:
    stream = None
    try:
        stream = _open(address)
        with stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except Exception as error:  # Each protocol has exceptions of its own, not all of them OSErrors.
        if status := getattr(stream, "status", None):
            program = "curl" if address.startswith("http") else "the command"
            raise _TransferError(f"{program} ended with exit code {status} (see its message)") from None
        raise _TransferError(f"{type(error).__name__}: {error}") from None


def _open(address: str) -> BinaryIO:
    from webdataset.gopen import gopen, gopen_schemes

    if re.match("https?://", address):
        # gopen's own call of curl would wait for ever for a server that has fallen silent.
        patience = f"--connect-timeout 30 --speed-limit 1 --speed-time {STALL_SECONDS}"
        return gopen(f"pipe:curl -fsSL {patience} {shlex.quote(address)}")
    if address.split(":", 1)[0] in gopen_schemes:
        return gopen(address)
    import fsspec

    return fsspec.open(address, "rb").open()
