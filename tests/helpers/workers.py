"""A pool of worker processes that have met through gloo and wait for functions to run."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from forks import ON_CPU, fork_context


class WorkerError(AssertionError):
    """A function failed or hung on some rank; the text holds that rank's traceback."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, world_size: int, port: int, environment: dict[str, str], connection: Connection) -> None:
    os.environ.clear()
    os.environ.update(
        {**environment, **ON_CPU}, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from npp_ds.distributed.process_group import join_processes

    processes = join_processes()
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(processes, *args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class WorkerPool:
    """`run(f, ...)` calls f(processes, ...) on every rank and returns the results by rank."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def _start(self) -> None:
        context, port, environment = fork_context(), free_port(), dict(os.environ)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, port, environment, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """Raises WorkerError when a rank fails or is not done after `timeout` seconds; the pool then starts anew."""
        if not self._workers:
            self._start()
        deadline = time.monotonic() + timeout
        for _, connection in self._workers:
            connection.send((function, args, kwargs))
        results, failures = [], []
        for rank, (process, connection) in enumerate(self._workers):
            try:
                # Once one rank has failed the others wait for it in a collective: no reason to wait with them.
                patience = 5 if failures else max(0.0, deadline - time.monotonic())
                good, value = connection.recv() if connection.poll(patience) else (False, f"no answer in {timeout} s")
            except EOFError:
                good, value = False, f"died with exit code {process.exitcode}"
            results.append(value)
            if not good:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.stop()
            raise WorkerError("\n".join(failures))
        return results

    def stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []
