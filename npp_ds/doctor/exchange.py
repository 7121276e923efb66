"""What processes tell each other through the rendezvous store: it works where collectives fail or hang."""

import json
import time
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from npp_ds.distributed.process_group import Processes

PATIENCE_SECONDS = 180.0  # Python starts slowly on a busy shared file system
_FAREWELL_SECONDS = 5.0


class Exchange:
    """All processes call the same methods in the same order; values are what JSON can hold."""

    _made = count()  # a group may meet for a second one

    def __init__(self, processes: Processes):
        self.rank, self.world_size = processes.rank, processes.world_size
        # torch has no public name for the store of the process group, and a second one would need a second port.
        self._store = dist.PrefixStore(f"doctor-{next(self._made)}", dist.distributed_c10d._get_default_store())
        self._round = 0

    def collect(self, value: Any, patience: float = PATIENCE_SECONDS) -> list[Any]:
        """On the first process the values of all by rank, None for those silent for `patience` seconds; else []."""
        self._round += 1
        self._store.set(self._key(self.rank), json.dumps(value))
        if self.rank:
            return []
        deadline = time.monotonic() + patience
        return [self._read(self._key(rank), deadline) for rank in range(self.world_size)]

    def tell(self, value: Any, patience: float = PATIENCE_SECONDS) -> Any:
        """The value of the first process, on all. Raises RuntimeError when it is silent for so long."""
        self._round += 1
        if self.rank == 0:
            self._store.set(self._key("first"), json.dumps(value))
            return value
        self._store.wait([self._key("first")], timedelta(seconds=patience))
        return json.loads(self._store.get(self._key("first")))

    def part(self) -> None:
        """The first process waits a moment until the others are done with its store."""
        gone = self._store.add("gone", 1)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self.rank == 0 and gone < self.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = self._store.add("gone", 0)

    def _key(self, of: int | str) -> str:
        return f"{self._round}/{of}"

    def _read(self, key: str, deadline: float) -> Any:
        try:
            self._store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:
            return None
        return json.loads(self._store.get(key))
