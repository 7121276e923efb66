"""Run each of the compared ways in a separate process; one works while the others wait.

This is for ways that affect their whole process: DeepSpeed's ZeRO-3 replaces functions of PyTorch, and the time of an
allocation depends on earlier allocations.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import Any

Worker = Callable[..., AbstractContextManager[Callable[..., Any]]]


def _serve(worker: Worker, arguments: tuple, orders: Connection) -> None:
    with worker(*arguments) as carry_out:
        while (order := orders.recv()) is not None:
            orders.send(carry_out(*order))


@contextmanager
def own_processes(worker: Worker, ways: Mapping[str, tuple]) -> Iterator[Callable[..., Any]]:
    """Start a process for each way that enters `worker(*arguments)`, a context manager defined in a module.

    Yield `ask(way, *order)`, which calls the function that the worker yields in that process and returns its result.
    `ask` raises RuntimeError if the process has ended, after an error that it has printed on stderr. All processes end
    with the context.
    """
    context = multiprocessing.get_context("forkserver")
    connections: dict[str, Connection] = {}
    processes = []

    def ask(way: str, *order: Any) -> Any:
        try:
            connections[way].send(order)
            return connections[way].recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(f"the process of {way} has ended; its own error is above") from error

    try:
        for way, arguments in ways.items():
            connections[way], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(worker, arguments, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
        yield ask
        for connection in connections.values():
            connection.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
            process.join()
