"""Images decoded and scaled by other processes, in order. Needs no torch, so that these processes stay small."""

import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from npp_ds.errors import UserError
from npp_ds.tokenizer.images import ImageItem, ImageReader, UnreadableImage, decode, square_sides, squares

ITEMS_PER_TASK = 16
NOTE_BYTES = 4096


@dataclass(frozen=True)
class Task:
    """At most ITEMS_PER_TASK consecutive images of one shard."""

    shard: int
    items: list[ImageItem]


def tasks_of(shard: int, items: list[ImageItem]) -> Iterator[Task]:
    """Split the items of a shard into tasks, each worth a message to another process."""
    for start in range(0, len(items), ITEMS_PER_TASK):
        yield Task(shard, items[start : start + ITEMS_PER_TASK])


@dataclass(frozen=True)
class Decoded:
    """The items of a task that could be read, and (item, reason) of the others.

    `squares` are those of the readable items, uint8 [readable, side, side, 3] for each crop range.
    """

    shard: int
    readable: list[ImageItem]
    unreadable: list[tuple[ImageItem, str]]
    squares: list[np.ndarray]


@dataclass(frozen=True)
class Decoder:
    """Reads images, decodes them and scales them to squares."""

    image_size: int
    ranges: tuple[float, ...]

    def run(self, task: Task, reader: ImageReader, note: Callable[[str], object] = lambda where: None) -> Decoded:
        """Decode the images of a task. `note` gets the path of each before it is decoded, and "" at the end."""
        sides = square_sides(self.image_size, self.ranges)
        found = [np.empty((len(task.items), side, side, 3), np.uint8) for side in sides]
        readable: list[ImageItem] = []
        unreadable: list[tuple[ImageItem, str]] = []
        for item in task.items:
            note(item.where)
            try:
                image = decode(reader.read(item))
                for rows, square in zip(found, squares(image, self.image_size, self.ranges), strict=True):
                    rows[len(readable)] = square
                readable.append(item)
            except UnreadableImage as error:
                unreadable.append((item, str(error)))
        note("")
        return Decoded(task.shard, readable, unreadable, [rows[: len(readable)] for rows in found])

    def map(self, tasks: Iterable[Task]) -> Iterator[Decoded]:
        """Yield the result of each task, decoded in this process."""
        reader = ImageReader()
        for task in tasks:
            yield self.run(task, reader)


class DecodePool:
    """Decodes tasks in `workers` processes (0: in this one), keeping their order. A context manager, used once.

    The processes take tasks in turn, and about `ahead` images are decoded in advance. They are started afresh, not
    forked, so this process may use CUDA. They end when this process ends, however it ends.
    """

    def __init__(self, image_size: int, ranges: tuple[float, ...], workers: int, ahead: int):
        self.workers: list[_Worker] = []
        self._decoder = Decoder(image_size, ranges)
        self._count = workers
        self._tasks_each = max(2, -(-ahead // (ITEMS_PER_TASK * max(workers, 1))))

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            worker.end()

    def map(self, tasks: Iterable[Task]) -> Iterator[Decoded]:
        """Yield the result of each task. Raises UserError if a process dies, and what a process raises."""
        if not self._count:
            yield from self._decoder.map(tasks)
            return
        tasks, turns = iter(tasks), itertools.cycle(range(self._count))
        pending: deque[_Worker] = deque()
        while True:
            for task in itertools.islice(tasks, self._tasks_each * self._count - len(pending)):
                pending.append(self._worker(next(turns)))
                pending[-1].send(task)
            if not pending:
                return
            yield pending.popleft().receive()

    def _worker(self, number: int) -> "_Worker":
        """Return a worker, started for its first task: a complete set needs none."""
        if number == len(self.workers):
            self.workers.append(_Worker(self._decoder))
        return self.workers[number]


class _Worker:
    """A decoding process, and a file without a name in which it notes the image that it decodes."""

    def __init__(self, decoder: Decoder):
        self.connection, theirs = Pipe()
        self._note = open(os.memfd_create("npp-note"), "rb")  # noqa: SIM115
        descriptors = theirs.fileno(), self._note.fileno()
        # A method of multiprocessing would import this program's main module, and fork would break CUDA.
        program = f"from {__name__} import serve; serve{descriptors}"
        paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        theirs.close()
        self.send(decoder)

    def send(self, message: Decoder | Task) -> None:
        with self._explain_death():
            self.connection.send(message)

    def receive(self) -> Decoded:
        with self._explain_death():
            result = self.connection.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        """Wait for the end of the process, which comes when its connection is closed; kill it after 5 seconds."""
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @contextmanager
    def _explain_death(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self.end()
            note = self._note.read().rstrip(b"\0").decode(errors="backslashreplace")
            image = f" while it decoded {note}" if note else ""
            raise UserError(
                f"a decoding process ended with exit code {self.process.returncode} (-9: killed, often because memory "
                f"ran out){image}; rerun the same command to resume, and if it happens again, with fewer --workers or "
                "without that image"
            ) from error


def serve(descriptor: int, note_descriptor: int) -> None:
    """Run a decoding process: receive tasks and send results through a socket until its other end is closed.

    A thread sends the results, so that they never delay the next task.
    """

    def note(text: str) -> None:
        os.pwrite(note_descriptor, os.fsencode(text)[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0"), 0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, reader = Connection(descriptor), ImageReader()
    results: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_send_all, args=(results, connection), daemon=True).start()
    try:
        decoder = connection.recv()
        while True:
            task = connection.recv()
            try:
                results.put(decoder.run(task, reader, note))
            except Exception as error:
                results.put(error)
    except (EOFError, OSError):
        return


def _send_all(results: queue.SimpleQueue, connection: Connection) -> None:
    try:
        while True:
            connection.send(results.get())
    except OSError:
        return
