"""What the checks look at: this process among its peers, and the run that is to start."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import RunConfig
from npp_ds.data.shards import Manifest
from npp_ds.data.store import expand_variables, load_manifest
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training.preflight import fitting_schedule


@dataclass
class Context:
    """`nodes` is the node of each rank. Without a run to look at, `config` is None."""

    processes: Processes
    nodes: list[str]
    config: RunConfig | None = None
    _manifests: dict[str, Manifest | UserError] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.processes.is_first

    @property
    def node(self) -> str:
        return self.nodes[self.processes.rank]

    @property
    def is_first_of_node(self) -> bool:
        return self.nodes.index(self.node) == self.processes.rank

    @property
    def has_gpu(self) -> bool:
        return self.processes.device.type == "cuda"

    def manifest(self, source: str) -> Manifest:
        """Read once. Raises UserError."""
        if source not in self._manifests:
            try:
                self._manifests[source] = load_manifest(source)
            except UserError as error:
                self._manifests[source] = error
        if isinstance(found := self._manifests[source], UserError):
            raise found
        return found

    @property
    def sources(self) -> list[str]:
        """The sets of shards of the run, where this node has them."""
        return [str(expand_variables(source)) for source in (self.config.data.train, self.config.data.val) if source]

    @cached_property
    def schedule(self) -> Schedule:
        """Raises UserError with everything that does not fit."""
        for source in self.sources:
            self.manifest(source)
        return fitting_schedule(self.config, self.processes.world_size)


@contextmanager
def made_for_now(folder: Path) -> Iterator[None]:
    """`folder` is there meanwhile; what had to be made for it goes again, unless something lies in it then."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            try:
                path.rmdir()
            except OSError:
                break
