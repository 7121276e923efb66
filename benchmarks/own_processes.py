"""Ways that are compared, each in a process of its own: one works while the others wait.

For ways that change their whole process: DeepSpeed's ZeRO-3 replaces functions of PyTorch, and what memory costs
depends on what was allocated before.
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
    """Starts `worker(*arguments)` for each way, a context manager of a module that yields what carries out orders.

    Yields ask(way, *order): its answer. Raises RuntimeError when a way's process has ended; its own error is on
    stderr. On the way out all processes end.
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
