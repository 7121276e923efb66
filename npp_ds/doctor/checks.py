"""What a check of `npp doctor` gets and returns, and how the results of all processes become one row of the table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import RunConfig
from npp_ds.data.manifest import Manifest
from npp_ds.data.store import expand_variables, load_manifest
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError, as_user_error
from npp_ds.training.preflight import fitting_schedule

OK, WARNING, FAILURE, NOT_RUN = "ok", "warning", "failure", "not run"
_SEVERITY = (OK, WARNING, FAILURE)


@dataclass
class Context:
    """This process among the others, and the run to check. `nodes` is the node of each rank, in order of rank.

    `config` is None until the config is read, and if there is no run to check.
    """

    processes: Processes
    nodes: list[str]
    config: RunConfig | None = None
    _manifests: dict[str, Manifest | UserError] = field(default_factory=dict)

    @property
    def node(self) -> str:
        return self.nodes[self.processes.rank]

    @property
    def is_first_of_node(self) -> bool:
        return self.nodes.index(self.node) == self.processes.rank

    @property
    def has_gpu(self) -> bool:
        return self.processes.device.type == "cuda"

    @property
    def run(self) -> RunConfig:
        """The config, for checks that are only made of a run."""
        assert self.config is not None, "checks of a run come after the check of its config"
        return self.config

    @property
    def sources(self) -> list[str]:
        """The run's sets of shards, at their paths on this node."""
        return [str(expand_variables(source)) for source in (self.run.data.train, self.run.data.val) if source]

    def manifest(self, source: str) -> Manifest:
        """Return the manifest of a set of shards, which is read once. Raises UserError."""
        if source not in self._manifests:
            try:
                self._manifests[source] = load_manifest(source)
            except UserError as error:
                self._manifests[source] = error
        if isinstance(found := self._manifests[source], UserError):
            raise found
        return found

    def has_manifests(self) -> bool:
        """Return whether this node can read all manifests; if not, the check of the shards reports why."""
        try:
            for source in self.sources:
                self.manifest(source)
        except UserError:
            return False
        return True

    @cached_property
    def schedule(self) -> Schedule:
        """The run's stages on its data. Raises UserError that lists everything that does not fit together."""
        for source in self.sources:
            self.manifest(source)
        return fitting_schedule(self.run, self.processes.world_size)


@dataclass(frozen=True)
class Result:
    """What a check found on one process; `detail` also says what to do, unless the state is OK.

    `common` must be the same on all processes. `permanent`: whether the failure would recur on another start.
    """

    detail: str
    state: str = OK
    permanent: bool = False
    common: str | None = None


@dataclass(frozen=True)
class Check:
    """A row of the table. `find` returns None if this process has nothing to check.

    `differing` is the state of the row if `Result.common` differs. `permanent` marks checks of settings and data, whose
    failures do not depend on the machine or on this start.
    """

    name: str
    find: Callable[[Context], Result | None]
    differing: str = FAILURE
    permanent: bool = False

    def run(self, context: Context) -> Result | None:
        """Return what `find` returns. Any exception is a failure, so that the other processes do not wait in vain.

        Only a UserError can be permanent: another exception (a lost connection, for example) may not occur again.
        """
        try:
            result = self.find(context)
        except UserError as error:
            return Result(str(error), FAILURE, self.permanent or error.on_all_ranks)
        except Exception as error:
            return Result(str(as_user_error(error) or f"{type(error).__name__}: {error}"), FAILURE)
        return replace(result, permanent=True) if self.permanent and result and result.state == FAILURE else result


@dataclass(frozen=True)
class Row:
    """One check over all processes; `detail` is that of process `rank` on `node`."""

    name: str
    state: str
    detail: str
    node: str = ""
    rank: int = 0
    permanent: bool = False

    @property
    def text(self) -> str:
        """The detail for the table, with the node that a problem was found on."""
        return f"{self.node}: {self.detail}" if self.state in (WARNING, FAILURE) else self.detail


def row_of(check: Check, results: Sequence[Result | None], nodes: Sequence[str]) -> Row | None:
    """Return the row of a check from its results and nodes by rank: the first process with the worst state counts.

    Of failures a permanent one counts first. None if no process had anything to check.
    """
    found = [(rank, result) for rank, result in enumerate(results) if result is not None]
    if not found:
        return None
    first_rank, first = found[0]
    rank, worst = max(found, key=lambda item: (_SEVERITY.index(item[1].state), item[1].permanent))
    odd = next(((rank, result.common) for rank, result in found if result.common != first.common), None)
    if worst.state == OK and odd:
        rank = odd[0]
        detail = f"{odd[1]}, but {first.common} on {nodes[first_rank]}; make it the same on all nodes"
        worst = Result(detail, check.differing, check.permanent)
    return Row(check.name, worst.state, " ".join(worst.detail.split()), nodes[rank], rank, worst.permanent)
