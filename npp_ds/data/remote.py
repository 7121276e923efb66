"""Sets of shards behind a URL: fetches the manifest, then each shard, and keeps only what the manifest describes.

A set is named by the URL of its folder (`https://host/data/train`, `s3://bucket/train`) or by a URL or command in which
`{file}` stands for the name of a file (`pipe:ssh host cat /data/train/{file}`). `webdataset.gopen` or fsspec opens it.
"""

import contextlib
import hashlib
import logging
import math
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, TypeVar

from npp_ds.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from npp_ds.data.shards import check_file
from npp_ds.errors import UserError
from npp_ds.utils.files import SMALL_FILE_BYTES, atomic_file
from npp_ds.utils.screen import ANY_RANK

logger = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 2.0
MANIFEST_SECONDS = 15  # for all tries
STALL_SECONDS, SLOWEST_RATE = 60, 16_000  # bytes a second
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
    deadline = time.monotonic() + MANIFEST_SECONDS
    # Every process reads it, so not each of them logs another try.
    content = _retry(address, partial(_fetch_manifest, address, deadline), logging.DEBUG, deadline)
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
    if not source.startswith("pipe:") and re.search(r"['\"\\\s]", source):  # webdataset 0.2 gives URLs to a shell
        raise UserError(f"{source}: found a quote, backslash or space, expected it as %27, %22, %5C or %20 in a URL.")
    if "{file}" in source:
        return source.replace("{file}", file)
    if source.startswith("pipe:"):
        raise UserError(
            f"{source}: found no {{file}} in the command; expected it in place of a file's name, as in "
            "pipe:ssh host cat /data/train/{file}."
        )
    return f"{source.rstrip('/')}/{file}"


def _retry(
    address: str, transfer: Callable[[], Content], level: int = logging.INFO, deadline: float = math.inf
) -> Content:
    """Return the result of `transfer()`, repeated up to ATTEMPTS times, each time after a longer pause.

    No try begins after `deadline`, a time of `time.monotonic`.
    """
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return transfer()
        except _TransferError as error:
            if attempt == ATTEMPTS or time.monotonic() + pause >= deadline:
                tries = f", in each of {attempt} tries" if attempt > 1 else ""
                raise UserError(
                    f"{address}: {error}{tries}; see that this node can read the file and that it is the one in the "
                    "manifest, then run again: shards that have arrived are kept."
                ) from None
            logger.log(level, f"{address}: {error}; trying again", extra=ANY_RANK)
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def _fetch_manifest(address: str, deadline: float) -> bytes:
    content = b""
    with contextlib.closing(_blocks(address, deadline - time.monotonic(), math.inf)) as blocks:
        for block in blocks:
            content += block
            if len(content) > SMALL_FILE_BYTES:
                raise UserError(f"{address}: more than the {SMALL_FILE_BYTES:,} bytes that a manifest may have.")
    return content


def _fetch(address: str, shard: ShardInfo, path: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with atomic_file(path) as file, contextlib.closing(_blocks(address, STALL_SECONDS, SLOWEST_RATE)) as blocks:
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


def _blocks(address: str, patience: float, rate: float) -> Generator[bytes]:
    """Yield the content of a file. It has `patience` seconds, and one more for each `rate` bytes that have arrived.

    A thread reads, because some protocols wait without end. If time is up, its program is killed, or it is left alone.
    """
    transfer = _Transfer(address)
    deadline = time.monotonic() + patience
    try:
        while block := transfer.next_block(max(0.0, deadline - time.monotonic())):
            deadline += len(block) / rate
            yield block
    except queue.Empty:
        reason = "not done" if math.isinf(rate) else f"below {rate:,.0f} bytes a second"
        raise _TransferError(f"too slow: {reason} after {patience:.3g} s") from None
    except Exception as error:  # each protocol has its own exceptions, and not all of them are OSErrors
        if status := getattr(transfer.stream, "status", None):
            program = "curl" if address.startswith("http") else "the command"
            raise _TransferError(f"{program} ended with exit code {status} (see its message)") from None
        raise _TransferError(f"{type(error).__name__}: {error}") from None
    finally:
        transfer.stop()


class _Transfer:
    """A thread that reads the file at `address`."""

    def __init__(self, address: str):
        self.stream: Any = None
        self._address, self._stopped = address, threading.Event()
        self._queue: queue.Queue[bytes | Exception] = queue.Queue(maxsize=16)
        threading.Thread(target=self._read, name="npp-transfer", daemon=True).start()

    def next_block(self, timeout: float) -> bytes:
        """Return the next bytes, b"" at the end. Raises queue.Empty after `timeout` seconds, or what reading raised."""
        item = self._queue.get(timeout=timeout)
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """End the transfer; its program, if there is one, is killed."""
        self._stopped.set()
        if program := getattr(self.stream, "proc", None):
            program.kill()

    def _read(self) -> None:
        try:
            self.stream = _open(self._address)
            with self.stream:
                while (block := self.stream.read(_BLOCK_BYTES)) and not self._stopped.is_set():
                    self._put(block)
            self._put(b"")
        except Exception as error:
            self._put(error)

    def _put(self, item: bytes | Exception) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return


def _open(address: str) -> BinaryIO:
    from webdataset.gopen import gopen, gopen_schemes

    # Unbuffered (bufsize 0), what has arrived is read at once.
    if re.match("https?://", address):  # webdataset 1.0's own call of curl shows no reason and repeats 30 times
        return gopen(f"pipe:exec curl -gfsSL --connect-timeout 30 {shlex.quote(address)}", bufsize=0)
    if address.split(":", 1)[0] in gopen_schemes:
        return gopen(address, bufsize=0)
    import fsspec

    return fsspec.open(address, "rb").open()
