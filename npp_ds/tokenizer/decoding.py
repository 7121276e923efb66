"""Images decoded and scaled by other processes, in order. Needs no torch, so that these processes stay small."""

import itertools
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np

from npp_ds.errors import UserError
from npp_ds.tokenizer.crops import square_sides, squares
from npp_ds.tokenizer.sources import ImageItem, ImageReader, UnreadableImage, decode

ITEMS_PER_TASK = 16


@dataclass(frozen=True)
class Task:
    """Neighbouring images of one shard."""

    shard: int
    items: list[ImageItem]


@dataclass(frozen=True)
class Decoded:
    """What became of a task: the `readable` items with their `squares`, uint8 [readable, side, side, 3] for each crop
    range, and (item, reason) of the `unreadable` ones."""

    shard: int
    readable: list[ImageItem]
    unreadable: list[tuple[ImageItem, str]]
    squares: list[np.ndarray] = field(repr=False)


class Decoder:
    """Reads, decodes and scales the images of tasks."""

    def __init__(self, image_size: int, ranges: tuple[float, ...]):
        self.image_size, self.ranges = image_size, ranges
        self._reader = ImageReader()

    def __call__(self, task: Task) -> Decoded:
        readable, unreadable = [], []
        result = [
            np.empty((len(task.items), side, side, 3), np.uint8) for side in square_sides(self.image_size, self.ranges)
        ]
        for item in task.items:
            try:
                image = decode(self._reader.read(item))
                for whole, square in zip(result, squares(image, self.image_size, self.ranges), strict=True):
                    whole[len(readable)] = square
                readable.append(item)
            except UnreadableImage as error:
                unreadable.append((item, str(error)))
        return Decoded(task.shard, readable, unreadable, [whole[: len(readable)] for whole in result])


class DecodePool:
    """`map` over tasks with `workers` processes (0: in this one), in order. A context manager, used once.

    Tasks go to the processes in turn, and at most `ahead` images are under way. The processes come from a clean server
    process, so CUDA may be in use here; they end when this process ends, however it ends.
    """

    def __init__(self, image_size: int, ranges: tuple[float, ...], workers: int, ahead: int):
        self._decoder = Decoder(image_size, ranges)
        self._workers: list[_Worker] = []
        self._count = workers
        self._tasks_ahead = max(2 * workers, -(-ahead // ITEMS_PER_TASK))

    def __enter__(self) -> "DecodePool":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._decoder, theirs), name="npp-decode", daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def map(self, tasks: Iterable[Task]) -> Iterator[Decoded]:
        """What became of each task. UserError when a process dies; what one raises is raised here."""
        if not self._workers:
            yield from map(self._decoder, tasks)
            return
        tasks, turns = iter(tasks), itertools.cycle(self._workers)
        under_way: deque[_Worker] = deque()
        while True:
            for task in itertools.islice(tasks, self._tasks_ahead - len(under_way)):
                under_way.append(next(turns))
                with under_way[-1].loss_explained():
                    under_way[-1].connection.send(task)
            if not under_way:
                return
            worker = under_way.popleft()
            with worker.loss_explained():
                result = worker.connection.recv()
            if isinstance(result, Exception):
                raise result
            yield result


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection

    @contextmanager
    def loss_explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self.process.join(timeout=5)
            raise UserError(
                f"a decoding process ended with exit code {self.process.exitcode} (-9: killed, often for want of "
                "memory); run the same command again, perhaps with fewer --workers"
            ) from error


def _serve(decoder: Decoder, connection: Connection) -> None:
    """A decoding process: results leave through a thread, so that taking the next task never waits for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_send_all, args=(results, connection), daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            results.put(decoder(task))
        except Exception as error:
            results.put(error)


def _send_all(results: queue.SimpleQueue, connection: Connection) -> None:
    try:
        while True:
            result = results.get()
            connection.send(result)
    except OSError:
        return


def tasks_of(shard: int, items: list[ImageItem]) -> Iterator[Task]:
    """The items of a shard in runs that are worth a message to another process."""
    for start in range(0, len(items), ITEMS_PER_TASK):
        yield Task(shard, items[start : start + ITEMS_PER_TASK])
