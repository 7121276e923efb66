"""Images decoded and scaled by other processes, in order. Needs no torch, so that these processes stay small."""

import itertools
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
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
class TaskResult:
    """The items of a task that could be read, and (item, reason) of the others."""

    shard: int
    readable: list[ImageItem]
    unreadable: list[tuple[ImageItem, str]]


@dataclass(frozen=True)
class Decoded(TaskResult):
    """A result with the `squares` of the readable items, uint8 [readable, side, side, 3] for each crop range.

    Their memory is used again for a later task once the next result is asked for.
    """

    squares: list[np.ndarray]


class SharedSquares:
    """Memory for the squares of `slots` tasks and for a note, in a file without a name that processes can share."""

    def __init__(self, sides: list[int], slots: int, descriptor: int | None = None):
        self._shapes = [(ITEMS_PER_TASK, side, side, 3) for side in sides]
        self._size = sum(int(np.prod(shape)) for shape in self._shapes)
        if descriptor is None:
            descriptor = _unnamed_file()
            os.ftruncate(descriptor, NOTE_BYTES + slots * self._size)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, NOTE_BYTES + slots * self._size)

    @property
    def note(self) -> str:
        """The image that is being decoded, "" between tasks: what a process that died cannot say any more."""
        return self._memory[:NOTE_BYTES].rstrip(b"\0").decode(errors="backslashreplace")

    @note.setter
    def note(self, text: str) -> None:
        self._memory[:NOTE_BYTES] = os.fsencode(text)[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")

    def __getitem__(self, slot: int) -> list[np.ndarray]:
        """Return the arrays of a slot, uint8 [ITEMS_PER_TASK, side, side, 3] for each side."""
        arrays, offset = [], NOTE_BYTES + slot * self._size
        for shape in self._shapes:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(self._memory, np.uint8, count, offset).reshape(shape))
            offset += count
        return arrays


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):  # and not /dev/shm, which is small in containers
        return os.memfd_create("npp-decode")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@dataclass(frozen=True)
class Decoder:
    """Reads images, decodes them and scales them to squares."""

    image_size: int
    ranges: tuple[float, ...]

    @property
    def sides(self) -> list[int]:
        """Sides of the squares in pixels."""
        return square_sides(self.image_size, self.ranges)

    def run(self, task: Task, reader: ImageReader, memory: SharedSquares, slot: int = 0) -> TaskResult:
        """Write the squares of the images of a task into a slot of `memory`, which notes the image in work."""
        out = memory[slot]
        readable: list[ImageItem] = []
        unreadable: list[tuple[ImageItem, str]] = []
        for item in task.items:
            memory.note = item.where
            try:
                image = decode(reader.read(item))
                for rows, square in zip(out, squares(image, self.image_size, self.ranges), strict=True):
                    rows[len(readable)] = square
                readable.append(item)
            except UnreadableImage as error:
                unreadable.append((item, str(error)))
        memory.note = ""
        return TaskResult(task.shard, readable, unreadable)

    def map(self, tasks: Iterable[Task]) -> Iterator[Decoded]:
        """Yield the result of each task, decoded in this process."""
        memory, reader = SharedSquares(self.sides, 1), ImageReader()
        os.close(memory.descriptor)
        for task in tasks:
            yield _with_squares(self.run(task, reader, memory), memory[0])


def _with_squares(result: TaskResult, squares: list[np.ndarray]) -> Decoded:
    count = len(result.readable)
    return Decoded(result.shard, result.readable, result.unreadable, [rows[:count] for rows in squares])


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
            self.workers.append(_Worker(self._decoder, self._tasks_each))
        return self.workers[number]


class _Worker:
    """A decoding process, and memory for the squares of the `slots` tasks that it may have at once."""

    def __init__(self, decoder: Decoder, slots: int):
        self._squares = SharedSquares(decoder.sides, slots)
        self._slots_to_fill, self._slots_to_read = itertools.cycle(range(slots)), itertools.cycle(range(slots))
        self.connection, theirs = Pipe()
        program = f"from {__name__} import serve; serve({theirs.fileno()}, {self._squares.descriptor}, {slots})"
        paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), self._squares.descriptor],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        theirs.close()
        os.close(self._squares.descriptor)
        with self._explain_death():
            self.connection.send(decoder)

    def send(self, task: Task) -> None:
        with self._explain_death():
            self.connection.send((next(self._slots_to_fill), task))

    def receive(self) -> Decoded:
        with self._explain_death():
            result = self.connection.recv()
        if isinstance(result, Exception):
            raise result
        return _with_squares(result, self._squares[next(self._slots_to_read)])

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
            image = f" while it decoded {note}" if (note := self._squares.note) else ""
            raise UserError(
                f"a decoding process ended with exit code {self.process.returncode} (-9: killed, often because memory "
                f"ran out){image}; rerun the same command to resume, and if it happens again, with fewer --workers or "
                "without that image"
            ) from error


def serve(descriptor: int, squares_descriptor: int, slots: int) -> None:
    """Run a decoding process: receive tasks and send results through a socket until its other end is closed.

    A thread sends the results, so that they never delay the next task.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, reader = Connection(descriptor), ImageReader()
    results: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_send_all, args=(results, connection), daemon=True).start()
    try:
        decoder = connection.recv()
        memory = SharedSquares(decoder.sides, slots, squares_descriptor)
        while True:
            slot, task = connection.recv()
            try:
                results.put(decoder.run(task, reader, memory, slot))
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
