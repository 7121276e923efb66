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
from npp_ds.tokenizer.crops import square_sides, squares
from npp_ds.tokenizer.sources import ImageItem, ImageReader, UnreadableImage, decode

ITEMS_PER_TASK = 16


@dataclass(frozen=True)
class Task:
    """At most ITEMS_PER_TASK neighbouring images of one shard."""

    shard: int
    items: list[ImageItem]


def tasks_of(shard: int, items: list[ImageItem]) -> Iterator[Task]:
    """The items of a shard in runs that are worth a message to another process."""
    for start in range(0, len(items), ITEMS_PER_TASK):
        yield Task(shard, items[start : start + ITEMS_PER_TASK])


@dataclass(frozen=True)
class Outcome:
    """The items of a task that could be read, and (item, reason) of the others."""

    shard: int
    readable: list[ImageItem]
    unreadable: list[tuple[ImageItem, str]]


@dataclass(frozen=True)
class Decoded(Outcome):
    """An outcome with the `squares` of the readable items, uint8 [readable, side, side, 3] for each crop range; their
    memory is used again once the next result is asked for."""

    squares: list[np.ndarray]


class Room:
    """Memory for the squares of `slots` tasks, in a file without a name that processes may share."""

    def __init__(self, sides: list[int], slots: int, descriptor: int | None = None):
        self._shapes = [(ITEMS_PER_TASK, side, side, 3) for side in sides]
        self._size = sum(int(np.prod(shape)) for shape in self._shapes)
        if descriptor is None:
            descriptor = _nameless_file()
            os.ftruncate(descriptor, slots * self._size)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, slots * self._size)

    def __getitem__(self, slot: int) -> list[np.ndarray]:
        """uint8 [ITEMS_PER_TASK, side, side, 3] for each side."""
        arrays, offset = [], slot * self._size
        for shape in self._shapes:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(self._memory, np.uint8, count, offset).reshape(shape))
            offset += count
        return arrays


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):  # not /dev/shm, which containers make small
        return os.memfd_create("npp-decode")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@dataclass(frozen=True)
class Decoder:
    """How images become squares."""

    image_size: int
    ranges: tuple[float, ...]

    @property
    def sides(self) -> list[int]:
        return square_sides(self.image_size, self.ranges)

    def run(self, task: Task, reader: ImageReader, room: list[np.ndarray]) -> Outcome:
        """Reads, decodes and scales the images of a task into `room`."""
        readable, unreadable = [], []
        for item in task.items:
            try:
                image = decode(reader.read(item))
                for whole, square in zip(room, squares(image, self.image_size, self.ranges), strict=True):
                    whole[len(readable)] = square
                readable.append(item)
            except UnreadableImage as error:
                unreadable.append((item, str(error)))
        return Outcome(task.shard, readable, unreadable)

    def map(self, tasks: Iterable[Task]) -> Iterator[Decoded]:
        """What becomes of each task, done here and now."""
        room, reader = Room(self.sides, 1), ImageReader()
        os.close(room.descriptor)
        for task in tasks:
            yield _with_squares(self.run(task, reader, room[0]), room[0])


def _with_squares(outcome: Outcome, room: list[np.ndarray]) -> Decoded:
    count = len(outcome.readable)
    return Decoded(outcome.shard, outcome.readable, outcome.unreadable, [whole[:count] for whole in room])


class DecodePool:
    """`map` over tasks with `workers` processes (0: in this one), in order. A context manager, used once.

    Tasks go to the processes in turn, and about `ahead` images are under way. The processes are started afresh, not
    forked, so CUDA may be in use here; they end when this process ends, however it ends.
    """

    def __init__(self, image_size: int, ranges: tuple[float, ...], workers: int, ahead: int):
        self._decoder = Decoder(image_size, ranges)
        self._workers: list[_Worker] = []
        self._count = workers
        self._tasks_each = max(2, -(-ahead // (ITEMS_PER_TASK * max(workers, 1))))

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end()

    def map(self, tasks: Iterable[Task]) -> Iterator[Decoded]:
        """What became of each task. UserError when a process dies; what one raises is raised here."""
        if not self._count:
            yield from self._decoder.map(tasks)
            return
        tasks, turns = iter(tasks), itertools.cycle(range(self._count))
        under_way: deque[_Worker] = deque()
        while True:
            for task in itertools.islice(tasks, self._tasks_each * self._count - len(under_way)):
                under_way.append(self._worker(next(turns)))
                under_way[-1].send(task)
            if not under_way:
                return
            yield under_way.popleft().receive()

    def _worker(self, number: int) -> "_Worker":
        """Started when there is a first task for it: a set that is whole needs none."""
        if number == len(self._workers):
            self._workers.append(_Worker(self._decoder, self._tasks_each))
        return self._workers[number]


class _Worker:
    """A decoding process, and room for the squares of as many tasks as may be under way there."""

    def __init__(self, decoder: Decoder, slots: int):
        self._room = Room(decoder.sides, slots)
        self._slots_to_fill, self._slots_to_read = itertools.cycle(range(slots)), itertools.cycle(range(slots))
        self.connection, theirs = Pipe()
        program = f"from {__name__} import serve; serve({theirs.fileno()}, {self._room.descriptor}, {slots})"
        paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), self._room.descriptor],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        theirs.close()
        os.close(self._room.descriptor)
        with self._loss_explained():
            self.connection.send(decoder)

    def send(self, task: Task) -> None:
        with self._loss_explained():
            self.connection.send((next(self._slots_to_fill), task))

    def receive(self) -> Decoded:
        with self._loss_explained():
            outcome = self.connection.recv()
        if isinstance(outcome, Exception):
            raise outcome
        return _with_squares(outcome, self._room[next(self._slots_to_read)])

    def end(self) -> None:
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @contextmanager
    def _loss_explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self.end()
            raise UserError(
                f"a decoding process ended with exit code {self.process.returncode} (-9: killed, often for want of "
                "memory); run the same command again, perhaps with fewer --workers"
            ) from error


def serve(descriptor: int, room_descriptor: int, slots: int) -> None:
    """A decoding process: tasks come, and outcomes leave, through a socket until its other end is closed.

    Outcomes leave by a thread, so that taking the next task never waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, reader = Connection(descriptor), ImageReader()
    outcomes: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_send_all, args=(outcomes, connection), daemon=True).start()
    try:
        decoder = connection.recv()
        room = Room(decoder.sides, slots, room_descriptor)
        while True:
            slot, task = connection.recv()
            try:
                outcomes.put(decoder.run(task, reader, room[slot]))
            except Exception as error:
                outcomes.put(error)
    except (EOFError, OSError):
        return


def _send_all(outcomes: queue.SimpleQueue, connection: Connection) -> None:
    try:
        while True:
            connection.send(outcomes.get())
    except OSError:
        return
